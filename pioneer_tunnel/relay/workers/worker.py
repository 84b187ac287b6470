"""A worker: a relay whose process does what the parent says.

It gets its configuration and its listening sockets from the parent. When the parent is gone, it drains and ends.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, final

import attrs
import trio

from ..._model.callbacks import nothing
from ..._model.errors import TunnelError
from ..._model.exception_groups import lone_error_bare
from ..._model.log_fields import about
from ..._net.freed_memory import manage_freed_memory
from ..._version import __version__
from ...websocket import EngineName
from ..inherited import Inherited
from ..server import Relay
from ..spawning import WORKER_VARIABLE
from .channel import CallFailed, Channel
from .folder import remove_if_left
from .node import WorkerNode
from .others import OtherWorkers
from .reports import Report
from .setup import PROTOCOL, REPLACED, Setup

__all__ = ["Worker"]

REPORT_TIMEOUT: Final = 2.0
"""Seconds that the parent has to take the last report."""

ANNOUNCE_TIMEOUT: Final = 5.0
"""Seconds that the parent has to let the others know something. It waits for 2 seconds at most."""

_IGNORED: Final = ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that a terminal or an operator sends to all processes. The parent acts on them."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.workers")


@final
class Worker:
    """A worker of this process.

    Args:
        connection: the worker's end of its channel.
        file: the relay's file. It is not read: the parent sends what it has read.
        engine: the WebSocket engine; None chooses the fastest that is installed.
        on_index: called with the worker's index, before it begins.
    """

    def __init__(
        self,
        connection: socket.socket,
        file: Path,
        *,
        engine: EngineName | None = None,
        on_index: Callable[[int], object] = nothing,
    ) -> None:
        self._file: Final = file
        self._engine: Final = engine
        self._on_index: Final = on_index
        self._channel: Final = Channel(connection, self._answer, self._hear)
        self._given: Final[dict[str, Sequence[socket.socket]]] = {}
        self._inherited: Inherited | None = None
        self._asked: Final = trio.Event()
        self._settled: Final = trio.Event()
        self._serving: Final = trio.CancelScope()
        self._drain_asked: Final = trio.Event()
        self._setup: Setup | None = None
        self._parent_is_gone = False
        self._relay: Relay | None = None
        self._expected_early: Final[list[Any]] = []
        self._others: OtherWorkers | None = None
        self._who: dict[str, int] = {}
        self._tasks: trio.Nursery | None = None
        self._standing_in: Final[dict[int, list[trio.CancelScope]]] = {}
        self._failure: TunnelError | OSError | None = None

    @classmethod
    def from_environment(
        cls,
        file: Path,
        *,
        engine: EngineName | None = None,
        on_index: Callable[[int], object] = nothing,
        environment: MutableMapping[str, str] = os.environ,
    ) -> Worker | None:
        """The worker that this process is; None if no parent has started it as one. Its variable is removed."""
        descriptor = environment.pop(WORKER_VARIABLE, None)
        if descriptor is None:
            return None
        connection = socket.socket(fileno=int(descriptor))
        connection.set_inheritable(False)
        return cls(connection, file, engine=engine, on_index=on_index)

    def run(self) -> None:
        """Serve until the parent says that it is enough, or is gone."""
        for name in _IGNORED:
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        trio.run(self._run)

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._carry)
            nursery.start_soon(self._leave_on_signal)
            nursery.start_soon(manage_freed_memory)
            with self._serving:
                await self._asked.wait()  # no deadline: the parent has one
                if self._setup is not None:
                    await self._serve(self._setup)
            if self._relay is not None:
                await self._report_last(self._relay)
            if self._parent_is_gone and self._setup is not None:
                remove_if_left(Path(self._setup.folder))  # the parent would have
            nursery.cancel_scope.cancel()

    async def _carry(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await self._channel.run()
        if not self._drain_asked.is_set():
            _log.warning("the parent process is gone; this worker drains", extra=about("parent_gone"))
            self._parent_is_gone = True
        self._drain()

    async def _leave_on_signal(self) -> NoReturn:
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self._channel.tell("leave")
        raise AssertionError

    async def _serve(self, setup: Setup) -> None:
        self._on_index(setup.index)
        try:
            config = await trio.to_thread.run_sync(setup.config, self._file)
            self._inherited = Inherited(self._given, connected=setup.connected)
            machine = config.id if config.fleet is None else config.fleet.node
            self._others = others = OtherWorkers(machine, setup, self._channel, self._note_holder)
            others.know(self._who)
            common = partial(Relay, config, engine=self._engine, inherited=self._inherited, announce=self._announce)
            if config.fleet is None:
                node = WorkerNode(others)
                self._relay = common(directory=node.directory, passing=node.passing, nodes=node.links)
            else:
                node = None  # the relay makes it, as it does without workers
                self._relay = common(neighbours=others)
            for params in self._expected_early:
                self._expect(params)
            with lone_error_bare():
                await self._serve_relay(self._relay, node)
        except (TunnelError, OSError) as error:
            if self._settled.is_set():
                raise
            self._failure = error
            self._settled.set()
            # No deadline: the parent ends this process, or is gone.
            await trio.sleep_forever()

    async def _serve_relay(self, relay: Relay, node: WorkerNode | None) -> None:
        async with trio.open_nursery() as nursery:
            if node is not None:
                await nursery.start(node.run)

            async def serve(*, task_status: trio.TaskStatus[object]) -> None:
                await relay.serve(task_status=task_status)
                nursery.cancel_scope.cancel()

            await nursery.start(serve)
            self._tasks = nursery
            self._settled.set()
            await self._drain_asked.wait()  # no deadline: it serves until then
            await relay.drain()

    async def _report_last(self, relay: Relay) -> None:
        gone = suppress(CallFailed, trio.BrokenResourceError)  # there is no parent to hear it
        with gone, trio.CancelScope(shield=True), trio.move_on_after(REPORT_TIMEOUT):
            await self._channel.call("last report", self._report(relay))

    def _drain(self) -> None:
        self._drain_asked.set()
        if not self._settled.is_set() or self._failure is not None:
            self._serving.cancel()

    def _hear(self, method: str, params: Any, sockets: Sequence[socket.socket]) -> None:
        match method:
            case "sockets" if self._inherited is not None:
                self._inherited.add(params, sockets)
            case "sockets":
                self._given[params] = sockets
            case "stand in" if self._tasks is not None:
                scope = trio.CancelScope()
                self._standing_in.setdefault(params["worker"], []).append(scope)
                self._tasks.start_soon(self._stand_in, scope, params["name"], sockets)
            case "stand back":
                for scope in self._standing_in.pop(params, ()):
                    scope.cancel()
            case "drain":
                if self._relay is not None:
                    self._relay.beside.has_successor = params == REPLACED
                self._drain()
            case "end":
                self._drain_asked.set()
                self._serving.cancel()
            case "reopen" if self._relay is not None:
                self._relay.reopen_access_log()
            case "who":
                self._who = params
                if self._others is not None:
                    self._others.know(params)
            case "record" if self._others is not None:
                self._others.hear_record(params)
            case "expect":
                self._expect(params)

    async def _answer(self, method: str, params: Any) -> Any:
        if method == "start":
            if params.get("protocol") != PROTOCOL:
                raise OSError(None, "the parent process is of another version; restart the relay as a whole")
            self._setup = Setup.from_wire(params)
            self._asked.set()
        await self._settled.wait()  # the caller has a deadline
        if self._failure is not None:
            raise self._failure
        assert self._relay is not None
        match method:
            case "start" | "ping":
                return None
            case "expect":
                return self._expect(params)
            case "announced":
                return await self._relay.beside.hear(params)
            case "apply":
                return await self._apply(self._relay, params)
            case "report":
                return self._report(self._relay)
        raise CallFailed(f"a worker does not know the method {method!r}")

    async def _stand_in(self, scope: trio.CancelScope, name: str, sockets: Sequence[socket.socket]) -> None:
        """Accept at the sockets of a worker that is missing."""
        assert self._relay is not None
        with scope:
            await self._relay.beside.accept_at(name, sockets)

    def _expect(self, params: Any) -> None:
        if self._relay is None or self._others is None:  # this process begins, and soon gets visitors of these tunnels
            self._expected_early.append(params)
            return
        self._others.note_leaving(params["process"], ended=params.get("ended", False))
        self._relay.beside.expect(params["tunnels"])

    def _note_holder(self, tunnel_id: str) -> None:
        if self._relay is not None:
            self._relay.beside.gateway_has_come(tunnel_id)

    async def _announce(self, message: Any) -> None:
        with suppress(CallFailed, trio.BrokenResourceError), trio.move_on_after(ANNOUNCE_TIMEOUT):
            await self._channel.call("announce", message)

    async def _apply(self, relay: Relay, content: str) -> None:
        assert self._setup is not None
        setup = attrs.evolve(self._setup, tunnels=content)
        await relay.apply(await trio.to_thread.run_sync(setup.config, self._file))
        self._setup = setup

    def _report(self, relay: Relay) -> dict[str, Any]:
        used = os.times()
        return Report(
            stats=relay.stats(),
            certificates=relay.certificates,
            orders_certificates=relay.orders_certificates,
            version=__version__,
            cpu_seconds=used.user + used.system,
            memory_bytes=_resident_bytes(),
        ).to_wire()


def _resident_bytes() -> int | None:
    """The resident memory of this process; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
