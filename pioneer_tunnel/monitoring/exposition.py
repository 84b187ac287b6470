"""Statistics as metric families of Prometheus, and their text. It needs the package prometheus-client.

A table says which number is which metric: see `relay/metrics.py` and `gateway_metrics.py`. Names follow OpenMetrics:
a counter ends in `_total`, and times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar, final

import attrs
import trio
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from .._model.stats import SessionStats
from .._version import __version__
from .site import Accept, Answer, Page, Refresh

__all__ = ["Measure", "families", "last_round_trip", "metrics_page"]

T = TypeVar("T")

_TOTAL: Final = "_total"


@final
@attrs.frozen
class Measure(Generic[T]):
    """One metric.

    Attributes:
        name: without the prefix. One that ends in `_total` is a counter, any other a gauge.
        words: say what it counts, for HELP.
        of: reads the number; None for no sample. Or the numbers by the value of `label`.
        label: the label of numbers by name.
    """

    name: str
    words: str
    of: Callable[[T], float | Mapping[str, float] | None]
    label: str | None = None

    @property
    def is_counter(self) -> bool:
        """Whether it is a counter."""
        return self.name.endswith(_TOTAL)


def families(
    prefix: str, measures: Sequence[Measure[T]], rows: Sequence[tuple[Sequence[str], T]], labels: Sequence[str] = ()
) -> Iterator[Metric]:
    """The metric families of a table.

    Args:
        prefix: of each name.
        measures: the table.
        rows: what to read, each with the values of `labels`.
        labels: the names of these labels.
    """
    for measure in measures:
        names = [*labels] if measure.label is None else [*labels, measure.label]
        make = CounterMetricFamily if measure.is_counter else GaugeMetricFamily
        family = make(prefix + measure.name, measure.words, labels=names)
        for values, row in rows:
            found = measure.of(row)
            if isinstance(found, Mapping):
                for name, number in found.items():
                    family.add_metric([*values, name], number)
            elif found is not None:
                family.add_metric(values, found)
        yield family


def version_info() -> Metric:
    """The version of this package."""
    return InfoMetricFamily("pioneer_tunnel_build", "The version of pioneer-tunnel.", {"version": __version__})


def last_round_trip(sessions: Sequence[SessionStats]) -> float | None:
    """The round trip of the session that gets new visitors, in seconds; None if there is none."""
    milliseconds = sessions[-1].round_trip_ms if sessions else None
    return None if milliseconds is None else milliseconds / 1000


@final
class _Families(Collector):
    """Families that were made before, as a collector."""

    def __init__(self, made: Iterable[Metric]) -> None:
        self._made: Final = made

    def collect(self) -> Iterable[Metric]:
        return self._made


def metrics_page(collect: Callable[[], Callable[[], Iterable[Metric]]], refresh: Refresh | None = None) -> Page:
    """A page of metrics, those of this process included. Its format is the one that `Accept` asks for.

    Args:
        collect: takes the numbers, in the event loop, and returns what makes families of them, in a thread: a relay
            with a thousand tunnels has some ten thousand lines.
        refresh: is awaited before that; by default the numbers are there.
    """
    process = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=process)

    async def answer(accept: Accept) -> Answer:
        encode, kind = choose_encoder(accept)
        if refresh is not None:
            await refresh()
        body = await trio.to_thread.run_sync(_encoded, encode, collect(), process)
        return Answer(HTTPStatus.OK, kind, body)

    return Page(answer)


def _encoded(encode: Callable[[Any], bytes], make: Callable[[], Iterable[Metric]], process: CollectorRegistry) -> bytes:
    return encode(_Families([version_info(), *make(), *process.collect()]))
