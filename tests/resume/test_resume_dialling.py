"""When a gateway dials again after it has lost a link that it can resume."""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random
from typing import final

import pytest
import trio
from resumable import resumable, seconds_until_dialled, talk
from trio.testing import MockClock

from pioneer_tunnel import State
from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.relay.gateways.spreading import Spreading
from pioneer_tunnel.testing import BlackHole, FaultPlan, Refuse, Reject, Stage, StallAt, Up


async def test_a_link_that_is_cut_again_and_again_is_dialled_less_and_less_often(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5)], then=Up(0.01))) as (relay, _):
        await trio.sleep(25)
        assert 6 <= len(relay.dials) <= 9
        relay.follow(FaultPlan([Up(11)]))
        await trio.sleep(16)  # it was steady, so that its loss is healed at once
        await talk(await relay.visit(), 2_000)
        assert len(relay.dials) <= 11


async def test_a_link_that_has_lasted_is_restored_at_once_however_often_it_was_lost(autojump_clock: MockClock) -> None:
    """As when the workers of a relay are killed one after the other: visitors wait meanwhile."""
    async with resumable() as (relay, _):
        for _ in range(6):
            await trio.sleep(7)
            relay.cut()
            assert await seconds_until_dialled(relay) == 0


@final
class Network:
    """A `WatchNetwork` of a test."""

    def __init__(self) -> None:
        self.change: Callable[[str], object] = str

    async def __call__(self, changed: Callable[[str], object], _: Callable[[], Collection[str]]) -> None:
        self.change = changed
        await trio.sleep_forever()


def tell_span(patch: pytest.MonkeyPatch, span: float) -> None:
    """Let the relay ask its gateways for so many seconds, as if there were many."""
    patch.setattr(Spreading, "advice", lambda *_: Spread(span=span, longest=span))


@pytest.mark.parametrize("span", [0.0, 1.9, 300.0])
async def test_a_link_that_may_be_lost_with_its_relay_takes_a_share_of_the_span(
    span: float, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_span(monkeypatch, span)
    async with resumable(random=Random(3)) as (relay, _):
        relay.cut()
        waited = await seconds_until_dialled(relay)
        assert waited == 0 if span < 2 else 10 < waited < 60


async def test_a_relay_that_refuses_is_dialled_at_its_rate(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens: the relay is gone, with all its gateways."""
    tell_span(monkeypatch, 60.0)
    async with resumable(FaultPlan([Up(60)], then=Refuse()), random=Random(1)) as (relay, _):
        await trio.sleep(120)
        assert 2 <= len(relay.dials) <= 6
        assert {dial.at >= 61 for dial in relay.dials[1:]} == {True}


async def test_a_relay_that_is_busy_says_when_to_come(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_span(monkeypatch, 300.0)
    plan = FaultPlan([Up(5), Reject("busy", retry_after=7.0)])
    async with resumable(plan, random=Random(3)) as (relay, _):
        await trio.sleep(100)
        _, second, third = relay.dials
        assert third.at == pytest.approx(second.at + 7, abs=0.1)


async def test_a_relay_that_is_busy_for_too_long_gets_another_session_in_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_span(monkeypatch, 300.0)
    async with resumable(FaultPlan([Up(5), Reject("busy", retry_after=90.0)]), random=Random(3)) as (relay, tunnel):
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        assert await visitor.receive_some() == b"hello"
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        await tunnel.wait_connected()
        _, second, third = relay.dials
        assert third.at == pytest.approx(second.at + 90, abs=0.1)


async def test_a_path_that_is_silent_is_left_at_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relay that stops closes its connections. So this gateway is alone."""
    tell_span(monkeypatch, 300.0)
    async with resumable(FaultPlan([BlackHole(30)]), random=Random(3)) as (relay, tunnel):
        await trio.sleep(65)
        assert len(relay.dials) == 2
        assert tunnel.status.state is State.CONNECTED


@pytest.mark.parametrize("before", [True, False])
async def test_a_link_that_is_lost_with_the_network_is_restored_at_once(
    before: bool, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tell_span(monkeypatch, 300.0)
    network = Network()
    async with resumable(random=Random(3), watch_network=network) as (relay, _):
        await trio.sleep(100)
        if before:
            network.change("another network")
            await trio.sleep(1)
        relay.cut()
        if not before:
            await trio.sleep(1)
            network.change("another network")
        await trio.sleep(0.1)
        assert len(relay.dials) == 2
        await talk(await relay.visit(), 2_000)


async def test_a_change_of_the_network_begins_an_attempt_anew(autojump_clock: MockClock) -> None:
    network = Network()
    for stage in Stage:
        plan = FaultPlan([Up(5), StallAt(stage), StallAt(stage)])
        async with resumable(plan, watch_network=network) as (relay, tunnel):
            started = trio.current_time()
            visitor = await relay.visit()
            await trio.sleep(6)
            for seconds in (1, 2):
                network.change("another network")
                await trio.sleep(seconds)
            await talk(visitor, 2_000)
            assert [round(dial.at - started) for dial in relay.dials] == [0, 5, 6, 7]
            assert tunnel.status.attempt == 1
