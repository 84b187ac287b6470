"""How a visitor finds its gateway at another node: with few requests to the store, and also by an old route."""

from __future__ import annotations

from collections.abc import Sequence

import trio
from fleet_rig import TUNNEL, Fleet, fleet_in_memory
from scripted_session import ScriptedSession
from trio.testing import wait_all_tasks_blocked

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.relay.fleet.memory import MemoryRecords, MemoryStore
from pioneer_tunnel.relay.fleet.peers import Order, OrderKind
from pioneer_tunnel.relay.fleet.records import Holding, Record
from pioneer_tunnel.relay.fleet.remote import RemoteSession
from pioneer_tunnel.testing import virtual_time


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
