"""Serves an ASGI application straight from a tunnel, in Trio, without a local port.

    async with open_tunnel("wss://relay.example.com", key=RelayKey("...")) as tunnel:
        await serve(app, tunnel)

HTTP/1.1 and WebSocket, by h11 and wsproto. The scope has the visitor's address and scheme, as the relay attests them.
The logic awaits only what `interface` names, so that `pioneer_tunnel.aio` serves applications for asyncio with it.

interface      what the logic needs: a connection, and the primitives of an async library
options        timeouts and limits
scope          the ASGI scope of a request
http1          heads of requests, framing, refusals
exchange       a request, the application, and its answer
websocket      a WebSocket
lifespan       startup and shutdown of the application
worker         connections, and how they are stopped
on_trio        Trio
"""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .interface import AsgiApp
from .lifespan import Lifespan, LifespanError
from .on_trio import open_handler, serve
from .options import Options

__all__ = ["AsgiApp", "Lifespan", "LifespanError", "Options", "open_handler", "serve"]

_publish(globals())
