"""Serves connections: request after request, until one opens a WebSocket, the visitor leaves, or the server stops."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final, final

from .exchange import After, Exchange
from .http1 import Http1
from .interface import AsgiApp, Disconnected, Host, Server, Wire
from .lifespan import Lifespan, run_lifespan
from .options import Options
from .scope import RequestRefused, Visitor
from .websocket import WebSocket, is_websocket

__all__ = ["Worker", "open_worker"]

_log: Final = logging.getLogger("pioneer_tunnel.asgi")


@asynccontextmanager
async def open_worker(app: AsgiApp, lifespan: Lifespan, host: Host, options: Options) -> AsyncIterator[Worker]:
    """Start `app` and yield what serves connections with it. At the end of the block, stop: see `Worker.stop`.

    Raises:
        LifespanError: the application's startup or shutdown has failed, or took too long.
    """
    async with run_lifespan(app, lifespan, host, options) as state:
        worker = Worker(Server(app=app, host=host, options=options, state=state, stopping=host.event()))
        try:
            yield worker
        finally:
            worker.stop()


@final
class Worker:
    """Serves connections with an application that has been started."""

    def __init__(self, server: Server) -> None:
        self._server: Final = server
        self._connections: Final[set[Http1]] = set()
        self._drained = server.host.event()

    async def serve(self, wire: Wire, visitor: Visitor) -> None:
        """Serve a connection until it ends. Raises only what cancels it."""
        http = Http1(wire, self._server.host, self._server.options)
        http.closing = self._server.stopping.is_set()
        self._connections.add(http)
        try:
            with suppress(Disconnected):
                if await self._serve(http, visitor) is After.CLOSE:
                    await wire.close(drain=http.more_may_come)
        except Exception:  # noqa: BLE001  # it must not affect other visitors
            _log.exception("an unforeseen failure in a connection, which is reset")
        finally:
            wire.reset()  # does nothing after `close`
            self._connections.remove(http)
            if not self._connections:
                self._drained.set()

    async def _serve(self, http: Http1, visitor: Visitor) -> After:
        after = After.NEXT
        while after is After.NEXT:
            try:
                request = await http.read_head()
                if request is None:
                    return After.CLOSE
                opens_websocket = is_websocket(request)
            except RequestRefused as refusal:
                _log.debug("a request is refused with status %d: %s", refusal.status, refusal)
                await http.refuse(refusal.status, refusal.headers)
                return After.CLOSE
            if opens_websocket:
                return await WebSocket(http, request, visitor, self._server).run()
            after = await Exchange(http, request, visitor, self._server).run()
            if after is After.NEXT:
                http.protocol.start_next_cycle()
        return after

    def stop(self) -> None:
        """Close idle connections, and each other one after its answer. WebSockets are closed with code 1012."""
        self._server.stopping.set()
        for http in self._connections:
            http.closing = True
            if http.idle:
                http.wire.interrupt()

    async def wait_drained(self) -> None:
        """Wait until there is no connection, for `graceful_timeout` at most."""
        with suppress(TimeoutError):
            async with self._server.host.within(self._server.options.graceful_timeout):
                while self._connections:
                    self._drained = self._server.host.event()
                    await self._drained.wait()
