"""`RemoteAccess` for asyncio. It runs in a Trio thread; what is here is called in an event loop."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, Final, Self, TypeVar, final

from .._async_library import need_asyncio
from .._hosts.background import run_remote_access
from .._hosts.trio_thread import Stopped, TrioThread, at_once
from .._model.session_limits import Limits
from .._model.stats import TunnelStats
from .._model.status import Status
from .._net.dialing import Dialer, dial_tcp
from .._net.network_changes import WatchNetwork
from ..asgi.interface import AsgiApp
from ..asgi.options import DEFAULTS, Options
from ..gateway import remote_access as trio_face, rpc as trio_rpc
from ..gateway.config import RemoteAccessConfig
from ..gateway.keystore import Keystore
from ..gateway.settings import Settings, SettingsFile, SettingsUpdate
from ..gateway.settings_and_key import KeyProvider
from ..gateway.snapshot import Snapshot
from ..transports.built_in import TRANSPORTS
from ..transports.interface import Serve
from ..transports.services import Services
from ..transports.tunnel_stream import TunnelStream
from .bridge import Bridge
from .calls import call, open_thread, start, task_group
from .on_asyncio import open_app_server
from .watching import StatusWatcher

__all__ = ["RemoteAccess", "RemoteAccessRpc"]

_T = TypeVar("_T")


@final
class RemoteAccess:
    """A gateway's remote access, for asyncio: `async with RemoteAccess(...) as remote_access`.

    The block is entered after the first status, not after connecting. What is said of `pioneer_tunnel.RemoteAccess`
    holds here too. Outside the block, only the properties work; everything else raises `RuntimeError`. It may be
    entered again after it has ended.

    Args:
        config: the operator's configuration.
        settings: the settings file, which other programs may write too.
        keystore: where the relay key is stored.
        key_provider: as there. It is called in the Trio thread, and so are `dial`, `transports` and `keystore`.
        app: an ASGI 3 application that is running already, and serves visitors in this event loop; by default they are
            forwarded to `config.local_addr`.
        app_options: limits for `app`.
        dial, watch_network, transports, limits, services, random, wall_clock: as there.

    Raises:
        TypeError: neither or both of `keystore` and `key_provider` are given.
    """

    def __init__(
        self,
        config: RemoteAccessConfig,
        *,
        settings: SettingsFile,
        keystore: Keystore | None = None,
        key_provider: KeyProvider | None = None,
        app: AsgiApp | None = None,
        app_options: Options = DEFAULTS,
        dial: Dialer = dial_tcp,
        watch_network: WatchNetwork | None = None,
        transports: Mapping[str, Serve] = TRANSPORTS,
        limits: Limits | None = None,
        services: Services | None = None,
        random: Random | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._inner: Final = trio_face.RemoteAccess(
            config,
            settings=settings,
            keystore=keystore,
            key_provider=key_provider,
            handler=None if app is None else self._handle,
            dial=dial,
            watch_network=watch_network,
            transports=transports,
            limits=limits,
            services=services,
            random=random,
            wall_clock=wall_clock,
        )
        self._app: Final = app
        self._app_options: Final = app_options
        self._bridge: Bridge | None = None
        self._thread: TrioThread | None = None
        self._stack: AsyncExitStack | None = None

    async def __aenter__(self) -> Self:
        """Start it. Returns after the first status.

        Raises:
            RuntimeError: it is running already, or no event loop of asyncio is running.
        """
        need_asyncio("pioneer_tunnel.aio.RemoteAccess", "pioneer_tunnel.RemoteAccess")
        if self._stack is not None:
            raise RuntimeError("this RemoteAccess is running already")
        self._stack = AsyncExitStack()
        try:
            async with AsyncExitStack() as stack:
                await self._start(stack)
                self._stack = stack.pop_all()
        except BaseException:
            self._stack = self._thread = self._bridge = None
            raise
        return self

    async def _start(self, stack: AsyncExitStack) -> None:
        stop: Callable[[], Awaitable[None]] | None = None
        if self._app is not None:
            server = await stack.enter_async_context(open_app_server(self._app, "off", self._app_options))
            self._bridge, stop = server.bridge, server.stop
        self._thread = await stack.enter_async_context(open_thread("pioneer-tunnel"))
        tasks = await stack.enter_async_context(task_group())
        running = await start(self._thread, tasks, partial(run_remote_access, remote_access=self._inner))
        stack.callback(running.cancel)
        if stop is not None:
            stack.push_async_exit(partial(_stop_after_body, stop))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Stop it. Requests at `app` get `app_options.graceful_timeout` to finish, unless the block has raised."""
        stack, thread = self._stack, self._thread
        assert stack is not None
        assert thread is not None
        try:
            if kind is GeneratorExit:  # the loop was closed under the host's task: nothing can be awaited
                thread.stop()
                return None
            return await stack.__aexit__(kind, error, traceback)
        finally:
            self._stack = self._thread = self._bridge = None

    async def _handle(self, stream: TunnelStream) -> None:
        assert self._bridge is not None
        await self._bridge.handle(stream)

    async def _call(self, work: Callable[[], Awaitable[_T]]) -> _T:
        return await call(self._running(), work)

    def _running(self) -> TrioThread:
        if self._thread is None:
            raise Stopped("this RemoteAccess is not running; use it inside its async with")
        return self._thread

    @property
    def config(self) -> RemoteAccessConfig:
        """The operator's configuration."""
        return self._inner.config

    @property
    def status(self) -> Status:
        """Where remote access stands now."""
        return self._inner.status

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return self._inner.history

    @property
    def history_dropped(self) -> int:
        """How many statuses there were before those in `history`."""
        return self._inner.history_dropped

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change. Slow watchers skip, never block.

        Ends after `stopped`.

        Raises:
            RuntimeError: it is not running.
        """
        return StatusWatcher(self._running(), self._inner._feed)

    async def settings(self) -> Settings:
        """See `pioneer_tunnel.RemoteAccess.settings`."""
        return await self._call(self._inner.settings)

    async def has_key(self) -> bool:
        """See `pioneer_tunnel.RemoteAccess.has_key`."""
        return await self._call(self._inner.has_key)

    async def snapshot(self) -> Snapshot:
        """See `pioneer_tunnel.RemoteAccess.snapshot`."""
        return await self._call(self._inner.snapshot)

    async def stats(self) -> TunnelStats:
        """What it has done and holds, as of now; see `pioneer_tunnel.RemoteAccess.stats`."""
        return await self._call(partial(at_once, self._inner.stats))

    async def apply(self, update: SettingsUpdate) -> None:
        """See `pioneer_tunnel.RemoteAccess.apply`."""
        await self._call(partial(self._inner.apply, update))

    async def configure(self, config: RemoteAccessConfig) -> None:
        """See `pioneer_tunnel.RemoteAccess.configure`."""
        await self._call(partial(self._inner.configure, config))

    async def settled(self) -> None:
        """See `pioneer_tunnel.RemoteAccess.settled`."""
        await self._call(self._inner.settled)

    async def stop(self) -> None:
        """Stop it in order, see `pioneer_tunnel.RemoteAccess.stop`. To stop it at once, leave the block."""
        await self._call(self._inner.stop)

    def retry_now(self) -> None:
        """See `pioneer_tunnel.RemoteAccess.retry_now`."""
        if self._thread is not None:
            self._thread.soon(self._inner.retry_now)

    def reopen_access_log(self) -> None:
        """See `pioneer_tunnel.RemoteAccess.reopen_access_log`."""
        if self._thread is not None:
            self._thread.soon(self._inner.reopen_access_log)


async def _stop_after_body(
    stop: Callable[[], Awaitable[None]],
    kind: type[BaseException] | None,
    _error: BaseException | None,
    _traceback: TracebackType | None,
) -> None:
    if kind is None:
        await stop()


@final
class RemoteAccessRpc:
    """The contract's JSON-RPC methods on a `RemoteAccess` of this module. See `pioneer_tunnel.RemoteAccessRpc`.

    Args:
        remote_access: the remote access to show and change.
        other_sections: returns the sections that the host adds to `settings`; called for each response.
    """

    def __init__(self, remote_access: RemoteAccess, *, other_sections: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._remote_access: Final = remote_access
        self._inner: Final = trio_rpc.RemoteAccessRpc(remote_access._inner)
        self._other_sections: Final = other_sections

    async def handle(self, method: str, params: Any = None) -> dict[str, Any]:
        """Answer a request; returns the `result` of the response.

        Raises:
            RpcError: with the code of the response, see `pioneer_tunnel.RemoteAccessRpc.handle`.
        """
        answering = call(self._remote_access._running(), partial(self._inner.handle, method, params))
        del params  # it may hold the key: a traceback that shows local variables must not show it
        result = await answering
        return {"settings": {**self._other_sections(), **result["settings"]}}

    def notifications(self) -> AsyncIterator[dict[str, Any]]:
        """The notifications for one client, from now on: one for each status that is news. Ends after `stopped`."""
        return trio_rpc.Notifications(self._remote_access.status, self._remote_access.watch())
