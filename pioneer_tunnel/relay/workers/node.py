"""A worker among the others: it shares the directory with them, and carries their visitors to its sessions."""

from __future__ import annotations

from collections.abc import Callable, Set as AbstractSet
from pathlib import Path
from random import Random
from typing import Any, Final, final

import trio

from ..fleet.directory import FleetDirectory
from ..fleet.node_links import NodeLinks
from ..fleet.passing import SocketPassing
from ..fleet.peers import Asked, Order
from ..fleet.records import Holding, Record
from ..fleet.remote import RemoteSession
from ..fleet.unix_network import WorkerNetwork
from ..gateways.registry import LiveSession
from .channel import Channel
from .records import ParentStore
from .setup import Setup

__all__ = ["WorkerNode"]


@final
class WorkerNode:
    """What makes a worker one of several.

    Args:
        relay_id: the name of the relay.
        setup: what the parent says.
        channel: leads to the parent.
        on_holder: called with the id of a tunnel that another worker has, which does not drain.

    Attributes:
        name: of this worker, for the others.
        directory: the sessions of all workers.
        links: lead to the other workers.
        passing: passes a visitor to the worker that has the session of the tunnel.
    """

    def __init__(self, relay_id: str, setup: Setup, channel: Channel, on_holder: Callable[[str], object]) -> None:
        self.name: Final = f"{relay_id}/{setup.index}"
        self._relay_id: Final = relay_id
        self._who: Final[dict[int, str]] = {}
        self._leaving: Final[set[str]] = set()
        self._on_holder: Final = on_holder
        self._store: Final = ParentStore(self.name, setup.process, channel)
        asked = _Asked()
        network = WorkerNetwork(self.name, setup.process, Path(setup.folder), self._who.get, workers=setup.workers)
        random = Random()  # noqa: S311  # it spreads attempts, and is no secret
        self.links: Final = NodeLinks(self.name, setup.process, asked, workers=network, random=random)
        self.passing: Final = SocketPassing(network, self._where, random)
        self.directory: Final = FleetDirectory(self._store, self.links)
        asked.directory = self.directory

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Share the directory, and answer the others, until cancelled. It is started when it can do both."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.links.run)
            await nursery.start(self.directory.run)
            task_status.started()

    def _where(self, tunnel_id: str) -> Holding | None:
        """The session of another worker that the next visitor of a tunnel goes to; None if there is none."""
        try:
            holder = self.directory.find_nowait(tunnel_id)
        except trio.WouldBlock:
            return None
        # Not `isinstance`, which takes long for a protocol. One that drains takes no visitors: they wait here for the
        # next session.
        if type(holder) is RemoteSession and holder.holding.process not in self._leaving:
            return holder.holding
        return None

    def know(self, workers: dict[str, int]) -> None:
        """Trust these processes, and no other ones: the workers of now, by their process ids."""
        self._who.clear()
        self._who.update({int(pid): f"{self._relay_id}/{index}" for pid, index in workers.items()})

    def note_leaving(self, process: str) -> None:
        """Another process drains: that it has a tunnel does not help new visitors."""
        self._leaving.add(process)

    def hear_record(self, message: Any) -> None:
        """The parent says that the record of a tunnel has changed."""
        record = self._store.hear(message)
        if _processes(record) - self._leaving:
            self._on_holder(message["tunnel"])


def _processes(record: Record) -> AbstractSet[str]:
    return {holding.process for holding in record.holdings}


@final
class _Asked(Asked):
    """The directory, which is made after what needs it."""

    directory: FleetDirectory

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        return self.directory.local(tunnel_id, session_id)

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        return await self.directory.carry_out(tunnel_id, session_id, order)
