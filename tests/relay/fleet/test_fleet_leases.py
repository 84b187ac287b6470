"""A node of a fleet that dies, stops or is paused: its lease, and the sessions that it held."""

from __future__ import annotations

import trio
from fleet_rig import FIRST, TUNNEL, Fleet, at_rest, fleet_in_memory, recorded

from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.store import LEASE
from pioneer_tunnel.testing import virtual_time


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
