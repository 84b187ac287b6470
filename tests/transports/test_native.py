"""The native transport against scripted peers: its opening, and that the key never leaves."""

from __future__ import annotations

import socket
from typing import Any, cast

import pytest
import trio
import trio.testing
from native_rig import HEADER, UPGRADED, Attempt, Peer, leave, relay, silent
from rig import KEY, RELAY_NAME, eventually, read_until

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RelayResolveError,
    TunnelAuthError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._wire.handshake import Rejection, RelayHandshake
from pioneer_tunnel.websocket import EngineName, WebSocket, WebSocketClosed
from pioneer_tunnel.yamux.frames import ACK, SYN, FrameType, encode_header


async def test_a_visitor_right_behind_the_welcome_is_not_lost(engine: EngineName) -> None:
    """A gateway used to drop what came in one read with the welcome: the visitor, or the tunnel with it, hung."""

    async def eager(opening: RelayHandshake, websocket: WebSocket) -> None:
        await websocket.send([opening.challenge])
        claim = None
        while claim is None:
            for text in await websocket.receive():
                assert isinstance(text, str)
                claim = opening.receive(text)
        opening.verify(claim, KEY.identity().public_key)
        welcome = opening.welcome(claim, session="s-1", public_url="http://office.test", heartbeat_ms=15_000)
        said = HEADER.encode() + b"hello"
        await websocket.send([welcome, encode_header(FrameType.DATA, SYN, 1, len(said)) + said])
        await eventually(lambda: bool(attempt.visitors))
        assert await attempt.visitors[0].receive_some() == b"hello"

    attempt = Attempt(relay(welcome=eager), engine)
    await attempt.run()
    assert attempt.visitors[0].visitor == HEADER.visitor


# When the tunnel is up


def late_answering(seconds: float) -> Peer:
    """A relay that answers what comes after the welcome only so many seconds later."""

    async def welcome(opening: RelayHandshake, websocket: WebSocket) -> None:
        await websocket.send([opening.challenge])
        claim = None
        while claim is None:
            for text in await websocket.receive():
                assert isinstance(text, str)
                claim = opening.receive(text)
        await websocket.send(
            [opening.welcome(claim, session="s-1", public_url="http://office.test", heartbeat_ms=15_000)]
        )
        (ping,) = await websocket.receive()
        assert not isinstance(ping, str)
        await trio.sleep(seconds)
        await websocket.send([encode_header(FrameType.PING, ACK, 0, int.from_bytes(ping[8:12], "big"))])
        await trio.sleep(3)

    return relay(welcome=welcome)


@pytest.mark.parametrize(("answers_after", "up_after"), [(0.5, 0.5), (2.5, 2.0)])
async def test_the_tunnel_is_up_when_the_relay_counts_the_session(
    engine: EngineName, autojump_clock: trio.testing.MockClock, answers_after: float, up_after: float
) -> None:
    """A relay finds the session for visitors when our ping has come. One that never answers is not waited for."""
    attempt = Attempt(late_answering(answers_after), engine)
    error = await attempt.run()
    assert isinstance(error, LinkLostError)
    assert attempt.session is not None
    assert attempt.up_at == up_after


async def test_a_session_that_ends_before_it_counts_was_never_up(engine: EngineName) -> None:
    attempt = Attempt(relay(leave), engine)
    error = await attempt.run()
    assert isinstance(error, LinkLostError)
    assert attempt.session is None


# Each step has a deadline


async def trickle(stream: trio.abc.Stream) -> None:
    await read_until(stream, b"\r\n\r\n")
    await stream.send_all(UPGRADED)
    while True:
        await stream.send_all(b"X-Later: yes\r\n")
        await trio.sleep(3)


async def never_challenges(opening: RelayHandshake, websocket: WebSocket) -> None:
    await trio.sleep_forever()


async def never_welcomes(opening: RelayHandshake, websocket: WebSocket) -> None:
    await websocket.send([opening.challenge])
    while True:
        await websocket.receive()


