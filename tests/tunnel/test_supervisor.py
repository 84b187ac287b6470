"""The restart loop, row by row of the contract's table, under virtual time: what it says, and how it ends."""

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
from supervised import EPOCH, PLAIN, TARGET, LocalGateway, Supervised, refuse_visitors, supervised, wall_clock
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
from pioneer_tunnel.transports.interface import Deliver, Report, RoundTrip, Session, Target
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
