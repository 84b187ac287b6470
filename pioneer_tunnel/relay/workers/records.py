"""The directory that the workers share: the parent keeps the records, and each worker has a replica of all of them.

The channel is the lease of a worker: it ends with its process, and the parent then drops what the worker had.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set as AbstractSet
from typing import Any, Final, NoReturn, TypeAlias, final

import cattrs
import trio

from ..._model.callbacks import nothing
from ..fleet.memory import MemoryRecords
from ..fleet.records import NOTHING_KNOWN, Holding, Record
from ..fleet.store import Changed, Store, StoreUnreachable
from .channel import CallFailed, Channel

__all__ = ["ParentRecords", "ParentStore"]

ANSWER_TIMEOUT: Final = 5.0
"""Seconds that the parent has to answer. It does nothing else that takes time."""

Tell: TypeAlias = Callable[[str, Any], object]
"""Sends a message to a worker."""


@final
class ParentRecords:
    """The records, in the parent. Each change goes to all workers, in the same order."""

    def __init__(self) -> None:
        self._records: Final = MemoryRecords(lease=float("inf"))
        self._records.on_write = self._written
        self._all: Final[dict[str, Record]] = {}
        self._joined: Final[dict[str, Tell]] = {}
        self._writer = ""

    def join(self, process: str, tell: Tell) -> None:
        """A worker begins. It gets all records, and from now on each change."""
        self._records.renew(process, seen=0)
        self._joined[process] = tell
        for tunnel_id, record in self._all.items():
            tell("record", _message(tunnel_id, record, ""))

    def leave(self, process: str) -> None:
        """A worker has ended. What it had is dropped at once."""
        if self._joined.pop(process, None) is not None:
            self._records.drop(process)

    def tunnels_of(self, process: str) -> list[str]:
        """The ids of the tunnels that a worker has."""
        return [tunnel_id for tunnel_id, record in self._all.items() if process in record.processes]

    def has_one_of(self, tunnel_id: str, processes: AbstractSet[str]) -> bool:
        """Whether one of these workers has a tunnel."""
        return not processes.isdisjoint(self._all.get(tunnel_id, NOTHING_KNOWN).processes)

    def read(self, tunnel_id: str) -> Any:
        """The record of a tunnel."""
        return cattrs.unstructure(self._records.read(tunnel_id))

    def write(self, process: str, params: Any) -> Any:
        """What a worker writes; returns the record as it is now, and whether it was written."""
        holdings = cattrs.structure(params["holdings"], tuple[Holding, ...])
        self._writer = process
        try:
            record = self._records.write(process, params["tunnel"], expected=params["expected"], holdings=holdings)
        except Changed as changed:
            return {"record": cattrs.unstructure(changed.record), "written": False}
        finally:
            self._writer = ""
        return {"record": cattrs.unstructure(record), "written": True}

    def show(self, process: str, params: Any) -> None:
        """A worker has these sessions of a tunnel. Which of all sessions have the tunnel is decided elsewhere."""
        record = self._records.read(params["tunnel"])
        others = [cattrs.unstructure(holding) for holding in record.holdings if holding.process != process]
        shown = {"tunnel": params["tunnel"], "expected": record.version, "holdings": [*others, *params["holdings"]]}
        self.write(process, shown)

    def _written(self, tunnel_id: str, record: Record) -> None:
        if record.holdings:
            self._all[tunnel_id] = record
        else:
            self._all.pop(tunnel_id, None)
        message = _message(tunnel_id, record, self._writer)
        for tell in self._joined.values():
            tell("record", message)


def _message(tunnel_id: str, record: Record, writer: str) -> dict[str, Any]:
    return {"tunnel": tunnel_id, "record": cattrs.unstructure(record), "by": writer}


@final
class ParentStore(Store):
    """The records, in a worker.

    Args:
        node: the name of the worker.
        process: the id of its process.
        channel: leads to the parent.
    """

    def __init__(self, node: str, process: str, channel: Channel) -> None:
        self.node = node
        self.process = process
        self.reachable = False
        self.on_change: Callable[[str], object] = nothing
        self.on_gap: Callable[[], object] = nothing
        self._channel: Final = channel
        self._replica: Final[dict[str, Record]] = {}

    async def read(self, tunnel_id: str) -> Record:
        return cattrs.structure(await self._ask("read", tunnel_id), Record)

    def known(self, tunnel_id: str) -> Record:
        return self._replica.get(tunnel_id, NOTHING_KNOWN)

    async def write(self, tunnel_id: str, *, expected: int, holdings: Sequence[Holding]) -> Record:
        params = {"tunnel": tunnel_id, "expected": expected, "holdings": cattrs.unstructure([*holdings])}
        found = await self._ask("write", params)
        record = cattrs.structure(found["record"], Record)
        if not found["written"]:
            raise Changed(record)
        return record

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        self.reachable = True
        try:
            await self._ask("join", None)
            task_status.started()
            self.on_gap()
            # No deadline: without the parent this process ends.
            await trio.sleep_forever()
        finally:
            self.reachable = False
        raise AssertionError

    def hear(self, message: Any) -> Record:
        """A record has changed; returns it. This comes before the answer to who has changed it."""
        tunnel_id, record = message["tunnel"], cattrs.structure(message["record"], Record)
        if record.holdings:
            self._replica[tunnel_id] = record
        else:
            self._replica.pop(tunnel_id, None)
        if message["by"] != self.process:
            self.on_change(tunnel_id)
        return record

    async def _ask(self, method: str, params: Any) -> Any:
        if not self.reachable:
            raise StoreUnreachable
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                return await self._channel.call(method, params)
        except (trio.BrokenResourceError, trio.TooSlowError, CallFailed):
            self.reachable = False
            raise StoreUnreachable from None
