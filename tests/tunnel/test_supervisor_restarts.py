"""When the restart loop tries again: delays, rejections, and what cuts a wait short."""

from __future__ import annotations

import math
from typing import NoReturn

import pytest
import trio
import trio.testing
from supervised import EPOCH, supervised
from trio.testing import MockClock

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RelayResolveError,
    ReplacedError,
    RestartLimitError,
    TunnelAuthError,
)
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall
from pioneer_tunnel.transports.interface import Deliver, Report, Session, SpreadTold, Target
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy


def delays(transport: ScriptedTransport) -> list[float]:
    """Seconds between the end of each attempt and the beginning of the next."""
    return [
        after.began - before.ended
        for before, after in zip(transport.attempts, transport.attempts[1:], strict=False)
        if before.ended is not None
    ]


async def test_what_the_relay_told_decides_when_a_gateway_comes_back(autojump_clock: MockClock) -> None:
    """What the last session told counts also while attempts fail, and no longer than until another session is up."""
    at_once, slowly = Spread(span=0, longest=0), Spread(span=0, longest=300)
    transport = ScriptedTransport(
        [
            Connect(60, reports=((0, SpreadTold(slowly)), (30, SpreadTold(at_once)))),
            Connect(60, reports=((0, SpreadTold(slowly)),)),
            *[Fail()] * 10,
            Connect(60),
            Connect(3600),
        ]
    )
    async with supervised(transport, policy=RestartPolicy(jitter=0)):
        await trio.sleep(3600)
    assert delays(transport)[:2] == [0, 0]
    assert delays(transport)[2:12] == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert 0 < delays(transport)[12] <= 2  # no relay has told anything since


REJECTIONS = [Fail(TunnelAuthError, message="no"), Fail(InvalidSettingsError, message="no", rejection=True)]


@pytest.mark.parametrize("rejection", REJECTIONS, ids=lambda rejection: rejection.error.__name__)
async def test_a_tunnel_that_was_up_tries_again_15_minutes_after_a_rejection(
    autojump_clock: MockClock, rejection: Fail
) -> None:
    """A registry that is wrong for a moment does not end every gateway for good."""
    transport = ScriptedTransport([Connect(60, public_url="https://office.test"), rejection, rejection, Fail()])
    async with supervised(transport) as generation:
        await trio.sleep(70)
        status = generation.status
        assert (status.state, status.message, status.attempt) == (State.FAILED, "no", 2)
        assert status.retry_at_unix == math.ceil(transport.attempts[1].began + EPOCH + 900)
        await trio.sleep(3600)
        assert delays(transport)[1:3] == pytest.approx([900, 900])
        kind = rejection.error.kind
        assert generation.said == [
            *("starting", "connected", "reconnecting/relay_connect_failed", f"failed/{kind}"),
            *("reconnecting/relay_connect_failed", "connected"),
        ]


@pytest.mark.parametrize("rejection", REJECTIONS, ids=lambda rejection: rejection.error.__name__)
async def test_one_that_was_never_up_gives_up(autojump_clock: MockClock, rejection: Fail) -> None:
    transport = ScriptedTransport([Fail(), rejection])
    async with supervised(transport) as generation:
        assert type(await generation.finish()) is rejection.error
        assert generation.status.retry_at_unix is None


async def test_retry_now_ends_the_wait_after_a_rejection(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(60), Fail(TunnelAuthError)])
    async with supervised(transport) as generation:
        await trio.sleep(100)
        generation.supervisor.retry_now()
        await trio.sleep(0.1)
        assert generation.said[-1] == "connected"


async def test_rejections_count_as_restarts(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(60)], then=Fail(TunnelAuthError, message="no"))
    async with supervised(transport, policy=RestartPolicy(max_restarts=3, jitter=0)) as generation:
        assert isinstance(await generation.finish(), RestartLimitError)
    assert len(transport.attempts) == 4


