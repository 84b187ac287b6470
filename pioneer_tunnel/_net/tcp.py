"""A TCP connection that is read and written by its descriptor. POSIX only.

It does what a `trio.SocketStream` does, without the layers of `trio.socket`, which support every kind of socket and
system. A read or write takes a third of the time, and a new connection five sixths. The contract is the same, and as
fair: calls let other tasks run. `tcp_socket` has what does not wait.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Final, final

import trio

from .delivery import Delivery
from .fastpath.event_loop import CAN_WATCH, Reactor
from .fastpath.socket_leg import SocketLeg
from .lent_socket import LentSocket
from .socket_options import (
    UNSENT_LIMIT,
    Socket,
    delivery_of,
    descriptor_of,
    forget_round_trip,
    limit_unsent,
    outlast_silence,
    resend_within,
    unsent,
    wait_sent,
)
from .streams import Bytes, ByteStream
from .tcp_socket import MOST_PIECES, TcpSocket

__all__ = ["CAN_USE_DESCRIPTORS", "TcpStream"]

CAN_USE_DESCRIPTORS: Final = sys.platform != "win32"
"""Whether sockets of this system can be read and written like files."""

_PIECE: Final = 64 * 1024


@final
class TcpStream(ByteStream):
    """A TCP connection that measures silence and stalls.

    One task may send and one may receive at a time; a second one gets `trio.BusyResourceError`.

    Args:
        socket: connected and non-blocking, Trio's or the standard library's. Closed with this.
        resets: see `LentSocket`.
        now: `trio.current_time()`, if it is known already.

    Attributes:
        socket: see the argument.
        plain_socket: see `ByteStream`. Bytes that the fast path moves do not count for `last_received` and
            `sending_since`.
    """

    __slots__ = ("_calls", "_io", "_outlasts", "_taken_last", "_unsent_limit", "_writable_waiters", "socket")

    def __init__(self, socket: Socket, *, resets: bool = False, now: float | None = None) -> None:
        self.socket: Final = socket
        lent = LentSocket(socket, resets=resets)
        self._io: Final = TcpSocket(lent, trio.current_time() if now is None else now)
        self._taken_last: tuple[int, float] | None = None
        self._outlasts = False
        self._calls = 0
        self._unsent_limit: int | None = None
        self._writable_waiters: trio.lowlevel.ParkingLot | None = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while (data := self._io.read(os.read, _PIECE if max_bytes is None else max_bytes)) is None:
            await self._wait_readable()
            waited = True
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        return data

    async def receive_into(self, buffer: memoryview) -> int:
        """Like `receive_some`, into `buffer`; returns how many bytes came.

        Lets other tasks run only when it has to wait, and at least every eighth time.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while (amount := self._io.read(os.readv, (buffer,))) is None:
            await self._wait_readable()
            self._calls = 0
        await self._let_others_run()
        return amount

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            descriptor_of(self.socket)  # also of an empty send
            self._io.raise_if_end_sent()
            waited = False
            with memoryview(data) as view:
                position = 0
                while position < len(view):
                    sent = self._io.write([view[position:]])
                    if sent is None:
                        await self._wait_writable()
                        waited = True
                    else:
                        position += sent
                        self._io.sending_since = trio.current_time()
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._io.sending_since = None

    async def send_pieces(self, pieces: Sequence[Bytes]) -> None:
        """Like `send_all` of all `pieces`, without joining them first.

        Lets other tasks run only when it has to wait, and at least every eighth time.
        """
        if len(pieces) > MOST_PIECES:
            await self.send_all(b"".join(pieces))
            return
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._io.raise_if_end_sent()
            while (sent := self._io.write(pieces)) is None:
                await self._wait_writable()
                self._calls = 0
            await self._let_others_run()
            left = sum(map(len, pieces)) - sent
        finally:
            self._io.sending_since = None
        if left:
            await self.send_all(b"".join(pieces)[-left:])

    def watch(self, on_readable: Callable[[], object]) -> TcpSocket | None:
        return self._io if self._io.watch(on_readable) else None

    async def wait_send_all_might_not_block(self) -> None:
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            descriptor_of(self.socket)
            await self._wait_writable()
        finally:
            self._io.sending_since = None

    async def send_eof(self) -> None:
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            descriptor_of(self.socket)
            if self._io.end_sent:
                return
            self._io.end_sent = True
            try:
                self._io.lent.shut_down()
            except OSError as error:
                raise self._io.broken(error) from error
        finally:
            self._io.sending_since = None

    async def aclose(self) -> None:
        """Close with a FIN, and with a RST if cancelled and the socket `resets`."""
        self._io.lent.take_back()
        if trio.current_effective_deadline() == -math.inf:
            self._io.lent.drop()
        else:
            self._io.lent.close()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """Close with a RST, which drops unsent data. After `aclose` this changes nothing."""
        self._io.lent.take_back()
        self._io.lent.reset()

    async def abort(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    @property
    def last_received(self) -> float:
        """`trio.current_time()` when the last byte arrived; before that, when this was made."""
        return self._io.last_received

    @property
    def sending_since(self) -> float | None:
        """When the peer was last seen to take bytes; None while none wait for it.

        It measures the lack of progress, not the time to finish: a slow path is not a dead one. On Linux the bytes are
        those that the peer has not acknowledged, and the time is that of the latest access that saw a change.
        Elsewhere they are those of the current send.
        """
        delivery = delivery_of(self.socket)
        if delivery is None:
            return self._io.sending_since
        if not delivery.waits:
            self._taken_last = None
            return None
        if self._taken_last is None or self._taken_last[0] != delivery.taken:
            self._taken_last = delivery.taken, trio.current_time()
        return self._taken_last[1]

    def delivery(self) -> Delivery | None:
        """What the kernel says of the connection; None if it cannot tell, or the connection is closed.

        After `outlast` this also adapts TCP's timeout to the round trip, so call it now and then.
        """
        delivery = delivery_of(self.socket)
        if self._outlasts and delivery is not None:
            resend_within(self.socket, delivery.resend_after)
        return delivery

    def outlast(self, seconds: float) -> None:
        """Survive a pause of the path for `seconds`, and notice soon when it is over."""
        self._outlasts = True
        outlast_silence(self.socket, seconds)
        self.delivery()

    @property
    def window_left(self) -> int:
        """Bytes that TCP would send at once, beyond those that it has; 0 if that is not known."""
        delivery = delivery_of(self.socket)
        return 0 if delivery is None else delivery.window_left

    def expect_bulk(self) -> None:
        """Prepare for much data after a while with little: the path may have become longer meanwhile."""
        delivery = delivery_of(self.socket)
        if delivery is not None and delivery.in_slow_start:
            forget_round_trip(self.socket)

    def limit_unsent(self, limit: int) -> None:
        """Let the kernel buffer at most about `limit` bytes that it has not sent yet; the default is 256 KiB."""
        self._unsent_limit = limit
        limit_unsent(self.socket, limit)

    @property
    def has_room(self) -> bool:
        """False while `wait_room` would wait."""
        return self._unsent_limit is None or unsent(self.socket) <= self._unsent_limit // 2

    async def wait_room(self) -> None:
        """Wait until half of the limit is free. Another task may send meanwhile. No checkpoint if it need not wait.

        A write alone does not respect the limit: the kernel appends to the last packet that it prepares, of up to
        64 KiB.
        """
        while not self.has_room:
            await self._wait_writable()

    async def wait_flushed(self) -> None:
        """Wait until the peer has acknowledged all that was sent (Linux; elsewhere it returns at once)."""
        await wait_sent(self.socket)

    @property
    def lowest_socket(self) -> LentSocket:
        return self._io.lent

    @property
    def plain_socket(self) -> LentSocket:
        return self._io.lent

    def leg(self) -> SocketLeg | None:
        if not CAN_WATCH:
            return None
        reactor = Reactor.current()
        return SocketLeg(self._io.lent, reactor) if reactor.has_epoll else None

    def _begin_sending(self) -> None:
        if self._io.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._io.sending_since = trio.current_time()

    async def _wait_readable(self) -> None:
        self._io.lent.waited_for = True
        await trio.lowlevel.wait_readable(self.socket)

    async def _wait_writable(self) -> None:
        if self._unsent_limit is None:
            self.limit_unsent(UNSENT_LIMIT)  # Trio's sockets have a lower limit
        if self._writable_waiters is not None:  # in Trio one task may wait for a descriptor
            await self._writable_waiters.park()
            return
        self._io.lent.waited_for = True
        waiters = self._writable_waiters = trio.lowlevel.ParkingLot()
        try:
            await trio.lowlevel.wait_writable(self.socket)
        finally:
            self._writable_waiters = None
            waiters.unpark_all()

    async def _let_others_run(self) -> None:
        """After every eighth call that did not wait."""
        self._calls += 1
        if not self._calls % 8:
            await trio.lowlevel.cancel_shielded_checkpoint()
