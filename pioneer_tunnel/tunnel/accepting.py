"""Starts a handler for each visitor of a tunnel."""

from __future__ import annotations

import trio

from ..transports.tunnel_stream import Handler
from .tunnel import Tunnel

__all__ = ["accept_visitors"]


async def accept_visitors(tunnel: Tunnel, handler: Handler, nursery: trio.Nursery) -> None:
    """Start `handler` in `nursery` for each visitor, until the tunnel is closed.

    `trio.serve_listeners` does more: it resets a stream whose handler has returned. This is for handlers that close
    their streams themselves, and never raise.

    Raises:
        TunnelError: the tunnel has failed for good.
    """
    while True:
        try:
            stream = await tunnel.accept()
        except trio.ClosedResourceError:
            return
        nursery.start_soon(handler, stream)
