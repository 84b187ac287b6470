"""What Trio's byte streams lack for a tunnel: a watch over silence and stalls, bytes put back, a bound.

`WatchedStream` stands directly above a socket (below TLS), so that it sees every byte that moves. `PrefixedStream`
stands on top, and gives what somebody has read already to whoever reads next; `MeteredStream` bounds what a stranger
sends.

Neighbours: `sockets` below; `endings` ends them.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Final, final

import trio

from .endings import send_eof
from .sockets import LentSocket, descriptor_of, raise_unsent_limit

__all__ = [
    "MeteredStream",
    "OneAtATime",
    "PrefixedStream",
    "WatchedStream",
    "receive_into",
    "send_pieces",
]

_PIECE: Final = 64 * 1024
_MOST_PIECES: Final = 64
_BY_DESCRIPTOR: Final = os.name == "posix"


@final
class WatchedStream(trio.abc.HalfCloseableStream):
    """A stream that remembers when its last byte came, and since when a send has made no progress.

    Above a socket it reads and writes the descriptor itself, which costs a third of the way through the layers that
    Trio has for every kind of socket. It is as fair: each call lets other tasks run once.

    Args:
        stream: what to watch; closed with this.

    Attributes:
        last_received: `trio.current_time()` of the last byte that arrived, of the start before that.
        sending_since: when the send that is under way last got rid of a byte; None while there is none. It measures
            the lack of progress, not the time to finish: a slow path is slow, a dead one is dead.
        plain_socket: see the function of that name. What moves past this stream, it does not see.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream: Final = stream
        self.last_received = trio.current_time()
        self.sending_since: float | None = None
        self._calls = 0
        self._socket: Final = stream.socket if _BY_DESCRIPTOR and isinstance(stream, trio.SocketStream) else None
        self.plain_socket: Final = None if self._socket is None else LentSocket(self._socket)
        self._had_to_wait = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._socket is None:
            data = await self.transport_stream.receive_some(max_bytes)
        else:
            data = await _read(self._socket, _PIECE if max_bytes is None else max_bytes)
        self.last_received = trio.current_time()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self.sending_since = trio.current_time()
        try:
            with memoryview(data) as view:
                if self._socket is not None:
                    await self._write_all(self._socket, view)
                    return
                for start in range(0, max(len(view), 1), _PIECE):
                    await self.transport_stream.send_all(view[start : start + _PIECE])
                    self.sending_since = trio.current_time()
        finally:
            self.sending_since = None

    async def _write_all(self, sock: trio.socket.SocketType, data: memoryview) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        descriptor_of(sock)  # also of an empty send
        if sock.did_shutdown_SHUT_WR:
            raise trio.ClosedResourceError("this stream has sent its end")
        position, waited = 0, False
        while position < len(data):
            try:
                position += os.write(descriptor_of(sock), data[position:])
                self.sending_since = trio.current_time()
            except BlockingIOError:
                await self._wait_for_room(sock)
                waited = True
            except OSError as error:
                raise trio.BrokenResourceError(f"the connection is broken: {error.strerror}") from error
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def receive_into(self, buffer: memoryview) -> int:
        """Like `receive_some`, into `buffer`; returns how many bytes came.

        Lets other tasks run only when it has to wait, and at least every eighth time.
        """
        if self._socket is None:
            data = await self.transport_stream.receive_some(len(buffer))
            buffer[: len(data)] = data
            amount = len(data)
        else:
            await trio.lowlevel.checkpoint_if_cancelled()
            amount = await self._brisk(self._socket, trio.lowlevel.wait_readable, os.readv, [buffer])
        self.last_received = trio.current_time()
        return amount

    async def send_pieces(self, pieces: Sequence[bytes]) -> None:
        """Like `send_all` of all `pieces`, without putting them together first.

        Lets other tasks run only when it has to wait, and at least every eighth time.
        """
        if self._socket is None or len(pieces) > _MOST_PIECES:
            await self.send_all(b"".join(pieces))
            return
        if self.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self.sending_since = trio.current_time()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            if self._socket.did_shutdown_SHUT_WR:
                raise trio.ClosedResourceError("this stream has sent its end")
            sent = await self._brisk(self._socket, self._wait_for_room, os.writev, pieces)
            left = sum(map(len, pieces)) - sent
        finally:
            self.sending_since = None
        if left:
            await self.send_all(b"".join(pieces)[-left:])

    async def _brisk(
        self,
        sock: trio.socket.SocketType,
        wait: Callable[[trio.socket.SocketType], Awaitable[None]],
        call: Callable[[int, Any], int],
        argument: object,
    ) -> int:
        while True:
            try:
                amount = call(descriptor_of(sock), argument)
            except BlockingIOError:
                await wait(sock)
                self._calls = 0
                continue
            except OSError as error:
                raise trio.BrokenResourceError(f"the connection is broken: {error.strerror}") from error
            self._calls += 1
            if not self._calls % 8:
                await trio.lowlevel.cancel_shielded_checkpoint()
            return amount

    async def _wait_for_room(self, sock: trio.socket.SocketType) -> None:
        if not self._had_to_wait:
            self._had_to_wait = True
            raise_unsent_limit(sock)
        await trio.lowlevel.wait_writable(sock)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if self.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        await send_eof(self.transport_stream)

    async def aclose(self) -> None:
        if self.plain_socket is not None:
            self.plain_socket.take_back()
        await self.transport_stream.aclose()


