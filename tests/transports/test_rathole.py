"""The transports `tcp` and `tls` against the scripted relay: each step of the opening, the pool, the ends of things."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import trustme
from fast_path import switch_fast_path_off
from resolving import resolving
from rig import (
    AT_ONCE,
    HANG,
    ask,
    echo,
    eventually,
    fill,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    read_until,
    seeds,
    tcp_pair,
)

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    TunnelAuthError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net import adopted as streams, dialing as dialer, tcp
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.dialing import Attempt
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.lent_socket import LentSocket
from pioneer_tunnel._net.log_limiter import LINES_IN_FULL
from pioneer_tunnel.testing import Moment, ScriptedPioneerRelay, Trouble, Way, open_pioneer_relay
from pioneer_tunnel.transports.interface import Target
from pioneer_tunnel.transports.link_checks import LinkChecks
from pioneer_tunnel.transports.rathole import control_channel, data_channels
from pioneer_tunnel.transports.rathole.channel_stream import ChannelStream
from pioneer_tunnel.transports.rathole.codec import ControlCommand, encode_command
from pioneer_tunnel.transports.rathole.control_channel import RatholeTransport
from pioneer_tunnel.transports.rathole.key_mode import KeyMode
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import forward
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.tunnel import Tunnel, open_tunnel

KEY = RelayKey("weak")  # these transports take any key
OPENING = [Moment.HELLO, Moment.ACK]
CREATE = encode_command(ControlCommand.CREATE_DATA_CHANNEL)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


every_way: Final = pytest.mark.parametrize(
    "comes_about", ["at once", "in a while", "a task for each", "no descriptors"], indirect=True
)


@pytest.fixture(autouse=True)
def comes_about(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How a data channel comes about, and waits for its visitor."""
    way = getattr(request, "param", "at once")
    if way != "at once":
        monkeypatch.setattr(Attempt, "at_once", lambda self: None)
    if way in {"a task for each", "no descriptors"}:
        switch_fast_path_off(monkeypatch)
    if way == "no descriptors":
        for module in (dialer, streams):
            monkeypatch.setattr(module, "CAN_USE_DESCRIPTORS", False)


