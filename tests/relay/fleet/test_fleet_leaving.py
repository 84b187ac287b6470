"""Sessions that go, alone or with the node that drains, leave no record, and their visitors wait when it is of use."""

from __future__ import annotations

import pytest
import trio
from fleet_rig import FIRST, TUNNEL, Node, at_rest, fleet_in_memory, recorded
from scripted_session import ScriptedSession

from pioneer_tunnel.relay.fleet.memory import MemoryStore
from pioneer_tunnel.relay.gateways.expected import HOLD, PATIENCE
from pioneer_tunnel.testing import virtual_time

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
