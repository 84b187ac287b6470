"""Nodes of a fleet in one process: real directories over a real store, with sessions that are scripted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, final

import trio
import trio.testing
from scripted_session import ScriptedSession

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.contact import ContactStore
from pioneer_tunnel.relay.fleet.directory import FleetDirectory
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.peers import Hop, Order, Peers
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.relay.gateways.registry import LiveSession, LocalDirectory, TunnelTaken
from pioneer_tunnel.relay.gateways.takeover import NEWEST_WINS, Takeover, TakeoverRules

__all__ = ["FIRST", "ROTATING", "TUNNEL", "Fleet", "Node", "at_rest", "fleet_in_memory", "recorded"]

TUNNEL: Final = "office"
FIRST: Final = TakeoverRules(takeover=Takeover.FIRST)
ROTATING: Final = TakeoverRules(keys=("old", "new"))


@final
class Node(Peers):
    """A node: a directory with its store, and its way to the others.

    Attributes:
        alone: it cannot reach other nodes, nor they it.
    """

    def __init__(self, fleet: Fleet, store: ContactStore) -> None:
        self._fleet: Final = fleet
        self.store: Final = store
        self.sessions: Final = LocalDirectory()
        self.directory: Final = FleetDirectory(store, self, self.sessions)
        self.alone = False
        self.asked = 0
        self.distances: dict[str, float] = {}

    async def open_stream(self, tunnel_id: str, holding: Holding) -> Hop:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        session = self._session(tunnel_id, holding)
        if session is None:
            raise trio.BrokenResourceError("it is not there")
        return Hop(await session.open_stream(), session.services)

    async def order(self, tunnel_id: str, holding: Holding, order: Order) -> bool:
        await trio.lowlevel.checkpoint()
        other = self._other(holding)
        return other is not None and await other.directory.carry_out(tunnel_id, holding.session, order)

    def distance(self, node: str) -> float:
        return self.distances.get(node, 0.01)

    def _other(self, holding: Holding) -> Node | None:
        other = self._fleet.nodes.get(holding.process)
        return None if other is None or self.alone or other.alone else other

    def _session(self, tunnel_id: str, holding: Holding) -> LiveSession | None:
        other = self._other(holding)
        return None if other is None else other.directory.local(tunnel_id, holding.session)

    async def connect(
        self,
        session: ScriptedSession | None = None,
        *,
        tunnel_id: str = TUNNEL,
        rules: TakeoverRules = NEWEST_WINS,
        **fields: str | float | LinkPlace | None,
    ) -> ScriptedSession:
        """Do with a session what the gateway endpoint does. Returns when it has the tunnel, or was refused."""
        session = session or ScriptedSession(**fields)  # type: ignore[arg-type]  # the test's own fields
        await self._fleet.tasks.start(self._serve, tunnel_id, session, rules)
        return session

    async def _serve(
        self,
        tunnel_id: str,
        session: ScriptedSession,
        rules: TakeoverRules,
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        try:
            await self.directory.admit(tunnel_id, session, rules=rules)
            await self.directory.enter(tunnel_id, session, rules=rules)
            task_status.started()
            await session.ended.wait()
        except TunnelTaken:
            session.refused = True
            session.ended.set()
            task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await self.directory.leave(tunnel_id, session)

    def holders(self, tunnel_id: str = TUNNEL) -> set[str]:
        """The ids of its sessions that have a tunnel."""
        return {session.id for session in self.sessions.holders(tunnel_id)}

    async def visit(self, tunnel_id: str = TUNNEL) -> str | None:
        """Visit a tunnel as `StreamOpener` does. Returns the id of the session, None if there is none."""
        tried = []
        while (found := await self.directory.find(tunnel_id)) is not None and found not in tried:
            try:
                await (await found.open_stream()).aclose()
            except trio.BrokenResourceError:
                tried.append(found)
                continue
            if isinstance(found, RemoteSession):
                return found.holding.session
            assert isinstance(found, ScriptedSession)
            return found.id
        return None


@final
class Fleet:
    """Nodes that reach each other in memory.

    Args:
        tasks: of all sessions.

    Attributes:
        nodes: those that run, by their process.
    """

    def __init__(self, tasks: trio.Nursery) -> None:
        self.tasks: Final = tasks
        self.nodes: Final[dict[str, Node]] = {}

    @asynccontextmanager
    async def running(self, *stores: ContactStore) -> AsyncIterator[list[Node]]:
        """Run a node over each store. They end with the block, and their sessions do not."""
        async with trio.open_nursery() as nursery:
            nodes = [Node(self, store) for store in stores]
            for node in nodes:
                self.nodes[node.store.process] = node
                await nursery.start(node.directory.run)
            yield nodes
            for node in nodes:
                del self.nodes[node.store.process]
            nursery.cancel_scope.cancel()

    @property
    def at_rest(self) -> bool:
        """Whether all nodes reach the store, and their sessions and the records agree as far as they know."""
        return all(node.store.reachable and not node.directory.to_reconcile for node in self.nodes.values())


@asynccontextmanager
async def fleet_in_memory(number: int) -> AsyncIterator[tuple[MemoryRecords, list[Node]]]:
    """So many nodes over records in memory. Needs a clock that jumps."""
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        async with fleet.running(*(MemoryStore(records, f"node{index}") for index in range(number))) as nodes:
            yield records, nodes
        tasks.cancel_scope.cancel()


def recorded(records: MemoryRecords) -> set[str]:
    """The ids of the sessions in the record."""
    return {holding.session for holding in records.read(TUNNEL).holdings}


async def at_rest(*nodes: Node) -> None:
    """Wait until the nodes have nothing to do."""
    with trio.fail_after(600):
        while not all(node.store.reachable and not node.directory.to_reconcile for node in nodes):
            await trio.sleep(0.1)
    await trio.testing.wait_all_tasks_blocked()