@pytest.fixture(params=["tcp", "tls"])
def secured(request: pytest.FixtureRequest, ca: trustme.CA, tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the relay and the tunnel have to know for each of the two transports."""
    if request.param == "tcp":
        return {}, {"transport": "tcp"}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    file = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(str(file))
    return {"tls": context}, {"transport": "tls", "ca_file": file}


def a_tunnel(relay: ScriptedPioneerRelay, **changes: Any) -> Any:
    settings: dict[str, Any] = {"key": KEY, "transport": "tcp", "restart": AT_ONCE, "connect_timeout": HANG}
    return open_tunnel(str(relay.address), **(settings | changes))


@asynccontextmanager
async def connected(
    secured: tuple[dict[str, Any], dict[str, Any]] = ({}, {}), **changes: Any
) -> AsyncIterator[tuple[ScriptedPioneerRelay, Tunnel]]:
    async with open_pioneer_relay(key=KEY, **secured[0]) as relay, a_tunnel(relay, **secured[1], **changes) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        yield relay, tunnel


async def failure(relay: ScriptedPioneerRelay, **changes: Any) -> TunnelError:
    """What one run of the transport over memory ends with."""
    settings: dict[str, Any] = {"key": KEY, "dial": relay.dial, "address": _ADDRESS, "connect_timeout": 10.0}
    target = Target(**(settings | changes))

    def deliver(stream: TunnelStream) -> None:
        nursery.start_soon(echo, stream)

    async with trio.open_nursery() as nursery:
        with pytest.raises(TunnelError) as raised:
            await RatholeTransport()(target, deliver, lambda event: None, task_status=trio.TASK_STATUS_IGNORED)
        nursery.cancel_scope.cancel()
    return raised.value


_ADDRESS = RelayAddress.parse("relay.test:2333")


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
                for number in range(50 if "tls" in secured[0] else 200):
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


@pytest.fixture
def few_idle(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many data channels may be idle at once: fewer than usual, so that a test comes to that bound soon."""
    monkeypatch.setattr(data_channels, "MOST_IDLE", 40)
    return 40


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
@pytest.mark.parametrize("comes_about", ["at once", "in a while"], indirect=True)
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


# Not coming up


@pytest.mark.parametrize("moment", OPENING)
async def test_a_step_that_stalls_is_given_up_on(moment: Moment, autojump_clock: trio.testing.MockClock) -> None:
    async with open_pioneer_relay(key=KEY, listen=False, troubles=[Trouble(moment, Way.STALL)]) as relay:
        began = trio.current_time()
        error = await failure(relay, connect_timeout=7.0)
        assert trio.current_time() - began == pytest.approx(7)
    assert type(error) is RelayConnectError
    assert "within 7 seconds" in str(error)
    assert not error.final


async def test_a_dial_that_stalls_is_given_up_on(autojump_clock: trio.testing.MockClock) -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    async with open_pioneer_relay(key=KEY, listen=False) as relay:
        error = await failure(relay, dial=dial)
    assert type(error) is RelayConnectError


@pytest.mark.parametrize("way", [Way.DROP, Way.RESET, Way.HALF, Way.JUNK])
@pytest.mark.parametrize("moment", OPENING)
async def test_an_opening_that_breaks_is_retried(moment: Moment, way: Way) -> None:
    """Over real sockets, where a RST is one."""
    with nothing_left_behind():
        async with (
            open_pioneer_relay(key=KEY, troubles=[Trouble(moment, way)]) as relay,
            a_tunnel(relay) as tunnel,
        ):
            with no_hang():
                await tunnel.wait_connected()
            told = [status for status in tunnel.history if status.state is State.FAILED]
            assert {str(status.error_kind) for status in told} == {"relay_connect_failed"}
            assert "127.0.0.1" in (told[0].message or "")
            assert relay.control_channels == 2


@pytest.mark.parametrize(
    ("trouble", "kind", "says"),
    [
        (Trouble(Moment.HELLO, Way.DROP), RelayConnectError, "its hello"),
        (Trouble(Moment.ACK, Way.DROP), RelayConnectError, "its word on our key"),
        (Trouble(Moment.HELLO, Way.JUNK), RelayConnectError, "HTTP"),
        (Trouble(Moment.ACK, Way.JUNK), RelayConnectError, "answer to a proof"),
        (Trouble(Moment.OPEN, Way.JUNK), LinkLostError, "command"),
        (Trouble(Moment.OPEN, Way.DROP), LinkLostError, "closed the control channel"),
        (Trouble(Moment.OPEN, Way.HALF), LinkLostError, "closed the control channel"),
        (Trouble(Moment.ACK, Way.AUTH_FAILED), TunnelAuthError, "rejected the key"),
        (Trouble(Moment.ACK, Way.UNKNOWN_SERVICE), InvalidSettingsError, "token_routing"),
        (Trouble(Moment.HELLO, Way.UNKNOWN_SERVICE), InvalidSettingsError, "pioneer_gateway"),
    ],
    ids=str,
)
async def test_what_a_relay_does_and_what_it_means(trouble: Trouble, kind: type[TunnelError], says: str) -> None:
    async with open_pioneer_relay(key=KEY, listen=False, then=trouble) as relay:
        error = await failure(relay)
    assert type(error) is kind
    assert says in str(error)
    assert KEY.reveal() not in str(error)


async def test_another_version_is_retried_slowly() -> None:
    async with open_pioneer_relay(key=KEY, listen=False, then=Trouble(Moment.HELLO, Way.OTHER_VERSION)) as relay:
        error = await failure(relay)
    assert type(error) is RelayConnectError
    assert error.retry_slowly
    assert "version 2" in str(error)


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (Trouble(Moment.ACK, Way.AUTH_FAILED), ErrorKind.TUNNEL_AUTH_FAILED),
        (Trouble(Moment.ACK, Way.UNKNOWN_SERVICE), ErrorKind.INVALID_SETTINGS),
        (Trouble(Moment.HELLO, Way.UNKNOWN_SERVICE), ErrorKind.INVALID_SETTINGS),
    ],
    ids=str,
)
async def test_a_tunnel_that_was_up_tries_again_after_a_rejection(
    autojump_clock: trio.testing.MockClock, trouble: Trouble, kind: ErrorKind
) -> None:
    async with (
        open_pioneer_relay(key=KEY, listen=False, troubles=[None, trouble]) as relay,
        a_tunnel(relay, dial=relay.dial, restart=RestartPolicy()) as tunnel,
    ):
        await tunnel.wait_connected()
        relay.drop_gateway()
        await trio.sleep(60)
        assert (tunnel.status.state, tunnel.status.error_kind) == (State.FAILED, kind)
        assert tunnel.status.retry_at_unix is not None
        await trio.sleep(20 * 60)
        assert tunnel.status.state is State.CONNECTED


