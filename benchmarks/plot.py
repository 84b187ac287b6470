"""The figures of a run as bars, and their growth as lines. It needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from .figures import WORDS, Run, median
from .measuring import GROWTH

__all__ = ["can_plot", "plot"]

PANELS: Final[Mapping[str, Sequence[str]]] = {
    "throughput, 8 streams, MB/s": ("down_8", "up_8"),
    "1-KiB round trip, p99, µs": ("idle_1024_p99", "busy_1024_p99"),
    "connections/s, 1, 50 and 500 at a time": ("connections_1", "connections_50", "connections_500"),
    "HTTP requests/s, 100 visitors": ("http",),
    "CPU s/GiB": ("relay_cpu_gib", "gateway_cpu_gib"),
    "CPU ms/connection": ("relay_cpu_connection", "gateway_cpu_connection"),
    "MiB with 1,000 idle streams": ("relay_memory_streams_1000", "gateway_memory_streams_1000"),
}
GROWING: Final = "1-byte round trip beside idle streams, p50, µs"
COLUMNS: Final = 2


def can_plot() -> bool:
    return find_spec("matplotlib") is not None


def plot(run: Run, path: Path) -> None:
    """Write an SVG. The same figures make the same file."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "bench"
    from matplotlib import pyplot as plt

    rows = -(-(len(PANELS) + 1) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(6 * COLUMNS, 3.2 * rows), layout="constrained")
    panels = iter(grid.flat)
    for title, keys in PANELS.items():
        _bars(next(panels), title, run, keys)
    _lines(next(panels), run)
    for rest in panels:
        rest.set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, title: str, run: Run, keys: Sequence[str]) -> None:
    names = [name for name in run if any(key in run[name] for key in keys)]
    width = 0.8 / len(keys)
    for number, key in enumerate(keys):
        places = [place + number * width for place in range(len(names))]
        values = [median(run, name, key) or 0 for name in names]
        spread = [_spread(run, name, key) for name in names]
        label = WORDS[key] + (", beside bulk" if key.startswith("busy") else "")
        axes.bar(places, values, width, yerr=[*zip(*spread, strict=True)] or None, label=label)
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(names))], names, rotation=60, fontsize="small")
    axes.set_title(title, fontsize="medium")
    if "p99" in title:
        axes.set(yscale="log")  # from one way to another it is a matter of powers of ten
    if len(keys) > 1:
        axes.legend(fontsize="small")


def _spread(run: Run, name: str, key: str) -> tuple[float, float]:
    """How far the lowest and the highest value are from the median."""
    value, values = median(run, name, key), run[name].get(key)
    return (value - min(values), max(values) - value) if value is not None and values else (0, 0)


def _lines(axes: Any, run: Run) -> None:
    for name, figures in run.items():
        points = [(count, figures[f"growth_{count}"][0]) for count in GROWTH if f"growth_{count}" in figures]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xscale="log", yscale="log", xlabel="idle streams")
    axes.set_title(GROWING, fontsize="medium")
    if axes.lines:
        axes.legend(fontsize="x-small", ncols=2)
