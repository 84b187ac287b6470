"""For programs without an event loop: Flask, Django, scripts. A tunnel runs in a thread of its own.

    with open_tunnel("wss://relay.example.com", key=RelayKey("..."), forward_to="127.0.0.1:5000") as tunnel:
        print(tunnel.wait_connected(timeout=30).public_url)

Methods may be called from any thread but the tunnel's own, in which `dial` and other functions of the host are called.
Ctrl-C interrupts a method that waits. All else that `pioneer_tunnel` has, such as keys and errors, is the same here.

runner         the thread, and calls into it
tunnel         `open_tunnel`
remote_access  `RemoteAccess`, `RemoteAccessRpc`
"""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .remote_access import RemoteAccess, RemoteAccessRpc
from .tunnel import Tunnel, open_tunnel

__all__ = ["RemoteAccess", "RemoteAccessRpc", "Tunnel", "open_tunnel"]

_publish(globals())