@pytest.mark.parametrize("mode", [KeyMode.TOKEN_HASH, KeyMode.RATHOLE])
async def test_a_wrong_key_and_an_unknown_service_are_final(mode: KeyMode) -> None:
    """With real sockets: the relay closes with our proof unread, and its last word arrives all the same."""
    async with open_pioneer_relay(key=KEY, key_mode=mode, service="mine") as relay:
        for _ in range(10):
            async with a_tunnel(relay, key_mode=mode, service="theirs") as tunnel:
                with no_hang(), pytest.raises(InvalidSettingsError, match=f"'theirs'.*{mode}"):
                    await tunnel.accept()
        async with a_tunnel(relay, key_mode=mode, service="mine", key=RelayKey("other")) as tunnel:
            with no_hang(), pytest.raises(TunnelAuthError, match="mine"):
                await tunnel.accept()


async def test_a_wrong_key_at_a_relay_that_routes_by_it_is_a_key_that_it_does_not_know() -> None:
    async with open_pioneer_relay(key=KEY) as relay, a_tunnel(relay, key=RelayKey("other")) as tunnel:
        with no_hang(), pytest.raises(InvalidSettingsError, match="does not know our key"):
            await tunnel.accept()


async def test_tls_to_a_relay_that_nobody_vouches_for_is_refused(ca: trustme.CA) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    async with open_pioneer_relay(key=KEY, tls=context) as relay, a_tunnel(relay, transport="tls") as tunnel:
        await eventually(lambda: tunnel.status.error_kind is not None)
        assert "not trusted" in (tunnel.status.message or "")
        assert relay.control_channels == 0


async def test_tcp_to_a_relay_that_speaks_tls_says_so(ca: trustme.CA) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    async with open_pioneer_relay(key=KEY, tls=context) as relay, a_tunnel(relay, transport="tcp") as tunnel:
        await eventually(lambda: tunnel.status.error_kind is not None)
        assert tunnel.status.error_kind is not None


@pytest.mark.parametrize(
    ("relay", "changes", "kind", "says"),
    [
        ("wss://relay.test", {}, InvalidSettingsError, "host:port"),
        ("relay.test:1", {"transport": "noise"}, UnsupportedTransportError, "noise"),
        ("relay.test:1", {"key_mode": "plain"}, InvalidSettingsError, "token_routing"),
        ("relay.test:1", {"relay_identity": "ed25519:" + "01" + "00" * 31}, InvalidSettingsError, "relay_identity"),
    ],
)
async def test_what_cannot_be_used_is_refused_at_once(
    relay: str, changes: dict[str, Any], kind: type[TunnelError], says: str
) -> None:
    settings: dict[str, Any] = {"key": KEY, "transport": "tcp"}
    with pytest.raises(kind, match=says):
        async with open_tunnel(relay, **(settings | changes)):
            pytest.fail("it was entered")


# Being up, and the end of it


async def test_a_relay_that_falls_silent_is_dead_after_40_seconds(autojump_clock: trio.testing.MockClock) -> None:
    async with open_pioneer_relay(key=KEY, listen=False, heartbeat=None) as relay:
        began = trio.current_time()
        error = await failure(relay)
        assert trio.current_time() - began == pytest.approx(40)
    assert type(error) is LinkLostError
    assert "silent for 40 seconds" in str(error)


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


