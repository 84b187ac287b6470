"""A connection in memory that behaves like TCP, and that a test can slow down, interrupt or cut.

    connection = MemoryConnection()
    connection.client, connection.server    # its two ends: Trio streams with half-close and `reset`
    connection.slow_down(4096)              # bytes a second in each direction
    connection.black_hole()                 # no byte, FIN or RST arrives
    connection.cut()                        # both ends break, as with a RST from the middle

Like TCP: each direction has a bounded buffer, so there is backpressure; closing with unread bytes sends RST, not FIN;
RST drops bytes that are not read yet. Unlike TCP: there is no delay, and a read returns all that is there. There are no
background tasks, and all time is Trio's. `trio.testing.memory_stream_pair` is simpler: its buffer has no bound and it
cannot fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from operator import index
from typing import Final, Literal, final

import trio

from .._model.callbacks import nothing
from .._net.streams import OneAtATime

__all__ = ["MemoryConnection", "MemoryStream"]

DEFAULT_BUFFER: Final = 64 * 1024
_TICK: Final = 0.1
"""Seconds' worth of bytes that a slow connection moves at a time."""

_RESET: Final = "the other end has reset the connection"
_CLOSED: Final = "the other end has closed the connection"
_CUT: Final = "the connection was cut"


@final
class MemoryConnection:
    """Two ends of a connection, and the state of the path between them.

    Args:
        buffer: bytes that one direction holds before `send_all` waits (default 65536).
        on_change: called whenever `whole` changes.

    Attributes:
        client: one end.
        server: the other.
        carried: bytes that have arrived, both directions together.
        bytes_per_second: throughput of each direction; infinity by default.
    """

    def __init__(self, *, buffer: int = DEFAULT_BUFFER, on_change: Callable[[], None] = nothing) -> None:
        if buffer < 1:
            raise ValueError(f"a buffer of {buffer} bytes passes nothing on")
        self.carried: int = 0
        self.bytes_per_second: float = math.inf
        self._on_change: Final = on_change
        self._is_cut = False
        self._cut_at = math.inf
        self._is_black_hole = False
        self._client_hears_nothing = False
        self._swallowed: list[Callable[[], None]] = []
        up, down = _Direction(self, buffer), _Direction(self, buffer)
        self._directions: Final = (up, down)
        self.client: Final = MemoryStream(outgoing=up, incoming=down)
        self.server: Final = MemoryStream(outgoing=down, incoming=up)

    @property
    def whole(self) -> bool:
        """False after a cut, and during a black hole."""
        return not (self._is_cut or self._is_black_hole)

    @property
    def silent(self) -> bool:
        """True during a black hole of a connection that is not cut: neither end gets an error."""
        return self._is_black_hole and not self._is_cut

    def cut(self) -> None:
        """Break both ends at once, as with a RST to both; also during a black hole. A second call does nothing."""
        if not self._is_cut:
            self._is_cut = True
            for direction in self._directions:
                direction.sender_breaks(_CUT)
                direction.receiver_breaks(_CUT)
            self._on_change()

    def cut_after(self, amount: int, *, towards: Literal["client", "server"] | None = None) -> None:
        """Cut after exactly `amount` more bytes have arrived.

        Args:
            amount: bytes.
            towards: the end at which they arrive; None counts both directions together.
        """
        if towards is None:
            self._cut_at = self.carried + amount
        else:
            direction = self._directions[towards == "client"]
            direction.cut_at = direction.carried + amount
        self._cut_if_due()

    def black_hole(self) -> None:
        """Let nothing arrive from now on: no byte, FIN or RST. Bytes that have arrived can still be read."""
        self._is_black_hole = True
        self._on_change()

    def deafen_client(self) -> None:
        """Let nothing arrive at the client from now on, until the connection is cut."""
        self._client_hears_nothing = True

    def heal(self) -> None:
        """End a black hole. All that was sent meanwhile arrives in order, as after TCP retransmissions."""
        self._is_black_hole = False
        swallowed, self._swallowed = self._swallowed, []
        for arrive in swallowed:
            arrive()
        self._on_change()

    def slow_down(self, bytes_per_second: float) -> None:
        """Limit the throughput of each direction; `math.inf` removes the limit.

        Raises:
            ValueError: `bytes_per_second` is not above 0.
        """
        if not bytes_per_second > 0:
            raise ValueError(f"{bytes_per_second} bytes a second is no speed; black_hole() lets nothing through")
        self.bytes_per_second = bytes_per_second

    def _pass_on(self, arrive: Callable[[], None]) -> None:
        if self._is_black_hole:
            self._swallowed.append(arrive)
        else:
            arrive()

    def _most_to_carry(self, direction: _Direction) -> float:
        if self._client_hears_nothing and direction is self._directions[1]:
            return 0
        return min(self._cut_at - self.carried, direction.cut_at - direction.carried)

    def _carry(self, direction: _Direction, amount: int) -> None:
        self.carried += amount
        direction.carried += amount
        self._cut_if_due()

    def _cut_if_due(self) -> None:
        if self.carried >= self._cut_at or any(each.carried >= each.cut_at for each in self._directions):
            self.cut()


