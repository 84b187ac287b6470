"""The ASGI server on asyncio: what `asgi.interface` asks for. Visitors come over a `Bridge` from the Trio thread."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Final, final

from .._model.log_fields import about
from ..asgi.interface import AsgiApp
from ..asgi.lifespan import Lifespan
from ..asgi.options import Options
from ..asgi.worker import Worker, open_worker
from .bridge import AsyncioWire, Bridge, Bridged
from .calls import run_beside, task_group

__all__ = ["AppServer", "open_app_server"]

_GOODBYE_TIMEOUT: Final = 3.0

_log: Final = logging.getLogger("pioneer_tunnel.asgi")


@final
class _AsyncioHost:
    event: Final = asyncio.Event
    lock: Final = asyncio.Lock
    wall_clock: Final = staticmethod(time.time)

    def within(self, seconds: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)

    def shielded_within(self, seconds: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)  # asyncio cancels once: what is awaited after that goes on

    def beside(self, work: Callable[[], Awaitable[None]]) -> AbstractAsyncContextManager[object]:
        return run_beside(work)


_HOST: Final = _AsyncioHost()


@final
class AppServer:
    """An application that serves visitors in this event loop.

    Attributes:
        bridge: takes visitors, in the Trio thread.
    """

    def __init__(self, worker: Worker, tasks: asyncio.TaskGroup) -> None:
        self.bridge: Final = Bridge(self._start, self._visitor_ended)
        self._worker: Final = worker
        self._tasks: Final = tasks
        self._running: Final[set[asyncio.Task[None]]] = set()
        self._visitors = 0
        self._no_visitors: Final = asyncio.Event()
        self._stopping = False

    def _start(self, bridged: Bridged) -> None:
        self._visitors += 1
        if self._stopping:
            bridged.socket.close()
            return
        task = self._tasks.create_task(self._serve(bridged))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, bridged: Bridged) -> None:
        wire = AsyncioWire(bridged)
        try:
            await wire.open()
        except OSError as error:
            _log.warning("a visitor was turned away: %s", error, extra=about("visitor_refused", reason=error))
        else:
            await self._worker.serve(wire, bridged.visitor)
        finally:
            wire.reset()  # does nothing after the end

    def _visitor_ended(self) -> None:
        self._visitors -= 1
        if self._stopping and not self._visitors:
            self._no_visitors.set()

    async def stop(self) -> None:
        """Take no more visitors, and let what is under way finish, for `graceful_timeout` at most; cancel the rest."""
        self._stopping = True
        self._worker.stop()
        await self._worker.wait_drained()
        self.cancel()
        if self._visitors:
            with suppress(TimeoutError):  # the Trio thread still sends what was answered
                async with asyncio.timeout(_GOODBYE_TIMEOUT):
                    await self._no_visitors.wait()

    def cancel(self) -> None:
        """Cancel what is under way, and take no more."""
        self._stopping = True
        for task in self._running:
            task.cancel()


@asynccontextmanager
async def open_app_server(app: AsgiApp, lifespan: Lifespan, options: Options) -> AsyncIterator[AppServer]:
    """Start `app`, and yield what serves visitors with it. At the end of the block all of it is cancelled.

    Raises:
        LifespanError: the application's startup or shutdown has failed, or took too long.
    """
    async with open_worker(app, lifespan, _HOST, options) as worker, task_group() as tasks:
        server = AppServer(worker, tasks)
        try:
            yield server
        finally:
            server.cancel()
