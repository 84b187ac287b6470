"""The restart loop, row by row of the contract's table, under virtual time."""

from __future__ import annotations

import errno
import gc
import logging
import math
import weakref
from typing import NoReturn

import pytest
import trio
import trio.testing
from supervised import (
    EPOCH,
    PLAIN,
    TARGET,
    LocalGateway,
    Supervised,
    refuse_visitors,
    supervised,
    wall_clock,
)
from trio.testing import MockClock

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    LocalGatewayError,
    MissingBinaryError,
    MissingKeyError,
    ProcessExitedError,
    RelayConnectError,
    RelayResolveError,
    ReplacedError,
    RestartLimitError,
    StorageError,
    TunnelAuthError,
    TunnelError,
    UnknownError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.status import ErrorKind, State, Status
from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.testing import (
    Connect,
    Crash,
    Fail,
    Return,
    ScriptedTransport,
    Stall,
    open_memory_relay,
    virtual_time,
)
from pioneer_tunnel.transports.interface import (
    Deliver,
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    LocalDialFailed,
    LocalDialOk,
    Report,
    RoundTrip,
    Session,
    SessionRenewed,
    SpreadTold,
    Target,
)
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.tunnel import open_tunnel
from pioneer_tunnel.yamux import YamuxConnection

RETRIED = [RelayResolveError, RelayConnectError, ProcessExitedError, UnknownError]
FINAL = [
    InvalidSettingsError,
    ReplacedError,
    MissingKeyError,
    MissingBinaryError,
    UnsupportedTransportError,
    TunnelAuthError,
    StorageError,
]


def delays(transport: ScriptedTransport) -> list[float]:
    """Seconds between the end of each attempt and the beginning of the next."""
    return [
        after.began - before.ended
        for before, after in zip(transport.attempts, transport.attempts[1:], strict=False)
        if before.ended is not None
    ]


# What a generation gives its transport


async def test_a_transport_is_told_where_to_connect_and_where_visitors_go(autojump_clock: MockClock) -> None:
    given: list[tuple[Target, Deliver]] = []

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        given.append((target, deliver))
        raise TunnelAuthError("no")

    async with supervised(serve) as generation:
        await generation.finish()
    assert given == [(TARGET, refuse_visitors)]


# What a generation says


async def test_a_generation_begins_as_starting(autojump_clock: MockClock) -> None:
    async with supervised(ScriptedTransport(then=Stall())) as generation:
        await trio.sleep(0.5)
        assert generation.status == Status(state=State.STARTING, attempt=1, updated_at_unix=int(EPOCH))


async def test_tunnel_up_is_connected(autojump_clock: MockClock) -> None:
    async with supervised(ScriptedTransport([Connect(after=2, public_url="https://office.test")])) as generation:
        await trio.sleep(3)
        assert generation.said == ["starting", "connected"]
        assert generation.status == Status(
            state=State.CONNECTED, attempt=1, public_url="https://office.test", updated_at_unix=int(EPOCH + 2)
        )


@pytest.mark.parametrize("error", RETRIED)
async def test_before_the_first_connect_what_is_retried_is_failed(
    autojump_clock: MockClock, error: type[TunnelError]
) -> None:
    transport = ScriptedTransport([Fail(error, message="so it is")])
    async with supervised(transport) as generation:
        await trio.sleep(0.5)
        assert generation.status == Status(
            state=State.FAILED,
            error_kind=error.kind,
            message="so it is",
            attempt=1,
            retry_at_unix=math.ceil(EPOCH + 1),
            updated_at_unix=int(EPOCH),
        )
        await trio.sleep(1)
        assert generation.said == ["starting", f"failed/{error.kind}", "connected"]


@pytest.mark.parametrize("error", RETRIED)
async def test_after_it_was_up_what_is_retried_is_reconnecting(
    autojump_clock: MockClock, error: type[TunnelError]
) -> None:
    transport = ScriptedTransport([Connect(60), Fail(error, message="so it is")])
    async with supervised(transport) as generation:
        while len(transport.attempts) < 2:
            await trio.sleep(0.1)
        assert generation.status.state is State.RECONNECTING
        assert generation.status.error_kind is error.kind
        assert generation.status.message == "so it is"
        assert generation.status.retry_at_unix is not None
        await trio.sleep(10)
        assert generation.said[-1] == "connected"
        assert f"failed/{error.kind}" not in generation.said


