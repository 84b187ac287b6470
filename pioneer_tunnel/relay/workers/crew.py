"""The workers of now: what the parent knows of all of them, and what they say to each other through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, final

import trio

from ..gateways.expected import Expected
from .process import NoWorker, WorkerProcess
from .records import ParentRecords
from .reports import Report
from .setup import REPLACED

__all__ = ["Crew"]

KNOW_TIMEOUT: Final = 2.0
"""Seconds that workers have to say that they know something. Not longer: one may be stuck."""

MOVE_TIMEOUT: Final = 5.0
"""Seconds that the gateways of a worker have to go to others, before the next one is replaced."""

_MOVE_LOOK: Final = 0.05


@final
class Crew:
    """The processes of all workers, and the directory that they share.

    Args:
        on_leave: called with a process that wants to end, and to be replaced first.

    Attributes:
        processes: those that have not ended.
    """

    def __init__(self, on_leave: Callable[[WorkerProcess], object]) -> None:
        self.processes: Final[set[WorkerProcess]] = set()
        self._on_leave: Final = on_leave
        self._records: Final = ParentRecords()
        self._expected: Final = Expected()
        self._changed = trio.Event()

    def start(self, index: int, command: Sequence[str]) -> WorkerProcess:
        """Start a process. `WorkerProcess.run` has to run, and `ended` to be called after it.

        Raises:
            NoWorker: it cannot be started.
        """
        process = WorkerProcess(index, command, self._answer, self._hear, self._gone)
        self.processes.add(process)
        self._tell_who()
        return process

    def ended(self, process: WorkerProcess) -> None:
        """A process has ended."""
        self.processes.discard(process)
        self._tell_who()
        self._changed.set()
        self._changed = trio.Event()

    async def wait_all_ended(self) -> None:
        """Wait until no process is left."""
        while self.processes:
            await self._changed.wait()  # the caller has a deadline

    @property
    def missing(self) -> list[str]:
        """The ids of the tunnels whose gateways were connected a moment ago, and have not come back."""
        serving = self._serving_ids
        return [one for one in self._expected.missing if not self._records.has_one_of(one, serving)]

    async def retire(self, process: WorkerProcess) -> Sequence[str]:
        """Let a worker drain. Visitors of its gateways wait for these at all other workers.

        Returns:
            The ids of the tunnels whose gateways have to go elsewhere.
        """
        process.retired = True
        tunnels = self._expect_those_of(process)
        await self._let_know(self._serving, "expect", {"process": process.id, "tunnels": tunnels})
        process.tell("drain", REPLACED)
        return tunnels

    async def wait_moved(self, tunnels: Sequence[str]) -> None:
        """Wait until the gateways of these tunnels are at workers that do not drain, or have had the time for that."""
        with trio.move_on_after(MOVE_TIMEOUT):
            while not all(self._records.has_one_of(one, self._serving_ids) for one in tunnels):
                await trio.sleep(_MOVE_LOOK)

    def _gone(self, process: WorkerProcess) -> None:
        """A worker is gone. Visitors wait for the gateways that it had."""
        tunnels = [] if process.retired else self._expect_those_of(process)
        for other in self._serving:
            other.tell("expect", {"process": process.id, "tunnels": tunnels, "ended": True})
        self._records.leave(process.id)

    def _expect_those_of(self, process: WorkerProcess) -> list[str]:
        others = self._serving_ids
        tunnels = [one for one in self._records.tunnels_of(process.id) if not self._records.has_one_of(one, others)]
        self._expected.add(tunnels)
        return tunnels

    def _hear(self, process: WorkerProcess, method: str, params: Any) -> None:
        match method:
            case "leave":
                self._on_leave(process)
            case "sessions":
                self._records.show(process.id, params)

    async def _answer(self, process: WorkerProcess, method: str, params: Any) -> Any:
        match method:
            case "join":
                return self._records.join(process.id, process.tell)
            case "read":
                # A worker asks since another one is gone. That is known here, too, after two rounds of the event loop.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                return self._records.read(params)
            case "write":
                return self._records.write(process.id, params)
            case "announce":
                return await self._let_know([one for one in self.processes if one is not process], "announced", params)
            case "last report":
                process.report = Report.from_wire(params)
                return None
        raise LookupError(f"the parent does not know the method {method!r}")

    async def _let_know(self, processes: Sequence[WorkerProcess], method: str, params: Any) -> None:
        """Tell workers something, and wait until they know it, or are stuck."""

        async def let_one_know(process: WorkerProcess) -> None:
            with suppress(NoWorker):  # it ends, or is stuck
                await process.call(method, params, timeout=KNOW_TIMEOUT)

        async with trio.open_nursery() as nursery:
            for process in processes:
                nursery.start_soon(let_one_know, process)

    @property
    def _serving(self) -> list[WorkerProcess]:
        """The workers that get new visitors."""
        return [process for process in self.processes if not process.retired and not process.gone]

    @property
    def _serving_ids(self) -> frozenset[str]:
        return frozenset(process.id for process in self._serving)

    def _tell_who(self) -> None:
        """Tell all workers which process is which worker, so that they trust each other alone."""
        who = {str(process.pid): process.index for process in self.processes}
        for process in self.processes:
            process.tell("who", who)
