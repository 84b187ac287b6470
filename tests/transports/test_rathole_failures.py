"""The transports `tcp` and `tls`: each step at which a tunnel fails, and what that means."""

from __future__ import annotations

import ssl
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from rathole_rig import ADDRESS, KEY, a_tunnel
from rig import echo, eventually, no_hang, nothing_left_behind

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
from pioneer_tunnel.testing import Moment, ScriptedPioneerRelay, Trouble, Way, open_pioneer_relay
from pioneer_tunnel.transports.interface import Target
from pioneer_tunnel.transports.rathole.control_channel import RatholeTransport
from pioneer_tunnel.transports.rathole.key_mode import KeyMode
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy
from pioneer_tunnel.tunnel.tunnel import open_tunnel

OPENING = [Moment.HELLO, Moment.ACK]


async def failure(relay: ScriptedPioneerRelay, **changes: Any) -> TunnelError:
    """What one run of the transport over memory ends with."""
    settings: dict[str, Any] = {"key": KEY, "dial": relay.dial, "address": ADDRESS, "connect_timeout": 10.0}
    target = Target(**(settings | changes))

    def deliver(stream: TunnelStream) -> None:
        nursery.start_soon(echo, stream)

    async with trio.open_nursery() as nursery:
        with pytest.raises(TunnelError) as raised:
            await RatholeTransport()(target, deliver, lambda event: None, task_status=trio.TASK_STATUS_IGNORED)
        nursery.cancel_scope.cancel()
    return raised.value


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
