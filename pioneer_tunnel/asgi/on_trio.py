"""The ASGI server on Trio: what `interface` asks for, and the loop that accepts visitors."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, final

import trio

from .._async_library import need_trio
from .._model.exception_groups import lone_error_bare, open_tasks_beside_body
from .._net.closing import close_after_answer
from .._net.tls.certificate import Certificate
from ..transports.tunnel_stream import Handler, TunnelStream
from ..tunnel.accepting import accept_visitors
from ..tunnel.tunnel import Tunnel
from ..tunnel.visitor_tls import with_certificate
from .interface import AsgiApp, Disconnected, Interrupted
from .lifespan import Lifespan
from .options import DEFAULTS, Options
from .scope import Visitor
from .worker import open_worker

__all__ = ["HOST", "open_handler", "serve", "visitor_of"]

_READ_SIZE: Final = 64 * 1024


@final
class _TrioHost:
    event: Final = trio.Event
    lock: Final = trio.Lock
    wall_clock: Final = staticmethod(time.time)

    @asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError:
            raise TimeoutError from None

    @asynccontextmanager
    async def shielded_within(self, seconds: float) -> AsyncIterator[None]:
        try:
            with trio.fail_after(seconds, shield=True):
                yield
        except trio.TooSlowError:
            raise TimeoutError from None

    def beside(self, work: Callable[[], Awaitable[None]]) -> AbstractAsyncContextManager[object]:
        return _beside(work)


@asynccontextmanager
async def _beside(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    scope = trio.CancelScope(shield=True)

    async def run() -> None:
        with scope:
            await work()

    async with open_tasks_beside_body() as nursery:
        nursery.start_soon(run)
        try:
            yield
        finally:
            scope.cancel()


@final
class _TrioWire:
    def __init__(self, stream: TunnelStream) -> None:
        self._stream: Final = stream
        self._waiting: trio.CancelScope | None = None

    async def receive(self, seconds: float | None = None) -> bytes:
        scope = trio.CancelScope() if seconds is None else trio.move_on_after(seconds)
        self._waiting = scope
        try:
            with scope:
                return bytes(await self._stream.receive_some(_READ_SIZE))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected("the visitor has gone") from error
        finally:
            self._waiting = None
        raise Interrupted

    def interrupt(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Disconnected("the visitor has gone") from error

    async def close(self, *, drain: bool) -> None:
        await (close_after_answer(self._stream) if drain else self._stream.aclose())

    def reset(self) -> None:
        self._stream.reset()


HOST: Final = _TrioHost()


def visitor_of(stream: TunnelStream, public_url: str | None = None) -> Visitor:
    """What the scope says of a visitor. The relay says whether it used TLS; if not, the tunnel's public URL does."""
    secure = stream.tls if stream.tls is not None else (public_url or "").startswith("https:")
    return Visitor(stream.visitor, stream.proxy_header.local, "https" if secure else "http")


@asynccontextmanager
async def open_handler(
    app: AsgiApp, *, lifespan: Lifespan = "auto", options: Options = DEFAULTS
) -> AsyncIterator[Handler]:
    """Start an ASGI application, and yield a handler of visitors' streams: for `RemoteAccess(handler=...)`.

    At the end of the block, requests under way get `options.graceful_timeout` to finish, if they are not cancelled by
    then. The application is shut down after that, also when the block was cancelled.

    Args:
        app: an ASGI 3 application for Trio.
        lifespan: whether the application's lifespan is run, see `Lifespan`.
        options: the limits.

    Raises:
        LifespanError: the application's startup or shutdown has failed, or took too long.
        ValueError: there is no such `lifespan`.
    """
    need_trio("pioneer_tunnel.asgi.open_handler", "pioneer_tunnel.aio.serve")
    async with open_worker(app, lifespan, HOST, options) as worker:

        async def handler(stream: TunnelStream) -> None:
            await worker.serve(_TrioWire(stream), visitor_of(stream))

        yield handler
        worker.stop()
        await worker.wait_drained()


async def serve(
    app: AsgiApp,
    tunnel: Tunnel,
    *,
    lifespan: Lifespan = "auto",
    options: Options = DEFAULTS,
    certificate: Certificate | None = None,
    shutdown_trigger: Callable[[], Awaitable[object]] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an ASGI application to the visitors of a tunnel, without a local port.

    It returns after a graceful stop, which begins when `shutdown_trigger` returns, or when the tunnel is closed by
    `Tunnel.aclose`. Then no visitor is accepted; idle connections are closed, the others after the answer under way,
    WebSockets with code 1012. What is not over after `options.graceful_timeout` is cancelled, and its visitors get a
    reset. If `serve` is cancelled, that happens at once. The application's shutdown comes last, in both cases.

    Args:
        app: an ASGI 3 application for Trio. For one for asyncio there is `pioneer_tunnel.aio.serve`.
        tunnel: from `open_tunnel`. It stays open.
        lifespan: whether the application's lifespan is run: `"auto"` (default), unless the application raises when it
            is asked to; `"on"`, and an application that raises is an error; `"off"`.
        options: the limits.
        certificate: ends visitors' TLS, where the relay passes it through; None (default) where the relay ends it.
        shutdown_trigger: an async function; the graceful stop begins when it returns. For example, `event.wait`.

    Raises:
        LifespanError: the application's startup or shutdown has failed, or took too long.
        TunnelError: the tunnel has failed for good.
        ValueError: there is no such `lifespan`.
    """
    need_trio("pioneer_tunnel.asgi.serve", "pioneer_tunnel.aio.serve")
    with lone_error_bare():
        async with open_worker(app, lifespan, HOST, options) as worker, trio.open_nursery() as nursery:
            accepting = trio.CancelScope()

            async def stop_when_triggered(trigger: Callable[[], Awaitable[object]]) -> None:
                await trigger()
                accepting.cancel()

            if shutdown_trigger is not None:
                nursery.start_soon(stop_when_triggered, shutdown_trigger)
            task_status.started()

            async def handler(stream: TunnelStream) -> None:
                await worker.serve(_TrioWire(stream), visitor_of(stream, tunnel.public_url))

            with accepting:
                await accept_visitors(tunnel, with_certificate(handler, certificate or tunnel.certificates), nursery)
            worker.stop()
            await worker.wait_drained()
            nursery.cancel_scope.cancel()
