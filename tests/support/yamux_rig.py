"""yamux frames made by hand, pipes of any width, and two connections at the ends of one, for the tests of `yamux`."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, NamedTuple, TypeAlias, final

import trio
from rig import eventually
from stream_link import StreamLink

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel.yamux import Limits, Role, YamuxConnection, YamuxStream
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND
from pioneer_tunnel.yamux.frames import ACK, SYN, Buffer, FrameDecoder, FrameType, GoAwayCode, Header, encode_header

DATA, WINDOW_UPDATE, PING, GO_AWAY = FrameType
KIB: Final = 1024
NEVER: Final = 1e6
"""A heartbeat that does not disturb a test on something else."""

FULL: Final = INITIAL_WINDOW + SEND_BOUND
"""What a stream takes before a send waits, when the other end reads nothing."""

# Frames


class Frame(NamedTuple):
    """A frame as a whole."""

    type: int
    flags: int
    stream_id: int
    length: int
    body: bytes = b""


GOODBYE: Final = Frame(GO_AWAY, 0, 0, GoAwayCode.NORMAL)


def data(stream_id: int, body: bytes = b"", flags: int = 0) -> bytes:
    return encode_header(DATA, flags, stream_id, len(body)) + body


def update(stream_id: int, flags: int = 0, credit: int = 0) -> bytes:
    return encode_header(WINDOW_UPDATE, flags, stream_id, credit)


def ping(opaque: int, flags: int = SYN) -> bytes:
    return encode_header(PING, flags, 0, opaque)


def go_away(code: int) -> bytes:
    return encode_header(GO_AWAY, 0, 0, code)


def inside_a_frame(decoder: FrameDecoder) -> bool:
    """Whether the bytes so far end inside a frame."""
    return bool(decoder._partial) or decoder.body_left > 0


def parse(chunks: Iterable[Buffer]) -> list[Frame]:
    """The frames in `chunks`, which end with a whole one."""
    decoder, frames = FrameDecoder(), list[Frame]()
    for item in decoder.receive_data(b"".join(chunks)):
        if isinstance(item, Header):
            frames.append(Frame(*item))
        else:
            frames[-1] = frames[-1]._replace(body=frames[-1].body + item)
    assert not inside_a_frame(decoder)
    return frames


def one_by_one(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """`data` cut at `places`, each taken modulo its length; neighbouring cuts leave empty chunks."""
    borders = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(borders)]


# Pipes


@final
class Pipe:
    """One direction: what is sent waits in a buffer of `capacity` bytes, and is received in pieces of any size.

    Args:
        capacity: how many bytes may wait.
        dice: cuts what is received; without it, all that waits comes at once.

    Attributes:
        allowance: how many bytes the pipe still takes before it is stuck; tests change it (`allow`).
        record: where a test wants everything that the pipe takes written down.
    """

    def __init__(self, capacity: int, dice: random.Random | None = None) -> None:
        self.allowance: float = float("inf")
        self.record: bytearray | None = None
        self._capacity: Final = capacity
        self._dice: Final = dice
        self._waiting = bytearray()
        self._send_closed = self._receive_closed = self._broken = False
        self._changed: Final = trio.lowlevel.ParkingLot()

    @property
    def closed(self) -> bool:
        """Whether nobody will receive any more."""
        return self._receive_closed

    def allow(self, amount: float) -> None:
        self.allowance = amount
        self._changed.unpark_all()

    def break_(self) -> None:
        """What a lost connection does: both ends get `trio.BrokenResourceError`."""
        self._broken = True
        self._changed.unpark_all()

    async def send_all(self, data: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        rest = memoryview(data)
        while rest:
            if self._send_closed:
                raise trio.ClosedResourceError("closed at this end")
            if self._receive_closed or self._broken:
                raise trio.BrokenResourceError("nobody receives")
            room = int(min(self._capacity - len(self._waiting), len(rest), self.allowance))
            if room > 0:
                self._waiting += rest[:room]
                if self.record is not None:
                    self.record += rest[:room]
                self.allowance -= room
                rest = rest[room:]
                self._changed.unpark_all()
            else:
                await self._changed.park()

    async def wait_send_all_might_not_block(self) -> None:
        while len(self._waiting) >= self._capacity and not self._receive_closed:
            await self._changed.park()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._receive_closed:
                raise trio.ClosedResourceError("closed at this end")
            if self._broken:
                raise trio.BrokenResourceError("the connection is lost")
            if self._send_closed:
                return b""
            await self._changed.park()
        amount = min(len(self._waiting), max_bytes or len(self._waiting))
        if self._dice is not None:
            amount = self._dice.randint(1, amount)
        received = bytes(self._waiting[:amount])
        del self._waiting[:amount]
        self._changed.unpark_all()
        return received

    def close_sending(self) -> None:
        self._send_closed = True
        self._changed.unpark_all()

    def close_receiving(self) -> None:
        self._receive_closed = True
        self._changed.unpark_all()


@final
class PipeEnd(trio.abc.Stream):
    """One end of two pipes."""

    def __init__(self, outbound: Pipe, inbound: Pipe) -> None:
        self.outbound: Final = outbound
        self.inbound: Final = inbound

    async def send_all(self, data: Buffer) -> None:
        await self.outbound.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.outbound.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.inbound.receive_some(max_bytes)

    async def aclose(self) -> None:
        self.outbound.close_sending()
        self.inbound.close_receiving()
        await trio.lowlevel.checkpoint()


Ends: TypeAlias = tuple[trio.abc.Stream, trio.abc.Stream]


def pipe(capacity: int = 1024 * KIB, dice: random.Random | None = None) -> tuple[PipeEnd, PipeEnd]:
    """Two ends of a connection in memory."""
    there, back = Pipe(capacity, dice), Pipe(capacity, dice)
    return PipeEnd(there, back), PipeEnd(back, there)


async def sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a TCP connection on loopback."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        near = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        return near, await listener.accept()


# Connections


@final
class Running:
    """A connection that runs, until it is cancelled or ends.

    Attributes:
        arrivals: the streams that the peer has opened, not accepted yet.
        ending: what `run` raised, if it was not cancelled.
        task: the one that runs it.
    """

    def __init__(self, stream: trio.abc.Stream, role: Role, *, heartbeat: float = 15.0, **options: Any) -> None:
        self._to_arrivals, self.arrivals = trio.open_memory_channel[YamuxStream](2000)
        self.round_trips: Final[list[float]] = []
        self.task: trio.lowlevel.Task | None = None
        self.ended: Final = trio.Event()
        self.ending: BaseException | None = None
        self.scope: Final = trio.CancelScope()
        options = {"on_stream": self._to_arrivals.send_nowait, "on_round_trip": self.round_trips.append} | options
        self.link: Final = StreamLink(stream)
        self.connection: Final = YamuxConnection(self.link, role, heartbeat=heartbeat, **options)
        self.session: Final = self.connection.session

    async def run(self) -> None:
        self.task = trio.lowlevel.current_task()
        try:
            with self.scope:
                await self.connection.run()
        except (RemoteProtocolError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.ending = error
        self.ended.set()

    async def open(self) -> YamuxStream:
        return await self.connection.open_stream()

    async def accept(self) -> YamuxStream:
        stream = await self.arrivals.receive()
        stream.acknowledge()
        return stream

    async def serve_echo(self) -> None:
        """Echo what comes on each stream that the peer opens, until cancelled. The peer may reset it."""

        async def serve(stream: YamuxStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await echo(stream)

        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(serve, await self.accept())


class Two(NamedTuple):
    """A client and a server, connected with each other."""

    client: Running
    server: Running

    async def stream(self) -> tuple[YamuxStream, YamuxStream]:
        """Two ends of a stream that the client has opened."""
        near = await self.client.open()
        return near, await self.server.accept()

    async def settle(self) -> None:
        """Wait until neither end has a stream left."""
        await eventually(lambda: not (self.client.session.live_streams or self.server.session.live_streams))


@contextlib.asynccontextmanager
async def two(
    ends: Ends,
    *,
    limits: Limits | None = None,
    heartbeat: float = 15.0,
    on_doubt: Callable[[float], bool] | None = None,
) -> AsyncIterator[Two]:
    """A client and a server at `ends`; they are cancelled in the end, and leave nothing behind.

    As a gateway, only the server has doubts.
    """
    both = Two(
        Running(ends[0], Role.CLIENT, limits=limits, heartbeat=heartbeat),
        Running(ends[1], Role.SERVER, limits=limits, heartbeat=heartbeat, on_doubt=on_doubt),
    )
    async with trio.open_nursery() as nursery:
        for running in both:
            nursery.start_soon(running.run)
        yield both
        for running in both:
            running.scope.cancel()


@final
class HandmadePeer:
    """The other end of a connection, which says what a test wants it to say."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream: Final = stream
        self._items: Final[deque[Header | memoryview]] = deque()
        self._decoder: Final = FrameDecoder()

    async def say(self, *frames: bytes) -> None:
        await self.stream.send_all(b"".join(frames))

    async def hear(self) -> Frame | None:
        """The next frame, with its body; None when the other end has closed the connection after a whole one."""
        frame: Frame | None = None
        while frame is None or (frame.type == DATA and len(frame.body) < frame.length):
            item = await self._next()
            if item is None:
                assert frame is None, "the connection ended inside a frame"
                return None
            if isinstance(item, Header):
                frame = Frame(*item)
            else:
                assert frame is not None
                frame = frame._replace(body=frame.body + item)
        return frame

    async def hear_ping(self) -> Frame:
        """The next frame, which is a ping."""
        frame = await self.hear()
        assert frame is not None
        assert (frame.type, frame.flags) == (PING, SYN)
        return frame

    async def hear_all(self) -> list[Frame]:
        """Every frame until the other end closes the connection."""
        frames = []
        while frame := await self.hear():
            frames.append(frame)
        return frames

    async def _next(self) -> Header | memoryview | None:
        while not self._items:
            received = await self.stream.receive_some(64 * KIB)
            if not received:
                assert not inside_a_frame(self._decoder), "the connection ended inside a frame"
                return None
            self._items.extend(self._decoder.receive_data(received))
        return self._items.popleft()


