"""The metrics of a relay: `Relay.stats` as metric families, one metric for each number. docs/monitoring.md lists them.

Labels are tunnels, services, workers, hosts of certificates and reasons, all of which are bounded. Sessions have no
label: their numbers are sums of a tunnel's sessions. A tunnel that was removed has no metrics any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client.metrics_core import Metric

from .._model.certificate_status import CertificateStatus
from .._model.stats import StreamStats
from ..monitoring.certificate_metrics import certificate_families
from ..monitoring.exposition import Measure, families, last_round_trip
from .stats import FleetStats, RelayStats, RelayTunnelStats, WorkerStats

__all__ = ["FLEET", "PREFIX", "RELAY", "STREAMS", "TUNNEL", "WORKER", "relay_families"]

PREFIX: Final = "pioneer_tunnel_relay_"

RELAY: Final[tuple[Measure[RelayStats], ...]] = (
    Measure("since_timestamp_seconds", "When counting began, since 1970.", lambda stats: stats.since_unix),
    Measure("draining", "1 while the relay stops.", lambda stats: stats.draining),
    Measure("connections_open", "Connections now, gateways' and visitors'.", lambda stats: stats.connections.open),
    Measure("connections_limit", "How many connections there may be.", lambda stats: stats.connections.limit),
    Measure("visitors_open", "Visitors whose tunnel is known.", lambda stats: stats.connections.visitors_open),
    Measure("visitors_limit", "How many visitors there may be.", lambda stats: stats.connections.visitors_limit),
    Measure(
        "connections_pending",
        "Connections that are neither a visitor nor a gateway yet.",
        lambda stats: stats.connections.pending,
    ),
    Measure(
        "connections_pending_limit", "How many of these there may be.", lambda stats: stats.connections.pending_limit
    ),
    Measure(
        "connections_accepted_total",
        "Connections that were accepted and not refused at once.",
        lambda stats: stats.connections.accepted_total,
    ),
    Measure(
        "connections_evicted_total",
        "Connections that were reset while pending, for the sake of newer ones.",
        lambda stats: stats.connections.evicted_total,
    ),
    Measure("streams_open", "Visitors' streams now.", lambda stats: stats.streams.open),
    Measure("streams_opened_total", "Visitors' streams that were opened.", lambda stats: stats.streams.opened_total),
    Measure(
        "from_visitors_bytes_total",
        "Bytes that came from visitors.",
        lambda stats: stats.streams.from_visitors_bytes_total,
    ),
    Measure(
        "to_visitors_bytes_total", "Bytes that went to visitors.", lambda stats: stats.streams.to_visitors_bytes_total
    ),
    Measure(
        "sessions_open",
        "Gateways' sessions, suspended ones and those without their tunnel included.",
        lambda stats: stats.sessions_open,
    ),
    Measure("sessions_total", "How often a session got its tunnel.", lambda stats: stats.sessions_total),
    Measure("resumes_total", "How often a session went on over another connection.", lambda stats: stats.resumes_total),
    Measure("suspended_sessions", "Sessions that wait for their gateway.", lambda stats: stats.suspended_sessions),
    Measure("suspended_sessions_limit", "How many sessions may wait.", lambda stats: stats.suspended_sessions_limit),
    Measure(
        "unsent_bytes",
        "Bytes that all sessions hold until gateways or visitors take them.",
        lambda stats: stats.unsent_bytes,
    ),
    Measure("unsent_limit_bytes", "How many such bytes there may be.", lambda stats: stats.unsent_limit_bytes),
    Measure("refusals_total", "Whom the relay refused.", lambda stats: stats.refusals_total, "reason"),
)
"""Of the relay as a whole."""

TUNNEL: Final[tuple[Measure[RelayTunnelStats], ...]] = (
    Measure(
        "tunnel_connected",
        "1 while a gateway is connected.",
        lambda stats: any(not session.suspended for session in stats.sessions),
    ),
    Measure("tunnel_sessions_open", "Sessions of the tunnel's gateways.", lambda stats: len(stats.sessions)),
    Measure(
        "tunnel_sessions_suspended",
        "Sessions that wait for their gateway.",
        lambda stats: sum(session.suspended for session in stats.sessions),
    ),
    Measure(
        "tunnel_sessions_draining",
        "Sessions whose new visitors go elsewhere.",
        lambda stats: sum(session.draining for session in stats.sessions),
    ),
    Measure("tunnel_sessions_total", "How often a session got the tunnel.", lambda stats: stats.sessions_total),
    Measure(
        "tunnel_resumes_total",
        "How often a session went on over another connection.",
        lambda stats: stats.resumes_total,
    ),
    Measure(
        "tunnel_round_trip_seconds",
        "The last round trip to the gateway that gets new visitors.",
        lambda stats: last_round_trip(stats.sessions),
    ),
    Measure(
        "tunnel_unread_bytes",
        "Bytes that have come from gateways and that nobody has read.",
        lambda stats: sum(session.unread_bytes or 0 for session in stats.sessions),
    ),
    Measure(
        "tunnel_unsent_bytes",
        "Bytes that are held until gateways take them.",
        lambda stats: sum(session.unsent_bytes or 0 for session in stats.sessions),
    ),
    Measure(
        "tunnel_refusals_total",
        "Visitors and gateways of the tunnel that were refused.",
        lambda stats: stats.refusals_total,
        "reason",
    ),
)
"""Of each tunnel."""

STREAMS: Final[tuple[Measure[StreamStats], ...]] = (
    Measure("tunnel_streams_open", "Visitors' streams now.", lambda stats: stats.open),
    Measure("tunnel_streams_opened_total", "Visitors' streams that were opened.", lambda stats: stats.opened_total),
    Measure(
        "tunnel_from_visitors_bytes_total",
        "Bytes that came from visitors.",
        lambda stats: stats.from_visitors_bytes_total,
    ),
    Measure(
        "tunnel_to_visitors_bytes_total", "Bytes that went to visitors.", lambda stats: stats.to_visitors_bytes_total
    ),
)
"""Of each service of each tunnel."""


WORKER: Final[tuple[Measure[WorkerStats], ...]] = (
    Measure("worker_since_timestamp_seconds", "When the process was started, since 1970.", lambda one: one.since_unix),
    Measure("worker_connections_open", "Connections of a worker.", lambda one: one.connections.open),
    Measure("worker_connections_limit", "How many there may be.", lambda one: one.connections.limit),
    Measure("worker_streams_open", "Visitors' streams that a worker serves.", lambda one: one.streams.open),
    Measure("worker_sessions_open", "Gateways' sessions of a worker.", lambda one: one.sessions_open),
    Measure("worker_cpu_seconds_total", "Processor time of the process.", lambda one: one.cpu_seconds_total),
    Measure("worker_resident_memory_bytes", "Resident memory of the process.", lambda one: one.memory_bytes),
)
"""Of each worker of a relay with workers, but those that drain."""


FLEET: Final[tuple[Measure[FleetStats], ...]] = (
    Measure("fleet_redis_reachable", "1 while Redis answers.", lambda fleet: fleet.redis_reachable),
    Measure(
        "fleet_node_round_trip_seconds",
        "The shortest round trip to another node of late. There is none while there is no link to it.",
        lambda fleet: {name: rtt for name, rtt in fleet.nodes.items() if rtt is not None},
        "node",
    ),
    Measure("fleet_nodes_known", "Other nodes in the configuration.", lambda fleet: len(fleet.nodes)),
    Measure(
        "fleet_hops_open", "Visitors whose streams other nodes carry to their gateways.", lambda fleet: fleet.hops_open
    ),
    Measure(
        "fleet_hops_served_total",
        "Visitors of other nodes that this one has carried to its gateways.",
        lambda fleet: fleet.hops_served_total,
    ),
    Measure(
        "fleet_unannounced_tunnels",
        "Tunnels whose sessions the other nodes do not know as they are.",
        lambda fleet: fleet.unannounced_tunnels,
    ),
    Measure(
        "fleet_signed_tunnels", "Tunnels in memory that the operator has signed.", lambda fleet: fleet.signed_tunnels
    ),
    Measure(
        "fleet_unconfirmed_seconds",
        "How long ago the node knew for the last time which signed tunnels are revoked.",
        lambda fleet: fleet.unconfirmed_seconds,
    ),
)
"""Of a node of a fleet."""


def relay_families(stats: RelayStats, certificates: Mapping[str, CertificateStatus]) -> Iterator[Metric]:
    """The metric families of a relay.

    Args:
        stats: its statistics.
        certificates: those that it orders, by host.
    """
    tunnels = [((name,), tunnel) for name, tunnel in stats.tunnels.items()]
    services = [
        ((name, service), streams)
        for name, tunnel in stats.tunnels.items()
        for service, streams in tunnel.services.items()
    ]
    yield from families(PREFIX, RELAY, [((), stats)])
    yield from families(PREFIX, TUNNEL, tunnels, ["tunnel"])
    yield from families(PREFIX, STREAMS, services, ["tunnel", "service"])
    if stats.workers:
        workers = [((str(worker.index),), worker) for worker in stats.workers if not worker.draining]
        yield from families(PREFIX, WORKER, workers, ["worker"])
    if stats.fleet is not None:
        yield from families(PREFIX, FLEET, [((), stats.fleet)])
    yield from certificate_families(PREFIX, certificates)
