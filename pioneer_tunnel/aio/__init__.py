"""For asyncio hosts: `open_tunnel`, `RemoteAccess` and `RemoteAccessRpc` as in `pioneer_tunnel`, and `serve` for ASGI.

    async with open_tunnel("wss://relay.example.com", key=RelayKey("..."), forward_to="127.0.0.1:8000") as tunnel:
        async for status in tunnel.watch():
            print(status.state, status.message)

The tunnel runs in a Trio thread (`_hosts.trio_thread` says why). All else that `pioneer_tunnel` has, such as keys,
errors and keystores, is the same here.

calls          calls into the thread, and their cancellation
watching       statuses
tunnel         `open_tunnel`, `serve`
remote_access  `RemoteAccess`, `RemoteAccessRpc`
bridge         visitors for applications in the event loop
on_asyncio     the server for these
"""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .remote_access import RemoteAccess, RemoteAccessRpc
from .tunnel import Tunnel, open_tunnel, serve

__all__ = ["RemoteAccess", "RemoteAccessRpc", "Tunnel", "open_tunnel", "serve"]

_publish(globals())
