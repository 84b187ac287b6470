"""The metrics of a gateway: its status and `stats()` as metric families. docs/monitoring.md lists them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from prometheus_client.metrics_core import Metric, StateSetMetricFamily

from .._model.stats import StreamStats, TunnelStats
from .._model.status import ErrorKind, State, Status
from .certificate_metrics import certificate_families
from .exposition import Measure, families, last_round_trip

__all__ = ["ERROR", "GATEWAY", "PREFIX", "STATE", "STREAMS", "gateway_families"]

PREFIX: Final = "pioneer_tunnel_gateway_"

STATE: Final = ("state", "The state of the tunnel: 1 for one of them.")
ERROR: Final = ("error", "What is wrong with the tunnel: 1 for one error kind, or for none.")

GATEWAY: Final[tuple[Measure[TunnelStats], ...]] = (
    Measure("since_timestamp_seconds", "When counting began, since 1970.", lambda stats: stats.since_unix),
    Measure("sessions_open", "Sessions that are up, suspended ones included.", lambda stats: len(stats.sessions)),
    Measure(
        "sessions_suspended",
        "Sessions whose connection is lost, and which both ends keep.",
        lambda stats: sum(session.suspended for session in stats.sessions),
    ),
    Measure(
        "sessions_draining",
        "Sessions whose new visitors go to another one.",
        lambda stats: sum(session.draining for session in stats.sessions),
    ),
    Measure("round_trip_seconds", "The last round trip to the relay.", lambda stats: last_round_trip(stats.sessions)),
    Measure(
        "unread_bytes",
        "Bytes that have come and that nobody has read.",
        lambda stats: sum(session.unread_bytes or 0 for session in stats.sessions),
    ),
    Measure(
        "unsent_bytes",
        "Bytes that are held until the relay takes them.",
        lambda stats: sum(session.unsent_bytes or 0 for session in stats.sessions),
    ),
    Measure(
        "attempts_total", "How often the transport was started to make a session.", lambda stats: stats.attempts_total
    ),
    Measure("sessions_total", "Sessions that came up.", lambda stats: stats.sessions_total),
    Measure(
        "losses_total", "How often a session, or the connection below it, was lost.", lambda stats: stats.losses_total
    ),
    Measure("resumes_total", "How often a session went on over another connection.", lambda stats: stats.resumes_total),
    Measure("failures_total", "Attempts and sessions that failed.", lambda stats: stats.failures_total, "error_kind"),
    Measure("refusals_total", "Visitors' streams that were not served.", lambda stats: stats.refusals_total, "reason"),
)
"""Of the tunnel."""

STREAMS: Final[tuple[Measure[StreamStats], ...]] = (
    Measure("streams_open", "Visitors' streams now.", lambda stats: stats.open),
    Measure("streams_opened_total", "Visitors' streams that were opened.", lambda stats: stats.opened_total),
    Measure(
        "from_visitors_bytes_total", "Bytes that came from visitors.", lambda stats: stats.from_visitors_bytes_total
    ),
    Measure("to_visitors_bytes_total", "Bytes that went to visitors.", lambda stats: stats.to_visitors_bytes_total),
)
"""Of each service."""


def gateway_families(status: Status, stats: TunnelStats) -> Iterator[Metric]:
    """The metric families of a gateway."""
    name, words = STATE
    yield StateSetMetricFamily(PREFIX + name, words, {str(state): state is status.state for state in State})
    name, words = ERROR
    yield StateSetMetricFamily(PREFIX + name, words, {str(kind): kind is status.error_kind for kind in ErrorKind})
    yield from families(PREFIX, GATEWAY, [((), stats)])
    services = [((service,), streams) for service, streams in stats.services.items()]
    yield from families(PREFIX, STREAMS, services, ["service"])
    yield from certificate_families(PREFIX, status.certificates or {})
