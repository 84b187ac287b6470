"""The directory of a fleet while its store is down or forgets, and what is found when it is back."""

from __future__ import annotations

import trio
from fleet_rig import FIRST, ROTATING, TUNNEL, Fleet, at_rest, fleet_in_memory, recorded
from scripted_session import ScriptedSession

from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.store import LEASE
from pioneer_tunnel.testing import virtual_time


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