@final
class _Direction:
    """One direction: its bytes, and the state of its sender and its receiver.

    Attributes:
        carried: bytes that have arrived.
        cut_at: after so many bytes the connection is cut.
    """

    def __init__(self, connection: MemoryConnection, capacity: int) -> None:
        self.carried: int = 0
        self.cut_at: float = math.inf
        self._connection: Final = connection
        self._capacity: Final = capacity
        self._arrived: Final = bytearray()
        self._under_way = 0
        self._ended = False
        self._sender_broken: str | None = None
        self._receiver_broken: str | None = None
        self._sender_closed = False
        self._receiver_closed = False
        self._changed = trio.Event()

    @property
    def unread(self) -> bool:
        """Whether bytes have arrived that are not read."""
        return bool(self._arrived)

    # Called by the two ends

    async def send(self, data: memoryview) -> None:
        position = 0
        while True:
            self._check_sender()
            if position == len(data):
                return
            most = min(len(data) - position, self._space())
            if not most:
                # No deadline here or below: it is the caller's, as with a socket.
                await self._changed.wait()
                continue
            speed = self._connection.bytes_per_second
            if speed < math.inf:
                most = min(most, max(int(speed * _TICK), 1))
                await trio.sleep(most / speed)
                self._check_sender()
            piece = bytes(data[position : position + most])
            position += most
            self._under_way += most
            self._connection._pass_on(partial(self._bytes_arrive, piece))

    async def wait_for_space(self) -> None:
        while not self._space():
            self._check_sender()
            await self._changed.wait()
        self._check_sender()

    async def receive(self, max_bytes: int | None) -> bytes:
        while True:
            if self._receiver_closed:
                raise trio.ClosedResourceError("this stream was closed")
            if self._arrived:
                data = bytes(self._arrived[:max_bytes])
                del self._arrived[:max_bytes]
                self._wake()
                return data
            if self._receiver_broken is not None:
                raise trio.BrokenResourceError(self._receiver_broken)
            if self._ended:
                return b""
            await self._changed.wait()

    def end(self) -> None:
        """Send FIN."""
        self._connection._pass_on(self._end_arrives)

    def close_sender(self, *, with_reset: bool) -> None:
        self._sender_closed = True
        self._wake()
        if with_reset:
            self._connection._pass_on(partial(self.receiver_breaks, _RESET))
        else:
            self.end()

    def close_receiver(self) -> None:
        self._receiver_closed = True
        self._arrived.clear()
        self._wake()
        self._connection._pass_on(partial(self.sender_breaks, _CLOSED))

    # Events of the path

    def sender_breaks(self, message: str) -> None:
        self._sender_broken = self._sender_broken or message
        self._wake()

    def receiver_breaks(self, message: str) -> None:
        self._receiver_broken = self._receiver_broken or message
        self._arrived.clear()
        self._wake()

    def _bytes_arrive(self, piece: bytes) -> None:
        self._under_way -= len(piece)
        most = min(len(piece), self._connection._most_to_carry(self))
        if self._receiver_broken is None and not self._receiver_closed:
            self._arrived.extend(piece[: int(most)])
        self._wake()
        self._connection._carry(self, int(most))

    def _end_arrives(self) -> None:
        self._ended = True
        self._wake()

    def _space(self) -> int:
        return max(self._capacity - len(self._arrived) - self._under_way, 0)

    def _check_sender(self) -> None:
        if self._sender_closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._sender_broken is not None:
            raise trio.BrokenResourceError(self._sender_broken)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@final
class MemoryStream(trio.abc.HalfCloseableStream):
    """One end of a `MemoryConnection`."""

    def __init__(self, *, outgoing: _Direction, incoming: _Direction) -> None:
        self._outgoing: Final = outgoing
        self._incoming: Final = incoming
        self._sending: Final = OneAtATime("another task is sending on this stream")
        self._receiving: Final = OneAtATime("another task is receiving on this stream")
        self._closed = False
        self._sent_end = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending, memoryview(data) as view:
            await trio.lowlevel.checkpoint()
            self._check_not_ended()
            await self._outgoing.send(view)

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            self._check_not_ended()
            await self._outgoing.wait_for_space()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        with self._receiving:
            await trio.lowlevel.checkpoint()
            return await self._incoming.receive(max_bytes)

    async def send_eof(self) -> None:
        with self._sending:
            await trio.lowlevel.checkpoint()
            if self._closed:
                raise trio.ClosedResourceError("this stream was closed")
            if not self._sent_end:
                self._sent_end = True
                self._outgoing.end()

    def reset(self) -> None:
        """Close with RST. Does not wait."""
        self._close(with_reset=True)

    async def aclose(self) -> None:
        self._close(with_reset=self._incoming.unread)
        await trio.lowlevel.checkpoint()

    def _close(self, *, with_reset: bool) -> None:
        if not self._closed:
            self._closed = True
            self._outgoing.close_sender(with_reset=with_reset)
            self._incoming.close_receiver()

    def _check_not_ended(self) -> None:
        if self._sent_end:
            raise trio.ClosedResourceError("this stream has sent its end")
