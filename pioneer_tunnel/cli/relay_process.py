"""The process of `pioneer-tunnel relay`: it follows its file, hands over to a successor, and reports to systemd."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator
from typing import Final, final

import trio

from .._model.log_fields import about
from ..relay import Relay
from ..relay.administration.running import serve_control_socket
from ..relay.handover import NoSuccessor, Predecessor, start_successor
from ..relay.reload import ConfigFile, follow
from .service_manager import tell_systemd
from .signals import received

__all__ = ["RelayProcess"]

_log: Final = logging.getLogger("pioneer_tunnel.cli")


@final
class RelayProcess:
    """A relay in a process of its own.

    Args:
        relay: the relay.
        file: its configuration, which has been loaded.
        predecessor: the process that has started this one; None if there is none.
    """

    def __init__(self, relay: Relay, file: ConfigFile, predecessor: Predecessor | None) -> None:
        self._relay: Final = relay
        self._file: Final = file
        self._predecessor: Final = predecessor
        self._handing_over: Final = trio.CancelScope()
        self._answering: Final = trio.CancelScope()

    async def run(self) -> None:
        """Serve until `stop`, or until a successor serves. Reload on SIGHUP, and start a successor on SIGUSR2."""
        with received("SIGHUP") as reloads, received("SIGUSR2") as restarts:
            async with trio.open_nursery() as nursery:

                async def serve(*, task_status: trio.TaskStatus[object]) -> None:
                    await self._relay.serve(task_status=task_status)
                    nursery.cancel_scope.cancel()

                await nursery.start(serve)
                if self._predecessor is not None:
                    self._predecessor.we_listen()
                tell_systemd(f"READY=1\nMAINPID={os.getpid()}")
                nursery.start_soon(self._answer)
                if restarts is not None:
                    nursery.start_soon(self._hand_over, restarts)
                await follow(self._file, self._relay.apply, reload_now=reloads and _Reopening(reloads, self._relay))

    async def stop(self) -> None:
        """Let visitors finish, and end `run`."""
        tell_systemd("STOPPING=1")
        self._handing_over.cancel()
        await self._relay.drain()

    async def _answer(self) -> None:
        """Answer `relay status`, until a successor does."""
        with self._answering:
            await serve_control_socket(self._relay, self._file.path)

    async def _hand_over(self, asked: AsyncIterator[object]) -> None:
        with self._handing_over:
            async for _ in asked:
                try:
                    await start_successor(self._relay.handover())
                except NoSuccessor as error:
                    fields = about("no_successor", reason=error)
                    _log.error("there is no successor, and this process goes on: %s", error, extra=fields)
                else:
                    self._answering.cancel()
                    break
        # Not within the scope: a signal to this process now does not stop the successor.
        if not self._handing_over.cancelled_caught:
            await self._relay.drain()


@final
class _Reopening(AsyncIterator[object]):
    """Signals to reload, each of which reopens the access log as well."""

    def __init__(self, signals: AsyncIterator[object], relay: Relay) -> None:
        self._signals: Final = signals
        self._relay: Final = relay

    async def __anext__(self) -> object:
        signal = await anext(self._signals)
        self._relay.reopen_access_log()
        return signal
