"""The native transport while the tunnel is up: its end, its notices and its visitors."""

from __future__ import annotations

from typing import final

import pytest
import trio
import trio.testing
from native_rig import HEADER, Attempt, Recorder, leave, relay
from rig import HANG, KEY, eventually

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import LinkLostError, RelayConnectError, ReplacedError, TunnelError
from pioneer_tunnel._wire.handshake import GatewayHandshake
from pioneer_tunnel._wire.messages import replaced_text
from pioneer_tunnel.transports.interface import Draining, Replaced, RoundTrip
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.websocket import EngineName, WebSocket
from pioneer_tunnel.yamux import YamuxConnection
from pioneer_tunnel.yamux.frames import RST, SYN, FrameType, encode_header

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
    assert any(isinstance(event, RoundTrip) and 0 <= event.seconds < HANG for event in attempt.events)


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
