"""The process of `pioneer-tunnel expose`: a tunnel, the statuses that it prints, a new key, and its end in order."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final, TypeAlias, final

import click
import trio

from .._model.errors import TunnelError
from .._model.keys import RelayKey
from .._model.log_fields import about
from .._model.stats import TunnelStats
from .._model.status import Status
from ..access_log.writer import AccessLog
from ..monitoring.address import SiteAddress
from ..monitoring.serving import serve_metrics
from ..tunnel.tunnel import Tunnel
from .signals import received
from .status_lines import StatusLines

__all__ = ["Exposure"]

CONNECT_TIMEOUT: Final = 30.0
"""Seconds that a tunnel with a new key has to come up. Until then the one before goes on."""

Open: TypeAlias = Callable[[RelayKey], AbstractAsyncContextManager[Tunnel]]

_log: Final = logging.getLogger("pioneer_tunnel.cli")


@final
class Exposure:
    """What `expose` runs.

    Args:
        open_tunnel: opens a tunnel with a key.
        serve: serves the visitors of a tunnel in a nursery, until the tunnel is closed.
        read_key: reads the key file.
        lines: prints statuses.
        access_log: is kept meanwhile, and reopened on SIGHUP; None if there is none.
        stop_grace: seconds that visitors have to finish.
        metrics: where metrics and health checks are; None for nowhere.
    """

    def __init__(
        self,
        open_tunnel: Open,
        serve: Callable[[Tunnel, trio.Nursery], Awaitable[None]],
        read_key: Callable[[], RelayKey],
        lines: StatusLines,
        *,
        stop_grace: float,
        access_log: AccessLog | None = None,
        metrics: SiteAddress | None = None,
    ) -> None:
        self._access_log: Final = access_log
        self._open: Final = open_tunnel
        self._serve_visitors: Final = serve
        self._read_key: Final = read_key
        self._lines: Final = lines
        self._stop_grace: Final = stop_grace
        self._metrics: Final = metrics
        self._key = read_key()
        self._tunnel: Tunnel | None = None
        self._running: Final = trio.CancelScope()

    async def run(self) -> None:
        """Run until `stop`, or until cancelled. On SIGHUP reread the key file; on SIGUSR1 check the link or retry now.

        Raises:
            TunnelError: the tunnel has failed for good.
            OSError: there can be no metrics at that address.
        """
        try:
            with self._running, received("SIGHUP") as reloads, received("SIGUSR1") as checks:
                keeping = nullcontext() if self._access_log is None else self._access_log.kept()
                async with keeping, trio.open_nursery() as nursery:
                    self._tunnel = await nursery.start(self._serve, self._key)
                    nursery.start_soon(self._show, self._tunnel)
                    if self._metrics is not None:
                        await nursery.start(serve_metrics, self, self._metrics)
                    if reloads is not None:
                        nursery.start_soon(self._reload_on, reloads, nursery)
                    if checks is not None:
                        nursery.start_soon(self._check_on, checks)
        finally:
            if self._tunnel is not None:
                self._catch_up(self._tunnel)

    @property
    def status(self) -> Status:
        """That of the tunnel, for metrics."""
        assert self._tunnel is not None
        return self._tunnel.status

    def stats(self) -> TunnelStats:
        """Those of the tunnel, for metrics. With a new key they begin again."""
        assert self._tunnel is not None
        return self._tunnel.stats()

    async def stop(self) -> None:
        """Let visitors finish, and end `run`."""
        if self._tunnel is not None:
            await self._tunnel.drain(self._stop_grace)
        self._running.cancel()

    async def _serve(self, key: RelayKey, *, task_status: trio.TaskStatus[Tunnel]) -> None:
        async with self._open(key) as tunnel, trio.open_nursery() as visitors:
            task_status.started(tunnel)
            try:
                await self._serve_visitors(tunnel, visitors)
            except TunnelError as error:
                if tunnel is self._tunnel:
                    raise
                fields = about("key_refused", reason=error)
                line = "the tunnel with the new key has failed, and the one before goes on: %s"
                _log.error(line, error, extra=fields)

    async def _show(self, tunnel: Tunnel) -> None:
        async for _ in tunnel.watch():
            if tunnel is not self._tunnel:
                break
            self._catch_up(tunnel)

    def _catch_up(self, tunnel: Tunnel) -> None:
        self._lines.catch_up(tunnel.history, tunnel.history_dropped)

    async def _check_on(self, asked: AsyncIterator[object]) -> None:
        async for _ in asked:
            _log.info("SIGUSR1: checking the link")
            if self._tunnel is not None:
                self._tunnel.retry_now()

    async def _reload_on(self, asked: AsyncIterator[object], nursery: trio.Nursery) -> None:
        async for _ in asked:
            if self._access_log is not None:
                self._access_log.reopen()
            try:
                key = await trio.to_thread.run_sync(self._read_key)
            except click.ClickException as error:
                _log.error("the key stays: %s", error.message, extra=about("key_refused", reason=error.message))
                continue
            if key == self._key:
                _log.info("the key has not changed; files for TLS are read again when they are used")
            else:
                await self._change_key(key, nursery)

    async def _change_key(self, key: RelayKey, nursery: trio.Nursery) -> None:
        """Open a tunnel with another key. When it is up, the one before lets its visitors finish, and ends."""
        before = self._tunnel
        assert before is not None
        tunnel = await nursery.start(self._serve, key)
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                await tunnel.wait_connected()
        except (TunnelError, trio.TooSlowError):
            fields = about("key_refused")
            _log.error("the tunnel with the new key does not come up; the key stays", extra=fields)
            await tunnel.drain(0)
            return
        self._key, self._tunnel = key, tunnel
        self._lines.restart()
        nursery.start_soon(self._show, tunnel)
        _log.info("the tunnel has a new key", extra=about("key_changed"))
        await before.drain(self._stop_grace)
