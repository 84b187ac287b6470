"""A worker among the others: it shares the directory with them, and carries their visitors to its sessions."""

from __future__ import annotations

from random import Random
from typing import Final, final

import trio

from ..fleet.directory import FleetDirectory
from ..fleet.neighbours import where_in
from ..fleet.node_links import NodeLinks
from ..fleet.passing import SocketPassing
from ..fleet.peers import AskedLater
from ..gateways.registry import LocalDirectory
from .others import OtherWorkers

__all__ = ["WorkerNode"]


@final
class WorkerNode:
    """What makes a worker one of several, in a relay without a fleet.

    Args:
        others: the other workers.

    Attributes:
        directory: the sessions of all workers.
        links: lead to the other workers.
        passing: passes a visitor to the worker that has the session of the tunnel; None if there is no other worker.
    """

    def __init__(self, others: OtherWorkers) -> None:
        asked = AskedLater()
        random = Random()  # noqa: S311  # it spreads attempts, and is no secret
        self.links: Final = NodeLinks(
            others.store.node, others.store.process, asked, workers=others.network, random=random
        )
        local = LocalDirectory()
        self.directory: Final = FleetDirectory(others.store, self.links, local)
        self.passing: SocketPassing | None = None
        if others.network.has_others:
            self.passing = SocketPassing(others.network, where_in(others, local, random), random)
        asked.directory = self.directory

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Share the directory, and answer the others, until cancelled. It is started when it can do both."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.links.run)
            await nursery.start(self.directory.run)
            task_status.started()
