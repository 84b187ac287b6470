"""The border between Trio's streams and ours: a stream of another class gets the interface of `ByteStream` here.

A connected socket becomes a `TcpStream`. Anything else, such as the stream of a host's own dialer, is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias, final

import trio
from trio.abc import HalfCloseableStream

from .closing import abandon, bottom_of, send_eof
from .delivery import Delivery
from .lent_socket import LentSocket
from .socket_options import delivery_of, limit_unsent, means_loss, wait_sent
from .streams import Bytes, ByteStream, Nowait
from .tcp import CAN_USE_DESCRIPTORS, TcpStream

__all__ = ["AdoptedStream", "Watched", "WatchedStream", "adopt", "watch"]

_PIECE: Final = 64 * 1024

_RESET_REPORT_TIMEOUT: Final = 0.05
"""Seconds that an EOF waits for a send under way, see `AdoptedStream.receive_some`. Mostly it is one step of Trio."""


class AdoptedStream(ByteStream):
    """Any Trio stream, behind our interface.

    Args:
        stream: closed with this.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.transport_stream: Final = stream
        bottom = bottom_of(stream)
        self._ours: Final = bottom if isinstance(bottom, ByteStream) else None
        self._socket: Final = LentSocket(bottom.socket) if isinstance(bottom, trio.SocketStream) else None
        self._sending = False
        self._sent: Final = trio.lowlevel.ParkingLot()
        self._was_lost = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await self.transport_stream.receive_some(max_bytes)
        if not data:
            # The kernel reports a loss once. If a send gets the report, a receive gets EOF, and a truncated answer
            # would look complete. A send of Trio's own streams raises one step after it got the report.
            if self._sending:
                with trio.move_on_after(_RESET_REPORT_TIMEOUT):
                    await self._sent.park()
            if self._was_lost:
                raise trio.BrokenResourceError("the connection was lost")
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending = True
        try:
            await self._send(data)
        except trio.BrokenResourceError as error:
            self._was_lost |= means_loss(error.__cause__)
            raise
        finally:
            self._sending = False
            self._sent.unpark_all()

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this stream")
        await send_eof(self.transport_stream)

    async def aclose(self) -> None:
        await self.transport_stream.aclose()

    async def abort(self) -> None:
        await abandon(self.transport_stream)

    async def wait_flushed(self) -> None:
        if self._ours is not None:
            await self._ours.wait_flushed()
        elif self._socket is not None:
            await wait_sent(self._socket.socket)

    async def wait_broken(self) -> bool:
        return await (super().wait_broken() if self._ours is None else self._ours.wait_broken())

    @property
    def can_half_close(self) -> bool:
        stream = self.transport_stream
        return stream.can_half_close if isinstance(stream, ByteStream) else isinstance(stream, HalfCloseableStream)

    @property
    def lowest_socket(self) -> LentSocket | None:
        return self._socket if self._ours is None else self._ours.lowest_socket


@final
class WatchedStream(AdoptedStream):
    """An adopted stream that measures silence and stalls, as `TcpStream` does.

    Attributes:
        last_received, sending_since: see `TcpStream`.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        super().__init__(stream)
        self.last_received = trio.current_time()
        self.sending_since: float | None = None
        self._nowait: Nowait | None = None  # of the stream, while it is watched

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        data = await super().receive_some(max_bytes)
        self.last_received = trio.current_time()
        return data

    def watch(self, on_readable: Callable[[], object]) -> Nowait | None:
        stream = self.transport_stream
        self._nowait = stream.watch(on_readable) if isinstance(stream, ByteStream) else None
        return None if self._nowait is None else self

    drained: Final = False

    def unwatch(self) -> None:
        if self._nowait is not None:
            self._nowait.unwatch()
            self._nowait = None

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        if self._nowait is None:
            raise trio.ClosedResourceError("this stream was closed")
        amount = self._nowait.receive_into_nowait(buffer)
        if amount is not None:
            self.last_received = trio.current_time()
        return amount

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        if self._nowait is None or self._sending:
            return [*pieces]
        return self._nowait.send_nowait(pieces)

    def delivery(self) -> Delivery | None:
        """See `TcpStream.delivery`."""
        return None if self._socket is None else delivery_of(self._socket.socket)

    def outlast(self, seconds: float) -> None:
        """See `TcpStream.outlast`. It changes nothing here."""

    @property
    def window_left(self) -> int:
        """See `TcpStream.window_left`."""
        return 0

    def expect_bulk(self) -> None:
        """See `TcpStream.expect_bulk`. It changes nothing here."""

    def limit_unsent(self, limit: int) -> None:
        """See `TcpStream.limit_unsent`. Changes nothing where there is no socket of Trio's at the bottom."""
        if self._socket is not None:
            limit_unsent(self._socket.socket, limit)

    has_room: Final = True
    """See `TcpStream.has_room`."""

    async def wait_room(self) -> None:
        """See `TcpStream.wait_room`. Here it never waits."""

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        self.sending_since = trio.current_time()
        try:
            with memoryview(data) as view:
                for start in range(0, max(len(view), 1), _PIECE):
                    await self.transport_stream.send_all(view[start : start + _PIECE])
                    self.sending_since = trio.current_time()
        finally:
            self.sending_since = None


Watched: TypeAlias = TcpStream | WatchedStream
"""The lowest stream of a connection. It sees every byte that moves, so it measures silence and stalls."""


def watch(stream: trio.abc.Stream, *, resets: bool = False) -> Watched:
    """Measure silence and stalls of `stream`. Use only the result from then on.

    Args:
        resets: whether a socket's SO_LINGER is set already, see `LentSocket`.
    """
    if CAN_USE_DESCRIPTORS and isinstance(stream, trio.SocketStream):
        return TcpStream(stream.socket, resets=resets)
    return stream if isinstance(stream, TcpStream | WatchedStream) else WatchedStream(stream)


def adopt(stream: trio.abc.Stream) -> ByteStream:
    """`stream` behind our interface; itself if it has that already. Use only the result from then on."""
    if isinstance(stream, ByteStream):
        return stream
    return watch(stream) if isinstance(stream, trio.SocketStream) else AdoptedStream(stream)
