"""A gateway with links to two relays in memory, one of which follows a plan of faults."""

from __future__ import annotations

import functools

import trio
from fuzzing import examples
from hypothesis import example, given, settings
from rig import echo, read_exactly, request

from pioneer_tunnel import State, Tunnel, open_tunnel
from pioneer_tunnel.testing import (
    BlackHole,
    Drain,
    FaultPlan,
    HostSleep,
    MemoryRelay,
    Refuse,
    Reject,
    StatusContract,
    Takeover,
    Up,
    dial_memory_relays,
    open_memory_relay,
    virtual_time,
    wall_clock,
)
from pioneer_tunnel.testing.strategies import fault_plans


async def visited(relay: MemoryRelay) -> bool:
    """Whether a visitor gets an answer now."""
    visitor = await relay.visit()
    try:
        with trio.move_on_after(60):
            await visitor.send_all(request())
            return await read_exactly(visitor, len(request())) == request()
    except trio.BrokenResourceError:
        pass
    finally:
        await trio.aclose_forcefully(visitor)
    return False


async def judge(tunnel: Tunnel, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """From the first connect on it stays connected."""
    contract = StatusContract(conflated=True)
    await tunnel.wait_connected()
    task_status.started()
    async for status in tunnel.watch():
        contract.see(status)
        assert status.state in {State.CONNECTED, State.STOPPED}


@settings(deadline=None, derandomize=True, max_examples=examples(12))
@given(plan=fault_plans(max_faults=5).filter(lambda plan: not any(isinstance(each, HostSleep) for each in plan.faults)))
@example(plan=FaultPlan([Up(10), Refuse(), Refuse()]))
@example(plan=FaultPlan([BlackHole(5, 300), Up(10)]))
@example(plan=FaultPlan([Drain(5), Takeover(5, own=True)]))
@example(plan=FaultPlan([Up(5)], then=Reject("auth_failed")))
@example(plan=FaultPlan(then=Takeover(5)))
@virtual_time
async def test_whatever_one_relay_does_the_other_one_serves(plan: FaultPlan) -> None:
    """Without `HostSleep`, which stops the links to both."""
    async with (
        open_memory_relay(plan, name="one.test", resume_timeout=60) as one,
        open_memory_relay(name="other.test", resume_timeout=60) as other,
        open_tunnel(
            [one.url, other.url], key=one.key, dial=dial_memory_relays(one, other), wall_clock=wall_clock
        ) as tunnel,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(functools.partial(trio.serve_listeners, echo, [tunnel]))
        await nursery.start(judge, tunnel)
        await other.wait_reachable()
        for _ in range(4):
            await trio.sleep(61)
            assert await visited(other)
        nursery.cancel_scope.cancel()


@virtual_time
async def test_two_links_to_one_relay_come_back_one_by_one() -> None:
    async with (
        open_memory_relay() as relay,
        open_tunnel(relay.url, links=2, key=relay.key, dial=relay.dial, wall_clock=wall_clock) as tunnel,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(functools.partial(trio.serve_listeners, echo, [tunnel]))
        await nursery.start(judge, tunnel)
        while tunnel.status.links_up != 2:
            await trio.sleep(1)
        for _ in range(5):
            await relay.reconnect()
            assert relay.reachable
            assert await visited(relay)
            await trio.sleep(60)
        assert tunnel.status.links_up == 2
        nursery.cancel_scope.cancel()
