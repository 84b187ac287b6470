"""A state machine of the fleet's directory: whatever happens to nodes, gateways and the store, it ends well.

It runs over records in memory in virtual time, and over a real Redis. A thread runs Trio; the machine gives it work.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final, TypeVar, final

import pytest
import trio
import trio.testing
from fleet_rig import Fleet, Node
from fuzzing import fuzzed_machine, searching
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis_server import RealRedis
from rig import HANG
from scripted_session import ScriptedSession

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.contact import ContactStore
from pioneer_tunnel.relay.fleet.finding import LOOK_AGAIN
from pioneer_tunnel.relay.fleet.memory import RETRY, MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.redis_store import RedisStore
from pioneer_tunnel.relay.fleet.store import LEASE
from pioneer_tunnel.relay.gateways.takeover import NEWEST_WINS, Takeover, TakeoverRules, other_link

NODES: Final = 3
RULES: Final = {
    "newest": NEWEST_WINS,
    "first": TakeoverRules(takeover=Takeover.FIRST),
    "rotating": TakeoverRules(keys=("old", "new")),
}
"""By the id of the tunnel."""

_T = TypeVar("_T")


class Kept(ABC):
    """What keeps the records, and how it fails."""

    clock: trio.abc.Clock | None = None

    @abstractmethod
    def store(self, node: str) -> ContactStore: ...

    @abstractmethod
    async def settle(self, at_rest: Callable[[], bool]) -> None: ...

    @abstractmethod
    async def wait(self, seconds: float) -> None: ...

    @abstractmethod
    def cut(self) -> None: ...

    @abstractmethod
    def mend(self) -> None: ...

    @abstractmethod
    def lose_all(self) -> None: ...

    @abstractmethod
    def expire(self, process: str) -> None: ...

    @abstractmethod
    async def renew(self, store: ContactStore) -> None:
        """Let the time come at which a lease is renewed."""


@final
class InMemory(Kept):
    def __init__(self) -> None:
        self.records: Final = MemoryRecords()
        self.clock: trio.testing.MockClock = trio.testing.MockClock()

    def store(self, node: str) -> ContactStore:
        return MemoryStore(self.records, node)

    async def settle(self, at_rest: Callable[[], bool]) -> None:
        for _ in range(40):
            await trio.testing.wait_all_tasks_blocked()
            if at_rest():
                return
            self.clock.jump(RETRY)
        raise AssertionError("they do not come to rest")

    async def wait(self, seconds: float) -> None:
        self.clock.jump(seconds)
        await trio.testing.wait_all_tasks_blocked()

    def cut(self) -> None:
        self.records.up = False

    def mend(self) -> None:
        self.records.up = True

    def lose_all(self) -> None:
        self.records.forget()

    def expire(self, process: str) -> None:
        self.records.end(process)

    async def renew(self, store: ContactStore) -> None:
        self.clock.jump(LEASE / 3)
        await trio.testing.wait_all_tasks_blocked()
        assert self.records.lives(store.process)


@final
class InRedis(Kept):
    def __init__(self, redis: RealRedis) -> None:
        self.redis: Final = redis
        redis.call("FLUSHALL")

    def store(self, node: str) -> ContactStore:
        return RedisStore(self.redis.server, node, retry=0.02)

    async def settle(self, at_rest: Callable[[], bool]) -> None:
        rests = 0
        with trio.fail_after(HANG):
            while rests < 3:
                await trio.sleep(0.01)
                rests = rests + 1 if at_rest() else 0

    async def wait(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def cut(self) -> None:
        self.redis.cut()

    def mend(self) -> None:
        self.redis.mend()

    def lose_all(self) -> None:
        self.redis.call("FLUSHALL")

    def expire(self, process: str) -> None:
        self.redis.call("DEL", f"pioneer:lease:{process}")

    async def renew(self, store: ContactStore) -> None:
        assert isinstance(store, RedisStore)
        await store._renew_lease()


@final
class TrioThread:
    """A thread that runs Trio."""

    def __init__(self, clock: trio.abc.Clock | None) -> None:
        self._begun: Final = threading.Event()
        self._end = trio.Event()
        self._thread: Final = threading.Thread(target=lambda: trio.run(self._run, clock=clock))
        self._thread.start()
        self._begun.wait(HANG)

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self.tasks:
            self._begun.set()
            await self._end.wait()
            self.tasks.cancel_scope.cancel()

    def do(self, work: Callable[..., Awaitable[_T]], *arguments: object) -> _T:
        return trio.from_thread.run(work, *arguments, trio_token=self._token)

    def end(self) -> None:
        trio.from_thread.run_sync(self._end.set, trio_token=self._token)
        self._thread.join(HANG)


class FleetMachine(RuleBasedStateMachine):
    """Three nodes.

    Attributes:
        make: what keeps the records; a test sets it.
    """

    make: ClassVar[Callable[[], Kept]] = InMemory

    def __init__(self) -> None:
        super().__init__()
        self.kept: Final = type(self).make()
        self.trio: Final = TrioThread(self.kept.clock)
        self.sessions: Final[list[tuple[str, ScriptedSession]]] = []
        self.reachable = True
        self.highest = 0
        self.came = 0
        self.nodes: list[Node] = self.trio.do(self._start)

    async def _start(self) -> list[Node]:
        fleet = Fleet(self.trio.tasks)

        async def run(task_status: trio.TaskStatus[list[Node]]) -> None:
            async with fleet.running(*(self.kept.store(f"node{index}") for index in range(NODES))) as nodes:
                task_status.started(nodes)
                await trio.sleep_forever()

        self.fleet = fleet
        nodes: list[Node] = await self.trio.tasks.start(run)
        return nodes

    def teardown(self) -> None:
        try:
            if not self.reachable:
                self.mend()
            self.trio.do(self._settle_and_check)
        finally:
            self.trio.end()

    # What happens

    @rule(
        where=st.lists(st.integers(0, NODES - 1), min_size=1, max_size=3),
        tunnel=st.sampled_from([*RULES]),
        instance=st.sampled_from(["a", "b"]),
        key=st.sampled_from(["old", "new"]),
        place=st.sampled_from([None, None, LinkPlace(0, 2), LinkPlace(1, 2)]),
        answering=st.booleans(),
    )
    def connect(  # noqa: PLR0917  # Hypothesis names them
        self, where: list[int], tunnel: str, instance: str, key: str, place: LinkPlace | None, answering: bool
    ) -> None:
        """Sessions of a gateway come to some nodes at once."""

        async def connect() -> None:
            async with trio.open_nursery() as nursery:
                for index in where:
                    self.came += 1
                    session = ScriptedSession(
                        instance=instance, key_id=key, place=place, since=float(self.came), answering=answering
                    )
                    self.sessions.append((tunnel, session))
                    nursery.start_soon(self._connect, self.nodes[index], session, tunnel)

        self.trio.do(connect)

    async def _connect(self, node: Node, session: ScriptedSession, tunnel: str) -> None:
        await node.connect(session, tunnel_id=tunnel, rules=RULES[tunnel])

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """A session ends."""
        _, session = data.draw(st.sampled_from(self.sessions[-8:]))
        self.trio.do(self._act, session.ended.set)

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), draining=st.booleans(), answering=st.booleans())
    def change(self, data: st.DataObject, draining: bool, answering: bool) -> None:
        """A gateway stops answering, or its relay asks it for another session."""
        _, session = data.draw(st.sampled_from(self.sessions[-8:]))
        session.draining, session.answering = session.draining or draining, answering

    @rule(index=st.integers(0, NODES - 1))
    def isolate(self, index: int) -> None:
        """A node reaches no other node, or does again."""
        self.nodes[index].alone = not self.nodes[index].alone

    @rule(index=st.integers(0, NODES - 1), tunnel=st.sampled_from([*RULES]))
    def visit(self, index: int, tunnel: str) -> None:
        self.trio.do(self.nodes[index].visit, tunnel)

    @precondition(lambda self: self.reachable)
    @rule(index=st.integers(0, NODES - 1))
    def expire(self, index: int) -> None:
        """A node was stopped for longer than its lease."""
        self.kept.expire(self.nodes[index].store.process)

    @precondition(lambda self: self.reachable)
    @rule(loses=st.booleans())
    def cut(self, loses: bool) -> None:
        """The store fails; it may lose all."""
        if loses:
            self.kept.lose_all()
        self.kept.cut()
        self.reachable = False
        self.trio.do(self._until_all_know)

    @precondition(lambda self: not self.reachable)
    @rule()
    def mend(self) -> None:
        self.kept.mend()
        self.reachable = True

    @precondition(lambda self: self.reachable)
    @rule()
    def rest(self) -> None:
        """Time passes, and all is well."""
        self.trio.do(self._settle_and_check)

    # What holds

    @invariant()
    def the_sessions_of_a_node_stand_side_by_side(self) -> None:
        for node in self.nodes:
            for tunnel in RULES:
                holders = node.sessions.holders(tunnel)
                for holder in holders:
                    assert all(other is holder or other_link(holder, other) for other in holders)

    async def _act(self, action: Callable[[], object]) -> None:
        action()
        await trio.testing.wait_all_tasks_blocked()

    async def _until_all_know(self) -> None:
        await self.kept.settle(lambda: not any(node.store.reachable for node in self.nodes))

    async def _settle_and_check(self) -> None:
        for node in self.nodes:
            node.alone = False
        await self.kept.settle(lambda: self.fleet.at_rest)
        for node in self.nodes:
            await self.kept.renew(node.store)
        await self.kept.settle(lambda: self.fleet.at_rest)
        for tunnel in RULES:
            alive = {
                session.id: session
                for where, session in self.sessions
                if where == tunnel and not session.ended.is_set()
            }
            holders = {holder for node in self.nodes for holder in node.holders(tunnel)}
            record = await self.nodes[0].store.read(tunnel)
            assert {holding.session for holding in record.holdings} == holders, "the record is true"
            # One that drains was left to end by itself; a retired one ends with its visitors.
            staying = {each.id for each in alive.values() if not (each.draining or each.is_retired)}
            assert staying <= holders <= alive.keys(), "nobody lost the tunnel without being told"
            for each in holders:
                for other in holders - {each}:
                    assert other_link(alive[each], alive[other]), "they stand side by side"
            for holding in record.holdings:
                assert holding.instance == alive[holding.session].instance
                self.highest = max(self.highest, holding.fence)
            for node in self.nodes:
                if (found := await node.visit(tunnel)) is None and holders:
                    await self.kept.wait(1.1 * LOOK_AGAIN)  # a visitor had come before the gateway
                    found = await node.visit(tunnel)
                assert found in holders if holders else found is None, "visitors of all nodes find one"
        await self._check_fences()

    async def _check_fences(self) -> None:
        """A new session gets a higher fence than all before it, whatever was lost."""
        self.came += 1
        session = ScriptedSession(since=float(self.came))
        await self.nodes[0].connect(session, tunnel_id="fences")
        (holding,) = (await self.nodes[1].store.read("fences")).holdings
        assert holding.fence > self.highest
        self.highest = holding.fence
        session.ended.set()


TestFleetInMemory = fuzzed_machine(FleetMachine.TestCase, 40, stateful_step_count=25)


@pytest.mark.fuzz
def test_the_same_over_a_real_redis(redis_of_the_module: RealRedis) -> None:
    class OverRedis(FleetMachine):
        make = staticmethod(lambda: InRedis(redis_of_the_module))

    run_state_machine_as_test(OverRedis, settings=searching(8, stateful_step_count=15))
