"""What this project wants to reach, compared with others in the same run, and whether it does."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Final, final

import attrs

from .figures import ALONE, CONNECTIONS, THROUGHPUTS, Run, median
from .way import PROCESSES

__all__ = ["GOALS", "Goal", "Part", "Verdict", "judge"]


@final
@attrs.frozen
class Part:
    """The sum of some figures of one contestant."""

    name: str
    keys: tuple[str, ...]

    def of(self, run: Run) -> float | None:
        """None if one of them was not measured."""
        values = [value for key in self.keys if (value := median(run, self.name, key)) is not None]
        return sum(values) if len(values) == len(self.keys) else None


@final
@attrs.frozen(kw_only=True)
class Goal:
    """A figure, in most cases as a ratio.

    Attributes:
        title: what it is, and what it is compared with.
        ratios: each is one figure, or a figure and what it is divided by. The goal is for their geometric mean.
        goal: the value to reach.
        stretch: a better one.
        at_most: whether the value must not exceed the goal; otherwise it must not be below.
    """

    title: str
    ratios: tuple[tuple[Part, ...], ...]
    goal: float
    stretch: float | None = None
    at_most: bool = False

    def reaches(self, value: float, wanted: float) -> bool:
        return value <= wanted if self.at_most else value >= wanted


_BUILDS: Final = {"ws": "", "ws-compiled": ", compiled"}


def _compared(ours: str, other: str, keys: Sequence[str]) -> tuple[tuple[Part, ...], ...]:
    return tuple((Part(ours, (key,)), Part(other, (key,))) for key in keys)


def _of_builds(
    title: str, peer: str, *sums: tuple[str, ...], goal: float, stretch: float | None = None, at_most: bool = False
) -> tuple[Goal, ...]:
    """A goal for each build of this project. Each of `sums` is compared with the same one of `peer`."""
    return tuple(
        Goal(
            title=f"{title}, of {peer}{note}",
            ratios=tuple((Part(ours, keys), Part(peer, keys)) for keys in sums),
            goal=goal,
            stretch=stretch,
            at_most=at_most,
        )
        for ours, note in _BUILDS.items()
    )


def _each(keys: Sequence[str]) -> list[tuple[str]]:
    return [(key,) for key in keys]


def _both_ends(what: str) -> tuple[str, ...]:
    return tuple(f"{name}_cpu_{what}" for name in PROCESSES)


GOALS: Final = (
    *_of_builds("download and upload", "gotun", *_each(THROUGHPUTS), goal=1.3, stretch=2.0),
    Goal(
        title="download and upload with trio-websocket alone, of gotun",
        ratios=_compared("ws-trio", "gotun", THROUGHPUTS),
        goal=0.7,
        stretch=1.0,
    ),
    *_of_builds("CPU s/GiB of both ends", "gotun", _both_ends("gib"), goal=0.7, stretch=0.5, at_most=True),
    *_of_builds("1-byte round trip, p50 and p99", "gotun", ("idle_1_p50",), ("idle_1_p99",), goal=1.3, at_most=True),
    *(
        Goal(
            title=f"1-KiB round trip beside a bulk download, p99, of the idle p99{note}",
            ratios=((Part(ours, ("busy_1024_p99",)), Part(ours, ("idle_1024_p99",))),),
            goal=3.0,
            stretch=1.5,
            at_most=True,
        )
        for ours, note in _BUILDS.items()
    ),
    *_of_builds("new connections/s, 50 at a time", "gotun", ("connections_50",), goal=0.8),
    *_of_builds("new connections/s, 50 at a time", "snitun", ("connections_50",), goal=1.3),
    *_of_builds("CPU ms/connection of both ends", "gotun", _both_ends("connection"), goal=1.2, at_most=True),
    *_of_builds("HTTP requests/s on kept connections", "gotun", ("http",), goal=1.0),
    *_of_builds("the same, only a stretch goal", "nginx", ("http",), goal=0.3),
    Goal(
        title="wss: throughput, of rathole's wss",
        ratios=_compared("wss", "rathole-wss", THROUGHPUTS),
        goal=0.7,
        stretch=1.0,
    ),
    Goal(
        title="wss: connections/s, of rathole's wss",
        ratios=_compared("wss", "rathole-wss", CONNECTIONS),
        goal=5.0,
        stretch=8.0,
    ),
    Goal(
        title="50 ms away, 100 visitors at once: the last first byte, in round trips after the request",
        ratios=((Part(ALONE, ("far_last_byte",)),),),
        goal=1.1,
        at_most=True,
    ),
    Goal(
        title="tcp at rathole's server: throughput, of its own client",
        ratios=_compared("ours-tcp", "rathole-tcp", THROUGHPUTS),
        goal=1.2,
        stretch=1.3,
    ),
    Goal(
        title="tcp at rathole's server: CPU s/GiB of the client",
        ratios=_compared("ours-tcp", "rathole-tcp", ("gateway_cpu_gib",)),
        goal=0.5,
        stretch=0.4,
        at_most=True,
    ),
    Goal(
        title="tcp at rathole's server: 1-byte round trip, p50",
        ratios=_compared("ours-tcp", "rathole-tcp", ("idle_1_p50",)),
        goal=0.7,
        stretch=0.6,
        at_most=True,
    ),
    Goal(
        title="tcp at rathole's server: connections/s",
        ratios=_compared("ours-tcp", "rathole-tcp", CONNECTIONS),
        goal=0.8,
        stretch=1.0,
    ),
    Goal(
        title="CPU of `import pioneer_tunnel`, of `import trio`",
        ratios=((Part(ALONE, ("import_pioneer_tunnel",)), Part(ALONE, ("import_trio",))),),
        goal=1.7,
        stretch=1.4,
        at_most=True,
    ),
)


@final
@attrs.frozen
class Verdict:
    """A goal, and what was measured: the ratios, empty if one of them is not known."""

    goal: Goal
    ratios: tuple[float, ...]

    @property
    def value(self) -> float | None:
        """The geometric mean."""
        return prod(self.ratios) ** (1 / len(self.ratios)) if self.ratios else None

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        if self.goal.stretch is not None and self.goal.reaches(self.value, self.goal.stretch):
            return "met, also the stretch goal"
        return "met" if self.goal.reaches(self.value, self.goal.goal) else "missed"


def judge(run: Run) -> list[Verdict]:
    """What came of each goal. It compares medians over the rounds."""
    return [Verdict(goal, _ratios(goal, run)) for goal in GOALS]


def _ratios(goal: Goal, run: Run) -> tuple[float, ...]:
    ratios = []
    for parts in goal.ratios:
        values = [part.of(run) for part in parts]
        known = [value for value in values if value]
        if len(known) < len(values):
            return ()
        ratios.append(known[0] / prod(known[1:]))
    return tuple(ratios)
