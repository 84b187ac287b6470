"""Resumed sessions over the relay in memory: whatever cuts the link, each visitor gets every byte, once."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from random import Random
from typing import Any, Final, final

import pytest
import trio
from fuzzing import examples
from hypothesis import example, given, settings, strategies as st
from rig import in_background
from statuses import check_contract
from trio.testing import MockClock

from pioneer_tunnel import Services, State, Tunnel, TunnelStream, open_tunnel
from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.spreading import Spreading
from pioneer_tunnel.testing import (
    BlackHole,
    ChangeNetwork,
    CutAfter,
    CutAtWelcome,
    Drain,
    Fault,
    FaultPlan,
    FaultyDialer,
    HostSleep,
    MemoryRelay,
    MemoryStream,
    Refuse,
    Reject,
    Stage,
    StallAt,
    Up,
    open_memory_relay,
)
from pioneer_tunnel.testing.memory_directory import Tunnels
from pioneer_tunnel.transports import native
from pioneer_tunnel.transports.resuming import Resuming
from pioneer_tunnel.websocket import ENGINES

TIMEOUT: Final = 60.0
PATTERN: Final = bytes(range(251)) * 5
each_engine = pytest.mark.parametrize("engine", ENGINES)


@asynccontextmanager
async def resumable(
    plan: FaultPlan | None = None,
    *,
    timeout: float = TIMEOUT,
    engine: Any = None,
    heartbeat: float = 15.0,
    told: bool = False,
    **options: Any,
) -> AsyncIterator[tuple[MemoryRelay, Tunnel]]:
    """A relay and a tunnel that can resume; the gateway sends back what visitors send.

    Args:
        told: whether the gateway's system tells it of changes of its network.
        options: of `open_tunnel`.
    """
    async with open_memory_relay(plan, resume_timeout=timeout, engine=engine, heartbeat=heartbeat) as relay:
        if told:
            options["watch_network"] = relay.watch_network
        async with (
            open_tunnel(relay.url, key=relay.key, dial=relay.dial, websocket_engine=engine, **options) as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            await tunnel.wait_connected()
            yield relay, tunnel


async def echo(stream: TunnelStream) -> None:
    with suppress(trio.BrokenResourceError):
        async with stream:
            async for data in stream:
                await stream.send_all(data)


async def talk(visitor: MemoryStream, amount: int, pause: float = 0.0) -> None:
    """Send so many bytes, and check that the same bytes come back, and then EOF."""
    pieces = [PATTERN[number % 251 :][:1000] for number in range(amount // 1000)]

    async def send() -> None:
        for piece in pieces:
            await visitor.send_all(piece)
            await trio.sleep(pause)
        await visitor.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        received = b"".join([data async for data in visitor])
    assert received == b"".join(pieces)


@each_engine
async def test_a_visitor_does_not_notice_a_cut(engine: str, autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(10)]), engine=engine) as (relay, tunnel):
        await talk(await relay.visit(), 40_000, pause=0.5)
        assert relay.sessions == 2
        told = [(status.state, status.public_url, status.attempt) for status in tunnel.history[2:]]
    assert told == [
        (State.CONNECTED, "http://office.test", 1),
        (State.RECONNECTING, "http://office.test", 1),
        (State.CONNECTED, "http://office.test", 1),
    ]


short_faults: st.SearchStrategy[Fault] = st.one_of(
    st.builds(CutAfter, st.integers(0, 6_000) | st.integers(0, 100_000)),
    st.builds(Up, st.floats(0, 5)),
    st.just(Refuse()),
    st.builds(StallAt, st.sampled_from(Stage)),
    st.builds(BlackHole, st.floats(0, 5), st.floats(0, 8)),
)


@settings(deadline=None, max_examples=examples(50))
@given(faults=st.lists(short_faults, max_size=5), engine=st.sampled_from(ENGINES))
@example(faults=[CutAfter(0)], engine=ENGINES[0])
@example(faults=[CutAfter(amount) for amount in (3000, 3500, 4000, 4500)], engine=ENGINES[0])
def test_no_byte_is_lost_or_doubled(faults: list[Fault], engine: str) -> None:
    """The first connection comes up; those that follow are cut anywhere, also in the handshake of a resume."""

    async def main() -> None:
        plan = FaultPlan([Up(0.5), *faults])
        async with resumable(plan, engine=engine, heartbeat=4.0) as (relay, tunnel):
            async with trio.open_nursery() as nursery:
                for amount, pause in ((100_000, 0.001), (20_000, 0.1), (1_000, 0.0)):
                    nursery.start_soon(talk, await relay.visit(), amount, pause)
            await tunnel.wait_connected()
            await talk(await relay.visit(), 2_000)
            check_contract(tunnel.history)
            assert tunnel.status.attempt == 1

    trio.run(main, clock=MockClock(autojump_threshold=0))


# Faults of the path at any time, each with the seconds until the next one. After a drain there are two connections: the
# old one finishes its streams. Both are hit by what follows.
happenings = st.one_of(
    st.builds(CutAfter, st.integers(0, 30_000), towards=st.sampled_from([None, "relay", "gateway"])),
    st.builds(ChangeNetwork),
    st.builds(HostSleep, seconds=st.floats(1, 20)),
    st.builds(Drain),
    st.builds(CutAtWelcome),
)


@settings(deadline=None, max_examples=examples(20))
@given(
    story=st.lists(st.tuples(happenings, st.floats(0, 5)), max_size=5),
    told=st.booleans(),
    engine=st.sampled_from(ENGINES),
)
@example(story=[(Drain(), 0.5), (CutAfter(0), 3)], told=True, engine=ENGINES[0])
@example(story=[(Drain(), 0.0), (CutAtWelcome(), 0.0), (CutAfter(3000), 3)], told=True, engine=ENGINES[0])
@example(
    story=[(CutAtWelcome(), 0.0), (CutAfter(0), 0.01), (Drain(), 0.0), (HostSleep(seconds=9), 1)],
    told=True,
    engine=ENGINES[1],
)
def test_whatever_happens_at_whatever_byte(story: list[tuple[Fault, float]], told: bool, engine: str) -> None:
    async def main() -> None:
        async with resumable(engine=engine, heartbeat=4.0, told=told) as (relay, tunnel):
            async with trio.open_nursery() as nursery:
                for amount, pause in ((60_000, 0.02), (10_000, 0.2), (1_000, 0.0)):
                    nursery.start_soon(talk, await relay.visit(), amount, pause)
                for fault, seconds in story:
                    await let_happen(relay, fault)
                    await trio.sleep(seconds)
            await relay.wait_reachable()  # after a drain it takes a moment until there is another session
            await talk(await relay.visit(), 2_000)
            check_contract(tunnel.history)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def let_happen(relay: MemoryRelay, fault: Fault) -> None:
    """Let a fault happen to the connections that there are, or to the next one."""
    match fault:
        case ChangeNetwork():
            relay.change_network()
        case HostSleep(seconds=seconds):
            relay.sleep(seconds)
        case CutAtWelcome():
            relay.follow(FaultPlan([fault]))
        case Drain():
            await relay.drain(relay.dials[-1])
        case CutAfter(amount=amount, towards=end):
            for dial in relay.dials:
                if dial.connection is not None:
                    dial.connection.cut_after(amount, towards={None: None, "relay": "server", "gateway": "client"}[end])


async def test_a_link_that_is_cut_again_and_again_is_dialled_less_and_less_often(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5)], then=Up(0.01))) as (relay, _):
        await trio.sleep(25)
        assert 6 <= len(relay.dials) <= 9
        relay.follow(FaultPlan([Up(11)]))
        await trio.sleep(16)  # it was steady, so that its loss is healed at once
        await talk(await relay.visit(), 2_000)
        assert len(relay.dials) <= 11


# When to dial again


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


async def seconds_until_dialled(relay: MemoryRelay) -> float:
    dials, started = len(relay.dials), trio.current_time()
    while len(relay.dials) == dials:
        await trio.sleep(0.1)
    return relay.dials[dials].at - started


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


# Ends


async def test_after_the_timeout_the_streams_are_reset(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5)], then=Refuse()), timeout=20) as (relay, tunnel):
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        assert await visitor.receive_some() == b"hello"
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert trio.current_time() == pytest.approx(25, abs=0.1)
        assert tunnel.status.state is State.RECONNECTING


async def test_the_smaller_timeout_counts(autojump_clock: MockClock) -> None:
    async with (
        open_memory_relay(FaultPlan([Up(5)], then=Refuse()), resume_timeout=20) as relay,
        open_tunnel(relay.url, key=relay.key, dial=relay.dial, resume_timeout=7) as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        visitor = await relay.visit()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert trio.current_time() == pytest.approx(12, abs=0.1)


@pytest.mark.parametrize(("relay_keeps", "gateway_keeps"), [(0, 60), (60, 0), (0, 0)])
async def test_without_the_extension_a_cut_ends_the_streams(
    relay_keeps: float, gateway_keeps: float, autojump_clock: MockClock
) -> None:
    async with (
        open_memory_relay(FaultPlan([Up(5)]), resume_timeout=relay_keeps) as relay,
        open_tunnel(relay.url, key=relay.key, dial=relay.dial, resume_timeout=gateway_keeps) as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        visitor = await relay.visit()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert trio.current_time() == pytest.approx(5, abs=0.1)
        await relay.wait_reachable()
        await talk(await relay.visit(), 2_000)
        assert tunnel.status.attempt == 2


async def test_a_gateway_that_is_cancelled_while_suspended_ends_at_once(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5)], then=Refuse())):
        await trio.sleep(10)
        before = trio.current_time()
    assert trio.current_time() == before


async def test_a_new_gateway_process_replaces_its_suspended_session(autojump_clock: MockClock) -> None:
    async with open_memory_relay(resume_timeout=60) as relay:
        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial, instance="me") as tunnel:
            await tunnel.wait_connected()
            visitor = await relay.visit()
            await visitor.send_all(b"hello")
            await tunnel.accept()
            relay.follow(FaultPlan(then=Refuse()))
            relay.cut()
            await trio.sleep(1)
        relay.follow(FaultPlan())
        async with (
            open_tunnel(relay.url, key=relay.key, dial=relay.dial, instance="me") as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            await tunnel.wait_connected()
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some()
            await talk(await relay.visit(), 2_000)


async def test_a_restarted_relay_gets_a_new_session(autojump_clock: MockClock) -> None:
    async with resumable() as (relay, _):
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        assert await visitor.receive_some() == b"hello"
        await relay.stop(abruptly=True)
        await relay.start()
        await relay.wait_reachable()
        await talk(await relay.visit(), 2_000)
        assert trio.current_time() < 3


@pytest.mark.parametrize("offers", [True, False])
async def test_a_relay_that_has_lost_the_session_grants_another_in_the_same_handshake(
    offers: bool, autojump_clock: MockClock
) -> None:
    services = Services({"": "127.0.0.1:1"}) if offers else None
    async with resumable(services=services) as (relay, tunnel):
        for _ in range(3):
            visitor = await relay.visit()
            await visitor.send_all(b"hello")
            assert await visitor.receive_some() == b"hello"
            await relay.stop(abruptly=True)
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some()
            dials = len(relay.dials)
            await relay.start()
            await relay.wait_reachable()
            await talk(await relay.visit(), 2_000)
            await trio.sleep(20)
            assert len(relay.dials) == dials + 1
            assert (tunnel.status.state, tunnel.status.attempt) == (State.CONNECTED, 1)
        relay.cut()  # the last session can be resumed, as any other one
        await talk(await relay.visit(), 20_000)
        assert len(relay.dials) == dials + 2


async def test_a_relay_that_loses_its_sessions_again_and_again_is_dialled_less_and_less_often(
    autojump_clock: MockClock,
) -> None:
    async with resumable() as (relay, _):
        await trio.sleep(20)
        for _ in range(60):
            await relay.stop(abruptly=True)
            await relay.start()
            await trio.sleep(0.5)
        assert 6 <= sum(dial.connection is not None for dial in relay.dials) <= 14


async def test_a_session_that_drains_takes_no_tunnel_from_its_successor(autojump_clock: MockClock) -> None:
    """Its visitors wait for it, but the relay has lost it."""
    async with resumable(FaultPlan([Drain(5)])) as (relay, tunnel):
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        assert await visitor.receive_some() == b"hello"
        await trio.sleep(6)
        await talk(await relay.visit(), 2_000)
        [session] = [each for each in relay._control._sessions if each.draining]
        relay._control._resumable.remove(session.id)
        first, second = relay.dials
        assert first.connection is not None
        first.connection.cut()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        await trio.sleep(1)
        assert second.ended_at is None
        await talk(await relay.visit(), 2_000)
        assert [status.state for status in tunnel.history].count(State.RECONNECTING) == 0


async def test_a_revoked_key_does_not_resume(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5)])) as (relay, tunnel):
        relay.revoke()
        await trio.sleep(10)
        assert tunnel.status.error_kind == "tunnel_auth_failed"
        assert not relay.reachable


async def test_another_gateway_with_the_same_key_ends_a_suspended_session(autojump_clock: MockClock) -> None:
    """It cannot resume it: it does not have the secret. Nor does the old gateway when it comes back."""
    async with (
        open_memory_relay(FaultPlan([Up(5), *[Refuse()] * 4]), resume_timeout=60) as relay,
        open_tunnel(relay.url, key=relay.key, dial=relay.dial, instance="me") as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        assert await visitor.receive_some() == b"hello"
        await trio.sleep(5.5)
        async with open_tunnel(relay.url, key=relay.key, dial=FaultyDialer(relay), instance="another") as other:
            await other.wait_connected()
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some()
            # When the old gateway comes back, it cannot resume. Its new session is the newest, which wins.
            await trio.sleep(30)
            assert (tunnel.status.state, tunnel.status.attempt) == (State.CONNECTED, 1)
            assert other.status.state is State.FAILED


async def test_the_goodbye_of_a_relay_ends_the_session(autojump_clock: MockClock) -> None:
    """A connection that is closed on purpose is not lost."""
    async with resumable() as (relay, tunnel):
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        assert await visitor.receive_some() == b"hello"
        await relay.stop()
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some()
        assert trio.current_time() < 1
        await trio.sleep(0.01)
        assert tunnel.status.state is State.RECONNECTING
        assert tunnel.status.retry_at_unix is not None


# Visitors of a suspended session


async def test_a_new_visitor_waits_for_the_gateway(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5), Refuse(), Refuse()])) as (relay, _):
        await trio.sleep(5.1)
        assert not relay.reachable
        await talk(await relay.visit(), 2_000)
        assert 6 < trio.current_time() < 9


async def test_a_new_visitor_does_not_wait_for_long(autojump_clock: MockClock) -> None:
    async with resumable(FaultPlan([Up(5)], then=Refuse())) as (relay, _):
        await trio.sleep(6)
        visitor = await relay.visit_http()
        await visitor.send_all(b"GET / HTTP/1.1\r\nHost: office.test\r\n\r\n")
        answer = b"".join([data async for data in visitor])
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 5\r\n" in answer
        assert trio.current_time() == pytest.approx(11, abs=0.1)


# A connection that is only suspected


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


# Clocks


async def test_time_without_a_link_ends_no_closing_stream(autojump_clock: MockClock) -> None:
    """A stream that was closed has 30 seconds to end. A hole of 50 seconds does not count."""
    plan = FaultPlan([Up(5), *[Refuse()] * 12])
    async with (
        open_memory_relay(plan, resume_timeout=60) as relay,
        open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel,
    ):
        await tunnel.wait_connected()
        visitor = await relay.visit()
        await trio.sleep(4)
        await visitor.send_all(b"hello")
        stream = await tunnel.accept()
        assert await stream.receive_some() == b"hello"
        await trio.sleep(2)
        assert tunnel.status.state is State.RECONNECTING
        await stream.send_all(b"good")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.aclose)
            received = b"".join([data async for data in visitor])
            assert received == b"good"
            assert trio.current_time() > 40


async def test_an_idle_link_sends_no_report(autojump_clock: MockClock) -> None:
    async with resumable() as (relay, _):
        await trio.sleep(1)
        connection = relay.dials[0].connection
        assert connection is not None
        carried = []
        for _ in range(40):
            await trio.sleep(15)
            carried.append(connection.carried)
        assert max(later - earlier for earlier, later in itertools.pairwise(carried)) <= 80
