"""Transports: ways to be a tunnel, by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from . import pioneer_relay, process, websocket
from .seam import Deliver, Event, Report, Serve, Session, Target, refuse_unusable_key

__all__ = ["TRANSPORTS", "Deliver", "Event", "Report", "Serve", "Session", "Target", "refuse_unusable_key"]

TRANSPORTS: Final[Mapping[str, Serve]] = {
    "websocket": websocket.serve,
    "tcp": pioneer_relay.serve_tcp,
    "tls": pioneer_relay.serve_tls,
    "process": process.serve,
}
"""The transports that this installation has."""
