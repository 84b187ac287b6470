"""A tunnel for asyncio. It runs in a Trio thread; what is here is called in an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final, Unpack, final

import trio

from .._async_library import need_asyncio
from .._hosts.background import Forwards, Serves, run_tunnel
from .._hosts.trio_thread import Stopped, TrioThread, at_once
from .._model.addresses import LocalAddress, RelayAddress
from .._model.exception_groups import lone_error_bare
from .._model.keys import RelayKey
from .._model.stats import TunnelStats
from .._model.status import Status
from .._net.tls.certificate import Certificate
from ..access.rules import Access
from ..asgi.interface import AsgiApp
from ..asgi.lifespan import Lifespan
from ..asgi.options import DEFAULTS, Options
from ..transports.tunnel_stream import Handler, TunnelStream
from ..tunnel import tunnel as trio_face
from ..tunnel.accepting import accept_visitors
from ..tunnel.forward import ForwardedHeaders, LocalServers, ProxyProtocol, RequestIds
from ..tunnel.options import TunnelOptions
from ..tunnel.visitor_tls import with_certificate
from .bridge import Bridge
from .calls import call, open_thread, start, task_group
from .on_asyncio import open_app_server
from .watching import StatusWatcher

__all__ = ["Tunnel", "open_tunnel", "serve"]


@final
class Tunnel:
    """A tunnel, seen from asyncio. Made by `open_tunnel`; its methods work in the event loop that opened it."""

    def __init__(self, thread: TrioThread, tunnel: trio_face.Tunnel) -> None:
        self._thread: Final = thread
        self._tunnel: Final = tunnel

    @property
    def status(self) -> Status:
        """Where the tunnel stands now."""
        return self._tunnel.status

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return self._tunnel.history

    @property
    def history_dropped(self) -> int:
        """How many statuses there were before those in `history`."""
        return self._tunnel.history_dropped

    @property
    def public_url(self) -> str | None:
        """The URL for visitors, as the relay reports it; None before the first connect."""
        return self._tunnel.public_url

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change. Slow watchers skip, never block.

        Ends after `stopped`, when the block of `open_tunnel` has ended.
        """
        return StatusWatcher(self._thread, self._tunnel._feed)

    async def wait_connected(self) -> Status:
        """Wait until the tunnel is up. The tunnel retries without a deadline; set one with `asyncio.timeout`.

        Raises:
            TunnelError: the tunnel has failed for good.
            RuntimeError: it was closed.
        """
        try:
            return await call(self._thread, self._tunnel.wait_connected)
        except trio.ClosedResourceError as error:
            raise Stopped(str(error)) from None

    async def stats(self) -> TunnelStats:
        """What it has done and holds, as of now; see `pioneer_tunnel.Tunnel.stats`."""
        return await call(self._thread, partial(at_once, self._tunnel.stats))

    async def drain(self, grace: float = trio_face.STOP_GRACE) -> None:
        """Stop in order: take no more visitors, wait until those who are there have gone, and disconnect.

        See `pioneer_tunnel.Tunnel.drain`. The block of `open_tunnel` goes on.

        Args:
            grace: seconds that visitors have (default 5).
        """
        await call(self._thread, partial(self._tunnel.drain, grace))

    def retry_now(self) -> None:
        """Retry now, if the tunnel waits before a retry; if it is up, check the link. See `pioneer_tunnel.Tunnel`."""
        self._thread.soon(self._tunnel.retry_now)

    def __repr__(self) -> str:
        return repr(self._tunnel)


