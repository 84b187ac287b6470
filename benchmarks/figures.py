"""The figures of a run by contestant and key, with a value for each time that it was measured, and what they mean."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from .measuring import AT_ONCE, GROWTH, STREAMS, Figures
from .way import PROCESSES

__all__ = [
    "ALONE",
    "CONNECTIONS",
    "SECTIONS",
    "THROUGHPUTS",
    "WORDS",
    "Run",
    "collect",
    "is_rate",
    "median",
    "worst_and_best",
]

Run: TypeAlias = dict[str, dict[str, list[float]]]

ALONE: Final = "alone"
"""The contestant that figures without a contestant belong to."""

THROUGHPUTS: Final = tuple(f"{direction}_{streams}" for direction in ("down", "up") for streams in STREAMS)
CONNECTIONS: Final = tuple(f"connections_{at_once}" for at_once in AT_ONCE)


def _round_trips(beside: str) -> dict[str, str]:
    sizes = ((1, "1 byte"), (1024, "1 KiB"))
    return {f"{beside}_{size}_p{percent}": f"{words}, p{percent}" for size, words in sizes for percent in (50, 99)}


def _of_both(what: str, unit: str) -> dict[str, str]:
    return {f"{name}_{what}": f"{name}, {unit}" for name in PROCESSES}


SECTIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "Throughput, MB/s": {
        f"{direction}_{streams}": f"{direction}, {streams} stream{'s'[: streams > 1]}"
        for direction in ("down", "up")
        for streams in STREAMS
    },
    "Round trip, idle, µs": _round_trips("idle"),
    "Round trip beside a bulk download, µs": _round_trips("busy"),
    "Connections": {
        "first_byte_p50": "connect to first byte, p50, µs",
        "first_byte_p99": "p99, µs",
        **{f"connections_{at_once}": f"connections/s, {at_once} at a time" for at_once in AT_ONCE},
        "reconnect": "back after the relay, s",
    },
    "HTTP on kept connections, and processor time": {
        "http": "requests/s, 100 visitors",
        **_of_both("cpu_request", "CPU ms/request"),
        **_of_both("cpu_connection", "CPU ms/connection"),
        **_of_both("cpu_gib", "CPU s/GiB"),
    },
    "Memory, MiB": {
        f"{name}_memory_{what}": f"{name}, {words}"
        for name in PROCESSES
        for what, words in (
            ("idle", "idle"),
            ("streams_1000", "1,000 streams"),
            ("streams_10000", "10,000 streams"),
            ("stalled", "100 stalled readers"),
        )
    },
    "Growth: 1-byte round trip beside idle streams, p50, µs": {
        f"growth_{count}": f"{count:,} stream{'s'[: count > 1]}" for count in GROWTH
    },
    "In one process": {
        "far_first_byte": "50 ms away, 100 visitors at once: the first one's first byte, round trips",
        "far_last_byte": "the last one's",
        "far_download": "one download of 64 MiB, round trips",
        "far_download_rate": "MB/s",
        "import_trio": "`import trio`, CPU ms",
        "import_pioneer_tunnel": "`import pioneer_tunnel`, CPU ms",
    },
}
"""Titles, and below each the columns: the key of a figure, and its words."""

WORDS: Final[Mapping[str, str]] = {key: words for columns in SECTIONS.values() for key, words in columns.items()}
"""What each key means, beside the title of its section."""


def collect(memory: Mapping[str, Figures], rounds: Mapping[str, Sequence[Figures]], alone: Figures) -> Run:
    """All values of each figure. What was not measured is not there."""
    run: Run = {}
    for name, each in rounds.items():
        values = run.setdefault(name, {})
        for figures in (memory.get(name, {}), *each):
            for key, value in figures.items():
                values.setdefault(key, []).append(value)
    if alone:
        run[ALONE] = {key: [value] for key, value in alone.items()}
    return run


def median(run: Run, name: str, key: str) -> float | None:
    """None if it was not measured."""
    values = run.get(name, {}).get(key)
    return statistics.median(values) if values else None


def is_rate(key: str) -> bool:
    """Whether more is better. The others are times and memory."""
    return key in {*THROUGHPUTS, *CONNECTIONS, "http", "far_download_rate"}


def worst_and_best(key: str, values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if is_rate(key) else (high, low)
