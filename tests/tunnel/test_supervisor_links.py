"""What the restart loop makes of the events of a link, and of a link that drains."""

from __future__ import annotations

from itertools import pairwise

import pytest
import trio
import trio.testing
from supervised import EPOCH, LocalGateway, supervised
from trio.testing import MockClock

from pioneer_tunnel._model.errors import LinkLostError, RelayResolveError, ReplacedError, StorageError, TunnelAuthError
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall
from pioneer_tunnel.transports.interface import (
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    LocalDialFailed,
    LocalDialOk,
    RoundTrip,
    Session,
    SessionRenewed,
)
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy

# Events


async def test_a_round_trip_is_told_and_is_no_news(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(60, reports=((5, RoundTrip(0.02512345)),))])
    async with supervised(transport, seed=3) as generation:
        await trio.sleep(4)
        before = generation.status
        await trio.sleep(2)
        assert generation.status.relay_rtt_ms == 25.123  # a microsecond is as much as anybody can tell
        assert not generation.status.is_news_after(before)
        assert generation.status.updated_at_unix == before.updated_at_unix
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
        assert generation.status.relay_rtt_ms == 25.123
        await trio.sleep(54.1)
        assert generation.status.state is State.RECONNECTING
        assert generation.status.relay_rtt_ms is None


async def test_a_lost_link_that_is_restored_is_one_session(autojump_clock: MockClock) -> None:
    """The address stays, no attempt is counted, and what the local gateway does is told afterwards."""
    gone, refused = LinkLostError("gone"), RelayResolveError("no such name")
    reports: list[tuple[float, Event]] = [
        (5, RoundTrip(0.02)),
        (10, LinkLost(gone)),
        (11, LinkLost(refused, retry_in=3.0)),
        *[(12.0, LocalDialFailed("no"))] * 3,
        (14, LinkRestored()),
        (20, LocalDialOk()),
        (25, LinkRestored()),
    ]
    transport = ScriptedTransport([Connect(60, reports=tuple(reports), public_url="https://office.test")])
    async with supervised(transport) as generation:
        await trio.sleep(40)
        seen = [(each.at, each.status) for each in generation.published if each.at > 6]
    told = [
        (status.state, status.error_kind, status.retry_at_unix is not None, status.public_url, status.attempt)
        for _, status in seen
    ]
    url = "https://office.test"
    assert told == [
        (State.RECONNECTING, ErrorKind.RELAY_CONNECT_FAILED, False, url, 1),
        (State.RECONNECTING, ErrorKind.RELAY_RESOLVE_FAILED, True, url, 1),
        (State.CONNECTED, ErrorKind.LOCAL_GATEWAY_UNAVAILABLE, False, url, 1),
        (State.CONNECTED, None, False, url, 1),
    ]


async def test_a_session_that_the_relay_has_renewed_is_the_same_run(autojump_clock: MockClock) -> None:
    """No attempt is counted, and its addresses are those of now. What the local gateway does goes on."""
    old, new = "https://office.test", "https://office.relay.test"
    renewed = SessionRenewed(Session(id="two", public_url=new, services={"web": new}))
    reports: list[tuple[float, Event]] = [
        *[(5.0, LocalDialFailed("no"))] * 3,
        (10, LinkLost(LinkLostError("gone"), retry_in=3.0)),
        (13, renewed),
        (20, LocalDialOk()),
    ]
    transport = ScriptedTransport([Connect(60, reports=tuple(reports), public_url=old)])
    async with supervised(transport) as generation:
        await trio.sleep(40)
        seen = [each.status for each in generation.published if each.at > 6]
    told = [(each.state, each.error_kind, each.retry_at_unix, each.public_url, each.attempt) for each in seen[1:]]
    assert [each.state for each in seen] == [State.RECONNECTING, State.CONNECTED, State.CONNECTED]
    assert told == [
        (State.CONNECTED, ErrorKind.LOCAL_GATEWAY_UNAVAILABLE, None, new, 1),
        (State.CONNECTED, None, None, new, 1),
    ]
    assert seen[-1].services == {"web": new}


