"""What Trio's byte streams lack for a tunnel: a watch over silence and stalls, bytes put back, and abandonment.

`WatchedStream` stands directly above a socket (below TLS), so that it sees every byte that moves. `PrefixedStream`
stands on top, and gives what somebody has read already to whoever reads next. `abandon` ends a connection with a RST.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any, Final, final

import trio

__all__ = ["PrefixedStream", "WatchedStream", "abandon"]

_PIECE: Final = 64 * 1024
_LINGER_NOT: Final = struct.pack("ii", 1, 0)


@final
class WatchedStream(trio.abc.HalfCloseableStream):
    """A stream that remembers when its last byte came, and does not let a send stall for ever.

    Args:
        stream: what to watch; closed with this.
        stall_timeout: how long a send may make no progress, in seconds. It bounds the lack of progress, not the
            time to finish: a slow path is slow, a dead one is dead.

    Attributes:
        last_received: `trio.current_time()` of the last byte that arrived, of the start before that.
    """

    def __init__(self, stream: trio.abc.Stream, *, stall_timeout: float) -> None:
        self.transport_stream: Final = stream
        self.stall_timeout: Final = stall_timeout
        self.last_received = trio.current_time()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.transport_stream.receive_some(max_bytes)
        self.last_received = trio.current_time()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`.

        Raises:
            trio.BrokenResourceError: the connection is gone, or took no byte for `stall_timeout`.
        """
        stream = self.transport_stream
        with memoryview(data) as view:
            position = 0
            while position < len(view):
                with trio.move_on_after(self.stall_timeout) as scope:
                    if isinstance(stream, trio.SocketStream):
                        # A socket tells how much it took, so that progress is seen to the byte.
                        position += await _send_some(stream.socket, view[position:])
                    else:
                        await stream.send_all(view[position : position + _PIECE])
                        position += _PIECE
                if scope.cancelled_caught:
                    raise trio.BrokenResourceError(f"the other end took no byte for {self.stall_timeout:g} seconds")

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if isinstance(self.transport_stream, trio.abc.HalfCloseableStream):
            await self.transport_stream.send_eof()
        else:
            await self.transport_stream.aclose()

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


async def _send_some(sock: trio.socket.SocketType, data: memoryview) -> int:
    try:
        return await sock.send(data)
    except OSError as error:
        if error.errno == errno.EBADF:
            raise trio.ClosedResourceError("this socket was already closed") from None
        raise trio.BrokenResourceError(f"socket connection broken: {error}") from error


@final
class PrefixedStream(trio.abc.HalfCloseableStream):
    """A stream whose first bytes were read already: they come again, then the rest."""

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        self.transport_stream: Final = stream
        self._prefix = prefix

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._prefix:
            return await self.transport_stream.receive_some(max_bytes)
        await trio.lowlevel.checkpoint()
        amount = len(self._prefix) if max_bytes is None else max_bytes
        data, self._prefix = self._prefix[:amount], self._prefix[amount:]
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if isinstance(self.transport_stream, trio.abc.HalfCloseableStream):
            await self.transport_stream.send_eof()
        else:
            await self.transport_stream.aclose()

    async def aclose(self) -> None:
        self._prefix = b""
        await self.transport_stream.aclose()


async def abandon(stream: trio.abc.AsyncResource) -> None:
    """End a connection so that the other end sees a reset, not an orderly end. Quick, also when cancelled.

    A tunnel stream is reset; a socket, however deep below TLS and wrappers, is closed with a RST; anything else is
    closed forcefully.
    """
    innermost: Any = stream
    while not hasattr(innermost, "reset") and hasattr(innermost, "transport_stream"):
        innermost = innermost.transport_stream
    if hasattr(innermost, "reset"):
        innermost.reset()
    elif isinstance(innermost, trio.SocketStream) and innermost.socket.fileno() != -1:
        innermost.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    await trio.aclose_forcefully(stream)
