"""A worker, as the parent sees it."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, final

import trio

from ..._model.log_fields import about
from ..._model.status import ErrorKind
from ..spawning import WORKER_VARIABLE, end_child, spawn
from .channel import CallFailed, Channel
from .reports import Report

__all__ = ["NoWorker", "WorkerProcess"]

START_TIMEOUT: Final = 60.0
"""Seconds that a worker has to start and listen."""

CALL_TIMEOUT: Final = 30.0
"""Seconds that a worker has to apply a configuration."""

LOOK_INTERVAL: Final = 5.0
"""Seconds between two questions whether a worker lives."""

STUCK_AFTER: Final = 30.0
"""Seconds without an answer after which a worker is killed, and so replaced. A busy machine may make it slow."""

END_TIMEOUT: Final = 5.0
"""Seconds that a worker has to end, when it shall end at once."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.workers")
_OF_THE_PARENT: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""Variables with which the service manager speaks to one process alone."""


@final
class NoWorker(Exception):
    """A worker does not listen; the text says why.

    Attributes:
        kind: the error kind; None if the reason has none.
    """

    def __init__(self, text: str, kind: ErrorKind | None = None) -> None:
        super().__init__(text)
        self.kind: Final = kind


@final
class WorkerProcess:
    """A process that runs a worker.

    Args:
        index: which worker it is, from 0.
        command: starts it. Its environment is that of this process, and the descriptor of its channel.
        answer: answers its calls. Gets this object first.
        hear: hears its messages. Gets this object first.
        on_gone: called with this object as soon as it cannot be spoken to any more, before `ended`.

    Attributes:
        index: as above.
        pid: its process id.
        id: a random name, by which other workers tell it from its successor.
        since: when it was started, as `trio.current_time` counts.
        listens: whether it has said that it listens.
        retired: whether it was told to drain.
        gone: whether it cannot be spoken to any more.
        status: its exit status, after its end.
        ended: set after its end.
        report: what it has reported last; None before the first time.

    Raises:
        NoWorker: it cannot be started.
    """

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        answer: Callable[[WorkerProcess, str, Any], Awaitable[Any]],
        hear: Callable[[WorkerProcess, str, Any], object],
        on_gone: Callable[[WorkerProcess], object],
    ) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_PARENT}
            environment[WORKER_VARIABLE] = str(theirs.fileno())
            try:
                self.pid: Final = spawn(command, environment, [theirs.fileno()])
            except OSError as error:
                ours.close()
                raise NoWorker(f"it cannot be started: {error.strerror}") from error
        self.index: Final = index
        self.since: Final = trio.current_time()
        self.listens = False
        self.retired = False
        self.gone = False
        self.status: int | None = None
        self.ended: Final = trio.Event()
        self.report: Report | None = None
        self._on_gone: Final = on_gone
        self._running: Final = trio.CancelScope()
        self.id: Final = secrets.token_hex(8)
        self._channel: Final = Channel(
            ours, partial(answer, self), lambda method, params, _sockets: hear(self, method, params)
        )

    async def run(self) -> None:
        """Carry messages until it has ended. If cancelled, end it at once."""
        gone = trio.Event()
        carrying = trio.CancelScope(shield=True)

        async def carry() -> None:
            with carrying:
                await self._channel.run()
            self.gone = True
            self._on_gone(self)
            gone.set()

        with self._running:
            await self._run(carry, carrying, gone)

    def end(self) -> None:
        """End it at once. Does not wait."""
        self._running.cancel()

    async def _run(self, carry: Callable[[], Awaitable[None]], carrying: trio.CancelScope, gone: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(carry)
            nursery.start_soon(self._kill_if_stuck, gone)
            try:
                # No deadline: it serves for as long as it is not told to end.
                await gone.wait()
            finally:
                self.tell("end")
                with trio.CancelScope(shield=True), trio.move_on_after(END_TIMEOUT):
                    await gone.wait()
                carrying.cancel()
                self.status = await end_child(self.pid, END_TIMEOUT)
                self.ended.set()

    async def _kill_if_stuck(self, gone: trio.Event) -> None:
        """Kill the process when it does not answer: it would keep the visitors waiting whom it gets."""
        while True:
            with trio.move_on_after(LOOK_INTERVAL):
                await gone.wait()
                return
            if self.listens:
                try:
                    await self.call("ping", timeout=STUCK_AFTER)
                except NoWorker as error:
                    if not gone.is_set():
                        fields = about("worker_stuck", worker=self.index, reason=error)
                        _log.error("worker %d, process %d, is stuck: %s", self.index, self.pid, error, extra=fields)
                        os.kill(self.pid, signal.SIGKILL)
                    return

    async def begin(self, setup: Mapping[str, Any], sockets: Mapping[str, Sequence[socket.socket]]) -> None:
        """Wait until it listens.

        Args:
            setup: what it needs, see `worker.Setup`.
            sockets: where it listens.

        Raises:
            NoWorker: it does not. It ends then.
        """
        self.give(sockets)
        try:
            with trio.fail_after(START_TIMEOUT):
                await self._channel.call("start", setup)
        except CallFailed as failed:
            raise NoWorker(str(failed), failed.kind) from None
        except trio.BrokenResourceError:
            await self.ended.wait()  # soon
            raise NoWorker(f"it has ended: {self.how_it_ended}") from None
        except trio.TooSlowError:
            raise NoWorker(f"it did not listen within {START_TIMEOUT:g} seconds") from None
        self.listens = True

    def give(self, sockets: Mapping[str, Sequence[socket.socket]]) -> None:
        """Give it sockets that listen, by the names of their addresses."""
        for name, listening in sockets.items():
            self.tell("sockets", name, listening)

    async def call(self, method: str, params: Any = None, *, timeout: float = CALL_TIMEOUT) -> Any:
        """Call a method of it.

        Raises:
            NoWorker: it could not do it, does not answer in time, or has ended.
        """
        try:
            with trio.fail_after(timeout):
                return await self._channel.call(method, params)
        except CallFailed as failed:
            raise NoWorker(str(failed), failed.kind) from None
        except trio.BrokenResourceError:
            raise NoWorker("it has ended") from None
        except trio.TooSlowError:
            raise NoWorker(f"it did not answer within {timeout:g} seconds") from None

    @property
    def how_it_ended(self) -> str:
        """Its exit status, in words."""
        assert self.status is not None
        if self.status >= 0:
            return f"exit status {self.status}"
        try:
            return f"killed by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"killed by signal {-self.status}"

    def tell(self, method: str, params: Any = None, sockets: Sequence[socket.socket] = ()) -> None:
        """Tell it something. Does not wait."""
        self._channel.tell(method, params, sockets)
