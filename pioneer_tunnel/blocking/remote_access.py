"""`RemoteAccess` for programs without an event loop."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, Final, Self, TypeVar, final

from .._hosts.background import run_remote_access
from .._hosts.trio_thread import Stopped, at_once
from .._model.session_limits import Limits
from .._model.stats import TunnelStats
from .._model.status import Status
from .._net.dialing import Dialer, dial_tcp
from .._net.network_changes import WatchNetwork
from ..gateway import remote_access as trio_face, rpc as trio_rpc
from ..gateway.config import RemoteAccessConfig
from ..gateway.keystore import Keystore
from ..gateway.settings import Settings, SettingsFile, SettingsUpdate
from ..gateway.settings_and_key import KeyProvider
from ..gateway.snapshot import Snapshot
from ..transports.built_in import TRANSPORTS
from ..transports.interface import Serve
from ..transports.services import Services
from .runner import OnStatus, Runner

__all__ = ["RemoteAccess", "RemoteAccessRpc"]

_T = TypeVar("_T")


@final
class RemoteAccess:
    """A gateway's remote access, in a thread of its own: from `start` to `stop`, or in a `with`.

    What is said of `pioneer_tunnel.RemoteAccess` holds here too. While it is not running, only the properties work;
    everything else raises `RuntimeError`. It may be started again after it has ended.

    Args:
        config: the operator's configuration.
        settings: the settings file, which other programs may write too.
        keystore: where the relay key is stored.
        key_provider: as there. It is called in the Trio thread, and so are `dial`, `transports` and `keystore`.
        on_status: gets the status at the start, and the newest after each change, in a thread of its own; a function,
            or the `put` of a queue. What it raises is logged.
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
        on_status: OnStatus | None = None,
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
            dial=dial,
            watch_network=watch_network,
            transports=transports,
            limits=limits,
            services=services,
            random=random,
            wall_clock=wall_clock,
        )
        self._on_status: Final = on_status
        self._runner: Runner | None = None

    def start(self) -> None:
        """Start it. Returns after the first status, not after connecting.

        Raises:
            RuntimeError: it is running already.
        """
        if self._runner is not None:
            raise RuntimeError("this RemoteAccess is running already")
        runner = Runner(lambda: self._inner._feed)
        runner.start(partial(run_remote_access, remote_access=self._inner), self._on_status)
        self._runner = runner

    def stop(self) -> None:
        """Stop it in order, see `pioneer_tunnel.RemoteAccess.stop`. Does nothing while it is not running.

        What a bug in its tasks has raised comes out. `KeyboardInterrupt` stops it at once.
        """
        runner = self._runner
        if runner is not None:
            try:
                with suppress(Stopped):  # a bug has ended it
                    runner.call(self._inner.stop)
            finally:
                self._stop_at_once()

    def _stop_at_once(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self._stop_at_once()

    def _call(self, work: Callable[[], Awaitable[_T]], timeout: float | None = None) -> _T:
        return self._running().call(work, timeout)

    def _running(self) -> Runner:
        if self._runner is None:
            raise Stopped("this RemoteAccess is not running; start it first")
        return self._runner

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

    def watch(self) -> Iterator[Status]:
        """The status now, then the newest after each change; ends after `stopped`. Slow watchers skip, never block.

        Raises:
            RuntimeError: it is not running.
        """
        return self._running().watch()

    def settings(self) -> Settings:
        """See `pioneer_tunnel.RemoteAccess.settings`."""
        return self._call(self._inner.settings)

    def has_key(self) -> bool:
        """See `pioneer_tunnel.RemoteAccess.has_key`."""
        return self._call(self._inner.has_key)

    def snapshot(self) -> Snapshot:
        """See `pioneer_tunnel.RemoteAccess.snapshot`."""
        return self._call(self._inner.snapshot)

    def stats(self) -> TunnelStats:
        """What it has done and holds, as of now; see `pioneer_tunnel.RemoteAccess.stats`."""
        return self._call(partial(at_once, self._inner.stats))

    def apply(self, update: SettingsUpdate) -> None:
        """See `pioneer_tunnel.RemoteAccess.apply`."""
        self._call(partial(self._inner.apply, update))

    def configure(self, config: RemoteAccessConfig) -> None:
        """See `pioneer_tunnel.RemoteAccess.configure`."""
        self._call(partial(self._inner.configure, config))

    def settled(self, timeout: float | None = None) -> None:
        """See `pioneer_tunnel.RemoteAccess.settled`.

        Raises:
            TimeoutError: it is not settled within `timeout` seconds.
        """
        self._call(self._inner.settled, timeout)

    def retry_now(self) -> None:
        """See `pioneer_tunnel.RemoteAccess.retry_now`."""
        if self._runner is not None:
            self._runner.soon(self._inner.retry_now)

    def reopen_access_log(self) -> None:
        """See `pioneer_tunnel.RemoteAccess.reopen_access_log`."""
        if self._runner is not None:
            self._runner.soon(self._inner.reopen_access_log)


@final
class RemoteAccessRpc:
    """The contract's JSON-RPC methods on a `RemoteAccess` of this module. See `pioneer_tunnel.RemoteAccessRpc`.

    Notifications: pass `on_status`, and send what `Status.is_news_after` calls news.

    Args:
        remote_access: the remote access to show and change.
        other_sections: returns the sections that the host adds to `settings`; called for each response.
    """

    def __init__(self, remote_access: RemoteAccess, *, other_sections: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._remote_access: Final = remote_access
        self._inner: Final = trio_rpc.RemoteAccessRpc(remote_access._inner)
        self._other_sections: Final = other_sections

    def handle(self, method: str, params: Any = None) -> dict[str, Any]:
        """Answer a request; returns the `result` of the response.

        Raises:
            RpcError: with the code of the response, see `pioneer_tunnel.RemoteAccessRpc.handle`.
        """
        request = [partial(self._inner.handle, method, params)]
        del params  # it may hold the key: a traceback that shows local variables must not show it
        result = self._remote_access._running().call(request.pop())
        return {"settings": {**self._other_sections(), **result["settings"]}}
