"""Fault plans: each fault has a gateway say what the contract has it say, and prints as the code that makes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from random import Random
from typing import Any, Final

import pytest
import trio
import trustme
from hypothesis import given, settings, strategies as st

from pioneer_tunnel import Certificate, ErrorKind, RelayKey, State, Status, Tunnel, open_tunnel, testing
from pioneer_tunnel.testing import (
    BadTls,
    BlackHole,
    CaptivePortal,
    ChangeNetwork,
    CutAfter,
    CutAtWelcome,
    Drain,
    Fault,
    FaultPlan,
    FaultyDialer,
    HostSleep,
    MemoryRelay,
    NotResolved,
    Refuse,
    Reject,
    Slow,
    Stage,
    StallAt,
    Takeover,
    Unavailable,
    Up,
    open_memory_relay,
    open_status_recorder,
    run,
    virtual_time,
    wall_clock,
)
from pioneer_tunnel.testing.strategies import fault_plans

RESOLVE, CONNECT, AUTH, INVALID = (
    ErrorKind.RELAY_RESOLVE_FAILED,
    ErrorKind.RELAY_CONNECT_FAILED,
    ErrorKind.TUNNEL_AUTH_FAILED,
    ErrorKind.INVALID_SETTINGS,
)

# The fault; the kind; whether it is final; what the message says; how long the gateway waits before it tries again.
OPENINGS: Final[list[tuple[Fault, ErrorKind, bool, str, tuple[float, float] | None]]] = [
    (Refuse(), CONNECT, False, "cannot connect to the relay", (0.8, 1.2)),
    (NotResolved(), RESOLVE, False, "'relay.test' does not resolve", (0.8, 1.2)),
    (BadTls(), CONNECT, False, "", (0.8, 1.2)),
    (CaptivePortal(302), CONNECT, False, "captive portal", (0.8, 1.2)),
    (CaptivePortal(200), CONNECT, False, "captive portal", (0.8, 1.2)),
    (Unavailable(), CONNECT, False, "HTTP status 503", (0.8, 1.2)),
    (Unavailable(retry_after=300), CONNECT, False, "HTTP status 503", (300, 300)),
    *((StallAt(stage), CONNECT, False, "within 10 seconds", (0.8, 1.2)) for stage in Stage),
    (Reject(), AUTH, True, "rejected the key", None),
    (Reject("service_unknown"), INVALID, True, "does not know the service", None),
    (Reject("wrong_audience"), INVALID, True, "does not go by the name", None),
    (Reject("busy", retry_after=120), CONNECT, False, "is busy", (120, 120)),
    (Reject("version"), CONNECT, False, "another version", (24, 36)),
    (Reject("too_early"), CONNECT, False, "for the reason 'too_early'", (24, 36)),
    (CutAfter(0), CONNECT, False, "", (0.8, 1.2)),
    (CutAfter(700), CONNECT, False, "broke off the opening", (0.8, 1.2)),
    (CutAfter(400, towards="relay"), CONNECT, False, "broke off the opening", (0.8, 1.2)),
    (CutAfter(300, towards="gateway"), CONNECT, False, "broke off the opening", (0.8, 1.2)),
    (CutAtWelcome(), CONNECT, False, "broke off the opening", (0.8, 1.2)),
    (BlackHole(), CONNECT, False, "within 10 seconds", (0.8, 1.2)),
]
ONCE_UP: Final[list[tuple[Fault, ErrorKind, bool, str]]] = [
    (Up(100), CONNECT, False, "is lost"),
    (CutAfter(5000), CONNECT, False, "is lost"),
    (BlackHole(100), CONNECT, False, "no byte came for 30 seconds"),
    (BlackHole(100, 3600), CONNECT, False, "no byte came for 30 seconds"),
    (Slow(4096, 100), CONNECT, False, "is lost"),
    (HostSleep(100), CONNECT, False, "no byte came for 30 seconds"),
    (ChangeNetwork(100), CONNECT, False, "no byte came for 30 seconds"),
    (Takeover(100, own=True), CONNECT, False, "a newer session of this gateway"),
    (Takeover(100), INVALID, True, "instance 'another-gateway'"),
]
UNNOTICED: Final[list[Fault]] = [Up(), Slow(4096), BlackHole(100, 14), Drain(100)]


OTHER_KEY: Final = RelayKey("ptk1_the-key-of-the-other-0123456789abcdef")


def tunnel_to(relay: MemoryRelay) -> AbstractAsyncContextManager[Tunnel]:
    return open_tunnel(relay.url, key=relay.key, dial=relay.dial, random=Random(0), wall_clock=wall_clock)


async def anything_but(tunnel: Tunnel, state: State) -> Status:
    async for status in tunnel.watch():
        if status.state is not state:
            return status
    raise AssertionError("the tunnel was closed")


def named(rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [pytest.param(*row, id=repr(row[0])) for row in rows]


def test_the_table_has_every_fault() -> None:
    faults = [*(row[0] for row in OPENINGS), *(row[0] for row in ONCE_UP), *UNNOTICED]
    assert {type(fault) for fault in faults} == set(Fault.__args__)


@pytest.mark.parametrize(("fault", "kind", "final", "message", "delay"), named(OPENINGS))
def test_what_a_gateway_says_of_an_opening_that_fails(
    fault: Fault, kind: ErrorKind, final: bool, message: str, delay: tuple[float, float] | None
) -> None:
    async def scenario(relay: MemoryRelay) -> None:
        async with tunnel_to(relay) as tunnel:
            status = await anything_but(tunnel, State.STARTING)
            assert (status.state, status.error_kind) == (State.FAILED, kind) == (State.FAILED, fault.kind)
            assert message in (status.message or "")
            assert (status.retry_at_unix is None) == final == fault.final
            failed_at = trio.current_time()
            await trio.sleep(900)
            assert len(relay.dials) == (1 if final else 2)
            if delay is not None:
                assert delay[0] <= relay.dials[1].at - failed_at <= delay[1]
                assert tunnel.status.state is State.CONNECTED

    run(FaultPlan([fault]), scenario)


@pytest.mark.parametrize(("fault", "kind", "final", "message"), named(ONCE_UP))
def test_what_a_gateway_says_of_a_link_that_was_up(fault: Fault, kind: ErrorKind, final: bool, message: str) -> None:
    async def scenario(relay: MemoryRelay) -> None:
        async with tunnel_to(relay) as tunnel:
            await tunnel.wait_connected()
            status = await anything_but(tunnel, State.CONNECTED)
            expected = State.FAILED if final else State.RECONNECTING
            assert (status.state, status.error_kind) == (expected, kind) == (expected, fault.kind)
            assert message in (status.message or "")
            assert final == fault.final
            await trio.sleep(900)
            assert len(relay.dials) == (1 if final else 2)
            assert (tunnel.status.state is State.CONNECTED) != final

    run(FaultPlan([fault]), scenario)


@pytest.mark.parametrize("fault", UNNOTICED, ids=repr)
def test_what_a_gateway_need_not_notice(fault: Fault) -> None:
    async def scenario(relay: MemoryRelay) -> None:
        async with tunnel_to(relay) as tunnel:
            await trio.sleep(900)
            assert tunnel.status.state is State.CONNECTED
            assert [entry.state for entry in tunnel.history if entry.error_kind] == []
            assert relay.sessions == (9 if isinstance(fault, Drain) else 1)
            assert fault.kind is None

    run(FaultPlan(then=fault), scenario)


@virtual_time
async def test_faults_come_about_inside_tls_as_well(tmp_path: Path) -> None:
    ca = trustme.CA()
    issued = ca.issue_cert("relay.test")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "relay.crt")
    issued.private_key_pem.write_to_path(tmp_path / "relay.key")
    certificate = Certificate(tmp_path / "relay.crt", tmp_path / "relay.key")
    faults = [row[0] for row in OPENINGS if not row[2]]
    async with open_memory_relay(FaultPlan(faults), certificate=certificate) as relay:
        assert relay.url == "wss://relay.test"
        with ca.cert_pem.tempfile() as ca_file:
            async with open_tunnel(relay.url, key=relay.key, dial=relay.dial, ca_file=ca_file) as tunnel:
                await tunnel.wait_connected()
    assert len(relay.dials) == len(faults) + 1
    kinds = {entry.attempt: (entry.error_kind, entry.message) for entry in tunnel.history if entry.retry_at_unix}
    assert [kinds[number + 1][0] for number in range(len(faults))] == [fault.kind for fault in faults]
    assert "TLS with wss://relay.test failed" in (kinds[faults.index(BadTls()) + 1][1] or "")


@pytest.mark.parametrize("fault", [HostSleep(100), ChangeNetwork(100)], ids=repr)
@pytest.mark.parametrize("resume_timeout", [0.0, 60.0])
@virtual_time
async def test_a_gateway_whose_system_tells_it_is_back_in_seconds(fault: Fault, resume_timeout: float) -> None:
    async with (
        open_memory_relay(FaultPlan([fault]), resume_timeout=resume_timeout) as relay,
        open_status_recorder(relay, grace=5.0) as recorder,
        open_tunnel(relay.url, key=relay.key, dial=relay.dial, watch_network=relay.watch_network) as tunnel,
    ):
        recorder.watch(tunnel)
        await trio.sleep(101)
        await relay.wait_reachable()
        happened_at = 100 + (fault.seconds if isinstance(fault, HostSleep) else 0)
        assert relay.dials[1].at <= happened_at + 3
        await tunnel.wait_connected()
        assert tunnel.status.attempt == (1 if resume_timeout else 2)


@virtual_time
async def test_a_resume_is_lost_when_only_the_relay_has_made_it() -> None:
    async with (
        open_memory_relay(FaultPlan([Up(5), CutAtWelcome(), CutAtWelcome()]), resume_timeout=60) as relay,
        open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel,
    ):
        await tunnel.wait_connected()
        visitor = await relay.visit()
        await visitor.send_all(b"hello")
        stream = await tunnel.accept()
        assert await stream.receive_some() == b"hello"
        await trio.sleep(6)
        await stream.send_all(b"good day")
        assert await visitor.receive_some() == b"good day"
        assert [dial.connected_at is not None for dial in relay.dials] == [True] * 4  # it was resumed three times
        assert tunnel.status.attempt == 1


async def test_a_clock_that_cannot_jump_is_named() -> None:
    with pytest.raises(TypeError, match="HostSleep needs a clock that can jump"):
        async with open_memory_relay(FaultPlan([HostSleep(0.01)])) as relay, tunnel_to(relay):
            await trio.sleep(10)


@virtual_time
async def test_each_gateway_has_a_plan_of_its_own() -> None:
    async with open_memory_relay() as relay:
        relay.register("home", OTHER_KEY)
        second = FaultyDialer(relay, FaultPlan([Refuse()], then=Reject()))
        async with tunnel_to(relay) as tunnel:
            async with open_tunnel(relay.url, key=OTHER_KEY, dial=second) as other:
                status = await anything_but(other, State.STARTING)
                assert status.error_kind is ErrorKind.RELAY_CONNECT_FAILED
                await trio.sleep(60)
                assert other.status.error_kind is ErrorKind.TUNNEL_AUTH_FAILED
                second.follow(FaultPlan())
            async with open_tunnel(relay.url, key=OTHER_KEY, dial=second) as other:
                await other.wait_connected()
                assert relay.is_reachable("home")
            assert tunnel.status.state is State.CONNECTED
        assert [dial.after_final for dial in second.dials] == [False, False, False]
        assert len(relay.dials) == 1


@settings(deadline=None)
@given(plan=fault_plans())
def test_a_plan_is_made_again_from_its_repr(plan: FaultPlan) -> None:
    assert eval(repr(plan), vars(testing)) == plan
    assert "\n" not in repr(plan)


def test_a_plan_prints_as_a_person_would_write_it() -> None:
    plan = FaultPlan([NotResolved(), StallAt(Stage.WELCOME), Up(60.0), BlackHole(5.0, 20.0)], then=Reject())
    assert repr(plan) == (
        "FaultPlan([NotResolved(), StallAt(Stage.WELCOME), Up(60.0), BlackHole(5.0, 20.0)], then=Reject())"
    )
    assert repr(FaultPlan()) == "FaultPlan()"
    assert repr(Slow(4096, math.inf)) == "Slow(4096)"
    assert repr(Takeover(own=True)) == "Takeover(own=True)"
    assert repr(Stage.DIAL) == "Stage.DIAL"  # Hypothesis prints arguments one by one
    assert repr(BlackHole(0.0, 10.0)) == "BlackHole(seconds=10.0)"


@pytest.mark.parametrize(
    ("plan", "final"),
    [
        (FaultPlan(), None),
        (FaultPlan([Refuse()], then=Reject()), Reject()),
        (FaultPlan([Takeover(3.0)], then=Reject()), Takeover(3.0)),
        (FaultPlan([Up()], then=Reject()), None),
        (FaultPlan([Up(60.0)], then=Reject()), None),
        (FaultPlan([Up(60.0)], then=Reject("busy")), None),
        (FaultPlan([Up(60.0), Reject()], then=Takeover(3.0)), Takeover(3.0)),
        (FaultPlan([BlackHole(60, 3)], then=Reject()), None),
    ],
    ids=repr,
)
def test_a_plan_knows_how_it_ends(plan: FaultPlan, final: Fault | None) -> None:
    assert plan.final == final


@settings(max_examples=10, deadline=None)
@given(plan=fault_plans(max_faults=3), seed=st.integers(0, 3))
def test_whatever_the_plan_the_tunnel_tells_the_truth(plan: FaultPlan, seed: int) -> None:
    async def scenario(relay: MemoryRelay) -> None:
        async with open_status_recorder(relay) as recorder, tunnel_to(relay) as tunnel:
            recorder.watch(tunnel)
            await relay.played()
            await trio.sleep(30)
            assert tunnel.status.error_kind == (plan.final.kind if plan.final else None)
            assert tunnel.status.state is (State.FAILED if plan.final else State.CONNECTED)
            assert not any(dial.after_final for dial in relay.dials)

    run(plan, scenario, seed=seed)
