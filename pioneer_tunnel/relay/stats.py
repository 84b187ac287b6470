"""The counts of a relay as a value: what `Relay.stats` returns. See `SessionStats` and `StreamStats` for its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import attrs

from .._model.stats import SessionStats, StreamStats

__all__ = ["ConnectionStats", "FleetStats", "RelayStats", "RelayTunnelStats", "WorkerStats"]


def _counts() -> Any:
    return attrs.field(factory=dict, hash=False)


@final
@attrs.frozen(kw_only=True)
class ConnectionStats:
    """The connections that a relay has accepted, gateways' and visitors'. For the limits see `RelayLimits`.

    Attributes:
        open, limit: connections now, and how many there may be.
        visitors_open, visitors_limit: those of them that are visitors whose tunnel is known.
        pending, pending_limit: those that are neither a visitor nor a gateway yet.
        accepted_total: connections that were accepted and not refused at once. One that another worker or node has
            accepted and passed on is counted there.
        evicted_total: connections that were reset while pending, for the sake of newer ones.
    """

    open: int
    limit: int
    visitors_open: int
    visitors_limit: int
    pending: int
    pending_limit: int
    accepted_total: int
    evicted_total: int


@final
@attrs.frozen(kw_only=True)
class RelayTunnelStats:
    """One tunnel of a relay. Its counters start when the tunnel is first configured, and end when it is removed.

    Attributes:
        sessions: of its gateways that have, or had, the tunnel, and are not gone. The last one gets new visitors,
            unless it drains; with several links of a gateway, each gets some. Empty while no gateway is connected.
        streams: visitors' streams of all its services.
        services: the same for each configured service, and for each other one that had a visitor, by name. The empty
            name stands for the service of an entry with a single one. Below a wildcard, the first 256 names of a tunnel
            have counts of their own, and all others count as `*`.
        sessions_total: how often a session got the tunnel.
        resumes_total: how often a session of it went on over another connection.
        refusals_total: visitors and gateways that were refused, by reason, see `RelayStats`.
    """

    sessions: tuple[SessionStats, ...] = ()
    streams: StreamStats = attrs.field(factory=StreamStats)
    services: Mapping[str, StreamStats] = _counts()
    sessions_total: int = 0
    resumes_total: int = 0
    refusals_total: Mapping[str, int] = _counts()


@final
@attrs.frozen(kw_only=True)
class WorkerStats:
    """One worker process of `pioneer-tunnel relay --workers`. Its counters start with the process.

    Attributes:
        index: which one, from 0. A process that drains has the index of its successor.
        pid: the process.
        version: of its package, which may be newer than the parent's.
        since_unix: when counting began, in seconds since 1970.
        draining: whether it stops, since it is replaced or the relay stops.
        connections: its own.
        streams: visitors' streams that it serves.
        sessions_open: gateways' sessions that it has.
        cpu_seconds_total: processor time.
        memory_bytes: resident memory; None where the system does not tell.
    """

    index: int
    pid: int
    version: str
    since_unix: float
    draining: bool
    connections: ConnectionStats
    streams: StreamStats
    sessions_open: int
    cpu_seconds_total: float
    memory_bytes: int | None = None


@final
@attrs.frozen(kw_only=True)
class FleetStats:
    """A node of a fleet.

    Attributes:
        node: its name.
        redis_reachable: whether Redis answers, as far as is known.
        nodes: each other node of the configuration, and the shortest round trip to it of late, in seconds; None while
            there is no link to it. A link is made when it is needed.
        hops_open: visitors of this node whose streams other nodes carry to their gateways now.
        hops_served_total: visitors of other nodes that this one has carried to its gateways.
        unannounced_tunnels: tunnels whose sessions here are not, or may not be, as the other nodes know them. While
            Redis cannot be reached, it is the tunnels whose sessions have come or gone meanwhile.
        signed_tunnels: tunnels in memory that the operator has signed.
        unconfirmed_seconds: how long ago this node knew for the last time which of these are revoked; 0 while it knows;
            None if there is no operator's key.
    """

    node: str
    redis_reachable: bool
    nodes: Mapping[str, float | None] = _counts()
    hops_open: int = 0
    hops_served_total: int = 0
    unannounced_tunnels: int = 0
    signed_tunnels: int = 0
    unconfirmed_seconds: float | None = None


@final
@attrs.frozen(kw_only=True)
class RelayStats:
    """A relay. Its counters start with the `Relay`, and include tunnels that were removed since.

    Attributes:
        since_unix: when counting began, in seconds since 1970.
        draining: whether the relay stops.
        connections: of gateways and visitors.
        tunnels: by id, in the order of the configuration; after them those that an operator has signed, while they
            have a session or visitors at this relay.
        streams: visitors' streams of all tunnels.
        sessions_open: gateways' sessions, suspended ones and those that have not got their tunnel included.
        sessions_total: how often a session got its tunnel.
        resumes_total: how often a session went on over another connection.
        suspended_sessions, suspended_sessions_limit: sessions that wait for their gateway, and how many may.
        unsent_bytes, unsent_limit_bytes: bytes that all sessions hold until gateways or visitors take them, and how
            many there may be.
        refusals_total: whom the relay refused, by reason. Refusals of a known tunnel count there too.
            Connections: `connections` (of all), `connections_per_address`, `connects_per_second_per_address`,
            `visitors` (of all).
            Visitors: `unknown_host`, `no_certificate` (`acme` has none yet), `bad_request`, `access_denied`,
            `access_unavailable` (the rules cannot be checked now), `passthrough_only`, `streams_per_tunnel`,
            `opens_per_second_per_tunnel`, `gateway_away` (not connected, or without connection for too long),
            `service_away` (not offered now), `registry_away` (Redis cannot be asked for the tunnel now),
            `gateway_timeout` (it took no new visitor in time), `gateway_broke_off` (it ended the stream before it
            answered, and the visitor got a 502).
            Gateways: `auth_failed`, `busy` (the handshakes of a second are used up), `tunnel_taken`, and other
            reasons of the handshake: see docs/protocol.md.
        fleet: what a node of a fleet tells; None for a relay alone.
        workers: the processes of a relay with workers, whose sums all other fields are; empty for a relay without.
    """

    since_unix: float
    draining: bool
    connections: ConnectionStats
    tunnels: Mapping[str, RelayTunnelStats] = _counts()
    streams: StreamStats = attrs.field(factory=StreamStats)
    sessions_open: int = 0
    sessions_total: int = 0
    resumes_total: int = 0
    suspended_sessions: int = 0
    suspended_sessions_limit: int = 0
    unsent_bytes: int = 0
    unsent_limit_bytes: int = 0
    refusals_total: Mapping[str, int] = _counts()
    fleet: FleetStats | None = None
    workers: tuple[WorkerStats, ...] = ()
