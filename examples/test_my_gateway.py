"""Tests of a gateway under generated network faults: its statuses are true, it gives up only after final failures, and
it loses neither bytes nor tasks. Run it with `pytest examples/test_my_gateway.py`; docs/testing.md explains it.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import trio
from hypothesis import given, settings

from pioneer_tunnel import (
    MemoryKeystore,
    RemoteAccess,
    RemoteAccessConfig,
    SettingsFile,
    SettingsUpdate,
    State,
    TunnelStream,
)
from pioneer_tunnel.testing import (
    FaultPlan,
    MemoryRelay,
    Visitor,
    check_task_leak,
    open_memory_relay,
    open_status_recorder,
    play_visitor,
    virtual_time,
    wall_clock,
)
from pioneer_tunnel.testing.strategies import fault_plans, visitor_traffic


@asynccontextmanager
async def my_gateway(relay: MemoryRelay) -> AsyncIterator[tuple[RemoteAccess, trio.Nursery]]:
    """Put your gateway here. It runs during the `async with` and connects through `relay.dial`."""
    with tempfile.TemporaryDirectory() as home:
        remote_access = RemoteAccess(
            RemoteAccessConfig(relay_addr=relay.url, base_dir=home),
            settings=SettingsFile(Path(home) / "gateway-settings.toml"),
            keystore=MemoryKeystore(),
            handler=echo,
            dial=relay.dial,
            wall_clock=wall_clock,
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(remote_access.run)
            await remote_access.apply(SettingsUpdate(enabled=True, key=relay.key))
            yield remote_access, nursery
            nursery.cancel_scope.cancel()


async def echo(visitor: TunnelStream) -> None:
    with suppress(trio.BrokenResourceError):
        async with visitor:
            async for data in visitor:
                await visitor.send_all(data)


@settings(deadline=None)
@given(plan=fault_plans())
@virtual_time
async def test_it_tells_the_truth_and_gives_up_only_when_it_has_to(plan: FaultPlan) -> None:
    async with open_memory_relay(plan) as relay, open_status_recorder(relay) as recorder, my_gateway(relay) as (it, _):
        recorder.watch(it)
        await relay.played()
        await trio.sleep(60)
        assert it.status.state is (State.FAILED if plan.final else State.CONNECTED)
        assert it.status.error_kind is (plan.final.kind if plan.final else None)
        assert not relay.dials_after_final


@settings(deadline=None)
@given(plan=fault_plans(final=False), traffic=visitor_traffic(max_visitors=2))
@virtual_time
async def test_every_byte_comes_back_or_the_visitor_is_told(plan: FaultPlan, traffic: list[Visitor]) -> None:
    async with open_memory_relay(plan) as relay, my_gateway(relay):
        for visitor in traffic:
            heard = await play_visitor(relay, visitor)
            assert visitor.data.startswith(heard.data)
            assert heard.data == visitor.data or heard.broken or visitor.leave != "end"


@virtual_time
async def test_a_reconnect_leaves_nothing_behind() -> None:
    async with open_memory_relay() as relay, my_gateway(relay) as (_, nursery):
        await relay.wait_reachable()
        await check_task_leak(nursery, relay.reconnect)
