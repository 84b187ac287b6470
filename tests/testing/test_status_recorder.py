"""The recorder: what a gateway shows is held against the contract, and against what a visitor would find."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from pioneer_tunnel import State, Status, Tunnel, open_tunnel
from pioneer_tunnel.testing import (
    ContractBroken,
    FaultPlan,
    MemoryRelay,
    Refuse,
    Slow,
    StatusUntrue,
    Up,
    open_memory_relay,
    open_status_recorder,
    virtual_time,
    wall_clock,
)


@asynccontextmanager
async def connected(relay: MemoryRelay) -> AsyncIterator[Tunnel]:
    async with open_tunnel(relay.url, key=relay.key, dial=relay.dial, wall_clock=wall_clock) as tunnel:
        await tunnel.wait_connected()
        yield tunnel


@virtual_time
async def test_it_sees_every_status_and_when() -> None:
    async with (
        open_memory_relay(FaultPlan([Refuse(), Up(60.0)])) as relay,
        open_status_recorder(relay) as recorder,
        connected(relay) as tunnel,
    ):
        recorder.watch(tunnel)  # it remembers what came before
        await trio.sleep(300)
    assert recorder.states == [
        "starting",
        "failed/relay_connect_failed",
        "connected",
        "reconnecting/relay_connect_failed",
        "connected",
        "stopped",
    ]
    lost = next(seen for seen in recorder.seen if seen.status["state"] == "reconnecting")
    assert lost.at == pytest.approx(relay.dials[1].at + 60)
    assert len(recorder.seen) == len(tunnel.history)


@virtual_time
async def test_it_sees_what_a_slow_watcher_would_skip_and_nothing_twice() -> None:
    class Forgetful:
        """Remembers the last two of ten, five of which come at once."""

        def __init__(self) -> None:
            self.all: list[Status] = []

        @property
        def history(self) -> tuple[Status, ...]:
            return tuple(self.all[-2:])

        @property
        def history_dropped(self) -> int:
            return max(len(self.all) - 2, 0)

        async def watch(self) -> AsyncIterator[Status]:
            for size in (1, 1, 2, 5, 1):
                kinds = [State.DISABLED, State.STARTING]
                self.all += [Status(state=kinds[(len(self.all) + more) % 2]) for more in range(size)]
                await trio.sleep(1)
                yield self.all[-1]

    async with open_status_recorder() as recorder:
        recorder.watch(Forgetful())
        await trio.sleep(10)
    states = [seen.status["state"] for seen in recorder.seen]
    assert states == ["disabled", "starting", "disabled", "starting", "starting", "disabled", "starting"]


@pytest.mark.parametrize(("silently", "grace"), [(False, 5), (True, 35)])
def test_a_gateway_that_shows_connected_while_nobody_gets_through_is_found_out(silently: bool, grace: int) -> None:
    @virtual_time
    async def lie(wait: float) -> None:
        async with open_memory_relay() as relay, open_status_recorder(relay) as recorder, connected(relay):
            recorder.see({"state": "starting"})
            recorder.see({"state": "connected"})
            await trio.sleep(100)
            if silently:
                assert relay.dials[0].connection is not None
                relay.dials[0].connection.black_hole()
                relay.follow(FaultPlan(then=Refuse()))
            else:
                await relay.stop()
            await trio.sleep(wait)

    lie(grace - 0.1)
    found = rf"showed 'connected' for {grace} s, from 100\.000 s on, while no visitor"
    with pytest.raises(StatusUntrue, match=found) as raised:
        lie(grace + 0.1)
    assert [seen.status["state"] for seen in raised.value.seen] == ["starting", "connected"]
    assert "0.000 s  connected" in str(raised.value)


def test_a_gateway_that_never_shows_connected_is_found_out() -> None:
    @virtual_time
    async def be_modest() -> None:
        async with open_memory_relay() as relay, open_status_recorder(relay, grace=10) as recorder, connected(relay):
            recorder.see({"state": "starting"})
            await trio.sleep(11)

    with pytest.raises(StatusUntrue, match=r"showed 'starting' for 10 s, from 0\.000 s on, while visitors got through"):
        be_modest()


@virtual_time
async def test_a_gateway_may_be_wrong_for_a_moment() -> None:
    async with open_memory_relay(FaultPlan([Slow(200.0, 9.0)])) as relay, open_status_recorder(relay) as recorder:
        recorder.see({"state": "starting"})
        async with connected(relay):
            await trio.sleep(30)
            recorder.see({"state": "connected"})
            await relay.stop()
            await trio.sleep(4)
            recorder.see({"state": "reconnecting", "error_kind": "relay_connect_failed"})
            await trio.sleep(3600)


def test_what_breaks_the_contract_is_raised_at_the_end() -> None:
    said: list[str] = []

    @virtual_time
    async def skip_a_state() -> None:
        async with open_status_recorder() as recorder:
            recorder.see(Status(state=State.STARTING))
            recorder.see({"state": "reconnecting", "error_kind": "relay_connect_failed"})
            recorder.see({"state": "also wrong, and not the first"})
            said.extend(recorder.states)

    with pytest.raises(ContractBroken, match="'reconnecting' does not follow 'starting'"):
        skip_a_state()
    assert said == ["starting", "reconnecting/relay_connect_failed", "also wrong, and not the first"]


def test_what_the_test_raises_comes_first() -> None:
    @virtual_time
    async def fail() -> None:
        async with open_status_recorder() as recorder:
            recorder.see({"state": "nonsense"})
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        fail()


@virtual_time
async def test_when_a_silent_link_is_cut_there_is_a_moment_to_notice_from_then_on() -> None:
    """Found by a simulated day: the 5 seconds were counted from when the link fell silent, and were long over."""
    async with (
        open_memory_relay() as relay,
        open_status_recorder(relay) as recorder,
        connected(relay) as tunnel,
    ):
        recorder.watch(tunnel)
        [dial] = relay.dials
        assert dial.connection is not None
        dial.connection.black_hole()
        await trio.sleep(20)
        dial.connection.cut()
        await trio.sleep(60)
        assert recorder.states[-2:] == ["reconnecting/relay_connect_failed", "connected"]


def test_when_a_silent_link_is_cut_there_is_no_more_than_that() -> None:
    @virtual_time
    async def shows_connected_for_ever() -> None:
        async with open_memory_relay() as relay, open_status_recorder(relay) as recorder, connected(relay) as tunnel:
            recorder.see({"state": "starting"})
            recorder.see(tunnel.status)
            [dial] = relay.dials
            assert dial.connection is not None
            dial.connection.black_hole()
            await trio.sleep(20)
            relay.follow(FaultPlan(then=Refuse()))
            dial.connection.cut()
            await trio.sleep(10)

    with pytest.raises(StatusUntrue, match="it showed 'connected' for 25 s"):
        shows_connected_for_ever()