@pytest.mark.parametrize("restarts", [1, 2, 3])
async def test_max_restarts_are_one_attempt_more(autojump_clock: MockClock, restarts: int) -> None:
    transport = ScriptedTransport(then=Fail(RelayConnectError, message="connection refused"))
    async with supervised(transport, policy=RestartPolicy(max_restarts=restarts)) as generation:
        failure = await generation.finish()
    assert len(transport.attempts) == restarts + 1
    assert isinstance(failure, RestartLimitError)
    assert isinstance(failure.__cause__, RelayConnectError)
    assert generation.status.error_kind is ErrorKind.RESTART_LIMIT_REACHED
    assert generation.status.retry_at_unix is None
    amount = "1 restart;" if restarts == 1 else f"{restarts} restarts;"
    assert generation.status.message == f"gave up after {amount} the last cause: connection refused"


async def test_without_max_restarts_it_never_gives_up(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(then=Fail())
    async with supervised(transport) as generation:
        await trio.sleep(6 * 3600)
        assert generation.over is None
    assert len(transport.attempts) > 6 * 120 - 10


async def test_a_stable_session_clears_the_count(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(), Connect(30), Fail(), Fail()], then=Fail(ReplacedError))
    async with supervised(transport, policy=RestartPolicy(max_restarts=3, jitter=0)) as generation:
        failure = await generation.finish()
    assert isinstance(failure, ReplacedError)
    assert delays(transport)[2:] == [2, 4]  # the first after the lost link is a matter of chance


async def test_a_shorter_session_counts_as_a_failure(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(), Connect(29), Fail(), Fail()], then=Fail(TunnelAuthError))
    async with supervised(transport, policy=RestartPolicy(max_restarts=3, jitter=0)) as generation:
        failure = await generation.finish()
    assert isinstance(failure, RestartLimitError)
    assert delays(transport) == [1, 2, 4]


async def test_delays_double_up_to_the_longest(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail()] * 8)
    async with supervised(transport):
        await trio.sleep(600)
    assert delays(transport) == [1, 2, 4, 8, 16, 30, 30, 30]


async def test_a_fleet_that_loses_its_relay_does_not_come_back_at_once(autojump_clock: MockClock) -> None:
    first_delays = []
    for seed in range(60):
        transport = ScriptedTransport([Connect(60)])
        async with supervised(transport, seed=seed):
            await trio.sleep(70)
        first_delays += delays(transport)
    assert len(first_delays) == 60
    assert all(0 <= delay <= 2 for delay in first_delays)
    for quarter in range(4):
        assert sum(quarter / 2 <= delay < (quarter + 1) / 2 for delay in first_delays) >= 8


@pytest.mark.parametrize(("asked", "waited"), [(0.1, 1), (120, 120), (900, 900), (7200, 900), (math.inf, 900)])
async def test_a_retry_after_counts_between_our_own_delay_and_15_minutes(
    autojump_clock: MockClock, asked: float, waited: float
) -> None:
    transport = ScriptedTransport([Fail(retry_after=asked)])
    async with supervised(transport) as generation:
        await trio.sleep(0.5)
        assert generation.status.retry_at_unix == math.ceil(EPOCH + waited)
        await trio.sleep(1000)
    assert delays(transport) == [waited]


async def test_another_version_or_an_unknown_reason_is_retried_at_the_longest_delay_only(
    autojump_clock: MockClock,
) -> None:
    transport = ScriptedTransport([Fail(retry_slowly=True), Connect(60, then=Fail(retry_slowly=True))])
    async with supervised(transport):
        await trio.sleep(200)
    assert delays(transport) == [30, 30]


async def test_retry_at_is_the_first_whole_second_after_the_delay(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail()] * 3)
    async with supervised(transport) as generation:
        await trio.sleep(60)
        planned = [
            published.status.retry_at_unix
            for published in generation.published
            if published.status.retry_at_unix is not None
        ]
    tried = [EPOCH + attempt.began for attempt in transport.attempts[1:]]
    assert len(planned) == len(tried) == 3
    assert all(0 <= plan - time < 1 for plan, time in zip(planned, tried, strict=True))


async def test_retry_at_is_gone_as_soon_as_the_attempt_begins(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(RelayResolveError, message="no such name")], then=Stall())
    async with supervised(transport) as generation:
        await trio.sleep(2)
        assert generation.status == Status(
            state=State.FAILED,
            error_kind=ErrorKind.RELAY_RESOLVE_FAILED,
            message="no such name",
            attempt=2,
            updated_at_unix=int(EPOCH),
        )


