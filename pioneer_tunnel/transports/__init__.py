"""Transports: ways to be a tunnel, by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from . import native
from .interface import Deliver, Event, Report, Serve, Session, Target, refuse_unusable_key
from .process import program
from .rathole import control_channel

__all__ = ["TRANSPORTS", "Deliver", "Event", "Report", "Serve", "Session", "Target", "refuse_unusable_key"]

TRANSPORTS: Final[Mapping[str, Serve]] = {
    "websocket": native.serve,
    "tcp": control_channel.serve_tcp,
    "tls": control_channel.serve_tls,
    "process": program.serve,
}
"""The transports that this installation has."""
