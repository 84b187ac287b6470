"""The directory of a fleet: two and three nodes, with records in memory and in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pytest
import trio
from fleet_rig import TUNNEL, Fleet, Node, ScriptedSession, fleet_in_memory
from trio.testing import wait_all_tasks_blocked

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.directory import FleetDirectory
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.peers import Order, OrderKind
from pioneer_tunnel.relay.fleet.records import Holding, Record
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.relay.fleet.store import LEASE
from pioneer_tunnel.relay.gateways.expected import HOLD, PATIENCE, Expected
from pioneer_tunnel.relay.gateways.takeover import Takeover, TakeoverRules
from pioneer_tunnel.testing import virtual_time

FIRST: Final = TakeoverRules(takeover=Takeover.FIRST)
ROTATING: Final = TakeoverRules(keys=("old", "new"))


def recorded(records: MemoryRecords) -> set[str]:
    """The ids of the sessions in the record."""
    return {holding.session for holding in records.read(TUNNEL).holdings}


async def at_rest(*nodes: Node) -> None:
    """Wait until the nodes have nothing to do."""
    with trio.fail_after(600):
        while not all(node.store.reachable and not node.directory.to_reconcile for node in nodes):
            await trio.sleep(0.1)
    await wait_all_tasks_blocked()


# Takeover


@virtual_time
async def test_a_gateway_that_comes_back_to_another_node_replaces_its_old_session() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        before = await left.connect()
        assert await right.visit() == before.id
        after = await right.connect()
        await at_rest(left, right)
        assert before.orders == ["replaced by host-a"]
        assert recorded(records) == right.holders() == {after.id}
        assert left.holders() == set()
        assert await left.visit() == after.id


@virtual_time
async def test_while_the_store_is_down_a_newer_session_of_another_worker_ends_the_older_one() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        records.up = False
        await trio.sleep(2 * records.lease)
        older = await left.connect(since=1.0)
        newer = await right.connect(since=2.0)
        shown = right.directory.holdings(TUNNEL)
        assert [each.session for each in shown] == [newer.id]
        right.directory.end_older_than(TUNNEL, left.directory.holdings(TUNNEL))
        left.directory.end_older_than(TUNNEL, shown)
        left.directory.end_older_than("of neither", shown)
        await wait_all_tasks_blocked()
        assert older.orders == ["replaced by host-a"]
        assert (left.holders(), right.holders()) == (set(), {newer.id})


@virtual_time
async def test_a_session_of_another_worker_is_found_without_the_store() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        records.up = False
        await trio.sleep(2 * records.lease)
        session = await right.connect()
        assert await left.visit() is None
        beside = FleetDirectory(left.store, left, beside=right.directory.holdings)
        found = beside.find_nowait(TUNNEL)
        assert isinstance(found, RemoteSession)
        assert found.holding.session == session.id


@virtual_time
async def test_visitors_wait_for_an_expected_gateway_wherever_it_comes() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        expected = Expected([TUNNEL])
        expected.begin()
        waiting = FleetDirectory(left.store, left, expected=expected)
        found: list[object] = []

        async def find() -> None:
            found.append(await waiting.find(TUNNEL))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(find)
            await trio.sleep(HOLD / 2)
            assert not found
            session = await right.connect()
        (remote,) = found
        assert isinstance(remote, RemoteSession)
        assert remote.holding.session == session.id
        since = trio.current_time()
        assert await waiting.find("another") is None
        assert trio.current_time() - since < 1


@pytest.mark.parametrize("alone", [False, True])
@virtual_time
async def test_the_loser_is_told_whether_or_not_the_nodes_reach_each_other(alone: bool) -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        left.alone = alone
        before = await left.connect(instance="host-a")
        after = await right.connect(instance="host-b")
        await at_rest(left, right)
        assert before.orders == ["replaced by host-b"]
        assert recorded(records) == {after.id}


@virtual_time
async def test_an_order_of_another_node_is_enough() -> None:
    """The store says nothing any more once it is down."""
    async with fleet_in_memory(2) as (_records, (left, right)):
        before = await left.connect()
        left.store.on_change = lambda _tunnel_id: None
        await right.connect()
        await wait_all_tasks_blocked()
        assert before.orders == ["replaced by host-a"]


@virtual_time
async def test_of_two_that_come_at_once_one_has_the_tunnel() -> None:
    async with fleet_in_memory(3) as (records, nodes):
        sessions = [ScriptedSession(instance=f"host-{index}") for index in range(9)]
        async with trio.open_nursery() as nursery:
            for index, session in enumerate(sessions):
                nursery.start_soon(nodes[index % 3].connect, session)
        await at_rest(*nodes)
        (winner,) = recorded(records)
        assert [session.id for session in sessions if not session.ended.is_set()] == [winner]
        assert {holder for node in nodes for holder in node.holders()} == {winner}
        for node in nodes:
            assert await node.visit() == winner


@virtual_time
async def test_the_first_one_keeps_the_tunnel_while_it_answers() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        first = await left.connect(instance="host-a", rules=FIRST)
        second = await right.connect(instance="host-b", rules=FIRST)
        assert second.refused
        assert recorded(records) == {first.id}
        first.answering = False
        third = await right.connect(instance="host-b", rules=FIRST)
        await at_rest(left, right)
        assert first.orders in (["abandoned"], ["replaced by host-b"])
        assert recorded(records) == right.holders() == {third.id}
        assert left.holders() == set()


@virtual_time
async def test_a_holder_that_does_not_answer_at_this_node_does_not_lock_the_tunnel() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        first = await left.connect(instance="host-a", rules=FIRST)
        first.answering = False
        second = await left.connect(instance="host-b", rules=FIRST)
        await at_rest(left, right)
        assert first.orders == ["abandoned"]
        assert recorded(records) == {second.id}


@virtual_time
async def test_a_later_key_retires_the_session_of_another_node() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        old = await left.connect(key_id="old", instance="host-a", rules=ROTATING)
        new = await right.connect(key_id="new", instance="host-b", rules=ROTATING)
        await at_rest(left, right)
        assert old.orders == ["retired by host-b"]
        assert not old.ended.is_set()
        assert recorded(records) == {new.id}, "a retired session is no holding"
        assert await left.visit() == new.id
        again = await left.connect(key_id="old", instance="host-a", rules=ROTATING)
        assert again.refused, "a rotation does not go back"


@virtual_time
async def test_the_links_of_a_gateway_stand_side_by_side_at_different_nodes() -> None:
    async with fleet_in_memory(3) as (records, (left, right, third)):
        first = await left.connect(place=LinkPlace(0, 2))
        second = await right.connect(place=LinkPlace(1, 2))
        await at_rest(left, right, third)
        assert recorded(records) == {first.id, second.id}
        assert await left.visit() == first.id
        assert await right.visit() == second.id
        third.distances = {"node0": 0.2, "node1": 0.1}
        assert [await third.visit() for _ in range(4)] == [second.id] * 4, "the nearest"
        third.distances = {"node0": 0.1, "node1": 0.2}
        assert [await third.visit() for _ in range(4)] == [first.id] * 4
        third.distances = {"node0": 0.1, "node1": 0.1}
        assert {await third.visit() for _ in range(4)} == {first.id, second.id}, "they take turns"
        first.sound = False
        assert await left.visit() == second.id, "one whose connection is in doubt is the last choice"
        alone = await third.connect()
        await at_rest(left, right, third)
        assert recorded(records) == {alone.id}, "after a restart with one link the others are replaced"


@virtual_time
async def test_one_that_drains_is_not_replaced_but_ends_by_itself() -> None:
    """A relay restarts: its gateways have been asked for another session."""
    async with fleet_in_memory(2) as (records, (left, right)):
        draining = await left.connect()
        draining.draining = True
        await at_rest(left, right)
        assert await right.visit() == draining.id, "until it is replaced, visitors go to it"
        other = await right.connect()
        await at_rest(left, right)
        assert draining.orders == []
        assert not draining.ended.is_set()
        assert recorded(records) == {other.id}
        assert await left.visit() == other.id


@virtual_time
async def test_a_node_that_restarts_has_two_processes_with_one_name() -> None:
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        async with fleet.running(MemoryStore(records, "node0"), MemoryStore(records, "node1")) as (before, other):
            session = await before.connect()
            async with fleet.running(MemoryStore(records, "node0")) as (after,):
                assert await other.visit() == session.id
                assert await after.visit() == session.id
                session.draining = True
                new = await after.connect()
                await at_rest(before, other, after)
                assert recorded(records) == {new.id}
                assert session.orders == []
                assert await other.visit() == new.id
        tasks.cancel_scope.cancel()


# Sessions that go


@virtual_time
async def test_a_session_that_goes_leaves_no_record() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect()
        assert len(records) == 1
        session.ended.set()
        await at_rest(left, right)
        assert len(records) == 0
        assert left.directory._tunnels == {}
        assert left.directory._locks == {}
        assert await left.visit() is None
        assert await right.visit() is None


@virtual_time
async def test_one_that_goes_does_not_take_the_record_of_its_successor_along() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        before = await left.connect()
        after = await right.connect()
        before.ended.set()
        await at_rest(left, right)
        assert recorded(records) == {after.id}


@virtual_time
async def test_one_that_is_cancelled_while_it_enters_leaves_nothing() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        store = left.store
        assert isinstance(store, MemoryStore)
        write = store.write

        async def write_and_hang(*arguments: object, **named: object) -> None:
            await write(*arguments, **named)  # type: ignore[arg-type]
            await trio.sleep_forever()

        session = ScriptedSession()
        store.write = write_and_hang  # type: ignore[method-assign, assignment]
        with trio.move_on_after(1):
            await left.directory.enter(TUNNEL, session)
        store.write = write  # type: ignore[method-assign]
        assert recorded(records) == {session.id}
        await left.directory.leave(TUNNEL, session)
        await at_rest(left, right)
        assert recorded(records) == set()


# Nodes that drain


@pytest.mark.parametrize("known", [False, True])
@virtual_time
async def test_visitors_wait_for_a_gateway_whose_node_drains(known: bool) -> None:
    async with fleet_in_memory(3) as (_records, (left, right, third)):
        session = await left.connect()
        if known:
            assert await third.visit() == session.id
        left.store.leaving = True
        session.ended.set()
        if not known:
            await at_rest(left)  # else the record still has the session when the first visitor comes
        found: list[str | None] = []

        async def visit(node: Node) -> None:
            found.append(await node.visit())

        async with trio.open_nursery() as nursery:
            for node in (third, third) if known else (left, third):
                nursery.start_soon(visit, node)
            await trio.sleep(3)  # as long as it may take to come again
            after = await right.connect()
        assert found == [after.id] * 2


@virtual_time
async def test_visitors_of_a_gateway_that_left_with_its_node_do_not_wait_for_ever() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect()
        left.store.leaving = True
        session.ended.set()
        await at_rest(left, right)
        before, operations = trio.current_time(), right.store.operations
        assert await right.visit() is None
        assert HOLD <= trio.current_time() - before < HOLD + 1
        assert right.store.operations - operations < 30, "the store is asked now and then"
        await trio.sleep(PATIENCE - HOLD)
        before = trio.current_time()
        assert await right.visit() is None
        assert trio.current_time() - before < 1, "nobody comes any more"
        assert len(records) == 0


@pytest.mark.parametrize("instance", ["host-a", "host-b"])
@virtual_time
async def test_a_gateway_that_comes_after_one_has_left_has_the_tunnel(instance: str) -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect(rules=FIRST)
        left.store.leaving = True
        session.ended.set()
        await at_rest(left, right)
        after = await right.connect(instance=instance, rules=FIRST)
        assert recorded(records) == {after.id}
        await trio.sleep(2 * PATIENCE)
        assert await left.visit() == after.id


@virtual_time
async def test_visitors_of_a_gateway_that_is_simply_gone_do_not_wait() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        session = await left.connect()
        assert await right.visit() == session.id
        session.ended.set()
        before = trio.current_time()
        assert await right.visit() is None
        assert trio.current_time() - before < 1


# Visitors


@virtual_time
async def test_a_visitor_that_comes_with_an_old_route_finds_the_new_one() -> None:
    async with fleet_in_memory(3) as (_records, (left, right, third)):
        await left.connect()
        await third.visit()
        after = await right.connect()
        asked = third.asked
        assert await third.visit() == after.id
        assert third.asked == asked + 2, "the old one says that it is gone"


@virtual_time
async def test_a_known_route_is_used_without_asking_the_store() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        session = await left.connect()
        await right.visit()
        before = right.store.operations
        assert [await right.visit() for _ in range(20)] == [session.id] * 20
        assert right.store.operations == before


@virtual_time
async def test_visitors_of_one_tunnel_read_its_record_once() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        session = await left.connect()
        before = right.store.operations
        found: list[str | None] = []

        async def visit() -> None:
            found.append(await right.visit())

        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(visit)
        assert found == [session.id] * 50
        assert right.store.operations == before + 1


@virtual_time
async def test_visitors_of_a_tunnel_without_gateway_do_not_flood_the_store() -> None:
    async with fleet_in_memory(1) as (_records, (node,)):
        before = node.store.operations
        with trio.move_on_after(10):
            while True:
                assert await node.visit() is None
                await trio.sleep(0.01)
        assert node.store.operations - before <= 45


@virtual_time
async def test_a_visitor_that_gives_up_does_not_take_the_others_along() -> None:
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        stores = MemoryStore(records, "node0"), MemoryStore(records, "node1", round_trip=1.0)
        async with fleet.running(*stores) as (left, right):
            session = await left.connect()
            found = []

            async def wait() -> None:
                found.append(await right.visit())

            async with trio.open_nursery() as nursery:
                with trio.move_on_after(0.5):
                    nursery.start_soon(wait)
                    await right.visit()
            assert found == [session.id]
        tasks.cancel_scope.cancel()


@virtual_time
async def test_a_route_to_a_node_that_cannot_be_reached_is_the_last_choice_for_a_while() -> None:
    async with fleet_in_memory(3) as (_records, (left, right, third)):
        first = await left.connect(place=LinkPlace(0, 2))
        second = await right.connect(place=LinkPlace(1, 2))
        third.distances = {"node0": 0.1, "node1": 0.2}
        assert await third.visit() == first.id
        left.alone = True
        assert await third.visit() == second.id
        asked = third.asked
        assert await third.visit() == second.id
        assert third.asked == asked + 1
        left.alone = False
        await trio.sleep(5)
        assert await third.visit() == first.id


@virtual_time
async def test_a_session_at_another_node_has_the_services_of_its_gateway() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        session = await left.connect()
        session.services = {"camera"}
        found = await right.directory.find(TUNNEL)
        assert isinstance(found, RemoteSession)
        assert (found.instance, found.key_id, found.place, found.since) == ("host-a", "key", None, 0.0)
        await (await found.open_stream()).aclose()
        assert found.services == {"camera"}


@virtual_time
async def test_a_node_answers_for_its_own_sessions_only() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        session = await left.connect()
        await right.visit()
        assert left.directory.local(TUNNEL, session.id) is session
        assert right.directory.local(TUNNEL, session.id) is None
        assert not await right.directory.carry_out(TUNNEL, session.id, Order(OrderKind.ABANDON))
        assert session.orders == []


@virtual_time
async def test_a_visitor_of_another_node_may_come_before_the_write_of_the_record_has_returned() -> None:
    async with fleet_in_memory(2) as (_records, (left, right)):
        write, returns = left.store.write, trio.Event()

        async def write_and_wait(tunnel_id: str, *, expected: int, holdings: Sequence[Holding]) -> Record:
            record = await write(tunnel_id, expected=expected, holdings=holdings)
            await returns.wait()
            return record

        left.store.write = write_and_wait  # type: ignore[method-assign]
        session = ScriptedSession()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.connect, session)
            await wait_all_tasks_blocked()
            assert left.holders() == set()
            assert await right.visit() == session.id
            returns.set()
        assert left.holders() == {session.id}


# The store fails


@virtual_time
async def test_sessions_that_come_while_the_store_is_down_are_announced_when_it_is_back() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        records.up = False
        await trio.sleep(LEASE)
        session = await left.connect()
        assert await left.visit() == session.id
        assert await right.visit() is None
        assert left.directory.to_reconcile == 1
        records.up = True
        await at_rest(left, right)
        assert recorded(records) == {session.id}
        assert await right.visit() == session.id


@virtual_time
async def test_a_store_that_is_down_at_the_start_does_not_keep_a_node_from_starting() -> None:
    records = MemoryRecords()
    records.up = False
    async with trio.open_nursery() as tasks:
        async with Fleet(tasks).running(MemoryStore(records, "node0")) as (node,):
            session = await node.connect()
            assert await node.visit() == session.id
            records.up = True
            await at_rest(node)
            assert recorded(records) == {session.id}
        tasks.cancel_scope.cancel()


@virtual_time
async def test_known_routes_outlive_an_outage_however_long_it_is() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect()
        await right.visit()
        records.up = False
        await trio.sleep(3600)
        assert await right.visit() == session.id
        records.up = True
        await trio.sleep(1.5)
        assert await right.visit() == session.id, "also while the leases that have expired are renewed"
        await trio.sleep(3600)
        assert await right.visit() == session.id
        assert session.orders == []


@virtual_time
async def test_leases_that_expired_while_the_store_was_down_prove_nothing() -> None:
    async with fleet_in_memory(3) as (records, (left, right, third)):
        session = await left.connect(instance="host-a", rules=FIRST)
        records.up = False
        await trio.sleep(3600)
        left.store.connected = False  # type: ignore[attr-defined]  # it comes back later than the others
        records.up = True
        await at_rest(right, third)
        assert await third.visit() == session.id
        other = await right.connect(instance="host-b", rules=FIRST)
        assert other.refused


@virtual_time
async def test_a_fence_is_higher_than_those_that_were_lost() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        await trio.sleep(1)
        await left.connect()
        (lost,) = records.read(TUNNEL).holdings
        records.forget()
        await trio.sleep(0.01)
        await right.connect(tunnel_id="other")
        (holding,) = records.read("other").holdings
        assert holding.fence > lost.fence


@virtual_time
async def test_a_store_that_comes_back_empty_learns_all_again() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect()
        (holding,) = records.read(TUNNEL).holdings
        await right.visit()
        records.up = False
        await trio.sleep(LEASE)
        records.forget()
        records.up = True
        await at_rest(left, right)
        assert records.read(TUNNEL).holdings == (holding,), "with its fence"
        assert await right.visit() == session.id
        new = await right.connect()
        await at_rest(left, right)
        (later,) = records.read(TUNNEL).holdings
        assert later.session == new.id
        assert later.fence > holding.fence


@virtual_time
async def test_of_two_that_have_the_tunnel_after_an_outage_the_higher_fence_keeps_it() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        left.alone = True
        before = await left.connect(instance="host-a")
        left.store.connected = False  # type: ignore[attr-defined]
        await trio.sleep(2 * LEASE)
        after = await right.connect(instance="host-b")
        assert before.orders == [], "its node knows nothing"
        records.forget()  # so the higher one is not in the record when the lower one comes
        left.store.connected = True  # type: ignore[attr-defined]
        await trio.sleep(LEASE)  # the lease of the other one is lost as well, and it announces again
        await at_rest(left, right)
        assert before.orders == ["replaced by host-b"]
        assert after.orders == []
        assert recorded(records) == {after.id}


@virtual_time
async def test_of_two_that_came_during_an_outage_the_newest_has_the_tunnel() -> None:
    """However they are announced."""
    for first, second in ((0, 1), (1, 0)):
        async with fleet_in_memory(2) as (records, nodes):
            records.up = False
            await trio.sleep(LEASE)
            early = await nodes[0].connect(since=1.0)
            late = await nodes[1].connect(since=2.0)
            for node in nodes:
                node.store.connected = False  # type: ignore[attr-defined]
            records.up = True
            for index in (first, second):
                nodes[index].store.connected = True  # type: ignore[attr-defined]
                await at_rest(nodes[index])
            await at_rest(*nodes)
            assert recorded(records) == {late.id}
            assert early.orders == ["replaced by host-a"]
            assert late.orders == []


@virtual_time
async def test_a_key_that_is_rotated_during_an_outage_retires_the_old_one() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        records.up = False
        await trio.sleep(LEASE)
        new = await left.connect(key_id="new", instance="host-b", since=1.0, rules=ROTATING)
        old = await right.connect(key_id="old", instance="host-a", since=2.0, rules=ROTATING)
        records.up = True
        await at_rest(left, right)
        assert recorded(records) == {new.id}
        assert old.orders in (["retired by host-b"], ["replaced by host-b"])
        assert new.orders == []


@virtual_time
async def test_a_write_that_was_carried_out_without_an_answer_is_found_again() -> None:
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        async with fleet.running(MemoryStore(records, "node0", round_trip=2.0)) as (node,):
            session = ScriptedSession()
            tasks.start_soon(node.connect, session)
            await trio.sleep(1.5)
            records.up = False
            await trio.sleep(1.5)
            assert recorded(records) == {session.id}
            assert node.holders() == {session.id}
            (holding,) = records.read(TUNNEL).holdings
            records.up = True
            await at_rest(node)
            assert records.read(TUNNEL).holdings == (holding,), "it has the fence that it was given"
        tasks.cancel_scope.cancel()


# A node fails


@virtual_time
async def test_the_holdings_of_a_node_that_dies_are_void_when_its_lease_expires() -> None:
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        async with fleet.running(MemoryStore(records, "node1")) as (right,):
            async with fleet.running(MemoryStore(records, "node0")) as (left,):
                await left.connect(instance="host-a", rules=FIRST)
                await right.visit()
                left.store.connected = False  # type: ignore[attr-defined]  # it is killed, and ends no lease
            assert recorded(records) != set()
            await trio.sleep(LEASE)
            assert recorded(records) == set()
            assert await right.visit() is None
            after = await right.connect(instance="host-b", rules=FIRST)
            assert recorded(records) == {after.id}
        tasks.cancel_scope.cancel()


@virtual_time
async def test_a_node_that_stops_ends_its_lease_at_once() -> None:
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        async with fleet.running(MemoryStore(records, "node1")) as (right,):
            async with fleet.running(MemoryStore(records, "node0")) as (left,):
                await left.connect()
                assert await right.visit() is not None
            assert recorded(records) == set()
            assert await right.visit() is None
        tasks.cancel_scope.cancel()


@virtual_time
async def test_the_parent_of_workers_drops_the_holdings_of_one_that_died() -> None:
    async with fleet_in_memory(2) as (records, (left, _right)):
        changes: list[str] = []
        await left.connect()
        records.on_write = lambda tunnel_id, _record: changes.append(tunnel_id)
        records.drop(left.store.process)
        assert changes == [TUNNEL]
        assert len(records) == 0


@virtual_time
async def test_a_node_that_was_paused_for_longer_than_its_lease_loses_to_newer_sessions() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        lost = await left.connect(instance="host-a")
        kept = await left.connect(instance="host-a", tunnel_id="other")
        left.alone = True
        left.store.connected = False  # type: ignore[attr-defined]
        left.store.reachable = True  # it does not know
        await trio.sleep(2 * LEASE)
        assert await right.visit("other") is None
        new = await right.connect(instance="host-b")
        assert lost.orders == []
        left.store.connected = True  # type: ignore[attr-defined]
        left.alone = False
        await trio.sleep(2)
        await at_rest(left, right)
        assert lost.orders == ["replaced by host-b"]
        assert kept.orders == []
        assert recorded(records) == {new.id}
        assert await right.visit("other") == kept.id


@virtual_time
async def test_a_lease_that_has_expired_by_itself_costs_nothing_when_nobody_came() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect()
        records.end(left.store.process)
        assert await right.visit() is None
        await trio.sleep(LEASE)
        await at_rest(left, right)
        assert await right.visit() == session.id
        assert session.orders == []


@virtual_time
async def test_who_writes_has_a_lease() -> None:
    """Two that wrote without one would not see each other, and write in turn for ever."""
    async with fleet_in_memory(1) as (records, (node,)):
        records.end(node.store.process)
        other = await node.connect(tunnel_id="other")
        records.end(node.store.process)
        session = await node.connect()
        assert recorded(records) == {session.id}
        assert node.directory.to_reconcile, "it looks what it has missed"
        await at_rest(node)
        assert not other.ended.is_set()


@virtual_time
async def test_a_record_that_was_lost_without_an_outage_comes_back_within_hours() -> None:
    async with fleet_in_memory(2) as (records, (left, right)):
        session = await left.connect()
        records.write("somebody", TUNNEL, expected=records.read(TUNNEL).version, holdings=[])
        left.store.on_change(TUNNEL)
        await at_rest(left)
        assert recorded(records) == {session.id}, "at once when the store tells"
        records._records.clear()
        await trio.sleep(7 * 3600)
        assert recorded(records) == {session.id}
        assert await right.visit() == session.id


@virtual_time
async def test_many_sessions_are_announced_with_few_requests_at_a_time() -> None:
    records = MemoryRecords()
    async with trio.open_nursery() as tasks:
        fleet = Fleet(tasks)
        async with fleet.running(MemoryStore(records, "node0", round_trip=0.5)) as (node,):
            records.up = False
            await trio.sleep(LEASE)
            for index in range(100):
                await node.connect(tunnel_id=f"tunnel-{index}")
            records.up = True
            before = node.store.operations
            await at_rest(node)
            assert len(records) == 100
            assert node.store.operations - before <= 2 * 100 + 5
        tasks.cancel_scope.cancel()
