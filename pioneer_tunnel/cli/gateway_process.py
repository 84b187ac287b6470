"""The process of `pioneer-tunnel run`: remote access, its control socket, and its reports to people and to systemd."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from typing import Final, final

import trio

from .._control import hold, serve_control
from .._model.errors import TunnelError
from .._model.status import Status
from ..gateway.config import RemoteAccessConfig
from ..gateway.remote_access import RemoteAccess
from ..gateway.rpc import RemoteAccessRpc
from .service_manager import keep_watchdog_quiet, tell_reloading, tell_systemd
from .signals import received
from .status_view import StatusView

__all__ = ["GatewayProcess"]

PATIENCE: Final = 2.0
"""Seconds for another process that holds the runtime folder: a command may be changing the stores."""

_log: Final = logging.getLogger("pioneer_tunnel.cli")


@final
class GatewayProcess:
    """What `run` runs.

    Args:
        remote_access: the gateway's remote access.
        load: reads its configuration again.
        view: shows statuses.
        stay: whether to go on after a failure that is final, until the settings change.

    Attributes:
        failure: the status of the failure that has ended `run`; None after an end in order.
    """

    def __init__(
        self,
        remote_access: RemoteAccess,
        load: Callable[[], RemoteAccessConfig],
        view: StatusView,
        *,
        stay: bool,
    ) -> None:
        self.failure: Status | None = None
        self._remote_access: Final = remote_access
        self._load: Final = load
        self._view: Final = view
        self._stay: Final = stay

    async def run(self) -> None:
        """Run until `stop`, or until remote access has failed for good.

        On SIGHUP read the configuration again, and reopen the access log; on SIGUSR1 check the link or retry now.

        Raises:
            StorageError: the runtime folder cannot be used, or another process uses it.
        """
        remote_access, rpc = self._remote_access, RemoteAccessRpc(self._remote_access)
        folder = remote_access.config.runtime_path
        with ExitStack() as held:
            await trio.to_thread.run_sync(held.enter_context, hold(folder, seconds=PATIENCE))
            with received("SIGHUP") as reloads, received("SIGUSR1") as checks:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._view.run)
                    serve = functools.partial(serve_control, notify=rpc.notifications)
                    await nursery.start(serve, folder, rpc.handle)
                    try:
                        await nursery.start(self._run_remote_access, nursery)
                        tell_systemd("READY=1")
                        nursery.start_soon(self._show)
                        nursery.start_soon(keep_watchdog_quiet)
                        if not self._stay:
                            nursery.start_soon(self._end_after_failure)
                        if reloads is not None:
                            nursery.start_soon(self._reload_on, reloads)
                        if checks is not None:
                            nursery.start_soon(self._check_on, checks)
                        # No deadline: it runs until it is stopped.
                        await trio.sleep_forever()
                    finally:
                        self._catch_up()

    async def stop(self) -> None:
        """Let visitors finish, and end `run`."""
        tell_systemd("STOPPING=1")
        await self._remote_access.stop()

    async def _run_remote_access(self, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None]) -> None:
        await self._remote_access.run(task_status=task_status)
        nursery.cancel_scope.cancel()

    async def _end_after_failure(self) -> None:
        self.failure = await self._remote_access.wait_failed()
        await self.stop()

    async def _show(self) -> None:
        async for status in self._remote_access.watch():
            self._catch_up()
            where = status.public_url if status.error_kind is None else status.message
            tell_systemd(f"STATUS={status.state}{f': {where}' if where else ''}")

    def _catch_up(self) -> None:
        self._view.catch_up(self._remote_access.history, self._remote_access.history_dropped)

    async def _check_on(self, asked: AsyncIterator[object]) -> None:
        async for _ in asked:
            _log.info("SIGUSR1: checking the link")
            self._remote_access.retry_now()

    async def _reload_on(self, asked: AsyncIterator[object]) -> None:
        async for _ in asked:
            tell_reloading()
            self._remote_access.reopen_access_log()  # also if the configuration is the same, or is refused
            try:
                config = await trio.to_thread.run_sync(self._load)
            except TunnelError as error:
                _log.error("SIGHUP: the configuration stays: %s", error)
            else:
                if config.runtime_path != self._remote_access.config.runtime_path:
                    _log.error("SIGHUP: the configuration stays: runtime_dir changes with a restart only")
                else:
                    await self._remote_access.configure(config)
                    _log.info("SIGHUP: the configuration was read again")
            tell_systemd("READY=1")
