"""yamux: many streams over one link of bytes.

`frames`, `flow`, `outbox` and `session` are the protocol, without I/O and without Trio; `connection` and `stream`
are its Trio side. They know nothing of WebSockets, relays or visitors.
"""

from __future__ import annotations

from .connection import YamuxConnection
from .session import Limits, Role
from .stream import YamuxStream

__all__ = ["Limits", "Role", "YamuxConnection", "YamuxStream"]
