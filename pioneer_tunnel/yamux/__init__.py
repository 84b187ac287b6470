"""yamux: many streams over one link of bytes.

`connection` and `stream` are the Trio side; all else is the protocol, without I/O and without Trio. Nothing here knows
of WebSockets, relays or visitors.
"""

from __future__ import annotations

from .connection import YamuxConnection
from .flow import SendBudget
from .session import Limits, Role
from .stream import YamuxStream

__all__ = ["Limits", "Role", "SendBudget", "YamuxConnection", "YamuxStream"]
