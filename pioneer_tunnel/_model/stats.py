"""What a tunnel or a relay has done and holds: snapshots of its counts, as frozen values.

A field that ends in `_total` is a counter: it only grows while its object lives, and starts at 0 with a new object. All
other numbers are gauges. Each is named for what it counts, so that an exporter of metrics needs no table.

Both ends say the direction as visitors see it: bytes from visitors, and bytes to visitors. A byte of a visitor's stream
counts once; PROXY headers, frames, WebSocket and TLS of the link do not count.

`cattrs.unstructure` makes objects for JSON of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import attrs

__all__ = ["SessionStats", "StreamStats", "TunnelStats"]


def _counts() -> Any:
    """A field of counts by name. It is a dict of its own in each snapshot."""
    return attrs.field(factory=dict, hash=False)


@final
@attrs.frozen(kw_only=True)
class StreamStats:
    """The visitors' streams of a service, of a tunnel, or of a relay. One stream carries one connection of a visitor.

    At a relay a connection that is kept for requests of several hosts has a stream for each change of the host.

    Attributes:
        open: streams now.
        opened_total: streams that were opened, those that are open included.
        from_visitors_bytes_total: bytes that came from visitors.
        to_visitors_bytes_total: bytes that went to visitors.
    """

    open: int = 0
    opened_total: int = 0
    from_visitors_bytes_total: int = 0
    to_visitors_bytes_total: int = 0

    def __add__(self, other: StreamStats) -> StreamStats:
        """The sum of both."""
        return StreamStats(
            open=self.open + other.open,
            opened_total=self.opened_total + other.opened_total,
            from_visitors_bytes_total=self.from_visitors_bytes_total + other.from_visitors_bytes_total,
            to_visitors_bytes_total=self.to_visitors_bytes_total + other.to_visitors_bytes_total,
        )


@final
@attrs.frozen(kw_only=True)
class SessionStats:
    """A session between a gateway and a relay. Its counters end with it.

    Attributes:
        id: the relay's name for the session; None where the protocol has none.
        since_unix: when it came up, in seconds since 1970. A resume does not change that.
        peer: where the other end's packets come from, as `host:port`; None if that is unknown. It is that of the
            last connection, and a proxy's if there is one.
        agent: the gateway's program and version, as it says itself; None at the gateway.
        instance: the gateway's name for itself, which tells it from others with the same key; None if it has none.
        engine: the WebSocket engine of this end; None with another transport.
        extensions: the extensions of the protocol that are in force, in the order of the alphabet.
        suspended: True while its connection is lost and both ends keep the session.
        draining: True when new visitors go, or shall soon go, to another session.
        round_trip_ms: the shortest round trip that was measured, in milliseconds; None before the first. When several
            in a row take more than twice as long, it is measured again.
        resumes_total: how often it went on over another connection.
        streams_open: streams that are not closed in both directions.
        unread_bytes, unread_limit_bytes: bytes that have come and were not read, and how many there may be.
        unsent_bytes, unsent_limit_bytes: bytes that this end holds until the other one takes them, those that it would
            send again after a resume included, and how many there may be.
    """

    id: str | None = None
    since_unix: float = 0.0
    peer: str | None = None
    agent: str | None = None
    instance: str | None = None
    engine: str | None = None
    extensions: tuple[str, ...] = ()
    suspended: bool = False
    draining: bool = False
    round_trip_ms: float | None = None
    resumes_total: int = 0
    streams_open: int | None = None
    unread_bytes: int | None = None
    unread_limit_bytes: int | None = None
    unsent_bytes: int | None = None
    unsent_limit_bytes: int | None = None


@final
@attrs.frozen(kw_only=True)
class TunnelStats:
    """A gateway's side of a tunnel. Its counters start with the `Tunnel` or `RemoteAccess`, and go on over reconnects.

    Attributes:
        since_unix: when counting began, in seconds since 1970.
        sessions: those that are up, suspended ones included. The last one of a link gets new visitors; others drain.
        streams: visitors' streams of all services.
        services: the same for each service that had a visitor, by name. The empty name stands for the tunnel's first
            service, where the relay does not name it. Services that are offered no more keep their counts.
        attempts_total: how often the transport was started to make a session. An attempt to restore a lost connection
            below a session does not count.
        sessions_total: sessions that came up. All but the first one are reconnects.
        losses_total: how often a session, or the connection below it, was lost. Ends that a relay asks for, and those
            of the host itself, do not count.
        resumes_total: how often a session went on over another connection.
        failures_total: attempts and sessions that failed, by `ErrorKind`.
        refusals_total: visitors' streams that this end did not serve, by reason: `backlog_full` (too many waited for
            `accept`, or the tunnel takes no more), `bad_header` (the relay's header makes no sense),
            `unknown_service` (no such service is offered here), `local_unavailable` (the local gateway did not
            answer), `access_denied` (the access rules), `bad_request` (a request could not be followed).
    """

    since_unix: float
    sessions: tuple[SessionStats, ...] = ()
    streams: StreamStats = attrs.field(factory=StreamStats)
    services: Mapping[str, StreamStats] = _counts()
    attempts_total: int = 0
    sessions_total: int = 0
    losses_total: int = 0
    resumes_total: int = 0
    failures_total: Mapping[str, int] = _counts()
    refusals_total: Mapping[str, int] = _counts()
