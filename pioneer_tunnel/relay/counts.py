"""What a relay counts while it runs. `Relay.stats` makes a value of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, final

from .._model.counters import ServiceCounters, StreamCounter
from .._model.services import FIRST_SERVICE
from .._model.stats import SessionStats, StreamStats
from .stats import ConnectionStats, RelayStats, RelayTunnelStats
from .tunnels import Route, TunnelEntry

__all__ = ["RelayCounts", "TunnelCounts"]


@final
class TunnelCounts:
    """The counts of one tunnel.

    Attributes:
        services: counts its streams.
        sessions, resumes: see `RelayTunnelStats`.
        refusals: by reason.
    """

    def __init__(self) -> None:
        self.services: Final = ServiceCounters()
        self.sessions: int = 0
        self.resumes: int = 0
        self.refusals: Final[Counter[str]] = Counter()

    def stats(self, configured: Iterable[str], sessions: Iterable[SessionStats]) -> RelayTunnelStats:
        """The numbers now."""
        services = self.services.stats(configured)
        return RelayTunnelStats(
            sessions=tuple(sessions),
            streams=sum(services.values(), StreamStats()),
            services=services,
            sessions_total=self.sessions,
            resumes_total=self.resumes,
            refusals_total=dict(self.refusals),
        )


@final
class RelayCounts:
    """The counts of a relay. Those of a tunnel begin with the first thing that there is to count.

    Attributes:
        accepted, evicted: connections, see `ConnectionStats`.
    """

    def __init__(self) -> None:
        self.accepted: int = 0
        self.evicted: int = 0
        self._tunnels: Final[dict[str, TunnelCounts]] = {}
        self._leaving: list[TunnelCounts] = []  # of tunnels that were removed, and still have streams
        self._left = TunnelCounts()  # the sum of those that have none
        self._left_streams = StreamStats()
        self._refusals: Final[Counter[str]] = Counter()

    def of(self, tunnel_id: str) -> TunnelCounts:
        """The counts of a tunnel."""
        counts = self._tunnels.get(tunnel_id)
        if counts is None:
            counts = self._tunnels[tunnel_id] = TunnelCounts()
        return counts

    def streams_of(self, route: Route) -> StreamCounter:
        """What counts the streams of a route."""
        return self.of(route.entry.id).services.of(route.service or FIRST_SERVICE)

    def refused(self, reason: str, tunnel_id: str | None = None) -> None:
        """Count a refusal; `tunnel_id` is None if no tunnel is known."""
        self._refusals[reason] += 1
        if tunnel_id is not None:
            self.of(tunnel_id).refusals[reason] += 1

    def drop(self, tunnel_ids: Collection[str]) -> None:
        """Drop the counts of these tunnels, which were removed. They stay in the sums."""
        for removed in self._tunnels.keys() & tunnel_ids:
            self._leaving.append(self._tunnels.pop(removed))

    def with_streams(self) -> Iterator[str]:
        """The ids of the tunnels that have visitors now."""
        return (tunnel_id for tunnel_id, counts in self._tunnels.items() if counts.services.total().open)

    def stats(
        self,
        tunnels: Iterable[TunnelEntry],
        sessions: Mapping[str, Sequence[SessionStats]],
        *,
        since_unix: float,
        draining: bool,
        connections: ConnectionStats,
    ) -> RelayStats:
        """The numbers now, but those of `gateways`, which knows what sessions hold."""
        self._add_up_left()
        configured = {entry.id: [route.service or FIRST_SERVICE for route in entry.routes] for entry in tunnels}
        of_tunnels = {
            tunnel_id: self.of(tunnel_id).stats(services, sessions.get(tunnel_id, ()))
            for tunnel_id, services in configured.items()
        }
        everything = [*self._tunnels.values(), *self._leaving, self._left]
        streams = sum((counts.services.total() for counts in everything), self._left_streams)
        return RelayStats(
            since_unix=since_unix,
            draining=draining,
            connections=connections,
            tunnels=of_tunnels,
            streams=streams,
            sessions_total=sum(counts.sessions for counts in everything),
            resumes_total=sum(counts.resumes for counts in everything),
            refusals_total=dict(self._refusals),
        )

    def _add_up_left(self) -> None:
        """Replace the counts of removed tunnels without streams by their sum."""
        leaving, self._leaving = self._leaving, []
        for counts in leaving:
            streams = counts.services.total()
            if streams.open:
                self._leaving.append(counts)
            else:
                self._left.sessions += counts.sessions
                self._left.resumes += counts.resumes
                self._left_streams += streams
