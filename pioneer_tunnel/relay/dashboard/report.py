"""What the operator's page shows: `Relay.stats` and its history, as an object for JSON. No key is among it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import attrs

from ..._model.stats import SessionStats
from ..config import RelayConfig
from ..stats import RelayStats, RelayTunnelStats
from ..tunnels import TunnelEntry, each_address
from .history import INTERVAL, History, Traffic

__all__ = ["TUNNELS_SHOWN", "report"]

TUNNELS_SHOWN: Final = 200
"""Tunnels in one report: the busiest ones, and after them those with visitors or a gateway."""


def report(config: RelayConfig, stats: RelayStats, history: History, now: float) -> dict[str, Any]:
    """The report of now.

    Args:
        config: of the relay.
        stats: of now.
        history: up to now.
        now: in seconds since 1970.
    """
    entries = {entry.id: entry for entry in config.tunnels}
    busy = history.busy()

    def rank(tunnel_id: str) -> tuple[int, int, bool]:
        tunnel = stats.tunnels[tunnel_id]
        return busy[tunnel_id], tunnel.streams.open, bool(tunnel.sessions)

    shown = sorted(stats.tunnels, key=rank, reverse=True)[:TUNNELS_SHOWN]
    whole = attrs.asdict(stats, filter=attrs.filters.exclude("tunnels", "refusals_total"))
    samples = history.refusals()
    return {
        **whole,
        "id": config.id,
        "now_unix": now,
        "interval": INTERVAL,
        "traffic": _series(history.traffic()),
        "tunnels_total": len(stats.tunnels),
        "tunnels_connected": sum(bool(tunnel.sessions) for tunnel in stats.tunnels.values()),
        "tunnels": [_tunnel(name, entries.get(name), stats.tunnels[name], history) for name in shown],
        "refusals": [
            {"reason": reason, "total": total, "recent": samples.get(reason, [])}
            for reason, total in sorted(stats.refusals_total.items())
        ],
    }


def _tunnel(tunnel_id: str, entry: TunnelEntry | None, stats: RelayTunnelStats, history: History) -> dict[str, Any]:
    """One tunnel. It has no entry if it is not of the file: an operator has signed it."""
    return {
        "id": tunnel_id,
        "addresses": [
            str(address)
            for route in (() if entry is None else entry.routes)
            for address in ([*each_address(route.bind_addr)] if route.url is None else [route.url])
        ],
        "sessions": [_session(session) for session in stats.sessions],
        "streams": attrs.asdict(stats.streams),
        "refusals": sum(stats.refusals_total.values()),
        "traffic": _series(history.traffic_of(tunnel_id)),
    }


def _session(session: SessionStats) -> dict[str, Any]:
    shown = ("id", "since_unix", "peer", "agent", "suspended", "draining", "round_trip_ms", "resumes_total")
    return {name: getattr(session, name) for name in shown}


def _series(samples: Sequence[Traffic]) -> dict[str, list[int]]:
    return {
        "from_visitors": [sample.from_visitors for sample in samples],
        "to_visitors": [sample.to_visitors for sample in samples],
    }
