"""The records of a fleet in memory: for the workers of one machine, for tests, and for simulations.

`MemoryRecords` is what a server keeps; the process that has it answers for all. `MemoryStore` is what one node sees of
it, with the delays and failures that it would see of a server. The same tests run over it and over `RedisStore`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NoReturn, final

import attrs
import trio

from ..._model.callbacks import nothing
from ..gateways.expected import PATIENCE
from .contact import ContactStore
from .records import LEAVING, NOTHING_KNOWN, Holding, Record
from .routes import KnownRoutes
from .store import LEASE, Changed, StoreUnreachable

__all__ = ["MemoryRecords", "MemoryStore"]

RETRY: Final = 1.0
"""Seconds between two attempts to reach the records."""


@final
class MemoryRecords:
    """The records of all tunnels, and the leases of all processes. Nothing here waits.

    Args:
        lease: seconds that a lease lives after it was renewed; inf for leases that only `drop` ends.

    Attributes:
        up: False makes it unreachable for each `MemoryStore`.
        on_write: called with the id of each tunnel whose record has changed, and the record.
    """

    def __init__(self, *, lease: float = LEASE) -> None:
        self.lease: Final = lease
        self.up = True
        self.on_write: Callable[[str, Record], object] = nothing
        self._records: Final[dict[str, Record]] = {}
        self._leases: Final[dict[str, float]] = {}
        self._subscribers: Final[dict[str, Callable[[str, Record], object]]] = {}
        self._left: Final[dict[str, float]] = {}  # until when a record says `leaving`; in this order
        self._counter = 0

    def __len__(self) -> int:
        """The tunnels that have a record."""
        return len(self._records)

    def subscribe(self, process: str, on_change: Callable[[str, Record], object]) -> None:
        """Tell a process of changes of others to records that it has, or had, a holding in."""
        self._subscribers[process] = on_change

    def unsubscribe(self, process: str) -> None:
        """Tell a process nothing any more."""
        self._subscribers.pop(process, None)

    def renew(self, process: str, *, seen: int) -> bool:
        """Renew the lease of a process, or begin it.

        Args:
            seen: the highest fence or version that the process has seen. Those that are given from now on are higher.

        Returns:
            False if it has just begun: it is new, or had expired.
        """
        self._counter = max(self._counter, seen)
        lived = self.lives(process)
        self._leases[process] = trio.current_time() + self.lease
        return lived

    def lives(self, process: str) -> bool:
        """Whether the lease of a process lives."""
        return self._leases.get(process, 0.0) > trio.current_time()

    def end(self, process: str) -> None:
        """End the lease of a process: its holdings are void."""
        self._leases.pop(process, None)

    def drop(self, process: str) -> None:
        """End the lease of a process, and remove its holdings, so that the others learn of it. Looks at all records."""
        self.end(process)
        for tunnel_id, record in [*self._records.items()]:
            staying = [holding for holding in record.holdings if holding.process != process]
            if len(staying) < len(record.holdings):
                self._put(process, tunnel_id, staying)

    def read(self, tunnel_id: str, *, trusting: bool = False) -> Record:
        """The record of a tunnel.

        Args:
            trusting: also with holdings of processes whose lease has expired.
        """
        self._forget_left()
        record = self._records.get(tunnel_id, NOTHING_KNOWN)
        if trusting or all(self.lives(holding.process) for holding in record.holdings):
            return record
        living = tuple(holding for holding in record.holdings if self.lives(holding.process))
        return attrs.evolve(record, holdings=living)

    def write(
        self,
        process: str,
        tunnel_id: str,
        *,
        expected: int,
        holdings: Sequence[Holding],
        trusting: bool = False,
        leaving: bool = False,
    ) -> Record:
        """Replace the holdings of a tunnel, as `Store.write`.

        Args:
            process: the writer; it is not told.
            tunnel_id, expected, holdings: see `Store.write`.
            trusting: see `read`; of the record that `Changed` tells.
            leaving: the writer drains.

        Raises:
            Changed: see `Store.write`.
        """
        if self._records.get(tunnel_id, NOTHING_KNOWN).version != expected:
            raise Changed(self.read(tunnel_id, trusting=trusting))
        return self._put(process, tunnel_id, holdings, leaving=leaving)

    def forget(self) -> None:
        """Lose all records, all leases and the counter, as a server that comes back empty."""
        self._records.clear()
        self._leases.clear()
        self._left.clear()
        self._counter = 0

    def _forget_left(self) -> None:
        now = trio.current_time()
        while self._left and self._left[first := next(iter(self._left))] <= now:
            del self._left[first], self._records[first]

    def _put(self, process: str, tunnel_id: str, holdings: Sequence[Holding], *, leaving: bool = False) -> Record:
        self._forget_left()
        self._left.pop(tunnel_id, None)
        before = self._records.pop(tunnel_id, NOTHING_KNOWN)
        # The clock is for a counter that was lost: what is given after that is higher all the same.
        self._counter = max(self._counter, int(trio.current_time() * 1000), *(each.fence for each in holdings), 0) + 1
        given = tuple(attrs.evolve(each, fence=each.fence or self._counter) for each in holdings)
        record = Record(self._counter, given) if given else LEAVING if leaving else NOTHING_KNOWN
        if record is LEAVING:
            self._left[tunnel_id] = trio.current_time() + PATIENCE
        if record is not NOTHING_KNOWN:
            self._records[tunnel_id] = record
        for told in {holding.process for holding in (*before.holdings, *given)} - {process}:
            if told in self._subscribers:
                self._subscribers[told](tunnel_id, record)
        self.on_write(tunnel_id, record)
        return record


@final
class MemoryStore(ContactStore):
    """What one process sees of `MemoryRecords`.

    Args:
        records: the records.
        node: the name of its node.
        process: its id; by default a new one.
        round_trip: seconds that a read or a write takes.
        routes: what it knows; by default a new cache.

    Attributes:
        connected: False makes the records unreachable for this process alone.
    """

    def __init__(
        self,
        records: MemoryRecords,
        node: str,
        *,
        process: str | None = None,
        round_trip: float = 0.0,
        routes: KnownRoutes | None = None,
    ) -> None:
        super().__init__(node, process=process, lease=records.lease, routes=routes)
        self.connected = True
        self._records: Final = records
        self._round_trip: Final = round_trip

    async def read(self, tunnel_id: str) -> Record:
        await self._travel()
        self.operations += 1
        record = self._records.read(tunnel_id, trusting=self._trusting)
        await self._travel()
        return self._note(tunnel_id, record)

    async def write(self, tunnel_id: str, *, expected: int, holdings: Sequence[Holding]) -> Record:
        await self._travel()
        if not self._records.lives(self.process):
            self._renew()  # else two processes like this would not see each other, and write in turn for ever
        self.operations += 1
        changed: Changed | None = None
        try:
            record = self._records.write(
                self.process,
                tunnel_id,
                expected=expected,
                holdings=holdings,
                trusting=self._trusting,
                leaving=self.leaving,
            )
        except Changed as other:
            record, changed = other.record, other
        await self._travel()
        self._note(tunnel_id, record)
        if changed is not None:
            raise changed
        return record

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        try:
            self._renew()
            task_status.started()
            while True:
                # No deadline: a lease is renewed for as long as the process runs.
                await trio.sleep(self.lease / 3 if self.reachable else RETRY)
                self._renew()
        finally:
            self._lost()
            if self._can_be_reached:
                self._records.end(self.process)

    @property
    def _can_be_reached(self) -> bool:
        return self._records.up and self.connected

    async def _travel(self) -> None:
        """Half a round trip."""
        if not self.reachable:
            raise StoreUnreachable
        await trio.sleep(self._round_trip / 2)
        if not self._can_be_reached:
            self._lost()
            raise StoreUnreachable

    def _lost(self) -> None:
        self.reachable = False
        self._records.unsubscribe(self.process)

    def _renew(self) -> None:
        if not self._can_be_reached:
            self._lost()
            return
        self.operations += 1
        self._records.subscribe(self.process, self._changed)
        self._renewed(lived=self._records.renew(self.process, seen=self._seen))

    def _changed(self, tunnel_id: str, record: Record) -> None:
        if self._can_be_reached:
            self._note(tunnel_id, record)
            self.on_change(tunnel_id)
