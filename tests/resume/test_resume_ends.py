"""What ends a suspended session, and what its visitors get meanwhile."""

from __future__ import annotations

import pytest
import trio
from resumable import resumable, talk
from rig import echo, in_background
from trio.testing import MockClock

from pioneer_tunnel import Services, State, open_tunnel
from pioneer_tunnel.testing import Drain, FaultPlan, FaultyDialer, Refuse, Up, open_memory_relay


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
