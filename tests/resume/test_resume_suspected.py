"""A connection that is only suspected: it carries on until another one has taken its place."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from resumable import resumable, talk
from trio.testing import MockClock

from pioneer_tunnel import Services, State, Tunnel
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.testing import BlackHole, FaultPlan, MemoryRelay, Refuse, Stage, StallAt, Up
from pioneer_tunnel.testing.memory_directory import Tunnels
from pioneer_tunnel.transports import native
from pioneer_tunnel.transports.resuming import Resuming


@asynccontextmanager
async def suspicious(
    plan: FaultPlan, *, services: Services | None = None
) -> AsyncIterator[tuple[MemoryRelay, Tunnel, Callable[[], None]]]:
    """As `resumable`, and what lets the gateway suspect its connection."""
    made: list[Resuming] = []

    def make(*arguments: Any, **named: Any) -> Resuming:
        made.append(Resuming(*arguments, **named))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "Resuming", make)
        async with resumable(plan, services=services) as (relay, tunnel):
            yield relay, tunnel, made[0].suspect


async def test_a_dead_path_is_left_before_anything_ends_it(autojump_clock: MockClock) -> None:
    async with suspicious(FaultPlan([BlackHole(5)])) as (relay, tunnel, suspect):
        visitor = await relay.visit()
        await trio.sleep(6)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, visitor, 20_000)
            await trio.sleep(1)
            suspect()
        assert trio.current_time() < 8
        assert [status.state for status in tunnel.history].count(State.RECONNECTING) == 0


async def test_a_suspected_connection_carries_on_while_no_other_is_found(autojump_clock: MockClock) -> None:
    """The redial stalls at each step; bytes flow on all the while, except when the new connection may have won."""
    for stage in Stage:
        async with suspicious(FaultPlan([Up(), StallAt(stage)], then=Refuse())) as (relay, tunnel, suspect):
            suspect()
            for _ in range(30):
                await talk(await relay.visit(), 2_000)
                await trio.sleep(1)
            assert len(relay.dials) == 2
            assert [status.state for status in tunnel.history].count(State.RECONNECTING) == 0


async def test_a_live_connection_is_replaced_under_traffic(autojump_clock: MockClock) -> None:
    async with suspicious(FaultPlan()) as (relay, _, suspect):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk, await relay.visit(), 100_000, 0.01)
            for _ in range(5):
                await trio.sleep(0.1)
                suspect()
        assert len(relay.dials) == 6


async def test_a_relay_is_asked_and_answers_when_the_gateway_has_gone_on(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The relay takes so long to look up the tunnel that the counters of the old connection have moved on."""
    caplog.set_level(logging.INFO, "pioneer_tunnel")
    by_key_id = Tunnels.by_key_id
    waits = deque([0.0, 0.0, 0.0, 20.0])  # the proof and the services: of the first connection, and of the second

    async def slowly(self: Tunnels, key_id: str) -> TunnelEntry | None:
        await trio.sleep(waits.popleft() if waits else 0.0)
        return await by_key_id(self, key_id)

    monkeypatch.setattr(Tunnels, "by_key_id", slowly)
    services = Services({"": "127.0.0.1:1"})
    async with suspicious(FaultPlan([Up(), BlackHole(1)], then=Refuse()), services=services) as (
        relay,
        tunnel,
        suspect,
    ):
        suspect()
        await trio.sleep(15)
        assert not waits
        await talk(await relay.visit(), 20_000)
        await trio.sleep(15)
        await talk(await relay.visit(), 20_000)
        assert tunnel.status.attempt == 1
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert "cannot be resumed: it has received" in caplog.text
