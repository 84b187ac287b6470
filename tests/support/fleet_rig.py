"""Nodes of a fleet in one process: real directories over a real store, with sessions that are scripted."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Final, final

import attrs
import trio
import trio.testing

from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.contact import ContactStore
from pioneer_tunnel.relay.fleet.directory import FleetDirectory
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.peers import Hop, Order, Peers
from pioneer_tunnel.relay.fleet.records import Holding
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.relay.gateways.registry import LiveSession, LocalDirectory, TunnelTaken
from pioneer_tunnel.relay.gateways.takeover import NEWEST_WINS, TakeoverRules

__all__ = ["TUNNEL", "Fleet", "Node", "ScriptedSession", "fleet_in_memory"]

TUNNEL: Final = "office"


@final
@attrs.define(eq=False, kw_only=True)
class ScriptedSession(LiveSession):
    """A session.

    Attributes:
        answering: whether its gateway answers.
        orders: what it got.
        refused: whether it did not get the tunnel.
        ended: set when an order has ended it, or the gateway.
    """

    instance: str = "host-a"
    key_id: str = "key"
    place: LinkPlace | None = None
    since: float = 0.0
    id: str = attrs.field(factory=lambda: secrets.token_hex(8))
    sound: bool = True
    draining: bool = False
    burden: tuple[int, float] = (0, 0.0)
    services: Collection[str] | None = None
    answering: bool = True
    orders: list[str] = attrs.field(factory=list)
    refused: bool = False
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def open_stream(self) -> ByteStream:
        await trio.lowlevel.checkpoint()
        if self.ended.is_set() or self.is_retired:
            raise trio.BrokenResourceError("the session has ended")
        return adopt(trio.testing.memory_stream_pair()[0])

    async def answers(self, within: float) -> bool:
        await trio.lowlevel.checkpoint()
        return self.answering and not self.ended.is_set()

    @property
    def is_retired(self) -> bool:
        return any(order.startswith("retired") for order in self.orders)

    def replace(self, by: str) -> None:
        self._end(f"replaced by {by}")

    def retire(self, by: str) -> None:
        self.orders.append(f"retired by {by}")

    def abandon(self) -> None:
        self._end("abandoned")

    def _end(self, order: str) -> None:
        if not self.ended.is_set():
            self.orders.append(order)
            self.ended.set()


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
