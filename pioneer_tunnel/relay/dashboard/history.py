"""The last ten minutes of a relay: what was counted between one look at `Relay.stats` and the next. No I/O."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Final, final

import attrs

from ..._model.stats import StreamStats
from ..stats import RelayStats

__all__ = ["INTERVAL", "SAMPLES", "History", "Traffic"]

INTERVAL: Final = 5.0
"""Seconds between two samples."""

SAMPLES: Final = 120
"""Samples that are kept: ten minutes."""


@final
@attrs.frozen
class Traffic:
    """Bytes of visitors between two samples."""

    from_visitors: int
    to_visitors: int

    @classmethod
    def between(cls, before: StreamStats, after: StreamStats) -> Traffic:
        """What was added. Counters that have begun again count from 0."""
        return cls(
            max(after.from_visitors_bytes_total - before.from_visitors_bytes_total, 0),
            max(after.to_visitors_bytes_total - before.to_visitors_bytes_total, 0),
        )


NOTHING: Final = Traffic(0, 0)


@final
@attrs.frozen
class _Sample:
    """What was added. Tunnels and reasons without anything are left out, so that idle ones cost nothing."""

    all: Traffic
    tunnels: Mapping[str, Traffic]
    refusals: Mapping[str, int]


@final
class History:
    """The samples, the oldest first."""

    def __init__(self) -> None:
        self._samples: Final[deque[_Sample]] = deque(maxlen=SAMPLES)
        self._last: RelayStats | None = None

    def add(self, stats: RelayStats) -> None:
        """Take a sample. The first call only begins."""
        last, self._last = self._last, stats
        if last is None:
            return
        none = StreamStats()
        tunnels = {}
        for tunnel_id, tunnel in stats.tunnels.items():
            before = last.tunnels.get(tunnel_id)
            traffic = Traffic.between(none if before is None else before.streams, tunnel.streams)
            if traffic != NOTHING:
                tunnels[tunnel_id] = traffic
        refusals = Counter(stats.refusals_total)
        refusals.subtract(last.refusals_total)
        self._samples.append(_Sample(Traffic.between(last.streams, stats.streams), tunnels, +refusals))

    def traffic(self) -> list[Traffic]:
        """The traffic of the relay in each sample."""
        return [sample.all for sample in self._samples]

    def traffic_of(self, tunnel_id: str) -> list[Traffic]:
        """The traffic of a tunnel in each sample."""
        return [sample.tunnels.get(tunnel_id, NOTHING) for sample in self._samples]

    def busy(self) -> Counter[str]:
        """The bytes of each tunnel in all samples; those without any are left out."""
        sums: Counter[str] = Counter()
        for sample in self._samples:
            for tunnel_id, traffic in sample.tunnels.items():
                sums[tunnel_id] += traffic.from_visitors + traffic.to_visitors
        return sums

    def refusals(self) -> dict[str, list[int]]:
        """For each reason that there was, the refusals in each sample."""
        reasons = {reason for sample in self._samples for reason in sample.refusals}
        return {reason: [sample.refusals.get(reason, 0) for sample in self._samples] for reason in reasons}
