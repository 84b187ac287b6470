"""The interface of a transport, which connects to a relay and delivers visitors: for transports of your own.

A transport is one async function, `Serve`; `pioneer_tunnel.open_tunnel(transport=...)` takes it.
docs/writing-a-transport.md is the guide.
"""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .interface import (
    Deliver,
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    LocalDialFailed,
    LocalDialOk,
    Replaced,
    Report,
    RoundTrip,
    Serve,
    ServicesMoved,
    Session,
    SessionRenewed,
    SpreadTold,
    Target,
    VisitorRefused,
)
from .tunnel_stream import CarriedStream

__all__ = [
    "CarriedStream",
    "Deliver",
    "Draining",
    "Event",
    "LinkLost",
    "LinkRestored",
    "LocalDialFailed",
    "LocalDialOk",
    "Replaced",
    "Report",
    "RoundTrip",
    "Serve",
    "ServicesMoved",
    "Session",
    "SessionRenewed",
    "SpreadTold",
    "Target",
    "VisitorRefused",
]

_publish(globals())