async def test_while_it_retries_it_stays_failed_with_the_newest_cause(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(RelayResolveError), Stall(3), Fail(RelayResolveError, after=1)])
    async with supervised(transport) as generation:
        await trio.sleep(60)
        assert generation.said == [
            "starting",
            "failed/relay_resolve_failed",
            "failed/relay_connect_failed",
            "failed/relay_resolve_failed",
            "connected",
        ]


async def test_a_lost_link_is_reconnecting(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(60, public_url="https://office.test")])
    async with supervised(transport, seed=3) as generation:
        await trio.sleep(60.01)
        assert generation.said == ["starting", "connected", "reconnecting/relay_connect_failed"]
        assert generation.status.public_url == "https://office.test"


async def test_a_link_lost_the_moment_it_was_up_was_up(autojump_clock: MockClock) -> None:
    async with supervised(ScriptedTransport([Connect(0)])) as generation:
        await trio.sleep(60)
        assert generation.said == ["starting", "connected", "reconnecting/relay_connect_failed", "connected"]


@pytest.mark.parametrize(
    ("error", "connected"),
    [(error, connected) for error in FINAL for connected in (False, True) if not (connected and error.rejection)],
)
async def test_a_final_failure_is_said_and_raised_and_that_is_all(
    autojump_clock: MockClock, error: type[TunnelError], connected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    end = Fail(error, message="never again")
    transport = ScriptedTransport([Connect(5, then=end, public_url="https://office.test") if connected else end])
    async with supervised(transport) as generation:
        failure = await generation.finish()
        assert type(failure) is error
        assert generation.status == Status(
            state=State.FAILED,
            error_kind=error.kind,
            message="never again",
            attempt=1,
            updated_at_unix=int(EPOCH + 5 * connected),
        )
        said = len(generation.published)
        await trio.sleep(3600)
        assert len(transport.attempts) == 1
        assert len(generation.published) == said
    assert not caplog.records


async def test_a_final_failure_leaves_no_round_trip_of_the_link_that_was(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(5, then=Fail(ReplacedError), reports=((1, RoundTrip(0.02)),))])
    async with supervised(transport) as generation:
        await generation.finish()
        assert generation.status.relay_rtt_ms is None


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


async def test_a_round_trip_that_was_measured_before_it_is_up_is_shown(autojump_clock: MockClock) -> None:
    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        report(RoundTrip(0.02))
        task_status.started(Session())
        await trio.sleep_forever()
        raise AssertionError

    async with supervised(serve) as generation:
        await trio.sleep(1)
        assert generation.status.relay_rtt_ms == 20.0


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


# What no one foresaw


@pytest.mark.parametrize(
    "step",
    [Crash(ZeroDivisionError), Crash(TunnelError), Crash(trio.TooSlowError), Fail(RestartLimitError), Return()],
    ids=repr,
)
@pytest.mark.parametrize("connected", [False, True])
async def test_an_unforeseen_exception_is_unknown_and_logged_and_retried(
    autojump_clock: MockClock, step: Crash | Fail | Return, connected: bool, caplog: pytest.LogCaptureFixture
) -> None:
    local = LocalGateway()
    transport = ScriptedTransport([Connect(60, then=step) if connected else step])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(100)
    state = "reconnecting" if connected else "failed"
    assert generation.said[1:] == [*["connected"] * connected, f"{state}/unknown", "connected"]
    assert caplog.record_tuples == [("pioneer_tunnel.supervisor", logging.ERROR, "an unforeseen failure of the tunnel")]
    assert "Traceback" in caplog.text


