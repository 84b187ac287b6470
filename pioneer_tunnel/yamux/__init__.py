"""yamux: many streams over one link of bytes.

`connection`, `driver`, `stream` and `stream_leg` use Trio. All other modules are the protocol, without I/O and without
Trio. Nothing here knows about WebSockets, relays or visitors.
"""

from __future__ import annotations

from .._model.session_limits import Limits
from .connection import YamuxConnection
from .flow import SendBudget
from .session import Role
from .stream import YamuxStream

__all__ = ["Limits", "Role", "SendBudget", "YamuxConnection", "YamuxStream"]
