"""The transports `tcp` and `tls` against the scripted relay: coming up, being up, and leaving."""

from __future__ import annotations

import logging
import random
import socket
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing
from rathole_rig import CREATE, KEY, a_tunnel, connected, every_way, in_ways
from resolving import resolving
from rig import (
    ask,
    echo,
    eventually,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    read_until,
    seeds,
)

from pioneer_tunnel._model.status import State
from pioneer_tunnel._net import dialing as dialer, tcp
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.lent_socket import LentSocket
from pioneer_tunnel.testing import ScriptedPioneerRelay, open_pioneer_relay
from pioneer_tunnel.transports.link_checks import LinkChecks
from pioneer_tunnel.transports.rathole import control_channel, data_channels
from pioneer_tunnel.transports.rathole.key_mode import KeyMode
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import open_tunnel

# Coming up


@pytest.mark.parametrize("mode", list(KeyMode))
async def test_a_visitor_is_served_in_each_key_mode(mode: KeyMode) -> None:
    async with (
        open_pioneer_relay(key=KEY, key_mode=mode, service="büro") as relay,
        a_tunnel(relay, key_mode=str(mode), service="büro") as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        with no_hang():
            status = await tunnel.wait_connected()
            assert status.public_url is None
            async with await relay.visit() as visitor:
                assert await ask(visitor, b"hello") == b"hello"


@every_way
async def test_what_a_stream_says_of_itself(secured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    async with connected(secured) as (relay, tunnel), await relay.visit() as visitor:
        await visitor.send_all(b"x")
        async with await tunnel.accept() as stream:
            assert stream.visitor is None
            assert stream.tls is None
            assert stream.tunnelled
            assert stream.usable
            has_one = (
                secured[1]["transport"] == "tcp" and vars(dialer)["CAN_USE_DESCRIPTORS"] and vars(tcp)["CAN_WATCH"]
            )
            assert (stream.leg() is not None) == has_one
        assert not stream.usable


async def test_tcp_says_at_connect_that_it_is_in_clear(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with connected():
            pass
    (record,) = [record for record in caplog.records if "clear" in record.message]
    assert "tokens" in record.message
    assert KEY.reveal() not in caplog.text


@every_way
async def test_visitors_at_once_each_get_their_own_answer(secured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    async def visit(number: int) -> None:
        body = f"visitor {number} ".encode() * 100
        async with await relay.visit() as visitor:
            assert await ask(visitor, body) == body

    async with (
        connected(secured) as (relay, tunnel),
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        with no_hang():
            async with trio.open_nursery() as nursery:
                for number in range(30 if "tls" in secured[0] else 100):
                    nursery.start_soon(visit, number)


@every_way
async def test_the_pool_is_filled_and_refilled() -> None:
    async with connected() as (relay, tunnel), in_background(lambda: trio.serve_listeners(echo, [tunnel])):
        await eventually(lambda: relay.data_channels == 8)
        for number in range(3):
            async with await relay.visit() as visitor:
                assert await ask(visitor, b"x") == b"x"
            await eventually(lambda number=number: relay.data_channels == 9 + number)  # type: ignore[misc]
        assert relay.asked_for == relay.data_channels == 11


@every_way
async def test_idle_data_channels_are_bounded_and_what_is_owed_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_channels, "MOST_IDLE", 10)
    async with connected() as (relay, tunnel), in_background(lambda: trio.serve_listeners(echo, [tunnel])):
        relay.tell(CREATE * 1000)
        await eventually(lambda: relay.data_channels == 10)
        await trio.sleep(0.05)
        assert relay.data_channels == 10
        async with await relay.visit() as visitor:
            assert await ask(visitor, b"x") == b"x"
        await eventually(lambda: relay.data_channels == 11)


@pytest.mark.skipif(not CAN_WATCH, reason="this system has no reactor")
@in_ways("at once", "in a while")
async def test_a_data_channel_that_waits_costs_no_task() -> None:
    async with connected() as (relay, _):
        await eventually(lambda: relay.data_channels == 8)
        await trio.testing.wait_all_tasks_blocked()
        before = ours()
        relay.tell(CREATE * 100)
        await eventually(lambda: relay.data_channels == 108)
        await eventually(lambda: ours() <= before)


def ours() -> int:
    """The tasks of this transport that live."""
    found, left = 0, [trio.lowlevel.current_root_task()]
    while left:
        task = left.pop()
        assert task is not None
        found += "data_channels" in task.name
        left += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return found


@every_way
async def test_a_burst_of_visitors_does_not_run_over_who_accepts_them(
    caplog: pytest.LogCaptureFixture, few_idle: int
) -> None:
    """Of a thousand who came while the gateway was busy for a moment, three quarters were lost without a word."""
    async with connected(backlog=few_idle) as (relay, tunnel):
        visitors = [await relay.visit() for _ in range(2 * few_idle)]
        for number, visitor in enumerate(visitors):
            await visitor.send_all(b"%d." % number)
        await eventually(lambda: relay.data_channels >= few_idle)
        await trio.testing.wait_all_tasks_blocked(0.05)  # nobody accepts meanwhile
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])):
            for number, visitor in enumerate(visitors):
                with no_hang():
                    assert await read_until(visitor, b".") == b"%d." % number
                await visitor.aclose()
    assert not [record for record in caplog.records if "turned away" in record.getMessage()]


@every_way
async def test_data_channels_go_to_the_machine_that_answered() -> None:
    """A name can have several addresses, and only one of them knows the session."""
    with resolving("127.0.0.1") as resolver:
        async with (
            open_pioneer_relay(key=KEY) as relay,
            open_tunnel(f"relay.test:{relay.address.port}", key=KEY, transport="tcp") as tunnel,
        ):
            with no_hang():
                await tunnel.wait_connected()
            await eventually(lambda: relay.data_channels == 8)
        assert resolver.asked == ["relay.test"]


# Being up


async def test_heartbeats_keep_it_alive(autojump_clock: trio.testing.MockClock) -> None:
    async with (
        open_pioneer_relay(key=KEY, listen=False) as relay,
        a_tunnel(relay, dial=relay.dial) as tunnel,
        in_background(lambda: trio.serve_listeners(echo, [tunnel])),
    ):
        await tunnel.wait_connected()
        await trio.sleep(3600)
        assert [status.state for status in tunnel.history].count(State.RECONNECTING) == 0
        visitor = await relay.visit()
        assert await ask(visitor, b"an hour later") == b"an hour later"


@every_way
async def test_a_relay_that_restarts_is_found_again(secured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    async def serve(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as relays:
                await relays.start(relay.run)
                task_status.started(scope)

    with nothing_left_behind():
        async with trio.open_nursery() as nursery:
            relay = ScriptedPioneerRelay(key=KEY, **secured[0])
            running = await nursery.start(serve)
            async with (
                a_tunnel(relay, **secured[1]) as tunnel,
                in_background(lambda: trio.serve_listeners(echo, [tunnel])),
            ):
                for _ in range(3):
                    await eventually(lambda: relay.connected and tunnel.status.state is State.CONNECTED)
                    with no_hang():
                        async with await relay.visit() as visitor:
                            assert await ask(visitor, b"x") == b"x"
                    running.cancel()
                    await eventually(lambda: tunnel.status.state is State.RECONNECTING)
                    running = await nursery.start(serve)
            assert relay.control_channels >= 3
            nursery.cancel_scope.cancel()


@every_way
async def test_a_handler_that_waits_hears_that_the_session_is_over() -> None:
    """It waited for ever, and the next connection with the number of its own was disturbed."""
    heard: list[Exception] = []
    waiting = 0

    async def wait(stream: TunnelStream) -> None:
        nonlocal waiting
        async with stream:
            try:
                while await stream.receive_some():
                    waiting += 1
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                heard.append(error)

    async with connected() as (relay, tunnel), in_background(lambda: trio.serve_listeners(wait, [tunnel])):
        visitors = [await relay.visit() for _ in range(3)]
        for visitor in visitors:
            await visitor.send_all(b"x")
        await eventually(lambda: waiting == 3)
        await trio.testing.wait_all_tasks_blocked()
        relay.drop_gateway()
        await eventually(lambda: len(heard) == 3)
        for visitor in visitors:
            await visitor.aclose()
        await eventually(lambda: relay.control_channels == 2 and relay.connected)
        async with await relay.visit() as visitor:
            await visitor.send_all(b"x")
            await trio.sleep(0.05)


@every_way
async def test_connections_are_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every system: a data channel waits without a deadline."""
    kept: list[object] = []
    for module in (control_channel, data_channels):
        monkeypatch.setattr(module, "keep_alive", kept.append)
    async with connected() as (relay, _):
        await eventually(lambda: relay.data_channels == 8)
    assert len(kept) == 9


@every_way
async def test_open_streams_end_with_a_reset_when_the_control_channel_does() -> None:
    async with connected() as (relay, tunnel):
        visitor = await relay.visit()
        await visitor.send_all(b"x")
        stream = await tunnel.accept()
        assert await read_exactly(stream, 1) == b"x"
        relay.drop_gateway()
        with no_hang():
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
            await eventually(lambda: not stream.usable)
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await stream.receive_some()
        await visitor.aclose()


# Leaving


@every_way
@seeds(20, quick=5)
async def test_cancellation_at_any_moment_leaves_nothing_behind(
    secured: tuple[dict[str, Any], dict[str, Any]], seed: int
) -> None:
    chance = random.Random(seed)

    async def visit() -> None:
        while True:
            with trio.move_on_after(chance.uniform(0, 0.02)), suppress(trio.BrokenResourceError, OSError):
                async with await relay.visit() as visitor:
                    await ask(visitor, bytes(chance.randrange(500_000)))
            await trio.sleep(0)

    with nothing_left_behind():
        async with open_pioneer_relay(key=KEY, **secured[0]) as relay:
            with trio.move_on_after(chance.uniform(0, 0.05)):
                async with (
                    a_tunnel(relay, **secured[1]) as tunnel,
                    in_background(visit, visit, lambda: trio.serve_listeners(echo, [tunnel])),
                ):
                    await trio.sleep_forever()


@every_way
async def test_leaving_tells_visitors_by_a_reset() -> None:
    async with open_pioneer_relay(key=KEY) as relay:
        async with a_tunnel(relay) as tunnel:
            await tunnel.wait_connected()
            visitor = await relay.visit()
            await visitor.send_all(b"x")
            await tunnel.accept()
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)
        await visitor.aclose()
        await eventually(lambda: not relay.connected)


# Checks of the link


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="this system has no such option")
async def test_a_check_makes_tcp_probe_the_control_channel(autojump_clock: trio.testing.MockClock) -> None:
    """The relay answers nothing on it. TCP breaks the connection if two probes get no answer."""

    def settings_of(connected: trio.SocketStream) -> tuple[int, ...]:
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        return tuple(int(connected.socket.getsockopt(socket.IPPROTO_TCP, option)) for option in options)

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener, trio.open_nursery() as nursery:
        connected = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        async with connected:
            checks = LinkChecks()
            nursery.start_soon(control_channel._check_when_asked, checks, LentSocket(connected.socket))
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(2):
                checks.ask()
                await trio.sleep(control_channel.CHECK_TIMEOUT - 0.5)
                assert settings_of(connected) == (1, 1, 2)
                await trio.sleep(1)
                assert settings_of(connected)[:2] == (20, 8)
        nursery.cancel_scope.cancel()
