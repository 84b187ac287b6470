"""Who has a tunnel of a fleet: two and three nodes, with records in memory and in virtual time."""

from __future__ import annotations

import pytest
import trio
from fleet_rig import FIRST, ROTATING, TUNNEL, Fleet, at_rest, fleet_in_memory, recorded
from scripted_session import ScriptedSession
from trio.testing import wait_all_tasks_blocked

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.directory import FleetDirectory
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.relay.gateways.expected import HOLD, Expected
from pioneer_tunnel.testing import virtual_time


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
