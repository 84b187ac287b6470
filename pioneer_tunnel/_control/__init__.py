"""The control socket: how a command speaks to a running gateway or relay of the same user, on the same machine.

It is a Unix socket in a folder that only its owner can enter. Both ends check who the other one is. JSON-RPC 2.0 goes
over it, one message on each line.

`hold` makes a process the only one that serves a folder, `serve_control` is the server, and `connect` the client.
"""

from __future__ import annotations

from .client import ControlClient, connect
from .folder import AlreadyServedError, hold
from .server import serve_control

__all__ = ["AlreadyServedError", "ControlClient", "connect", "hold", "serve_control"]