@asynccontextmanager
async def open_tunnel(
    relay: str | RelayAddress | Sequence[str | RelayAddress],
    *,
    key: RelayKey,
    forward_to: str | LocalAddress | LocalServers | None = None,
    proxy_protocol: ProxyProtocol | None = None,
    forwarded_headers: ForwardedHeaders | None = None,
    host_header: str | None = None,
    request_id: RequestIds | None = None,
    raw_services: Collection[str] = (),
    access: Access | Mapping[str, Access | None] | None = None,
    app: AsgiApp | None = None,
    app_options: Options = DEFAULTS,
    certificate: Certificate | None = None,
    **options: Unpack[TunnelOptions],
) -> AsyncIterator[Tunnel]:
    """Keep a tunnel to `relay` open for the length of an `async with`, in a thread of its own.

    The block is entered without waiting for the relay (`Tunnel.wait_connected` waits). Its visitors go to `forward_to`,
    or to `app`, or to the application of `serve`; without any of these they wait.

    When the tunnel fails for good, the block goes on: `Tunnel.status` says why, and `Tunnel.wait_connected` raises. An
    exception of the block comes out as it is. A bug in the tunnel's own task cancels the block and comes out.

    On exit, and when the block is cancelled, the tunnel says goodbye to the relay, for a second at most. Requests that
    `app` is working on get `app_options.graceful_timeout` before that, unless the block is cancelled or has raised.

    Args:
        relay: as for `pioneer_tunnel.open_tunnel`.
        key: as there.
        forward_to: a local server, which gets the visitors' connections: `host:port`, `unix:/path/to/socket`,
            `https://host:port`, or an address; or a mapping of services to such, for example a `Services`. It is also
            what the status reports on, as `local` and `services` are there.
        proxy_protocol: `"v2"` for a PROXY header before each of these connections; None for none (default).
        forwarded_headers: `"set"` for headers that name the visitor in each HTTP request, as for
            `pioneer_tunnel.forward`; None for none (default).
        host_header: the Host that the local server gets; None (default) for the visitor's.
        request_id: `"set"` or `"keep"` for an X-Request-ID in each HTTP request, as for `forward`; None (default) for
            none.
        raw_services: the names of services that are not HTTP, whose bytes pass unchanged.
        access: who may reach the local server, as for `pioneer_tunnel.forward`; None (default) admits everybody.
        app: an ASGI 3 application that is running already, and so its lifespan is not run: for the lifespan of
            FastAPI or Starlette. It serves visitors in this event loop.
        app_options: limits for `app`.
        certificate: ends visitors' TLS, where the relay passes it through; None (default) where the relay ends it.
        **options: as for `pioneer_tunnel.open_tunnel`. Functions among them are called in the Trio thread.

    Raises:
        InvalidSettingsError: an address, identity, key or file that cannot be used.
        RuntimeError: no event loop of asyncio is running.
        TypeError: both `forward_to` and `app` are given.
        UnsupportedTransportError: there is no transport of that name, or the WebSocket engine is not installed.
    """
    need_asyncio("pioneer_tunnel.aio.open_tunnel", "pioneer_tunnel.open_tunnel")
    if forward_to is not None and app is not None:
        raise TypeError("visitors go to forward_to or to app, not to both")
    async with AsyncExitStack() as stack:
        serves: Serves | Forwards | None = None
        if forward_to is not None:
            serves = Forwards(
                forward_to, proxy_protocol, forwarded_headers, host_header, request_id, raw_services, access
            )
        elif app is not None:
            server = await stack.enter_async_context(open_app_server(app, "off", app_options))
            serves = partial(_bridged, server.bridge)
        thread = await stack.enter_async_context(open_thread("pioneer-tunnel"))
        tasks = await stack.enter_async_context(task_group())
        opened: list[Tunnel] = []

        async def run(started: Callable[[], None]) -> None:
            def note(tunnel: trio_face.Tunnel) -> None:
                opened.append(Tunnel(thread, tunnel))
                started()

            await run_tunnel(note, relay, serves, key=key, certificate=certificate, **options)

        running = await start(thread, tasks, run)
        try:
            yield opened[0]
            if app is not None:
                await server.stop()
        except GeneratorExit:  # the loop was closed under the host's task: nothing can be awaited
            thread.stop()
            stack.pop_all()
            raise
        running.cancel()


def _bridged(bridge: Bridge, tunnel: trio_face.Tunnel) -> Handler:
    async def handler(stream: TunnelStream) -> None:
        await bridge.handle(stream, public_url=tunnel.public_url)

    return handler


async def serve(
    app: AsgiApp,
    tunnel: Tunnel,
    *,
    lifespan: Lifespan = "auto",
    options: Options = DEFAULTS,
    certificate: Certificate | None = None,
    shutdown_trigger: Callable[[], Awaitable[object]] | None = None,
) -> None:
    """Serve an ASGI application to the visitors of a tunnel, in this event loop, without a local port.

    It returns after a graceful stop, which begins when `shutdown_trigger` returns. Then no visitor is accepted; idle
    connections are closed, the others after the answer under way, WebSockets with code 1012. What is not over after
    `options.graceful_timeout` is cancelled, and its visitors get a reset. If `serve` is cancelled, that happens at
    once. The application's shutdown comes last, in both cases.

    Args:
        app: an ASGI 3 application for asyncio, such as one of FastAPI.
        tunnel: from `open_tunnel`, without `forward_to` and `app`. It stays open.
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
    need_asyncio("pioneer_tunnel.aio.serve", "pioneer_tunnel.asgi.serve")
    async with open_app_server(app, lifespan, options) as server, task_group() as tasks:
        accepting = trio.CancelScope()

        async def accept() -> None:
            trio_tunnel = tunnel._tunnel
            handler = with_certificate(_bridged(server.bridge, trio_tunnel), certificate or trio_tunnel.certificates)
            with lone_error_bare():
                async with trio.open_nursery() as nursery:
                    with accepting:
                        await accept_visitors(trio_tunnel, handler, nursery)

        visitors = tasks.create_task(call(tunnel._thread, accept))
        if shutdown_trigger is not None:
            trigger = tasks.create_task(_until(shutdown_trigger))
            await asyncio.wait([visitors, trigger], return_when=asyncio.FIRST_COMPLETED)
            tunnel._thread.soon(accepting.cancel)
            await server.stop()
            trigger.cancel()
            visitors.cancel()


async def _until(trigger: Callable[[], Awaitable[object]]) -> None:
    await trigger()