async def test_what_an_unforeseen_exception_says_goes_to_the_log_alone(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervised(ScriptedTransport([Crash(ValueError, message="who knows what")])) as generation:
        await trio.sleep(0.5)
        assert generation.status.message == "an unforeseen failure, see the log: ValueError"
    assert "who knows what" in caplog.text


async def test_a_transport_that_ends_without_a_reason_is_named_in_the_log(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervised(ScriptedTransport([Return()])):
        await trio.sleep(0.5)
    assert "RuntimeError: the transport ended without a reason" in caplog.text.splitlines()


async def test_an_unforeseen_exception_counts_as_a_failure(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(then=Crash(OSError))
    async with supervised(transport, policy=RestartPolicy(max_restarts=2)) as generation:
        failure = await generation.finish()
    assert isinstance(failure, RestartLimitError)
    assert isinstance(failure.__cause__, UnknownError)
    assert isinstance(failure.__cause__.__cause__, OSError)
    assert len(transport.attempts) == 3


async def test_the_local_gateway_is_no_reason_for_a_tunnel_to_be_down(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Fail(LocalGatewayError), Connect(60, then=Fail(LocalGatewayError))])
    async with supervised(transport) as generation:
        await trio.sleep(100)
    assert generation.said == ["starting", "failed/unknown", "connected", "reconnecting/unknown", "connected"]


async def fail_together(*errors: Exception) -> NoReturn:
    async def fail(error: Exception) -> None:
        raise error

    async with trio.open_nursery() as nursery:
        for error in errors:
            nursery.start_soon(fail, error)
    raise AssertionError


@pytest.mark.parametrize(
    ("errors", "kind", "logged"),
    [
        ([RelayConnectError("1"), RelayResolveError("2")], None, False),
        ([RelayConnectError("1"), TunnelAuthError("2")], ErrorKind.TUNNEL_AUTH_FAILED, False),
        ([ValueError("1"), TunnelAuthError("2")], ErrorKind.TUNNEL_AUTH_FAILED, True),
        ([ValueError("1"), RelayConnectError("2")], ErrorKind.UNKNOWN, True),
        ([ValueError("1"), OSError("2")], ErrorKind.UNKNOWN, True),
    ],
)
async def test_when_several_things_fail_at_once_a_final_one_decides(
    autojump_clock: MockClock,
    errors: list[Exception],
    kind: ErrorKind | None,
    logged: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        await fail_together(*errors)

    async with supervised(serve) as generation:
        await trio.sleep(0.5)
        assert generation.status.state is State.FAILED
        if kind is None:
            # Trio starts tasks in any order: either of them comes first.
            assert generation.status.error_kind in {ErrorKind.RELAY_CONNECT_FAILED, ErrorKind.RELAY_RESOLVE_FAILED}
        else:
            assert generation.status.error_kind is kind
        assert (generation.over is not None) is (kind is ErrorKind.TUNNEL_AUTH_FAILED)
    assert bool(caplog.records) is logged
    # Whichever of them the status tells of, the log has them all.
    assert all(f"{type(error).__name__}: {error}" in caplog.text for error in errors if logged)


async def test_the_end_of_the_program_is_no_failure_of_the_tunnel(autojump_clock: MockClock) -> None:
    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        await trio.sleep(1)
        raise SystemExit(3)

    generation = Supervised(serve)
    with pytest.raises(SystemExit):
        await generation.run()
    assert generation.said == ["starting"]


# The local gateway


async def test_the_tunnel_comes_up_without_a_local_gateway_and_says_that_it_is_missing(
    autojump_clock: MockClock,
) -> None:
    local, transport = LocalGateway(there=False), ScriptedTransport([Connect(after=1, public_url="https://o.test")])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(0.5)
        assert local.probes == []
        await trio.sleep(13)
        assert generation.said == ["starting", "connected", "connected/local_gateway_unavailable"]
        assert generation.status.message == "nothing listens at 127.0.0.1:17878"
        assert generation.status.public_url == "https://o.test"
        assert generation.status.retry_at_unix is None
        assert local.probes == [1, 6, 11]
        local.there = True
        await trio.sleep(100)
        assert generation.said[2:] == ["connected/local_gateway_unavailable", "connected"]
        assert local.probes == [1, 6, 11, 16]
    assert len(transport.attempts) == 1


async def test_the_local_gateway_is_probed_each_time_the_tunnel_comes_up(autojump_clock: MockClock) -> None:
    local, transport = LocalGateway(), ScriptedTransport([Fail(), Connect(60), Fail(), Connect(60)])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(20)
        assert len(local.probes) == 1
        assert generation.said[-1] == "connected"
        local.there = False
        await trio.sleep(50)
        assert generation.said[-2:] == ["connected", "connected/local_gateway_unavailable"]
    assert len(transport.attempts) == 4


async def test_a_tunnel_that_is_lost_while_the_local_gateway_is_missing_reconnects(autojump_clock: MockClock) -> None:
    local, transport = LocalGateway(there=False), ScriptedTransport([Connect(7), Connect(7)])
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(100)
    local_down = "connected/local_gateway_unavailable"
    lost = ["reconnecting/relay_connect_failed", "connected", local_down]
    assert generation.said == ["starting", "connected", local_down, *lost, *lost]


async def test_a_probe_that_is_slow_ends_with_the_link(autojump_clock: MockClock) -> None:
    async def probe() -> None:
        await trio.sleep(9)
        raise LocalGatewayError("late")

    async with supervised(ScriptedTransport([Connect(5), Stall()]), probe=probe) as generation:
        await trio.sleep(100)
    assert generation.said[:3] == ["starting", "connected", "reconnecting/relay_connect_failed"]
    assert "connected/local_gateway_unavailable" not in generation.said


async def test_three_local_dials_in_a_row_say_so_and_the_gateway_is_probed_until_it_is_back(
    autojump_clock: MockClock,
) -> None:
    local, transport = LocalGateway(), ScriptedTransport()
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(5)
        transport.report(LocalDialOk())
        await trio.sleep(5)
        local.there = False
        transport.report(LocalDialFailed("connection refused"))
        transport.report(LocalDialFailed("connection refused"))
        assert generation.said[-1] == "connected"
        transport.report(LocalDialFailed("connection refused"))
        assert generation.status == Status(
            state=State.CONNECTED,
            error_kind=ErrorKind.LOCAL_GATEWAY_UNAVAILABLE,
            message="connection refused",
            attempt=1,
            updated_at_unix=int(EPOCH + 10),
        )
        await trio.sleep(14)
        local.there = True
        await trio.sleep(0.5)
        assert generation.said[-1] == "connected/local_gateway_unavailable"
        await trio.sleep(1)
        assert generation.status == Status(state=State.CONNECTED, attempt=1, updated_at_unix=int(EPOCH + 25))
        await trio.sleep(100)
        assert local.probes == [0, 15, 20, 25]
    assert len(transport.attempts) == 1


async def test_a_local_dial_that_works_starts_the_count_anew(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport()
    async with supervised(transport) as generation:
        await trio.sleep(1)
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
            transport.report(LocalDialFailed("no"))
            transport.report(LocalDialOk())
        assert generation.said == ["starting", "connected"]
        transport.report(LocalDialFailed("no"))
        transport.report(LocalDialFailed("no"))
        assert generation.said == ["starting", "connected"]
        transport.report(LocalDialFailed("no"))
        assert generation.said == ["starting", "connected", "connected/local_gateway_unavailable"]


async def test_a_visitor_that_gets_through_clears_it_too_and_spares_the_probe(autojump_clock: MockClock) -> None:
    local, transport = LocalGateway(), ScriptedTransport()
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(1)
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
        await trio.sleep(2)
        transport.report(LocalDialOk())
        assert generation.said[-1] == "connected"
        await trio.sleep(100)
        assert local.probes == [0]
        for _ in range(3):
            transport.report(LocalDialFailed("no"))
        assert generation.said[-1] == "connected/local_gateway_unavailable"
        await trio.sleep(6)
        assert generation.said[-1] == "connected"
        assert local.probes == [0, 108]


async def test_the_count_of_local_dials_ends_with_the_link(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport([Connect(10)])
    async with supervised(transport) as generation:
        await trio.sleep(5)
        transport.report(LocalDialFailed("no"))
        transport.report(LocalDialFailed("no"))
        await trio.sleep(20)
        transport.report(LocalDialFailed("no"))
        assert generation.said[-1] == "connected"


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


# Cancelling


@pytest.mark.parametrize(
    ("steps", "seconds", "said"),
    [
        ([Stall()], 5, "starting"),
        ([Connect()], 5, "connected"),
        ([Fail(retry_after=60)], 5, "failed/relay_connect_failed"),
        ([Connect(2), Stall()], 30, "reconnecting/relay_connect_failed"),
    ],
    ids=["coming up", "up", "waiting", "coming back"],
)
async def test_cancelled_it_says_nothing_more_and_leaves_no_task(
    autojump_clock: MockClock, steps: list[Connect | Fail | Stall], seconds: float, said: str
) -> None:
    tasks = trio.lowlevel.current_statistics().tasks_living
    local, transport = LocalGateway(), ScriptedTransport(steps, goodbye=0.5)
    async with supervised(transport, probe=local.probe) as generation:
        await trio.sleep(seconds)
        published = len(generation.published)
    assert len(generation.published) == published
    assert generation.said[-1] == said
    assert generation.failure is None
    assert transport.running == 0
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_the_transports_goodbye_belongs_to_the_generation(autojump_clock: MockClock) -> None:
    async with supervised(ScriptedTransport(goodbye=3)) as generation:
        await trio.sleep(5)
    assert generation.over == 8


@pytest.mark.parametrize(
    "errors",
    [[LinkLostError("closed")], [TunnelAuthError("closed")], [OSError("closed")], [OSError("1"), ValueError("2")]],
    ids=repr,
)
@pytest.mark.parametrize("connected", [False, True])
async def test_a_transport_that_fails_of_being_cancelled_is_not_said_to_fail(
    autojump_clock: MockClock, errors: list[Exception], connected: bool
) -> None:
    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        if connected:
            task_status.started(Session())
        try:
            await trio.sleep_forever()
        finally:
            await fail_together(*errors) if len(errors) > 1 else None
            raise errors[0]

    local = LocalGateway()
    async with supervised(serve, probe=local.probe) as generation:
        await trio.sleep(5)
    assert generation.failure is None
    assert generation.said == ["starting", *["connected"] * connected]


async def test_the_next_attempt_waits_until_the_last_task_of_the_one_before_is_gone(autojump_clock: MockClock) -> None:
    began: list[float] = []

    async def linger() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(20)

    async def serve(
        target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        began.append(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(linger)
            task_status.started(Session())
            await trio.sleep(60)
            raise LinkLostError("gone")

    async with supervised(serve) as generation:
        await trio.sleep(100)
        assert generation.status.state is State.CONNECTED
    assert len(began) == 2
    assert 80 <= began[1] <= 82


# What a Tunnel makes of it


async def test_a_tunnel_stopped_by_its_host_plans_no_retry(autojump_clock: MockClock) -> None:
    transport = ScriptedTransport(then=Fail(retry_after=100))
    async with open_tunnel(
        "wss://relay.test", key=TARGET.key, transport=transport, restart=PLAIN, wall_clock=wall_clock
    ) as tunnel:
        await trio.sleep(50)
        assert tunnel.status.retry_at_unix is not None
    assert tunnel.status == Status(state=State.STOPPED, updated_at_unix=int(EPOCH + 50))


@pytest.mark.parametrize("local", [None, Address("127.0.0.1", 17878)])
async def test_a_tunnel_probes_the_local_gateway_when_it_is_named(
    autojump_clock: MockClock, local: Address | None
) -> None:
    dialled: list[tuple[str, int]] = []

    async def dial(host: str, port: int) -> NoReturn:
        dialled.append((host, port))
        raise ConnectionRefusedError(errno.ECONNREFUSED, "refused")

    transport = ScriptedTransport([Connect(60)])
    async with open_tunnel("wss://relay.test", key=TARGET.key, transport=transport, local=local, dial=dial) as tunnel:
        await trio.sleep(600)
        kinds = {status.error_kind for status in tunnel.history if status.state is State.CONNECTED}
    assert set(dialled) == (set() if local is None else {("127.0.0.1", 17878)})
    assert kinds == {None} | (set() if local is None else {ErrorKind.LOCAL_GATEWAY_UNAVAILABLE})


@virtual_time
async def test_a_session_that_was_lost_is_let_go_of_before_the_next_one_ends() -> None:
    """Found by a simulated day: the last failure kept its traceback, and that the session with all its buffers."""

    def sessions() -> list[weakref.ref[YamuxConnection]]:
        gc.collect()
        return [weakref.ref(item) for item in gc.get_objects() if isinstance(item, YamuxConnection)]

    async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
        await tunnel.wait_connected()
        first = [session for session in sessions() if not getattr(session(), "failure", None)]
        assert len(first) == 2
        await relay.reconnect()
        await trio.testing.wait_all_tasks_blocked()
        assert len(sessions()) >= 2
        assert [session for session in first if session() is not None] == []


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
    assert len(transport.attempts) < 30


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