async def test_an_unknown_command_loses_the_link() -> None:
    async with open_pioneer_relay(key=KEY, listen=False) as relay, trio.open_nursery() as nursery:
        errors = []

        @nursery.start_soon
        async def run() -> None:
            errors.append(await failure(relay))

        await eventually(lambda: relay.connected)
        relay.tell(b"\x07\0\0\0")
        await eventually(lambda: bool(errors))
        assert type(errors[0]) is LinkLostError
        assert "7" in str(errors[0])


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


# Data channels that come to nothing


@every_way
@pytest.mark.parametrize("way", [Way.DROP, Way.RESET, Way.HALF, Way.JUNK, Way.UDP])
@pytest.mark.parametrize("moment", [Moment.DATA, Moment.START])
async def test_a_data_channel_that_breaks_harms_nobody_else(moment: Moment, way: Way) -> None:
    with nothing_left_behind():
        async with (
            open_pioneer_relay(key=KEY, troubles=[Trouble(moment, way)]) as relay,
            a_tunnel(relay) as tunnel,
            in_background(lambda: trio.serve_listeners(echo, [tunnel])),
        ):
            with no_hang():
                await tunnel.wait_connected()
            turned_away = await relay.visit()
            await eventually(lambda: relay.data_channels >= 8)
            assert tunnel.status.state is State.CONNECTED
            await turned_away.aclose()
            relay.drop_gateway()  # the second time the relay behaves
            await eventually(lambda: relay.control_channels == 2 and relay.connected)
            with no_hang():
                async with await relay.visit() as visitor:
                    assert await ask(visitor, b"x") == b"x"


@every_way
async def test_what_a_relay_spoils_again_and_again_is_few_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """It asks for data channels as often as it likes, and each one that it spoils was a line."""

    def told() -> list[logging.LogRecord]:
        return [record for record in caplog.records if "came to nothing" in record.getMessage()]

    async with open_pioneer_relay(key=KEY, then=Trouble(Moment.DATA, Way.JUNK)) as relay, a_tunnel(relay) as tunnel:
        with no_hang():
            await tunnel.wait_connected()
        relay.tell(CREATE * 50)
        await eventually(lambda: relay.data_channels >= 50 and len(told()) >= LINES_IN_FULL)
        await trio.testing.wait_all_tasks_blocked(0.01)
    assert len(told()) == LINES_IN_FULL
    assert told()[0].levelno == logging.WARNING


