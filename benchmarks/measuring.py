"""What is measured of one way to the origin, in groups. figures.py tells what each key means."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Final, TypeAlias, final

import attrs

from .processes import wait_until_listening
from .visitors import (
    IdleStreams,
    KeptConnections,
    bulk_download,
    connections,
    dial_echo,
    percentile,
    round_trips,
    stalled_readers,
    throughput,
)
from .way import MEMORY_GROUPS, SPEED_GROUPS, Way

__all__ = ["AT_ONCE", "DEFAULT", "GROWTH", "QUICK", "STREAMS", "Figures", "Sizes", "measure"]

Figures: TypeAlias = dict[str, float]

STREAMS: Final = (1, 8, 64)
"""How many of them carry a throughput together."""
AT_ONCE: Final = (1, 50, 500)
"""How many connections are opened at a time."""
GROWTH: Final = (1, 100, 1_000, 10_000)
"""How many idle streams there are beside a round trip."""
BRIEFLY: Final = 1.0
"""Seconds that a visitor waits for a tunnel that may not be there."""
HTTP_VISITORS: Final = 100
KIB: Final = 1024


@final
@attrs.frozen(kw_only=True)
class Sizes:
    """How much of everything.

    Attributes:
        mib: for each throughput.
        round_trips: for each kind.
        connections: one at a time; twice as many with several at a time.
        seconds: the limit of each of these.
        http_seconds: how long HTTP requests run.
        streams: the most idle streams.
        stalled: readers who do not read.
        growth_round_trips: for each number of idle streams.
        away: seconds that the relay is away.
        back: seconds that its gateway has to come back.
        settle: seconds for a tunnel to clear up after a measurement before the next.
    """

    mib: int = 256
    round_trips: int = 1000
    connections: int = 1000
    seconds: float = 2.0
    http_seconds: float = 2.0
    streams: int = 10_000
    stalled: int = 100
    growth_round_trips: int = 300
    away: float = 1.0
    back: float = 20.0
    settle: float = 0.3


DEFAULT: Final = Sizes()
QUICK: Final = Sizes(
    mib=32,
    round_trips=200,
    connections=100,
    seconds=0.5,
    http_seconds=0.3,
    streams=1_000,
    growth_round_trips=50,
    away=0.2,
    settle=0.1,
)


def measure(way: Way, sizes: Sizes, groups: Collection[str], failed: Callable[[str, Exception], object]) -> Figures:
    """The figures of `groups`. What cannot be measured is left out, after a call of `failed` with its group."""
    figures = Figures()
    for group in (*MEMORY_GROUPS, *SPEED_GROUPS):
        if group in groups:
            try:
                _MEASURES[group](way, sizes, figures)
            except (OSError, RuntimeError) as error:
                failed(group, error)
            time.sleep(sizes.settle)
    return figures


def _idle(way: Way, sizes: Sizes, figures: Figures) -> None:
    _note_memory(way, sizes, figures, "idle")


def _stalled(way: Way, sizes: Sizes, figures: Figures) -> None:
    with stalled_readers(way.endpoint, sizes.stalled):
        time.sleep(3 * sizes.settle)
        _note_memory(way, sizes, figures, "stalled")


def _streams(way: Way, sizes: Sizes, figures: Figures) -> None:
    with IdleStreams(way.endpoint) as streams:
        for count in GROWTH:
            if count <= sizes.streams:
                streams.grow(count)
                _note_memory(way, sizes, figures, f"streams_{count}")
                times = round_trips(way.endpoint, size=1, count=sizes.growth_round_trips, seconds=sizes.seconds)
                figures[f"growth_{count}"] = percentile(times, 50)


def _note_memory(way: Way, sizes: Sizes, figures: Figures, what: str) -> None:
    time.sleep(sizes.settle)
    figures.update({f"{name}_memory_{what}": process.memory for name, process in way.processes.items()})


def _throughput(way: Way, sizes: Sizes, figures: Figures) -> None:
    with _Costs(way, sizes, figures, "gib", 2 * len(STREAMS) * sizes.mib / KIB):
        for streams in STREAMS:
            total = sizes.mib << 20
            figures[f"down_{streams}"] = throughput(way.endpoint, "down", streams=streams, total=total)
            figures[f"up_{streams}"] = throughput(way.endpoint, "up", streams=streams, total=total)


def _latency(way: Way, sizes: Sizes, figures: Figures, beside: str = "idle") -> None:
    for size in (1, KIB):
        times = round_trips(way.endpoint, size=size, count=sizes.round_trips, seconds=sizes.seconds)
        for percent in (50, 99):
            figures[f"{beside}_{size}_p{percent}"] = percentile(times, percent)


def _connections(way: Way, sizes: Sizes, figures: Figures) -> None:
    with _Costs(way, sizes, figures, "connection", 0) as costs:
        for at_once in AT_ONCE:
            count = sizes.connections * (1 if at_once == 1 else 2)
            result = connections(way.endpoint, count=count, at_once=at_once, seconds=sizes.seconds)
            figures[f"connections_{at_once}"] = result.rate
            costs.amount += len(result.first_byte) / 1000
            if at_once == 1:
                for percent in (50, 99):
                    figures[f"first_byte_p{percent}"] = percentile(result.first_byte, percent)


def _http(way: Way, sizes: Sizes, figures: Figures) -> None:
    with KeptConnections(way.endpoint, HTTP_VISITORS) as visitors, _Costs(way, sizes, figures, "request", 0) as costs:
        done, figures["http"] = visitors.requests(sizes.http_seconds)
        costs.amount = done / 1000


def _busy(way: Way, sizes: Sizes, figures: Figures) -> None:
    with bulk_download(way.endpoint):
        _latency(way, sizes, figures, "busy")


def _reconnect(way: Way, sizes: Sizes, figures: Figures) -> None:
    if way.relay is None or way.control is None:
        return
    way.relay.stop(abruptly=True)
    time.sleep(sizes.away)
    way.relay.start()
    wait_until_listening(way.control, way.relay)
    began = time.perf_counter()
    while time.perf_counter() < began + sizes.back:
        try:
            dial_echo(way.endpoint, patience=BRIEFLY).close()
        except OSError:
            time.sleep(0.01)
        else:
            figures["reconnect"] = time.perf_counter() - began
            return
    raise TimeoutError(f"no visitor gets through {sizes.back:g} seconds after the relay is back")


_MEASURES: Final[Mapping[str, Callable[[Way, Sizes, Figures], None]]] = {
    "idle": _idle,
    "stalled": _stalled,
    "streams": _streams,
    "throughput": _throughput,
    "latency": _latency,
    "connections": _connections,
    "http": _http,
    "busy": _busy,
    "reconnect": _reconnect,
}


@final
class _Costs:
    """Notes the processor time that passes in a `with`, for each of an `amount`."""

    def __init__(self, way: Way, sizes: Sizes, figures: Figures, what: str, amount: float) -> None:
        self.amount = amount
        self._way: Final = way
        self._settle: Final = sizes.settle
        self._figures: Final = figures
        self._what: Final = what
        self._before: dict[str, float] = {}

    def __enter__(self) -> _Costs:
        self._before = self._now()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for name, now in self._now().items():
                self._figures[f"{name}_cpu_{self._what}"] = (now - self._before[name]) / self.amount

    def _now(self) -> dict[str, float]:
        time.sleep(self._settle)
        return {name: process.cpu for name, process in self._way.processes.items()}