async def _read(sock: trio.socket.SocketType, max_bytes: int) -> bytes:
    if max_bytes < 1:
        raise ValueError("max_bytes must be at least 1")
    await trio.lowlevel.checkpoint_if_cancelled()
    waited = False
    while True:
        try:
            data = os.read(descriptor_of(sock), max_bytes)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
            waited = True
        except OSError as error:
            raise trio.BrokenResourceError(f"the connection is broken: {error.strerror}") from error
        else:
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
            return data


@final
class OneAtATime:
    """Tells two tasks that want the same direction of a stream apart, as Trio's own streams do."""

    __slots__ = ("_held", "_message")

    def __init__(self, message: str) -> None:
        self._message = message
        self._held = False

    def __enter__(self) -> None:
        if self._held:
            raise trio.BusyResourceError(self._message)
        self._held = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._held = False


async def receive_into(stream: trio.abc.Stream, buffer: memoryview) -> int:
    """Receive into `buffer`, straight from the socket where possible; returns how many bytes came, 0 at the end."""
    bottom = _watched(stream)
    if bottom is not None:
        return await bottom.receive_into(buffer)
    data = await stream.receive_some(len(buffer))
    buffer[: len(data)] = data
    return len(data)


async def send_pieces(stream: trio.abc.Stream, pieces: Sequence[bytes]) -> None:
    """Send all of `pieces`, in one system call where there is a way."""
    bottom = _watched(stream)
    if bottom is not None:
        await bottom.send_pieces(pieces)
    else:
        await stream.send_all(pieces[0] if len(pieces) == 1 else b"".join(pieces))


def _watched(stream: trio.abc.Stream) -> WatchedStream | None:
    # `type` and not `isinstance`, which takes its time over an abstract base class, for every piece that moves.
    while (type(stream) is PrefixedStream and not stream.prefixed) or (
        type(stream) is MeteredStream and stream.trusted
    ):
        stream = stream.transport_stream
    return stream if type(stream) is WatchedStream else None


@final
class PrefixedStream(trio.abc.HalfCloseableStream):
    """A stream whose first bytes were read already: they come again, then the rest."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        self.transport_stream: Final = stream
        self._prefix = prefix

    @property
    def prefixed(self) -> bool:
        """True while there is something left that was read already."""
        return bool(self._prefix)

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._prefix:
            return await self.transport_stream.receive_some(max_bytes)
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint()
        amount = len(self._prefix) if max_bytes is None else max_bytes
        data, self._prefix = self._prefix[:amount], self._prefix[amount:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await send_eof(self.transport_stream)

    async def aclose(self) -> None:
        self._prefix = b""
        await self.transport_stream.aclose()


@final
class MeteredStream(trio.abc.HalfCloseableStream):
    """A stream whose other end may send only so much, until it is trusted: beyond that the stream is broken.

    Args:
        stream: closed with this.
        allowance: bytes.

    Attributes:
        trusted: to be set when the other end may send as much as it likes.
    """

    def __init__(self, stream: trio.abc.Stream, allowance: int) -> None:
        self.transport_stream: Final = stream
        self.trusted = False
        self._allowance = allowance

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.transport_stream.receive_some(max_bytes)
        self._allowance -= len(data)
        if self._allowance < 0 and not self.trusted:
            raise trio.BrokenResourceError("the other end has sent more than it may before it is trusted")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await send_eof(self.transport_stream)

    async def aclose(self) -> None:
        await self.transport_stream.aclose()