async def test_data_channels_that_are_lost_at_once_are_dialled_again_after_pauses(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Found by an attack: a relay that reset each one kept the gateway dialling, and everything else waiting."""
    trouble = Trouble(Moment.DATA, Way.RESET)
    relay = ScriptedPioneerRelay(key=KEY, then=trouble)
    target = Target(key=KEY, dial=relay.dial, address=_ADDRESS, connect_timeout=10.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(relay.run)
        await nursery.start(functools.partial(RatholeTransport(), target, lambda stream: None, lambda event: None))
        relay.tell(CREATE * 1000)
        await trio.sleep(0.5)
        assert 32 <= relay.data_channels <= 700
        await trio.sleep(5)
        assert relay.data_channels >= 1000
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(not CAN_WATCH, reason="this system has no reactor")
async def test_data_channels_are_dialled_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tasks run after 32 of them, however many the relay asks for in one breath."""
    dials = [0]

    def count(host: str, port: int) -> Attempt | None:
        dials[-1] += 1
        return dialer.begin_dial(host, port)

    async def others() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            if dials[-1]:
                dials.append(0)

    monkeypatch.setattr(data_channels, "begin_dial", count)
    async with connected() as (relay, _), in_background(others):
        relay.tell(CREATE * 200)
        await eventually(lambda: relay.data_channels == 208)
    assert sum(dials) == 208
    assert max(dials) < 100


async def test_a_data_channel_is_dialled_again_for_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    dialled: list[float] = []

    async def dial(host: str, port: int) -> trio.abc.Stream:
        if relay.control_channels == 0:
            return await relay.dial(host, port)
        dialled.append(trio.current_time())
        raise ConnectionRefusedError(111, "Connection refused")

    async with open_pioneer_relay(key=KEY, listen=False, pool=1) as relay, a_tunnel(relay, dial=dial) as tunnel:
        await tunnel.wait_connected()
        await trio.sleep(60)
        assert tunnel.status.state is State.CONNECTED
    assert 9 < dialled[-1] - dialled[0] <= 10
    assert 8 < len(dialled) < 20


@every_way
async def test_a_visitor_that_nobody_has_room_for_is_reset(delivered: list[TunnelStream]) -> None:
    async with connected(backlog=1) as (relay, tunnel), await relay.visit() as first:
        await first.send_all(b"1")
        await eventually(lambda: delivered)
        async with await relay.visit() as second:
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(second)
        async with await tunnel.accept() as stream:
            assert await read_exactly(stream, 1) == b"1"


@every_way
async def test_a_place_is_free_again_when_a_visitor_leaves_before_it_was_accepted(few_idle: int) -> None:
    async with connected(backlog=few_idle) as (relay, tunnel):

        async def turn_away() -> None:
            while True:
                (await tunnel.accept()).reset()

        for number in range(1, 4):
            visitors = [await relay.visit() for _ in range(few_idle)]
            await eventually(lambda number=number: relay.asked_for >= 8 + number * few_idle)  # type: ignore[misc]
            for visitor in visitors:
                await abandon(visitor)
            async with in_background(turn_away):
                await eventually(lambda: relay.data_channels == relay.asked_for)
        async with in_background(lambda: trio.serve_listeners(echo, [tunnel])), await relay.visit() as visitor:
            with no_hang():
                assert await ask(visitor, b"x") == b"x"


async def test_a_place_is_made_free_once(monkeypatch: pytest.MonkeyPatch) -> None:
    freed = 0
    free_slot = data_channels.DataChannels._free_slot

    def count(self: Any) -> None:
        nonlocal freed
        freed += 1
        free_slot(self)

    monkeypatch.setattr(data_channels.DataChannels, "_free_slot", count)
    async with connected() as (relay, tunnel), await relay.visit() as visitor:
        await visitor.send_all(b"x")
        stream = await tunnel.accept()
        stream.acknowledge()
        stream.reset()
        stream.acknowledge()
        assert freed == 1


@every_way
async def test_a_visitor_who_left_while_it_waited_is_not_accepted(delivered: list[TunnelStream]) -> None:
    async with connected() as (relay, tunnel):
        gone = await relay.visit()
        await gone.send_all(b"gone")
        await eventually(lambda: delivered)
        await abandon(gone)
        await eventually(lambda: not delivered[0].usable)
        async with await relay.visit() as here:
            await here.send_all(b"here")
            with no_hang():
                async with await tunnel.accept() as stream:
                    assert await read_exactly(stream, 4) == b"here"


# Bytes


@pytest.mark.parametrize("by", ["forward", "handler"])
async def test_64_mib_each_way_at_once_unharmed(secured: tuple[dict[str, Any], dict[str, Any]], by: str) -> None:
    piece = random.Random(4).randbytes(1024 * 1024)
    size = 64 if secured[1]["transport"] == "tcp" else 16
    expected = hashlib.sha256(piece * size).hexdigest()

    async def exchange(stream: trio.abc.Stream) -> None:
        """Send it all and end, while reading all that comes."""
        received = hashlib.sha256()

        async def send() -> None:
            for _ in range(size):
                await stream.send_all(piece)
            assert isinstance(stream, trio.abc.HalfCloseableStream)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while data := await stream.receive_some(1024 * 1024):
                received.update(data)
        await stream.aclose()
        digests.append(received.hexdigest())

    digests: list[str] = []
    async with connected(secured) as (relay, tunnel), trio.open_nursery() as nursery:
        handler: Callable[[Any], Any] = exchange
        if by == "forward":
            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, host="127.0.0.1"), exchange, 0)
            local = Address("127.0.0.1", listener.socket.getsockname()[1])
            handler = functools.partial(forward, local=local)
        nursery.start_soon(trio.serve_listeners, handler, [tunnel])
        with no_hang():
            async with await relay.visit() as visitor:
                await exchange(visitor)
            await eventually(lambda: len(digests) == 2)
        nursery.cancel_scope.cancel()
    assert digests == [expected, expected]


