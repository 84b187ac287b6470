"""The WebSocket engines: the same promises by either of them, in all four pairings, and towards raw bytes."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final

import attrs
import hostile
import pytest
import trio
import trio.testing
from fuzzing import fuzzed
from hostile import BINARY, CLOSE, CONTINUATION, PING, PONG, RSV1, TEXT
from hypothesis import example, given, strategies as st
from rig import (
    no_hang,
    nothing_left_behind,
    raise_again_and_again,
    read_all,
    read_exactly,
    read_until,
    run_until_it_waits,
    until_it_raises,
)
from stream_link import StreamLink
from yamux_rig import cut

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import UnsupportedTransportError
from pioneer_tunnel._model.exception_groups import lone_error_bare
from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.websocket import (
    ENGINES,
    MAX_BINARY,
    MAX_TEXT,
    Allowance,
    EngineName,
    Opening,
    WebSocket,
    WebSocketClosed,
    WebSocketLink,
    WebSocketRefused,
    load_engine,
)
from pioneer_tunnel.websocket.frame_meter import FRAMES_PER_TURN, FrameMeter
from pioneer_tunnel.websocket.messages import MESSAGE_SIZE, messages_of
from pioneer_tunnel.yamux.frames import LARGEST_FRAME, FrameType, encode_header

Pair = tuple[trio.abc.Stream, trio.abc.Stream]

ADDRESS: Final = RelayAddress.parse("ws://relay.test/path")
OPENING: Final = Opening(subprotocol="test.v1", address=ADDRESS, agent="test/1")
PAIRINGS: Final = list(itertools.product(ENGINES, ENGINES))

each_pairing = pytest.mark.parametrize(("client_engine", "server_engine"), PAIRINGS)


@asynccontextmanager
async def open_pair(
    client_engine: EngineName, server_engine: EngineName, streams: Pair | None = None
) -> AsyncIterator[tuple[WebSocket, WebSocket]]:
    """Two ends of one WebSocket: the client's and the server's."""
    ours, theirs = streams or trio.testing.memory_stream_pair()
    done = trio.Event()

    async def serve(*, task_status: trio.TaskStatus[WebSocket]) -> None:
        async with load_engine(server_engine).accept(theirs, OPENING) as websocket:
            accepted.append(websocket)
            is_accepted.set()
            await done.wait()

    accepted: list[WebSocket] = []
    is_accepted = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve(task_status=trio.TASK_STATUS_IGNORED))
        async with load_engine(client_engine).connect(ours, OPENING) as client:
            await is_accepted.wait()
            yield client, accepted[0]
        done.set()
        nursery.cancel_scope.deadline = trio.current_time() + 1


async def sockets() -> Pair:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return ours, await listener.accept()


async def receive_texts(websocket: WebSocket, count: int) -> list[str]:
    texts: list[str] = []
    while len(texts) < count:
        for message in await websocket.receive():
            assert isinstance(message, str)
            texts.append(message)
    return texts


async def receive_bytes(websocket: WebSocket, amount: int) -> bytes:
    received = bytearray()
    while len(received) < amount:
        for message in await websocket.receive():
            assert not isinstance(message, str)
            received += message
    return bytes(received)


async def receive_close(websocket: WebSocket) -> WebSocketClosed:
    """Take messages until the WebSocket is closed, and tell how it was."""
    with no_hang(), pytest.raises(WebSocketClosed) as closed:
        await until_it_raises(websocket.receive)
    return closed.value


# The opening


@each_pairing
async def test_opening_agrees_on_the_subprotocol(client_engine: EngineName, server_engine: EngineName) -> None:
    async with open_pair(client_engine, server_engine) as (client, server):
        assert client.subprotocol == server.subprotocol == "test.v1"


async def test_the_request_names_host_path_and_agent(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def look() -> None:
        request = (await read_until(theirs, b"\r\n\r\n")).decode().lower()
        assert request.startswith("get /path http/1.1\r\n")
        assert "\r\nhost: relay.test\r\n" in request
        assert "\r\nuser-agent: test/1\r\n" in request
        assert "\r\nsec-websocket-protocol: test.v1\r\n" in request
        assert "sec-websocket-extensions" not in request, "no compression"
        await theirs.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        with pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
            async with load_engine(engine).connect(ours, OPENING):
                pytest.fail("it opened")


@each_pairing
async def test_a_server_without_the_subprotocol_is_told_apart(
    client_engine: EngineName, server_engine: EngineName
) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def serve() -> None:
        try:
            async with load_engine(server_engine).accept(theirs, Opening(subprotocol="other.v1")) as websocket:
                assert websocket.subprotocol is None
                await receive_close(websocket)
        except WebSocketRefused:
            pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        try:
            async with load_engine(client_engine).connect(ours, OPENING) as client:
                assert client.subprotocol is None
                await client.aclose()
        except WebSocketRefused:
            pass  # the server has said so already


async def test_a_connection_that_ends_without_an_answer_is_broken(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await theirs.aclose()
    with no_hang(), pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
        async with load_engine(engine).connect(ours, OPENING):
            pytest.fail("it opened")


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01" + bytes(99)])
async def test_a_client_that_is_none_is_refused(engine: EngineName, said: bytes) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(said)
    await ours.send_eof()
    with no_hang(), pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
        async with load_engine(engine).accept(theirs, OPENING):
            pytest.fail("it opened")


async def test_a_client_that_leaves_when_it_has_asked_is_broken(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()

    async def nobody_is_there() -> None:
        raise trio.BrokenResourceError("the client is gone")

    theirs.send_stream.send_all_hook = nobody_is_there
    request = (
        "GET /path HTTP/1.1\r\nHost: relay.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
        "Sec-WebSocket-Protocol: test.v1\r\n\r\n"
    )
    await ours.send_all(request.encode())
    with no_hang(), pytest.raises(trio.BrokenResourceError):
        async with load_engine(engine).accept(theirs, OPENING) as websocket:
            await until_it_raises(websocket.receive)


@asynccontextmanager
async def raw_server(answer: bytes) -> AsyncIterator[trio.abc.Stream]:
    """The client's stream to a server that answers with these bytes, in which `ACCEPT` stands for the right one."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def serve() -> None:
        request = await read_until(theirs, b"\r\n\r\n")
        key = next(line.split()[1] for line in request.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key"))
        accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        await theirs.send_all(answer.replace(b"ACCEPT", accept))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield ours


SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"


async def test_what_comes_with_the_answer_is_not_lost(engine: EngineName) -> None:
    frames = hostile.frame(TEXT, b"early") + hostile.frame(BINARY, b"bytes")
    answer = SWITCHING + b"Date: today\r\nSec-WebSocket-Accept: ACCEPT\r\n\r\n" + frames
    async with raw_server(answer) as stream, load_engine(engine).connect(stream, OPENING) as client:
        received = list[str | bytes]()
        with no_hang():
            while len(received) < 2:
                received += [each if isinstance(each, str) else bytes(each) for each in await client.receive()]
        assert received == ["early", b"bytes"]
        assert client.date == "today"


@pytest.mark.parametrize("answer", [SWITCHING + b"Sec-WebSocket-Accept: wrong\r\n\r\n", SWITCHING + b"\r\n"])
async def test_a_server_that_does_not_prove_that_it_understands_is_refused(engine: EngineName, answer: bytes) -> None:
    async with raw_server(answer) as stream:
        with no_hang(), pytest.raises(WebSocketRefused):
            async with load_engine(engine).connect(stream, OPENING):
                pytest.fail("it opened")


def test_an_engine_that_is_not_there_is_named() -> None:
    with pytest.raises(UnsupportedTransportError, match="speed"):
        load_engine("another")  # type: ignore[arg-type]
    assert "trio-websocket" in ENGINES


# Messages


@each_pairing
async def test_messages_arrive_in_order_both_ways(client_engine: EngineName, server_engine: EngineName) -> None:
    async with open_pair(client_engine, server_engine) as (client, server):
        for sender, receiver in ((client, server), (server, client)):
            await sender.send(["one", "", "three é \U0001f600"])
            assert await receive_texts(receiver, 3) == ["one", "", "three é \U0001f600"]
            data = [bytes([number]) * (number * 700) for number in range(1, 90)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sender.send, data)
                assert await receive_bytes(receiver, sum(map(len, data))) == b"".join(data)


@each_pairing
async def test_the_largest_messages_are_taken(client_engine: EngineName, server_engine: EngineName) -> None:
    async with open_pair(client_engine, server_engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.send, [bytes(MAX_BINARY)])
        assert await receive_bytes(server, MAX_BINARY) == bytes(MAX_BINARY)
        nursery.start_soon(client.send, ["é" * (MAX_TEXT // 2)])
        assert await receive_texts(server, 1) == ["é" * (MAX_TEXT // 2)]


@each_pairing
@pytest.mark.parametrize(
    "message",
    [bytes(MAX_BINARY + 1), "x" * (MAX_TEXT + 1), "é" * (MAX_TEXT // 2 + 1)],
    ids=["binary", "text", "text, counted in bytes"],
)
async def test_larger_messages_close_with_1009(
    client_engine: EngineName, server_engine: EngineName, message: bytes | str
) -> None:
    for receiving in (0, 1):
        async with open_pair(client_engine, server_engine) as ends, trio.open_nursery() as nursery:
            receiver, sender = ends[receiving], ends[1 - receiving]
            nursery.start_soon(sender.send, [message])

            @nursery.start_soon
            async def hear(sender: WebSocket = sender) -> None:
                assert (await receive_close(sender)).code == 1009

            assert (await receive_close(receiver)).code == 1009
            with trio.move_on_after(1):
                await receiver.aclose()


# Towards raw bytes


frame: Final = functools.partial(hostile.frame, masked=True)


async def read_frame(stream: trio.abc.ReceiveStream) -> tuple[int, bytes]:
    """One unmasked frame that was not fragmented."""
    first, second = await read_exactly(stream, 2)
    assert first & 0xF0 == 0x80
    size = second
    if size == 126:
        size = int.from_bytes(await read_exactly(stream, 2), "big")
    elif size == 127:
        size = int.from_bytes(await read_exactly(stream, 8), "big")
    return first & 0x0F, await read_exactly(stream, size) if size else b""


@asynccontextmanager
async def raw_client(
    engine: EngineName, streams: Pair | None = None, opening: Opening = OPENING
) -> AsyncIterator[tuple[trio.abc.Stream, WebSocket]]:
    """A client made of bytes, after its opening, and the server."""
    ours, theirs = streams or trio.testing.memory_stream_pair()
    key = base64.b64encode(bytes(16))
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def open_it() -> None:
            await ours.send_all(
                b"GET / HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Protocol: other, test.v1\r\n"
                b"Sec-WebSocket-Key: " + key + b"\r\n\r\n"
            )
            answer = await read_until(ours, b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 101")
            assert accept in answer
            opened.set()

        opened = trio.Event()
        async with load_engine(engine).accept(theirs, opening) as server:
            await opened.wait()
            yield ours, server


async def test_fragments_of_a_message_are_joined(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(
            frame(TEXT, b"caf\xc3", fin=False) + frame(PING, b"now?") + frame(CONTINUATION, b"\xa9")
            + frame(BINARY, b"ab", fin=False) + frame(CONTINUATION, b"", fin=False) + frame(CONTINUATION, b"cd")
        )  # fmt: skip
        texts: list[str] = []
        data = b""
        with no_hang():
            while data != b"abcd":
                for message in await server.receive():
                    if isinstance(message, str):
                        texts.append(message)
                    else:
                        data += message
            assert texts == ["café"]
            assert await read_frame(client) == (PONG, b"now?")


async def test_a_long_text_in_fragments_closes_with_1009(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send_all(frame(TEXT, b"x" * 10_000, fin=False) + frame(CONTINUATION, b"x" * 10_000))
            assert (await read_frame(client))[1][:2] == (1009).to_bytes(2, "big")
            await client.send_all(frame(CLOSE, (1009).to_bytes(2, "big")))
            await client.aclose()

        assert (await receive_close(server)).code == 1009


async def test_a_text_in_endless_empty_fragments_is_not_waited_for(engine: EngineName) -> None:
    """Found by an attack: they cost their sender six bytes each, and this end the square of their number."""
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await client.send_all(frame(TEXT, b"", fin=False) + frame(CONTINUATION, b"", fin=False) * 300)
            assert (await read_frame(client))[1][:2] == (1009).to_bytes(2, "big")
            await client.send_all(frame(CLOSE, (1009).to_bytes(2, "big")))
            await client.aclose()

        assert (await receive_close(server)).code == 1009


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (frame(CONTINUATION, b"of nothing"), 1002),
        (frame(3, b"reserved opcode"), 1002),
        (frame(BINARY, b"not masked", masked=False), 1002),
        (frame(CLOSE, b"\x03"), 1002),
        (frame(PING, bytes(126)), 1002),
        (frame(TEXT, b"\xff\xfe"), 1007),
        (frame(BINARY, b"begun", fin=False) + frame(TEXT, b"inside"), 1002),
        (frame(TEXT, b"begun", fin=False) + frame(BINARY, b"inside"), 1002),
    ],
    ids=["continuation", "opcode", "unmasked", "close", "ping", "utf-8", "in binary", "in text"],
)
async def test_what_breaks_a_rule_closes_with_its_code(engine: EngineName, wrong: bytes, code: int) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(wrong)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def look() -> None:
                opcode, payload = await read_frame(client)
                assert (opcode, int.from_bytes(payload[:2], "big")) == (CLOSE, code)
                await client.aclose()

            assert (await receive_close(server)).code == code


async def test_a_ping_is_answered_while_nobody_receives_or_sends(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.receive)
        with no_hang():
            for number in range(5):
                await client.send_all(frame(PING, b"%d" % number))
                assert await read_frame(client) == (PONG, b"%d" % number)
        nursery.cancel_scope.cancel()


async def test_pings_do_not_stop_the_receiver_while_the_writer_is_blocked(engine: EngineName) -> None:
    async with (
        raw_client(engine, trio.testing.lockstep_stream_pair()) as (client, server),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.send, [bytes(100_000)])
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(client.send_all, frame(PING, b"there?") + frame(BINARY, b"more"))
        with no_hang():
            assert await receive_bytes(server, 4) == b"more"
            assert await read_frame(client) == (BINARY, bytes(100_000))
            assert await read_frame(client) == (PONG, b"there?")


async def test_pings_that_nobody_lets_us_answer_are_bounded(engine: EngineName) -> None:
    async with (
        raw_client(engine, trio.testing.lockstep_stream_pair()) as (client, server),
        trio.open_nursery() as nursery,
    ):

        @nursery.start_soon
        async def flood() -> None:
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await until_it_raises(lambda: client.send_all(frame(PING, b"!") * 50))

        assert (await receive_close(server)).code == 1008
        await trio.aclose_forcefully(server)


@pytest.mark.parametrize("small", [frame(CONTINUATION, fin=False), frame(PONG), frame(PONG, b"x" * 125)])
async def test_many_small_frames_leave_others_their_turn(engine: EngineName, small: bytes) -> None:
    """One read may bring 100,000 frames, and the engines parse all that they are given without a pause."""
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        turns = 0

        @nursery.start_soon
        async def others() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        await client.send_all(frame(BINARY, bytes(1024 * 1024 - 10)))  # so that reads are as large as they get
        await receive_bytes(server, 1024 * 1024 - 10)
        before = turns
        await client.send_all(frame(BINARY, fin=False) + small * 10_000 + frame(CONTINUATION, b"the last"))
        assert await receive_bytes(server, 8) == b"the last"
        assert turns - before >= 10_000 // FRAMES_PER_TURN
        nursery.cancel_scope.cancel()


async def test_a_stranger_who_says_little_costs_little(engine: EngineName) -> None:
    """Found by an attack: each connection had a buffer for the largest read, before it had proved anything."""
    async with raw_client(engine) as (_, server):
        tracemalloc.start()
        try:
            async with raw_client(engine) as (_, another):
                assert another is not server
                assert tracemalloc.get_traced_memory()[1] < 200_000
        finally:
            tracemalloc.stop()


# Before the other end is trusted


def stranger(**allowed: int) -> Opening:
    return attrs.evolve(OPENING, allowance=Allowance(**({"size": 24 * 1024, "frames": 16} | allowed)))


@pytest.mark.parametrize(
    "flood",
    [
        frame(PING) * 17,
        frame(PONG) * 17,
        frame(TEXT, b"{}") * 17,
        frame(TEXT, fin=False) + frame(CONTINUATION, fin=False) * 16,
        frame(BINARY, bytes(24 * 1024)),
        frame(PING, bytes(125)) * 400,
    ],
    ids=["pings", "pongs", "texts", "fragments", "bytes", "a read of large pings"],
)
async def test_a_stranger_that_sends_more_than_its_allowance_is_cut_off(engine: EngineName, flood: bytes) -> None:
    async with raw_client(engine, opening=stranger()) as (client, server):
        await client.send_all(flood)
        with no_hang(), pytest.raises(trio.BrokenResourceError) as broken:
            await until_it_raises(server.receive)
        assert not isinstance(broken.value, WebSocketClosed)


async def test_the_size_of_a_message_counts_from_before_the_trust(engine: EngineName) -> None:
    """The library has begun with such a message, and gets the rest of it, too."""
    async with raw_client(engine, opening=stranger()) as (client, server), trio.open_nursery() as nursery:
        await client.send_all(frame(BINARY, b"begun", fin=False))
        assert await receive_bytes(server, 5) == b"begun"
        server.trust()

        @nursery.start_soon
        async def send() -> None:
            await client.send_all(frame(CONTINUATION, bytes(MAX_BINARY // 2), fin=False) * 2)
            assert (await read_frame(client))[1][:2] == (1009).to_bytes(2, "big")
            await client.aclose()

        assert (await receive_close(server)).code == 1009


async def test_a_message_that_began_before_the_trust_has_to_end_before_another_one(engine: EngineName) -> None:
    async with raw_client(engine, opening=stranger()) as (client, server):
        await client.send_all(frame(BINARY, b"begun", fin=False))
        assert await receive_bytes(server, 5) == b"begun"
        server.trust()
        await client.send_all(frame(PING, b"between"))
        with no_hang():
            await server.receive_bytes()
            assert await read_frame(client) == (PONG, b"between")
        await client.send_all(frame(BINARY, b"another"))
        assert (await receive_close(server)).code == 1002


async def test_an_allowance_counts_frames_that_come_with_the_request(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    key = base64.b64encode(bytes(16))
    await ours.send_all(
        b"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Protocol: test.v1\r\nSec-WebSocket-Key: " + key + b"\r\n\r\n" + frame(PONG) * 1000
    )
    # One engine reads on before its request is answered, so it may end in the opening.
    with no_hang(), lone_error_bare(), pytest.raises((trio.BrokenResourceError, WebSocketRefused)):
        async with load_engine(engine).accept(theirs, stranger()) as server:
            await until_it_raises(server.receive)


async def test_a_trusted_end_has_no_allowance(engine: EngineName) -> None:
    async with raw_client(engine, opening=stranger()) as (client, server):
        await client.send_all(frame(TEXT, b"x" * 10_000) + frame(PING) * 15)
        assert await receive_texts(server, 1) == ["x" * 10_000]
        server.trust()
        await client.send_all(frame(BINARY, bytes(100_000)) + frame(BINARY, b"!") * 100)
        assert await receive_bytes(server, 100_100) == bytes(100_000) + b"!" * 100


sizes = st.sampled_from([0, 1, 125, 126, 300, 65_535, 65_536])


@fuzzed()
@given(
    st.lists(st.tuples(sizes, st.booleans()), max_size=100), st.sampled_from([b"\r\n\r\n", b"\n\n", b"\n\r\n"]),
    st.lists(st.integers(0, 1000), max_size=20),
)  # fmt: skip
def test_a_meter_admits_whole_turns_of_frames(parts: list[tuple[int, bool]], end: bytes, places: list[int]) -> None:
    """However reads are cut, the head comes alone, each portion after it begins at most as many frames as a turn may
    have, and all bytes pass.
    """
    frames_of = [hostile.frame(BINARY, bytes(size), masked=masked) for size, masked in parts]
    head = b"GET /" + end
    starts = {len(head) + sum(map(len, frames_of[:number])) for number in range(len(parts))}
    said = head + b"".join(frames_of)
    meter, passed = FrameMeter(), 0
    for piece in cut(said, places):
        until = passed + len(piece)
        while passed < until:
            amount = meter.admit(memoryview(said)[passed:until])
            begun = [start for start in starts if passed <= start < passed + amount]
            assert passed >= len(head) or passed + amount <= len(head)
            passed += amount
            assert passed in {until, len(head)} or len(begun) == FRAMES_PER_TURN
            assert len(begun) <= FRAMES_PER_TURN
    assert passed == len(said)


# One engine is the other's oracle

payloads = st.binary(max_size=8) | st.sampled_from([b"caf\xc3", b"\xa9", b"\xff", bytes(130), b"x" * 70_000])
frames = st.builds(
    hostile.frame,
    st.sampled_from([CONTINUATION, TEXT, BINARY, BINARY, PING, PONG, CLOSE, 3, 11]),
    payloads,
    fin=st.booleans(),
    masked=st.sampled_from([True] * 9 + [False]),
    bits=st.sampled_from([0] * 9 + [RSV1, 0x20]),
)


def what_comes_out(engine: EngineName, data: bytes, places: list[int]) -> tuple[list[str], bytes, bool]:
    """The texts, the bytes, and whether it went wrong, of what follows an opening, cut at `places`."""
    texts: list[str] = []
    received = bytearray()

    async def run() -> bool:
        async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    for piece in cut(data, places):
                        await client.send_all(piece)
                        await trio.testing.wait_all_tasks_blocked()
                    # A text first: a close within a message is an error to one of them, and none to the other.
                    await client.send_all(frame(TEXT, b"over") + frame(CLOSE, (1000).to_bytes(2, "big")))
                    assert isinstance(client, trio.abc.HalfCloseableStream)
                    await client.send_eof()
                    await read_all(client)
                await client.aclose()

            try:
                with no_hang():
                    while True:
                        for message in await server.receive():
                            if isinstance(message, str):
                                texts.append(message)
                            else:
                                received.extend(message)
            except WebSocketClosed as closed:
                return closed.code != 1000
            except trio.BrokenResourceError:
                return True
            finally:
                nursery.cancel_scope.cancel()

    wrong = trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    return texts, bytes(received), wrong


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs the extra 'speed'")
@fuzzed(30)
@given(st.lists(frames | st.binary(max_size=6), max_size=8).map(b"".join), st.lists(st.integers(0, 300), max_size=4))
@example(frame(TEXT, b"caf\xc3", fin=False) + frame(PING) + frame(CONTINUATION, b"\xa9"), [3])
@example(frame(BINARY, b"ab", fin=False) + frame(TEXT, b"within"), [])
@example(frame(BINARY, b"x", bits=RSV1), [1])
def test_both_engines_take_the_same(data: bytes, places: list[int]) -> None:
    """A message that one takes and the other refuses could mean two things to two ends."""
    texts, received, wrong = what_comes_out("websockets", data, places)
    other_texts, other_received, other_wrong = what_comes_out("trio-websocket", data, places)
    assert (texts, wrong) == (other_texts, other_wrong)
    # What has come of a binary message that never ends is handed on by one of them.
    assert received.startswith(other_received)
    assert wrong or received == other_received


# Closing


async def test_what_comes_during_the_closing_is_not_kept(engine: EngineName) -> None:
    """Found by an attack: a peer that was told to go sent 350 MB meanwhile, and all of it was kept."""
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        piece = frame(BINARY, bytes(500_000))

        @nursery.start_soon
        async def go_on() -> None:
            for _ in range(40):
                await client.send_all(piece)
                await trio.testing.wait_all_tasks_blocked()  # until it was read
            await client.send_all(frame(CLOSE, (1002).to_bytes(2, "big")))

        tracemalloc.start()
        try:
            with no_hang():
                await server.close(1002)
            assert tracemalloc.get_traced_memory()[1] < 8_000_000
        finally:
            tracemalloc.stop()


@each_pairing
async def test_close_codes_arrive_both_ways(client_engine: EngineName, server_engine: EngineName) -> None:
    for closing, code, reason in ((0, 1000, ""), (1, 1001, "stopping"), (1, 4001, "replaced"), (0, 1008, "no")):
        async with open_pair(client_engine, server_engine) as ends, trio.open_nursery() as nursery:
            closer, other = ends[closing], ends[1 - closing]
            await closer.send(["the last word"])
            nursery.start_soon(closer.close, code, reason)
            with no_hang():
                assert await receive_texts(other, 1) == ["the last word"]
            closed = await receive_close(other)
            assert (closed.code, closed.reason) == (code, reason)
            with pytest.raises(trio.BrokenResourceError):
                await other.send(["too late"])
            with no_hang():
                await other.aclose()


async def test_an_answered_close_is_not_waited_for_any_longer(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.close, 1000)
        with no_hang():
            assert (await read_frame(client))[0] == CLOSE
            await client.send_all(frame(CLOSE, (1000).to_bytes(2, "big")))
            assert await client.receive_some() == b"", "the connection is closed as well"


@pytest.mark.parametrize("last", [frame(CLOSE, (1000).to_bytes(2, "big")), frame(3, b"reserved opcode")])
async def test_what_comes_after_our_close_frame_does_not_stop_the_closing(engine: EngineName, last: bytes) -> None:
    async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:
        nursery.start_soon(server.close, 1000)
        with no_hang():
            assert (await read_frame(client))[0] == CLOSE
            await client.send_all(frame(PING, b"still there?") + frame(TEXT, b"text") + last)
            assert await client.receive_some() == b"", "the ping is not answered, and the connection is closed"


async def test_a_close_without_a_code_is_1005(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(CLOSE))
        assert (await receive_close(server)).code == 1005


async def test_a_close_can_be_raised_again_and_again(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(CLOSE, (1000).to_bytes(2, "big")))
        with pytest.raises(WebSocketClosed):
            await server.receive()
        await raise_again_and_again(server.receive, WebSocketClosed)
        await raise_again_and_again(lambda: server.send([b"x"]), WebSocketClosed)


async def test_a_close_reason_cannot_forge_a_log_line(engine: EngineName) -> None:
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(CLOSE, (1000).to_bytes(2, "big") + b"a\r\nb\x1b[31m"))
        assert (await receive_close(server)).reason == "a b [31m"


@each_pairing
async def test_a_peer_that_vanishes_is_broken_and_not_closed(
    client_engine: EngineName, server_engine: EngineName
) -> None:
    for resetting in (False, True):
        ours, theirs = await sockets()
        async with open_pair(client_engine, server_engine, (ours, theirs)) as (_, server):
            await (abandon(ours) if resetting else trio.aclose_forcefully(ours))
            with no_hang(), pytest.raises(trio.BrokenResourceError) as broken:
                await server.receive()
            assert not isinstance(broken.value, WebSocketClosed)
            with no_hang():
                await server.aclose()


@each_pairing
async def test_a_cancelled_send_is_good_for_nothing_but_aclose(
    client_engine: EngineName, server_engine: EngineName
) -> None:
    async with open_pair(client_engine, server_engine, await sockets()) as (client, server):
        await run_until_it_waits(lambda: client.send([bytes(MAX_BINARY)] * 32))
        with trio.move_on_after(0.1):
            await client.aclose()
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await until_it_raises(server.receive)


@each_pairing
@pytest.mark.parametrize("how", ["quietly", "cancelled", "raising"])
async def test_leaving_leaves_nothing_behind(client_engine: EngineName, server_engine: EngineName, how: str) -> None:
    with nothing_left_behind(), trio.CancelScope() as scope:
        try:
            async with open_pair(client_engine, server_engine, await sockets()) as (client, _):
                await client.send(["hello"])
                if how == "cancelled":
                    scope.cancel()
                    await trio.sleep_forever()
                if how == "raising":
                    raise ValueError
        except* ValueError:
            pass


@pytest.mark.parametrize("moment", range(12))
async def test_an_opening_cancelled_at_any_checkpoint_leaves_nothing_behind(engine: EngineName, moment: int) -> None:
    streams = await sockets()
    with nothing_left_behind(), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def cancel() -> None:
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            async with open_pair(engine, engine, streams):
                await trio.sleep_forever()
    for stream in streams:
        assert isinstance(stream, trio.SocketStream)
        assert stream.socket.fileno() == -1


# The link


async def test_text_goes_aside_also_inside_a_yamux_frame(engine: EngineName) -> None:
    texts: list[str] = []
    ours, theirs = trio.testing.memory_stream_pair()
    watched = watch(theirs)
    async with raw_client(engine, (ours, watched)) as (client, server):
        link = WebSocketLink(server, watched, texts.append)
        head = encode_header(FrameType.DATA, 0, 1, 3)
        await client.send_all(
            frame(TEXT, b"first") + frame(BINARY, head[:5]) + frame(TEXT, b"second") + frame(BINARY, head[5:] + b"ab")
            + frame(TEXT, b"third") + frame(BINARY, b"c")
        )  # fmt: skip
        received = b""
        with no_hang():
            while len(received) < 15:
                received += b"".join(await link.receive())
        assert received == head + b"abc"
        assert texts == ["first", "second", "third"]
        await link.send([b"x" * 40_000, b"y" * 40_000])
        assert await read_frame(client) == (BINARY, b"x" * 40_000)
        assert await read_frame(client) == (BINARY, b"y" * 40_000)


async def test_a_text_that_raises_comes_out_of_receive(engine: EngineName) -> None:
    def refuse(text: str) -> None:
        raise ValueError(text)

    watched = watch(trio.testing.memory_stream_pair()[0])
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(TEXT, b"replaced"))
        with pytest.raises(ValueError, match="replaced"):
            await WebSocketLink(server, watched, refuse).receive()


async def test_what_came_with_the_handshake_is_received_first(engine: EngineName) -> None:
    """Also by callbacks, which ask the engine only."""
    texts: list[str] = []
    watched = watch(trio.testing.memory_stream_pair()[0])
    async with raw_client(engine) as (client, server):
        await client.send_all(frame(BINARY, b"later"))
        for by_callback in (False, True):
            link = WebSocketLink(server, watched, texts.append, [b"early", "text", b"bytes"])
            assert list(link.receive_nowait() or () if by_callback else await link.receive()) == [b"early", b"bytes"]
        assert b"".join(await link.receive()) == b"later"
    assert texts == ["text"] * 2


async def test_an_offered_text_is_sent_soon(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with raw_client(engine, (ours, theirs)) as (client, server):
        assert server.offer_text("report")
        with no_hang():
            assert await read_frame(client) == (TEXT, b"report")
            await trio.testing.wait_all_tasks_blocked()
            assert server.offer_text("again")
            await server.send_binary([b"bytes"])
            frames = [await read_frame(client), await read_frame(client)]
            assert sorted(frames) == [(TEXT, b"again"), (BINARY, b"bytes")]


async def test_texts_are_not_offered_to_a_peer_that_reads_none(engine: EngineName) -> None:
    """Otherwise they would pile up without a bound."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def never() -> None:
        await trio.sleep_forever()

    async with raw_client(engine, (ours, theirs)) as (_, server):
        theirs.send_stream.send_all_hook = never
        assert server.offer_text("one")
        await trio.testing.wait_all_tasks_blocked()
        taken = [server.offer_text(f"{number}") for number in range(100)]
        assert sum(taken) <= 1


async def test_a_link_closes_with_the_code_that_it_was_given(engine: EngineName) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    watched = watch(theirs)
    async with raw_client(engine, (ours, watched)) as (client, server), trio.open_nursery() as nursery:
        link = WebSocketLink(server, watched, pytest.fail)
        link.close_code, link.close_reason = 4001, "replaced"
        nursery.start_soon(link.aclose)
        assert await read_frame(client) == (CLOSE, (4001).to_bytes(2, "big") + b"replaced")
        await client.aclose()


async def test_a_link_over_a_bare_stream_carries_bytes_both_ways() -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    async with StreamLink(ours) as one, StreamLink(theirs) as other:
        await one.send([b"ab", bytearray(b"c"), memoryview(b"d")])
        assert b"".join(await other.receive()) == b"abcd"
        await one.aclose()
        assert await other.receive() == []


def test_a_message_is_as_large_as_a_frame_of_yamux_that_is_made_for_it() -> None:
    assert MESSAGE_SIZE == LARGEST_FRAME


@given(st.lists(st.integers(1, 3 * MESSAGE_SIZE) | st.integers(1, 500), max_size=20))
def test_pack_joins_and_cuts_within_64_kib(sizes: list[int]) -> None:
    chunks = [bytes([index]) * size for index, size in enumerate(sizes)]
    messages = [b"".join(message) for message, _ in messages_of(chunks)]
    assert b"".join(messages) == b"".join(chunks)
    assert all(0 < len(message) <= MESSAGE_SIZE for message in messages)
    ends = set(itertools.accumulate(map(len, messages)))
    for start, chunk in zip(itertools.accumulate(sizes, initial=0), chunks, strict=False):
        if len(chunk) <= MESSAGE_SIZE:
            assert not any(start < end < start + len(chunk) for end in ends), "a small chunk was cut"