async def chatters(opening: RelayHandshake, websocket: WebSocket) -> None:
    """Texts of unknown types are ignored, but they do not buy time."""
    while True:
        await websocket.send(['{"type":"weather","sky":"blue"}'])
        await trio.sleep(2)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        pytest.param(silent, "ws://relay.test", id="HTTP answer"),
        pytest.param(silent, "wss://relay.test", id="TLS"),
        pytest.param(trickle, "ws://relay.test", id="end of the HTTP answer"),
        pytest.param(relay(welcome=never_challenges), "ws://relay.test", id="challenge"),
        pytest.param(relay(welcome=never_welcomes), "ws://relay.test", id="welcome"),
        pytest.param(relay(welcome=chatters), "ws://relay.test", id="chatter"),
    ],
)
async def test_every_step_that_stalls_ends_by_its_deadline(
    engine: EngineName, autojump_clock: trio.testing.MockClock, peer: Peer, address: str
) -> None:
    attempt = Attempt(peer, engine, address)
    error = await attempt.run(connect_timeout=7.0)
    assert type(error) is RelayConnectError
    assert "7 seconds" in str(error)
    assert RELAY_NAME in str(error)
    assert attempt.took == pytest.approx(7, abs=0.1)


async def test_a_connection_that_never_comes_about_ends_by_its_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    error = await Attempt(silent).run(dial=dial)
    assert type(error) is RelayConnectError
    assert "10 seconds" in str(error)


async def test_a_name_that_does_not_resolve_is_told_as_such() -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        raise socket.gaierror(-2, "Name or service not known")

    error = await Attempt(silent).run(dial=dial)
    assert isinstance(error, RelayResolveError)
    assert "'relay.test'" in str(error)


# The opening


async def test_a_key_that_could_be_guessed_is_refused_before_anything_is_dialled() -> None:
    async def dial(host: str, port: int) -> trio.abc.Stream:
        pytest.fail("it dialled")

    error = await Attempt(silent).run(key=RelayKey("nineteen-characters"), dial=dial)
    assert isinstance(error, InvalidSettingsError)
    assert "nineteen" not in str(error)


async def test_an_engine_that_is_not_installed_is_named() -> None:
    error = await Attempt(silent, cast("Any", "other")).run()
    assert isinstance(error, UnsupportedTransportError)


async def test_binary_before_the_welcome_is_refused_with_1002(engine: EngineName) -> None:
    codes: list[int] = []

    async def blurt(opening: RelayHandshake, websocket: WebSocket) -> None:
        await websocket.send([b"\0" * 12])
        try:
            while True:
                await websocket.receive()
        except WebSocketClosed as closed:
            codes.append(closed.code)

    error = await Attempt(relay(welcome=blurt), engine).run()
    assert type(error) is RelayConnectError
    assert "before it said welcome" in str(error)
    assert codes == [1002]


@pytest.mark.parametrize(
    ("rejection", "kind"),
    [
        (Rejection("auth_failed", "no"), TunnelAuthError),
        (Rejection("service_unknown", "no"), InvalidSettingsError),
        (Rejection("wrong_audience", "no"), InvalidSettingsError),
        (Rejection("busy", "later", retry_after_ms=5000), RelayConnectError),
    ],
    ids=lambda value: getattr(value, "reason", ""),
)
async def test_a_rejection_is_raised_as_what_it_means(
    engine: EngineName, rejection: Rejection, kind: type[TunnelError]
) -> None:
    async def reject(opening: RelayHandshake, websocket: WebSocket) -> None:
        await websocket.send([opening.challenge])
        await websocket.receive()
        await websocket.send([rejection.text])
        await websocket.close(1008, rejection.reason)

    error = await Attempt(relay(welcome=reject), engine).run()
    assert type(error) is kind
    assert error.retry_after == (5.0 if rejection.reason == "busy" else None)


async def test_a_close_during_the_opening_names_its_code(engine: EngineName) -> None:
    async def close(opening: RelayHandshake, websocket: WebSocket) -> None:
        await websocket.close(1013, "try again later")

    error = await Attempt(relay(welcome=close), engine).run()
    assert type(error) is RelayConnectError
    assert "1013" in str(error)
    assert "'try again later'" in str(error)


async def test_a_relay_that_cannot_prove_the_pinned_identity_is_refused(engine: EngineName) -> None:
    error = await Attempt(relay(), engine).run(relay_identity=SigningIdentity.generate().public_key)
    assert type(error) is RelayConnectError
    assert "pinned" in str(error)
