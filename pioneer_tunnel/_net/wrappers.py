"""What Trio's byte streams lack for a tunnel: a watch over silence and stalls, bytes put back.

What `watch` makes stands at the bottom (below TLS), so that it sees every byte that moves. `PrefixedStream` stands on
top, and gives what somebody has read already to whoever reads next.

Neighbours: `tcp_stream` is the bottom over a socket; `endings` ends them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Final, TypeAlias, final

import trio

from .closing import send_eof
from .tcp import CAN_USE_DESCRIPTORS, TcpStream

__all__ = [
    "OneAtATime",
    "PrefixedStream",
    "Watched",
    "WatchedStream",
    "receive_into",
    "send_pieces",
    "watch",
]

_PIECE: Final = 64 * 1024


@final
class WatchedStream(trio.abc.HalfCloseableStream):
    """Any other stream than a socket's, and a watch over silence and stalls, like a `TcpStream`'s.

    Args:
        stream: what to watch; closed with this.

    Attributes:
        last_received, sending_since: see `TcpStream`.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream: Final = stream
        self.last_received = trio.current_time()
        self.sending_since: float | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.transport_stream.receive_some(max_bytes)
        self.last_received = trio.current_time()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self.sending_since = trio.current_time()
        try:
            with memoryview(data) as view:
                for start in range(0, max(len(view), 1), _PIECE):
                    await self.transport_stream.send_all(view[start : start + _PIECE])
                    self.sending_since = trio.current_time()
        finally:
            self.sending_since = None

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if self.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        await send_eof(self.transport_stream)

    async def aclose(self) -> None:
        await self.transport_stream.aclose()


Watched: TypeAlias = TcpStream | WatchedStream
"""What stands at the bottom of a connection."""


def watch(stream: trio.abc.Stream, *, resets: bool = False) -> Watched:
    """What watches `stream`, and stands in for it; a socket's own stream is not to be used any more.

    Args:
        resets: of a socket's own stream, see `LentSocket`.
    """
    if CAN_USE_DESCRIPTORS and isinstance(stream, trio.SocketStream):
        return TcpStream(stream.socket, resets=resets)
    return WatchedStream(stream)


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
    bottom = _tcp_below(stream)
    if bottom is not None:
        return await bottom.receive_into(buffer)
    data = await stream.receive_some(len(buffer))
    buffer[: len(data)] = data
    return len(data)


async def send_pieces(stream: trio.abc.Stream, pieces: Sequence[bytes]) -> None:
    """Send all of `pieces`, in one system call where there is a way."""
    bottom = _tcp_below(stream)
    if bottom is not None:
        await bottom.send_pieces(pieces)
    else:
        await stream.send_all(pieces[0] if len(pieces) == 1 else b"".join(pieces))


def _tcp_below(stream: trio.abc.Stream) -> TcpStream | None:
    # `type` and not `isinstance`, which takes its time over an abstract base class, for every piece that moves.
    while type(stream) is PrefixedStream and not stream.prefixed:
        stream = stream.transport_stream
    return stream if type(stream) is TcpStream else None


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