# retry_now


async def test_retry_now_cuts_the_wait_short(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(retry_after=600)])
    async with supervised(transport) as generation:
        await trio.sleep(10)
        generation.supervisor.retry_now()
        await trio.sleep(1)
        assert generation.status.state is State.CONNECTED
    assert delays(transport) == [10]


async def test_retry_now_does_nothing_when_nothing_waits(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(after=5, retry_after=60), Fail(after=5)])
    async with supervised(transport) as generation:
        for _ in range(5):  # at 6 it waits; before and after, an attempt is under way
            generation.supervisor.retry_now()
            await trio.sleep(2)
        assert [attempt.began for attempt in transport.attempts] == [0, 6]
        await trio.sleep(60)
        generation.supervisor.retry_now()
        await trio.sleep(1)
        assert len(transport.attempts) == 3
    assert delays(transport) == [1, 2]


async def test_retry_now_skips_a_delay_but_not_its_count(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(then=Fail())
    async with supervised(transport, policy=RestartPolicy(max_restarts=2, initial=100, maximum=1000)) as generation:
        for _ in range(2):
            await trio.sleep(1)
            generation.supervisor.retry_now()
        failure = await generation.finish()
    assert isinstance(failure, RestartLimitError)
    assert len(transport.attempts) == 3


# Checks, and changes of the network


async def test_retry_now_checks_a_link_that_is_up(autojump_clock: MockClock) -> None:
    asked: list[float] = []

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        task_status.started(Session())
        while True:
            await target.checks.asked()
            asked.append(trio.current_time())

    async with supervised(serve) as generation:
        await trio.sleep(1)
        generation.supervisor.retry_now()
        await trio.sleep(1)
        generation.supervisor.network_changed()
        await trio.sleep(1)
    assert asked == [1, 2]


async def test_a_link_that_failed_a_check_is_dialled_again_without_a_wait(autojump_clock: MockClock) -> None:
    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        began.append(trio.current_time())
        task_status.started(Session())
        await target.checks.asked()
        await trio.sleep(2)
        raise LinkLostError("no answer", retry_at_once=True)

    began: list[float] = []
    async with supervised(serve) as generation:
        for _ in range(3):
            await trio.sleep(5)
            generation.supervisor.network_changed()
        await trio.sleep(5)
    assert began == [0, 7, 12, 17]


async def test_a_change_of_the_network_cuts_a_wait_short(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(), Fail(), Fail()])
    async with supervised(transport) as generation:
        await trio.sleep(4)  # the third attempt was at 3, and the next is due at 7
        generation.supervisor.network_changed()
        await trio.sleep(1)
        assert generation.status.state is State.CONNECTED
    assert delays(transport) == [1, 2, 1]


@pytest.mark.parametrize(
    "step",
    [Fail(retry_after=60), Fail(retry_slowly=True)],
    ids=["the relay asked for it", "another version"],
)
async def test_a_change_of_the_network_does_not_hammer_a_relay_that_asked_for_a_wait(
    autojump_clock: MockClock, step: Fail
) -> None:
    transport = ScriptedTransport([step])
    async with supervised(transport) as generation:
        for _ in range(5):
            await trio.sleep(1)
            generation.supervisor.network_changed()
    assert len(transport.attempts) == 1


async def test_a_change_of_the_network_begins_an_attempt_anew(autojump_clock: MockClock) -> None:
    """It may wait for answers on a way that is gone."""
    transport = ScriptedTransport([Stall(), Connect()])
    async with supervised(transport) as generation:
        await trio.sleep(3)
        generation.supervisor.network_changed()
        await trio.sleep(1)
        assert generation.status.state is State.CONNECTED
        generation.supervisor.network_changed()
        await trio.sleep(1)
        assert generation.status.state is State.CONNECTED
    assert [attempt.began for attempt in transport.attempts] == [0, 3]


async def test_a_change_of_the_network_after_the_end_changes_nothing(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect()])
    async with supervised(transport) as generation:
        await trio.sleep(1)
    generation.supervisor.network_changed()
    assert len(transport.attempts) == 1