async def test_a_renewed_session_that_ends_soon_was_not_stable(autojump_clock: MockClock) -> None:
    reports: list[tuple[float, Event]] = [(90, LinkLost(LinkLostError("gone"))), (91, SessionRenewed(Session()))]
    transport = ScriptedTransport([Connect(1), Connect(100, reports=tuple(reports)), Stall()])
    async with supervised(transport, policy=RestartPolicy(max_restarts=1)) as generation:
        await trio.sleep(200)
        assert generation.status.error_kind is ErrorKind.RESTART_LIMIT_REACHED


LATE: list[Event] = [
    RoundTrip(0.02),
    LocalDialFailed("no"),
    LocalDialFailed("no"),
    LocalDialFailed("no"),
    LocalDialOk(),
    LinkLost(LinkLostError("gone")),
    LinkRestored(),
    SessionRenewed(Session(public_url="https://late.test")),
    Draining(3),
]


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        ([Connect(60, then=Fail(retry_after=100))], 70),  # between two attempts
        ([Connect(60), Stall()], 70),  # during the next one
        ([Connect(60, then=Fail(TunnelAuthError))], 70),  # after a final failure
        ([Stall()], 1),  # before the tunnel is up
    ],
    ids=["waiting", "next attempt", "final", "too early"],
)
async def test_events_of_a_link_that_is_not_up_change_nothing(
    autojump_clock: MockClock, steps: list[Connect | Fail | Stall], seconds: float
) -> None:
    transport = ScriptedTransport(steps)
    async with supervised(transport) as generation:
        await trio.sleep(seconds)
        before = list(generation.published)
        for event in LATE:
            transport.report(event)
        assert generation.published == before


async def test_events_after_the_generation_was_cancelled_change_nothing(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport()
    async with supervised(transport) as generation:
        await trio.sleep(1)
    before = generation.status
    for event in LATE:
        transport.report(event)
    generation.supervisor.retry_now()
    assert generation.status is before


async def test_updated_at_moves_when_something_else_is_said(autojump_clock: MockClock) -> None:
    """Not for another attempt or time; for another message alone, it does."""
    transport = ScriptedTransport([Fail(message="one"), Fail(message="one"), Fail(message="two"), Stall(6)])
    async with supervised(transport) as generation:
        await trio.sleep(60)
        moved = {published.status.message: published.status.updated_at_unix for published in generation.published[1:]}
    assert moved == {
        "one": int(EPOCH),
        "two": int(EPOCH + 3),
        "timed out after 6 seconds, as the script has it": int(EPOCH + 13),
        None: int(EPOCH + 21),
    }


# A relay that drains


async def test_a_draining_link_goes_on_while_the_next_one_comes_up(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(
        [
            Connect(70, reports=((40, Draining(2.0)),), public_url="https://office.test"),
            Connect(after=1, public_url="https://other.test"),
        ]
    )
    async with supervised(transport) as generation:
        await trio.sleep(60)
        old, new = transport.attempts
        assert 40 <= new.began <= 42
        assert transport.running == 2
        assert generation.said == ["starting", "connected"]
        assert (generation.status.attempt, generation.status.public_url) == (2, "https://other.test")
        await trio.sleep(60)
        assert old.ended == 70
        assert len(transport.attempts) == 2
        assert generation.said == ["starting", "connected"]


async def test_when_the_next_link_does_not_come_up_at_once_it_is_reconnecting(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(100, reports=((40, Draining(0.0)),)), Fail(message="so it is"), Stall(9)])
    async with supervised(transport) as generation:
        await trio.sleep(40.5)
        assert (generation.status.state, generation.status.message) == (State.RECONNECTING, "so it is")
        await trio.sleep(30)
        assert generation.said == ["starting", "connected", "reconnecting/relay_connect_failed", "connected"]
        assert transport.attempts[0].ended is None


async def test_an_attempt_that_hangs_while_the_relay_drains_shows_after_3_seconds(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(100, reports=((40, Draining(1.0)),)), Stall(30)])
    async with supervised(transport) as generation:
        await trio.sleep(43.9)
        assert generation.said[-1] == "connected"
        await trio.sleep(0.2)
        assert generation.said[-1] == "reconnecting/relay_connect_failed"
        assert generation.status.message == "the relay is stopping, and no other session is up yet"


