"""What a worker reports to the parent, and what all workers do as the statistics of one relay.

A counter of a relay never falls. So what a worker has counted stays in the sums when it ends. Of one that was killed,
that is what it had reported last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, final

import attrs
import cattrs

from ..._model.certificate_status import CertificateStatus
from ..._model.stats import StreamStats
from ..stats import ConnectionStats, FleetStats, RelayStats, RelayTunnelStats, WorkerStats

__all__ = ["Report", "past", "summed_up", "total"]

_NUMBERS: Final = (
    "sessions_open",
    "sessions_total",
    "resumes_total",
    "suspended_sessions",
    "suspended_sessions_limit",
    "unsent_bytes",
    "unsent_limit_bytes",
)
_GAUGES: Final = ("open", "limit", "visitors_open", "visitors_limit", "pending", "pending_limit")
_COUNTERS: Final = ("accepted_total", "evicted_total")


@final
@attrs.frozen(kw_only=True)
class Report:
    """What a worker reports.

    Attributes:
        stats: of its relay.
        certificates: those that it shows, by host.
        orders_certificates: whether it is this worker that orders them, and knows why one is missing.
        version: of its package.
        cpu_seconds: processor time of its process.
        memory_bytes: resident memory of its process; None where the system does not tell.
    """

    stats: RelayStats
    certificates: Mapping[str, CertificateStatus]
    orders_certificates: bool
    version: str
    cpu_seconds: float
    memory_bytes: int | None

    def to_wire(self) -> dict[str, Any]:
        """As an object of JSON."""
        wire: dict[str, Any] = cattrs.unstructure(self)
        return wire

    @classmethod
    def from_wire(cls, wire: Any) -> Report:
        """Read what `to_wire` has made."""
        return cattrs.structure(wire, cls)


def past(stats: RelayStats) -> RelayStats:
    """What is left of the statistics of a worker that has ended: its counters."""
    return attrs.evolve(
        stats,
        draining=False,
        connections=attrs.evolve(stats.connections, **dict.fromkeys(_GAUGES, 0)),
        tunnels={name: _past_tunnel(tunnel) for name, tunnel in stats.tunnels.items()},
        streams=attrs.evolve(stats.streams, open=0),
        fleet=None if stats.fleet is None else _past_fleet(stats.fleet),
        sessions_open=0,
        suspended_sessions=0,
        suspended_sessions_limit=0,
        unsent_bytes=0,
        unsent_limit_bytes=0,
    )


def _past_fleet(fleet: FleetStats) -> FleetStats:
    return FleetStats(node=fleet.node, redis_reachable=True, hops_served_total=fleet.hops_served_total)


def _past_tunnel(tunnel: RelayTunnelStats) -> RelayTunnelStats:
    services = {name: attrs.evolve(streams, open=0) for name, streams in tunnel.services.items()}
    return attrs.evolve(tunnel, sessions=(), streams=attrs.evolve(tunnel.streams, open=0), services=services)


def total(
    stats: Sequence[RelayStats],
    *,
    since_unix: float,
    draining: bool,
    tunnels: Iterable[str],
    workers: Sequence[WorkerStats] = (),
) -> RelayStats:
    """The statistics of a relay from those of its workers, the past ones among them.

    Args:
        stats: the workers'.
        since_unix, draining, workers: see `RelayStats`.
        tunnels: the ids of the tunnels of now, in the order of the configuration.
    """
    return RelayStats(
        since_unix=since_unix,
        draining=draining,
        connections=ConnectionStats(**_sums([one.connections for one in stats], (*_GAUGES, *_COUNTERS))),
        tunnels={name: _tunnel([one.tunnels[name] for one in stats if name in one.tunnels]) for name in tunnels},
        streams=sum((one.streams for one in stats), StreamStats()),
        refusals_total=_added(one.refusals_total for one in stats),
        fleet=_fleet([one.fleet for one in stats if one.fleet is not None]),
        workers=tuple(workers),
        **_sums(stats, _NUMBERS),
    )


def summed_up(stats: Sequence[RelayStats]) -> RelayStats:
    """The sum of what is past, with all tunnels that it has."""
    tunnels = dict.fromkeys(name for one in stats for name in one.tunnels)
    return total(stats, since_unix=0.0, draining=False, tunnels=tunnels)


def _fleet(parts: Sequence[FleetStats]) -> FleetStats | None:
    """What a node of a fleet tells, from what its workers tell; None without a fleet."""
    if not parts:
        return None
    trips = {name: [each.nodes.get(name) for each in parts] for part in parts for name in part.nodes}
    unconfirmed = [each.unconfirmed_seconds for each in parts if each.unconfirmed_seconds is not None]
    return FleetStats(
        node=parts[0].node,
        redis_reachable=all(each.redis_reachable for each in parts),
        nodes={name: min((one for one in each if one is not None), default=None) for name, each in trips.items()},
        signed_tunnels=max(each.signed_tunnels for each in parts),
        unconfirmed_seconds=max(unconfirmed, default=None),
        **_sums(parts, ("hops_open", "hops_served_total", "unannounced_tunnels")),
    )


def _tunnel(parts: Sequence[RelayTunnelStats]) -> RelayTunnelStats:
    services: dict[str, StreamStats] = {}
    for part in parts:
        for name, streams in part.services.items():
            services[name] = services.get(name, StreamStats()) + streams
    return RelayTunnelStats(
        sessions=tuple(sorted((one for part in parts for one in part.sessions), key=lambda one: one.since_unix)),
        streams=sum((part.streams for part in parts), StreamStats()),
        services=services,
        sessions_total=sum(part.sessions_total for part in parts),
        resumes_total=sum(part.resumes_total for part in parts),
        refusals_total=_added(part.refusals_total for part in parts),
    )


def _sums(parts: Sequence[object], names: Iterable[str]) -> dict[str, Any]:
    return {name: sum(getattr(part, name) for part in parts) for name in names}


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    added: Counter[str] = Counter()
    for each in counts:
        added.update(each)
    return dict(added)
