"""The native transport against scripted peers: what each failure is called, and that the key never leaves."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast, final

import attrs
import pytest
import trio
import trio.testing
import trustme
from rig import KEY, RELAY_NAME, eventually, read_until

from pioneer_tunnel._model.addresses import Address, RelayAddress
from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    RelayConnectError,
    RelayResolveError,
    ReplacedError,
    TunnelAuthError,
    TunnelError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.keys import PublicKey, RelayKey, SigningIdentity
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.tls.client import client_tls
from pioneer_tunnel._wire.handshake import SUBPROTOCOL, GatewayHandshake, Rejection, RelayHandshake
from pioneer_tunnel._wire.messages import replaced_text
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.testing.virtual_time import stop_the_clock_for_threads
from pioneer_tunnel.transports import Target
from pioneer_tunnel.transports.interface import Deliver, Draining, Event, Replaced, RoundTrip, Session
from pioneer_tunnel.transports.native import NativeTransport
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.websocket import EngineName, Opening, WebSocket, WebSocketClosed, WebSocketLink, load_engine
from pioneer_tunnel.yamux import Role, YamuxConnection
from pioneer_tunnel.yamux.frames import ACK, RST, SYN, FrameType, encode_header

Peer = Callable[[trio.abc.Stream], Awaitable[object]]

HEADER: Final = ProxyHeader(visitor=Address("203.0.113.7", 4711), local=Address("192.0.2.1", 443), tls=True)
UPGRADED: Final = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"


class Recorder(trio.abc.Stream):
    """A peer's end of a connection that remembers all it was told."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.received = bytearray()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self._stream.receive_some(max_bytes)
        self.received += data
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._stream.aclose()


@final
class Attempt:
    """One run of the transport towards a peer, and what came of it."""

    def __init__(
        self,
        peer: Peer,
        engine: EngineName | None = None,
        address: str = f"ws://{RELAY_NAME}",
        deliver: Deliver | None = None,
    ) -> None:
        self.visitors: list[TunnelStream] = []
        self.events: list[Event] = []
        self.session: Session | None = None
        self.up_at = 0.0
        self.heard = bytearray()
        self.took = 0.0
        self._peer = peer
        self._deliver = deliver or self.visitors.append
        self._transport = NativeTransport(engine=engine)
        self._fields: dict[str, Any] = {"address": RelayAddress.parse(address), "key": KEY}

    async def run(self, *, relay_identity: PublicKey | None = None, **changes: Any) -> TunnelError:
        """Run it to its end; returns what it raised."""
        serve = attrs.evolve(self._transport, relay_identity=relay_identity)
        stop_the_clock_for_threads()
        started = trio.current_time()
        async with trio.open_nursery() as nursery:

            async def dial(host: str, port: int) -> trio.abc.Stream:
                ours, theirs = trio.testing.memory_stream_pair()
                nursery.start_soon(play, Recorder(theirs))
                return ours

            async def play(stream: Recorder) -> None:
                self.heard = stream.received
                try:
                    await self._peer(stream)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass
                finally:
                    await trio.aclose_forcefully(stream)

            with pytest.raises(TunnelError) as raised:
                await serve(
                    Target(**({"dial": dial} | self._fields | changes)),
                    self._deliver,
                    self.events.append,
                    task_status=self,
                )
            self.took = trio.current_time() - started
            nursery.cancel_scope.cancel()
        return raised.value

    def started(self, value: Session | None = None) -> None:
        """As a `trio.TaskStatus`."""
        assert self.session is None
        self.session = value
        self.up_at = trio.current_time()


def relay(
    then: Callable[[WebSocket, YamuxConnection], Awaitable[object]] | None = None,
    *,
    welcome: Callable[[RelayHandshake, WebSocket], Awaitable[object]] | None = None,
    engine: EngineName | None = None,
) -> Peer:
    """A relay: opens, lets the gateway in, runs `then` beside yamux, and leaves with 1001."""

    async def peer(stream: trio.abc.Stream) -> None:
        watched = watch(stream)
        async with load_engine(engine).accept(watched, Opening(subprotocol=SUBPROTOCOL)) as websocket:
            opening = RelayHandshake("relay-1", public_names=[RELAY_NAME])
            if welcome is not None:
                await welcome(opening, websocket)
                return
            await websocket.send([opening.challenge])
            claim = None
            while claim is None:
                for text in await websocket.receive():
                    assert isinstance(text, str)
                    claim = opening.receive(text)
            opening.verify(claim, KEY.identity().public_key)
            await websocket.send(
                [opening.welcome(claim, session="s-1", public_url="http://office.test", heartbeat_ms=15_000)]
            )
            link = WebSocketLink(websocket, watched, lambda text: None)
            connection = YamuxConnection(link, Role.CLIENT, heartbeat=15)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                if then is None:
                    await trio.sleep_forever()
                else:
                    await then(websocket, connection)
                link.close_code, link.close_reason = 1001, "the relay is stopping"
                nursery.cancel_scope.cancel()

    return peer