async def test_a_draining_link_without_visitors_may_end_before_the_next_one_is_up(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(40.1, reports=((40, Draining(0.0)),)), Connect(after=2)])
    async with supervised(transport) as generation:
        await trio.sleep(60)
        assert generation.said == ["starting", "connected"]


async def test_a_handover_that_waits_for_as_long_as_the_relay_says_is_none_that_failed(
    autojump_clock: MockClock,
) -> None:
    transport = ScriptedTransport([Connect(40.001, reports=((40, Draining(20.0)),))])
    async with supervised(transport, seed=1) as generation:
        await trio.sleep(100)
        assert generation.said == ["starting", "connected"]


async def test_the_end_of_a_draining_link_is_no_failure(autojump_clock: MockClock) -> None:
    """Not even a final one: whoever took over at the old relay says nothing about the new one."""
    end = Fail(ReplacedError)
    transport = ScriptedTransport([Connect(60, reports=((40, Draining(0.0)),), then=end)])
    async with supervised(transport, policy=RestartPolicy(max_restarts=1)) as generation:
        await trio.sleep(1000)
        assert generation.over is None
        assert generation.said == ["starting", "connected"]


async def test_a_relay_that_drains_again_and_again_is_dialled_less_and_less_often(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(then=Connect(reports=((1, Draining(0.0)),)))
    async with supervised(transport):
        await trio.sleep(600)
    assert len(transport.attempts) < 40


async def test_a_relay_that_is_restarted_several_times_gets_another_link_each_time(autojump_clock: MockClock) -> None:
    """Of two workers, both may drain the link in one restart. That is no failure, so nothing is delayed or counted."""
    moves = [1.5, 6.5] * 4
    steps = [Connect(20, reports=((seconds, Draining(0.1)),)) for seconds in moves]
    transport = ScriptedTransport([*steps, Connect(1000)])
    async with supervised(transport, policy=RestartPolicy(max_restarts=1)) as generation:
        await trio.sleep(60)
        began = [attempt.began for attempt in transport.attempts]
        late = [later - earlier - up for (earlier, later), up in zip(pairwise(began), moves, strict=True)]
        assert all(-1e-9 <= each <= 0.1 + 1e-9 for each in late)
        assert generation.said == ["starting", "connected"]


async def test_few_links_drain_at_a_time(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(then=Connect(reports=((40, Draining(0.0)),)))
    async with supervised(transport):
        await trio.sleep(400)
        assert len(transport.attempts) >= 10
        assert transport.running == 5


async def test_the_local_gateway_stays_away_while_the_relay_drains(autojump_clock: MockClock) -> None:
    local = LocalGateway(there=False)
    transport = ScriptedTransport([Connect(80, reports=((40, Draining(0.0)),)), Connect(after=1)])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(60)
        assert generation.said == ["starting", "connected", "connected/local_gateway_unavailable"]
        local.there = True
        await trio.sleep(6)
        assert generation.said[-1] == "connected"
        probes = len(local.probes)
        await trio.sleep(100)
        assert len(local.probes) == probes


async def test_a_final_failure_ends_what_drains(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(reports=((40, Draining(0.0)),)), Fail(StorageError)])
    async with supervised(transport) as generation:
        assert isinstance(await generation.finish(), StorageError)
        assert transport.running == 0