async def test_the_answer_to_a_visitor_that_has_ended_arrives(secured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    async def handler(stream: TunnelStream) -> None:
        async with stream:
            request = await read_all(stream)
            await stream.send_all(b"answer to " + request)

    async with connected(secured) as (relay, tunnel), in_background(lambda: trio.serve_listeners(handler, [tunnel])):
        with no_hang():
            async with await relay.visit() as visitor:
                assert await ask(visitor, b"request") == b"answer to request"


async def test_a_gateway_that_ends_first_still_hears_the_visitor() -> None:
    async with connected() as (relay, tunnel), await relay.visit() as visitor:
        await visitor.send_all(b"request")
        async with await tunnel.accept() as stream:
            await stream.send_all(b"whole answer")
            await stream.send_eof()
            assert await read_all(visitor) == b"whole answer"
            await visitor.send_all(b" and more")
            await visitor.send_eof()
            assert await read_all(stream) == b"request and more"


async def test_a_last_word_arrives_although_the_visitor_is_still_talking() -> None:
    """A plain close with something unread would be a RST, which takes the last word back."""
    answer = os.urandom(300_000)

    async def handler(stream: TunnelStream) -> None:
        async with stream:
            await stream.receive_some(10)
            await stream.send_all(answer)

    async with (
        connected() as (relay, tunnel),
        in_background(lambda: trio.serve_listeners(handler, [tunnel])),
        await relay.visit() as visitor,
    ):
        await visitor.send_all(bytes(200_000))
        with no_hang():
            assert await read_exactly(visitor, len(answer)) == answer


@every_way
@pytest.mark.parametrize("by", ["stream", "forward", "visitor"])
async def test_a_reset_is_a_reset_at_the_other_end(by: str) -> None:
    async with connected() as (relay, tunnel), trio.open_nursery() as nursery:
        visitor = await relay.visit()
        await visitor.send_all(b"x")
        stream = await tunnel.accept()
        if by == "visitor":
            await abandon(visitor)
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(stream)
            stream.reset()
            return
        if by == "stream":
            stream.reset()
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()
        else:

            async def refuse(local: trio.SocketStream) -> None:
                await local.receive_some()
                await abandon(local)

            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, host="127.0.0.1"), refuse, 0)
            await forward(stream, Address("127.0.0.1", listener.socket.getsockname()[1]))
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)
        await visitor.aclose()
        nursery.cancel_scope.cancel()


async def test_the_stream_keeps_trios_contract() -> None:
    async with trio.open_nursery() as nursery:
        over: list[ChannelStream] = []

        def channel(end: trio.SocketStream) -> ChannelStream:
            return ChannelStream(watch(end), nursery, on_accepted=lambda: None, on_closed=over.append)

        async def make_pair() -> tuple[ChannelStream, ChannelStream]:
            one, other = map(channel, await tcp_pair())
            return one, other

        async def make_clogged_pair() -> tuple[ChannelStream, ChannelStream]:
            ends = await tcp_pair(buffers=4096)
            for end in ends:
                await fill(end)
            one, other = map(channel, ends)
            return one, other

        await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("how", "broken"), [("abandon", True), ("reset", False), ("aclose", False)])
async def test_who_waits_for_a_break_of_a_stream_hears_of_the_end_of_its_session(how: str, broken: bool) -> None:
    near, far = trio.testing.memory_stream_pair()
    heard: list[bool] = []
    async with trio.open_nursery() as nursery:
        stream = ChannelStream(watch(near), nursery, on_accepted=lambda: None, on_closed=lambda stream: None)

        @nursery.start_soon
        async def wait() -> None:
            heard.append(await stream.wait_broken())

        await far.send_all(b"the visitor talks")
        await trio.testing.wait_all_tasks_blocked()
        assert not heard
        if how == "aclose":
            await stream.aclose()
        else:
            getattr(stream, how)()
    assert heard == [broken]
    assert await stream.wait_broken() == broken


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