async def leave(websocket: WebSocket, connection: YamuxConnection) -> None:
    """What a relay does that leaves at once."""
    await trio.lowlevel.checkpoint()


def saying(answer: bytes, *, hold: bool = True) -> Peer:
    """A peer that answers every request in the same way, and then waits or ends."""

    async def peer(stream: trio.abc.Stream) -> None:
        await read_until(stream, b"\r\n\r\n")
        await stream.send_all(answer)
        if hold:
            await trio.sleep_forever()

    return peer


def assert_nothing_secret(heard: bytes | bytearray) -> None:
    """Neither the key nor anything that is made of it."""
    for secret in (KEY.reveal(), KEY.identity().key_id, KEY.identity().public_key.raw.hex(), "proof", "authenticate"):
        assert secret.encode() not in heard


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


async def silent(stream: trio.abc.Stream) -> None:
    while await stream.receive_some():
        pass
    await trio.sleep_forever()


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


# What is no relay


HTML: Final = b"<html><body>Please sign in</body></html>"


async def endless_page(stream: trio.abc.Stream) -> None:
    await read_until(stream, b"\r\n\r\n")
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n")
    while True:
        await stream.send_all(HTML)
        await trio.sleep(1)


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        pytest.param(
            saying(b"HTTP/1.1 302 Found\r\nLocation: http://portal.test/login\r\nContent-Length: 0\r\n\r\n"),
            "redirect.*'http://portal.test/login'.*captive portal",
            id="302",
        ),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(HTML) + HTML),
            "web page.*200.*captive portal",
            id="page",
        ),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\n\r\n" + HTML, hold=False), "web page.*captive portal", id="page to the end"
        ),
        pytest.param(endless_page, "web page.*captive portal", id="page without an end"),
        pytest.param(
            saying(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n28\r\n" + HTML), "web page", id="chunked page"
        ),
        pytest.param(saying(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"), "status 401", id="401"),
        pytest.param(
            saying(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"),
            "404; is this where .*control_addr",
            id="404",
        ),
        pytest.param(saying(b"SSH-2.0-OpenSSH_9.6\r\n"), "does not answer as a WebSocket", id="SSH"),
        pytest.param(saying(b"\x00\x01\x02garbage\xff" * 100), "does not answer as a WebSocket", id="garbage"),
        pytest.param(saying(b"\x15\x03\x01\x00\x02\x02\x46"), "does not answer as a WebSocket", id="TLS alert"),
        pytest.param(saying(b"", hold=False), "broke off|does not answer", id="end"),
        pytest.param(saying(UPGRADED + b"\r\n"), "does not answer as a WebSocket", id="101 without accept"),
        pytest.param(
            saying(UPGRADED + b"Sec-WebSocket-Accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n"),
            "does not answer as a WebSocket",
            id="101 with a wrong accept",
        ),
    ],
)
async def test_what_is_no_relay_is_told_so_and_gets_no_secret(
    engine: EngineName, autojump_clock: trio.testing.MockClock, peer: Peer, told: str
) -> None:
    attempt = Attempt(peer, engine)
    error = await attempt.run()
    assert type(error) is RelayConnectError
    assert re.search(told, str(error))
    assert error.retry_after is None
    assert attempt.session is None
    assert_nothing_secret(attempt.heard)


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [(b"120", 120.0), (b"0", 0.0), (b"Fri, 31 Dec 1999 23:59:59 GMT", None), (b"-5", None), (b"9" * 40, None)],
)
async def test_retry_after_is_heeded(
    engine: EngineName, autojump_clock: trio.testing.MockClock, retry_after: bytes, seconds: float | None
) -> None:
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nretry-after: " + retry_after + b"\r\n\r\n"
    error = await Attempt(saying(answer), engine).run()
    assert "status 503" in str(error)
    assert error.retry_after == seconds


async def test_a_redirect_is_not_followed(engine: EngineName) -> None:
    dialled: list[tuple[str, int]] = []
    answer = b"HTTP/1.1 301 Moved Permanently\r\nLocation: ws://elsewhere.test/\r\n\r\n"

    async def dial(host: str, port: int) -> trio.abc.Stream:
        dialled.append((host, port))
        ours, theirs = trio.testing.memory_stream_pair()
        await theirs.send_all(answer)
        return ours

    await Attempt(silent, engine).run(dial=dial)
    assert dialled == [(RELAY_NAME, 80)]


async def test_a_websocket_that_is_no_relay_is_told_apart(engine: EngineName) -> None:
    async def chat(stream: trio.abc.Stream) -> None:
        request = await read_until(stream, b"\r\n\r\n")
        key = re.search(rb"Sec-WebSocket-Key: (\S+)", request, re.IGNORECASE)
        assert key is not None
        from wsproto.utilities import generate_accept_token

        accept = generate_accept_token(key[1])
        await stream.send_all(UPGRADED + b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        while await stream.receive_some():
            pass

    attempt = Attempt(chat, engine)
    error = await attempt.run()
    assert "not as a relay" in str(error)
    assert_nothing_secret(attempt.heard)


async def test_what_a_peer_says_is_quoted_clean(engine: EngineName) -> None:
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://a\x1b[31m" + b"x" * 2000 + b"\r\n\r\n"
    error = await Attempt(saying(answer), engine).run()
    assert "\x1b" not in str(error)
    assert len(str(error)) < 1000


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def over_tls(peer: Peer, certificate: trustme.LeafCert) -> Peer:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)

    async def secured(stream: trio.abc.Stream) -> None:
        await peer(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    return secured


async def test_wss_with_a_ca_file(engine: EngineName, authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    async def leave_when_up(websocket: WebSocket, connection: YamuxConnection) -> None:
        await eventually(lambda: attempt.session is not None)

    peer = over_tls(relay(leave_when_up), authority.issue_cert(RELAY_NAME))
    attempt = Attempt(peer, engine, f"wss://{RELAY_NAME}")
    error = await attempt.run(make_tls=partial(client_tls, tmp_path / "ca.pem"))
    assert isinstance(error, LinkLostError)
    assert attempt.session == Session(id="s-1", public_url="http://office.test")
    assert_nothing_secret(attempt.heard)


async def test_a_certificate_of_an_unknown_ca_is_refused(engine: EngineName, authority: trustme.CA) -> None:
    attempt = Attempt(over_tls(relay(), authority.issue_cert(RELAY_NAME)), engine, f"wss://{RELAY_NAME}")
    error = await attempt.run()
    assert type(error) is RelayConnectError
    assert re.search(r"not trusted .*self.signed.*ca_file|not trusted .*issuer.*ca_file", str(error))


async def test_a_certificate_of_another_name_is_refused(authority: trustme.CA, tmp_path: Path) -> None:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    attempt = Attempt(over_tls(relay(), authority.issue_cert("other.test")), address=f"wss://{RELAY_NAME}")
    error = await attempt.run(make_tls=partial(client_tls, tmp_path / "ca.pem"))
    assert type(error) is RelayConnectError
    assert re.search(f"another name.*{RELAY_NAME}", str(error))


async def test_tls_towards_a_plain_port(engine: EngineName) -> None:
    async def plain(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    error = await Attempt(plain, engine, f"wss://{RELAY_NAME}").run()
    assert type(error) is RelayConnectError
    assert "does it speak TLS at all?" in str(error)


async def test_plain_towards_a_tls_port(engine: EngineName, authority: trustme.CA) -> None:
    attempt = Attempt(over_tls(relay(), authority.issue_cert(RELAY_NAME)), engine)
    error = await attempt.run()
    assert type(error) is RelayConnectError
    assert "wss://" in str(error)
    assert_nothing_secret(attempt.heard)


async def test_tls_that_ends_in_the_middle_of_its_handshake() -> None:
    async def vanish(stream: trio.abc.Stream) -> None:
        await stream.receive_some()

    error = await Attempt(vanish, address=f"wss://{RELAY_NAME}").run()
    assert type(error) is RelayConnectError
    assert "TLS" in str(error)


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


# While it is up


async def test_what_a_relay_hears_of_us_is_no_secret(engine: EngineName) -> None:
    attempt = Attempt(relay(leave), engine)
    error = await attempt.run()
    assert isinstance(error, LinkLostError)
    assert "1001" in str(error)
    assert "'the relay is stopping'" in str(error)
    assert b'"' + KEY.reveal().encode() not in attempt.heard


async def test_a_link_that_ends_without_a_word_is_lost(engine: EngineName) -> None:
    ended = trio.Event()
    inner = relay()

    async def peer(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inner, stream)
            await eventually(lambda: attempt.session is not None)
            await trio.aclose_forcefully(stream)
            ended.set()
            nursery.cancel_scope.cancel()

    attempt = Attempt(peer, engine)
    assert isinstance(await attempt.run(), LinkLostError)


async def test_a_silent_relay_is_dead_after_two_heartbeats(
    engine: EngineName, autojump_clock: trio.testing.MockClock
) -> None:
    @final
    class Mute(Recorder):
        """What it is given to send gets lost as soon as the gateway is up."""

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            if attempt.session is None:
                await super().send_all(data)

    async def peer(stream: trio.abc.Stream) -> None:
        await relay()(Mute(stream))

    attempt = Attempt(peer, engine)
    error = await attempt.run()
    assert isinstance(error, LinkLostError)
    assert "no byte came for 30 seconds" in str(error)
    assert attempt.took == pytest.approx(30, abs=1)


async def test_a_relay_that_breaks_a_rule_is_told_so_and_left(engine: EngineName) -> None:
    async def blunder(websocket: WebSocket, connection: YamuxConnection) -> None:
        await websocket.send([encode_header(FrameType.WINDOW_UPDATE, SYN, 2, 0)])

    error = await Attempt(relay(blunder), engine).run()
    assert isinstance(error, LinkLostError)
    assert "broke a rule" in str(error)


async def test_draining_and_round_trips_are_reported(engine: EngineName) -> None:
    async def drain(websocket: WebSocket, connection: YamuxConnection) -> None:
        await websocket.send(['{"type":"unknown"}', '{"type":"draining","reconnect_within_ms":2500}'])
        await eventually(lambda: len(attempt.events) >= 2)

    attempt = Attempt(relay(drain), engine)
    await attempt.run()
    assert Draining(2.5) in attempt.events
    assert any(isinstance(event, RoundTrip) and 0 <= event.seconds < 5 for event in attempt.events)


@pytest.mark.parametrize(
    ("by", "kind"), [("ourselves", LinkLostError), ("somebody-else", ReplacedError), ("", ReplacedError)]
)
async def test_being_replaced_is_final_unless_it_was_ourselves(
    engine: EngineName, by: str, kind: type[TunnelError]
) -> None:
    async def replace(websocket: WebSocket, connection: YamuxConnection) -> None:
        await websocket.send([replaced_text(by, "a newer one")])

    attempt = Attempt(relay(replace), engine)
    error = await attempt.run(instance="ourselves")
    assert type(error) is kind
    assert Replaced(by) in attempt.events
    if kind is ReplacedError:
        assert repr(by) in str(error)
        assert error.final


@pytest.mark.parametrize("text", ["{", "[]", '{"type":"draining","reconnect_within_ms":"soon"}', "[" * 10_000])
async def test_a_notice_that_is_none_ends_the_link(engine: EngineName, text: str) -> None:
    async def babble(websocket: WebSocket, connection: YamuxConnection) -> None:
        await websocket.send([text])

    error = await Attempt(relay(babble), engine).run()
    assert isinstance(error, LinkLostError)
    assert "broke a rule" in str(error)


# Visitors


@final
class Visitors:
    """A relay that opens one stream, sends `pieces` on it and tells how it ended."""

    def __init__(self, *pieces: bytes, pause: float = 0) -> None:
        self.pieces = pieces
        self.pause = pause
        self.reset_after: float | None = None

    async def __call__(self, websocket: WebSocket, connection: YamuxConnection) -> None:
        stream = await connection.open_stream()
        started = trio.current_time()
        try:
            for piece in self.pieces:
                await stream.send_all(piece)
                await trio.sleep(self.pause)
            with trio.fail_after(60):
                await stream.receive_some()
        except trio.BrokenResourceError:
            self.reset_after = trio.current_time() - started


async def test_a_visitor_is_delivered_with_what_it_said(engine: EngineName) -> None:
    async def visit(websocket: WebSocket, connection: YamuxConnection) -> None:
        stream = await connection.open_stream()
        await stream.send_all(HEADER.encode() + b"hello")
        await eventually(lambda: bool(attempt.visitors))
        assert await attempt.visitors[0].receive_some(3) == b"hel"
        assert await attempt.visitors[0].receive_some() == b"lo"

    attempt = Attempt(relay(visit), engine)
    await attempt.run()
    (visitor,) = attempt.visitors
    assert visitor.visitor == Address("203.0.113.7", 4711)
    assert visitor.tls is True
    assert visitor.proxy_header == HEADER


@pytest.mark.parametrize("at", [1, 12, 16, len(HEADER.encode()) - 1])
async def test_a_header_in_pieces_is_put_together(autojump_clock: trio.testing.MockClock, at: int) -> None:
    whole = HEADER.encode() + b"hello"

    async def visit(websocket: WebSocket, connection: YamuxConnection) -> None:
        stream = await connection.open_stream()
        await stream.send_all(whole[:at])
        await trio.sleep(4)
        assert not attempt.visitors
        await stream.send_all(whole[at:])
        await trio.sleep(0.1)
        assert await attempt.visitors[0].receive_some() == b"hello"

    attempt = Attempt(relay(visit))
    await attempt.run()
    assert attempt.visitors[0].visitor == HEADER.visitor


async def test_a_late_header_resets_its_stream_after_five_seconds(autojump_clock: trio.testing.MockClock) -> None:
    for pieces in ([b"\r"], [HEADER.encode()[:1], HEADER.encode()[1:2]]):
        visitors = Visitors(*pieces, pause=2)
        attempt = Attempt(relay(visitors))
        await attempt.run()
        assert visitors.reset_after == pytest.approx(5, abs=0.2)
        assert not attempt.visitors


async def test_a_wrong_header_resets_its_stream_at_once(autojump_clock: trio.testing.MockClock) -> None:
    for wrong in (b"GET / HTTP/1.1\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 1 2\r\n", HEADER.encode()[:12] + b"\x31"):
        visitors = Visitors(wrong)
        attempt = Attempt(relay(visitors))
        await attempt.run()
        assert visitors.reset_after is not None
        assert visitors.reset_after < 1
        assert not attempt.visitors


async def test_one_visitors_bad_header_does_not_hold_up_the_next(autojump_clock: trio.testing.MockClock) -> None:
    async def visit(websocket: WebSocket, connection: YamuxConnection) -> None:
        slow = await connection.open_stream()
        await slow.send_all(b"\r\n")
        for _ in range(3):
            stream = await connection.open_stream()
            await stream.send_all(HEADER.encode())
        await trio.sleep(1)
        assert len(attempt.visitors) == 3

    attempt = Attempt(relay(visit))
    await attempt.run()


async def test_a_visitor_that_comes_and_goes_in_one_breath_takes_nobody_along(engine: EngineName) -> None:
    """Found by an attack: its opening and its reset arrived in one read, and ended the whole session."""

    async def visit(websocket: WebSocket, connection: YamuxConnection) -> None:
        came_and_went = encode_header(FrameType.WINDOW_UPDATE, SYN, 101, 0)
        came_and_went += encode_header(FrameType.WINDOW_UPDATE, RST, 101, 0)
        await websocket.send([came_and_went])
        stream = await connection.open_stream()
        await stream.send_all(HEADER.encode() + b"hello")
        await eventually(lambda: bool(attempt.visitors))
        assert await attempt.visitors[0].receive_some() == b"hello"

    attempt = Attempt(relay(visit), engine)
    await attempt.run()
    assert len(attempt.visitors) == 1


@pytest.mark.parametrize("word", ["no JSON", "[" * 5000, "[]", "{}"])
async def test_a_first_word_that_is_no_message_is_told_as_no_relay(word: str) -> None:
    """Found by an attack: it was an unforeseen failure."""
    opening = GatewayHandshake(KEY.identity(), audience="relay.test", service="s")
    with pytest.raises(RelayConnectError, match="first word"):
        opening.receive(word)


async def test_a_visitor_for_whom_there_is_no_room_is_reset(autojump_clock: trio.testing.MockClock) -> None:
    def full(stream: TunnelStream) -> None:
        raise trio.WouldBlock

    visitors = Visitors(HEADER.encode())
    await Attempt(relay(visitors), deliver=full).run()
    assert visitors.reset_after is not None
    assert visitors.reset_after < 1