@contextlib.asynccontextmanager
async def one(ends: Ends, role: Role = Role.SERVER, **options: Any) -> AsyncIterator[tuple[Running, HandmadePeer]]:
    """A connection at one end, a hand-made peer at the other."""
    running = Running(ends[0], role, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(running.run)
        yield running, HandmadePeer(ends[1])
        running.scope.cancel()
    await ends[1].aclose()


@contextlib.asynccontextmanager
async def pair(ends: Ends | None = None) -> AsyncIterator[tuple[YamuxStream, YamuxStream, Two]]:
    """Two ends of a stream, and the connections that carry it."""
    async with two(ends or pipe(), heartbeat=NEVER) as both:
        near, far = await both.stream()
        yield near, far, both


@contextlib.asynccontextmanager
async def accepted(ends: Ends | None = None) -> AsyncIterator[tuple[YamuxStream, HandmadePeer]]:
    """A stream that a hand-made peer has opened; what it hears next is about this stream."""
    async with one(ends or pipe(), heartbeat=NEVER) as (running, peer):
        await peer.hear_ping()
        await peer.say(update(1, SYN))
        stream = await running.accept()
        assert await peer.hear() == Frame(WINDOW_UPDATE, ACK, 1, 0)
        yield stream, peer


# What streams carry


def body(size: int, seed: int = 0) -> bytes:
    """`size` bytes, the same for the same `seed`."""
    return random.Random(seed).randbytes(size)


async def echo(stream: YamuxStream) -> None:
    async with stream:
        while received := await stream.receive_some():
            await stream.send_all(received)


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything up to the end; a reset raises `trio.BrokenResourceError`."""
    received = bytearray()
    while some := await stream.receive_some(64 * KIB):
        received += some
    return bytes(received)


async def send_and_end(stream: YamuxStream, body: bytes) -> None:
    await stream.send_all(body)
    await stream.send_eof()


async def ask(stream: YamuxStream, body: bytes) -> bytes:
    """Send `body` and an end while the whole answer is read, as an echo needs it."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_and_end, stream, body)
        return await read_all(stream)


async def answer_correctly(stream: YamuxStream, question: bytes) -> None:
    """Ask an echo at the other end."""
    async with stream:
        assert await ask(stream, question) == question
