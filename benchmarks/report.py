"""What is reported, and how: the rows of the table, medians, and on what machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from .tunnels import PROCESSES

__all__ = ["CAVEAT", "Figures", "machine", "medians", "table"]

Figures: TypeAlias = dict[str, float]

BASELINE: Final = "direct"
CAVEAT: Final = "Medians; the same number times direct in brackets. Differences under 25 % are noise."

_PACKAGES: Final = ("pioneer-tunnel", "trio", "websockets", "trio-websocket")
_ROWS: Final[dict[str, str]] = {
    "down_1": "down, 1 stream, MB/s",
    "down_8": "down, 8 streams, MB/s",
    "up_1": "up, 1 stream, MB/s",
    "up_8": "up, 8 streams, MB/s",
    "round_trip_p50": "1-byte round trip, p50, µs",
    "round_trip_p99": "1-byte round trip, p99, µs",
    "connections_1": "new connections/s, 1 at a time",
    "connections_50": "new connections/s, 50 at a time",
    **{f"{name}_cpu_gib": f"CPU s/GiB, {name}" for name in PROCESSES},
    **{f"{name}_cpu_connection": f"CPU ms/new connection, {name}" for name in PROCESSES},
    **{
        f"{name}_memory_{when}": f"memory MiB, {name}, {words}"
        for name in PROCESSES
        for when, words in (("idle", "idle"), ("streams", "1,000 idle streams"), ("after", "after all"))
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
        cells = [_cell(figures.get(key), baseline.get(key)) for figures in results.values()]
        if any(cells):
            lines.append([label, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(line, widths) for line in lines)


def machine() -> str:
    """One line that says on what this ran; figures of different machines cannot be compared."""
    versions = ", ".join(f"{package} {_version(package)}" for package in _PACKAGES)
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0))} cores shared by origin, tunnel and visitors;"
        f" Linux {platform.release()}, Python {platform.python_version()}; {versions}; load averages {load}"
    )


def _cell(value: float | None, baseline: float | None) -> str:
    if value is None:
        return ""
    if baseline is None:
        return _three_digits(value)
    return f"{_three_digits(value)} ({_three_digits(value / baseline)})"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(width) if index == 0 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return f"| {' | '.join([first, *others])} |"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"
