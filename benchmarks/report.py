"""What is reported, and how: the rows of the table, medians, and on what machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeAlias

from .tunnels import PROCESSES

__all__ = ["Figures", "busy", "machine", "medians", "table"]

Figures: TypeAlias = dict[str, float]

BASELINE: Final = "direct"

_ROWS: Final[dict[str, str]] = {
    "down_1": "down, 1 stream, MB/s",
    "down_8": "down, 8 streams, MB/s",
    "down_64": "down, 64 streams, MB/s",
    "up_1": "up, 1 stream, MB/s",
    "up_8": "up, 8 streams, MB/s",
    "up_64": "up, 64 streams, MB/s",
    "round_trip_p50": "1-byte round trip, p50, µs",
    "round_trip_p99": "1-byte round trip, p99, µs",
    "connections_1": "new connections/s, 1 at a time",
    "connections_50": "new connections/s, 50 at a time",
    **{f"{name}_cpu_gib": f"{name}, CPU s/GiB" for name in PROCESSES},
    **{f"{name}_cpu_connection": f"{name}, CPU ms/new connection" for name in PROCESSES},
    **{
        f"{name}_memory_{when}": f"{name}, MiB {words}"
        for name in PROCESSES
        for when, words in (("idle", "idle"), ("streams", "with 1,000 idle streams"), ("after", "after all"))
    },
}


def medians(rounds: Mapping[str, Sequence[Figures]]) -> dict[str, Figures]:
    """The median over the rounds of each figure, by contestant."""
    return {
        name: {key: statistics.median(figures[key] for figures in each) for key in each[0]}
        for name, each in rounds.items()
    }


def table(results: Mapping[str, Figures]) -> str:
    """A Markdown table with a column for each contestant."""
    baseline = results.get(BASELINE, {})
    lines = [["", *results], ["---", *("--:" for _ in results)]]
    for key, label in _ROWS.items():
        cells = [
            _cell(figures.get(key), None if name == BASELINE else baseline.get(key))
            for name, figures in results.items()
        ]
        if any(cells):
            lines.append([label, *cells])
    label_width, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"| {label.ljust(label_width)} | {' | '.join(map(str.rjust, cells, widths))} |" for label, *cells in lines
    )


def _cell(value: float | None, baseline: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return text if baseline is None else f"{text} ({value / baseline:.2g})"


def machine() -> str:
    """On what this runs; figures of different machines cannot be compared."""
    packages = ("pioneer-tunnel", "trio", "websockets", "trio-websocket")
    cores = len(os.sched_getaffinity(0))
    return (
        f"{cores} {platform.machine()} cores, shared by origin, tunnel and visitors; Linux {platform.release()},"
        f" Python {platform.python_version()}, {', '.join(f'{package} {version(package)}' for package in packages)}"
    )


def busy(seconds: float) -> float:
    """How much of the machine is in use, from 0 to 1, for the next `seconds`. While we do nothing, that is others."""
    before = _cpu_times()
    time.sleep(seconds)
    everything, idle = (after - was for after, was in zip(_cpu_times(), before, strict=True))
    return 1 - idle / everything


def _cpu_times() -> tuple[int, int]:
    times = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(times), times[3] + times[4]  # idle, and waiting for a disk
