"""Resumed sessions over the relay in memory: whatever cuts the link, each visitor gets every byte, once."""

from __future__ import annotations

import itertools

import pytest
import trio
from fuzzing import examples
from hypothesis import example, given, settings, strategies as st
from resumable import resumable, talk
from statuses import check_contract
from trio.testing import MockClock

from pioneer_tunnel import State, open_tunnel
from pioneer_tunnel.testing import (
    BlackHole,
    ChangeNetwork,
    CutAfter,
    CutAtWelcome,
    Drain,
    Fault,
    FaultPlan,
    HostSleep,
    MemoryRelay,
    Refuse,
    Stage,
    StallAt,
    Up,
    open_memory_relay,
)
from pioneer_tunnel.websocket import ENGINES

each_engine = pytest.mark.parametrize("engine", ENGINES)


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
