"""A TCP connection that is read and written by its descriptor. POSIX only.

It does what a `trio.SocketStream` does, without the layers of `trio.socket`, which support every kind of socket and
system. A read or write takes a third of the time, and a new connection five sixths. The contract is the same, and as
fair: calls let other tasks run.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, final

import trio

from .delivery import Delivery
from .fastpath.event_loop import CAN_WATCH, HUNG_UP, Reactor
from .fastpath.socket_leg import SocketLeg
from .lent_socket import LentSocket
from .socket_options import (
    UNSENT_LIMIT,
    Socket,
    delivery_of,
    descriptor_of,
    forget_round_trip,
    limit_unsent,
    means_loss,
    outlast_silence,
    resend_within,
    unsent,
    wait_sent,
)
from .streams import Bytes, ByteStream
from .turn import Turn

__all__ = ["CAN_USE_DESCRIPTORS", "TcpStream"]

CAN_USE_DESCRIPTORS: Final = sys.platform != "win32"
"""Whether sockets of this system can be read and written like files."""

_PIECE: Final = 64 * 1024
_MOST_PIECES: Final = 64


@final
class TcpStream(ByteStream):
    """A TCP connection that measures silence and stalls.

    One task may send and one may receive at a time; a second one gets `trio.BusyResourceError`.

    Args:
        socket: connected and non-blocking, Trio's or the standard library's. Closed with this.
        resets: see `LentSocket`.
        now: `trio.current_time()`, if it is known already.

    Attributes:
        last_received: `trio.current_time()` when the last byte arrived; before that, when this was made.
        plain_socket: see `ByteStream`. Bytes that the fast path moves do not count for the attributes above.
    """

    _turn: Turn  # from `watch` on

    __slots__ = (
        "_calls",
        "_end_sent",
        "_hung_up",
        "_lent",
        "_outlasts",
        "_sending_since",
        "_taken_last",
        "_turn",
        "_unsent_limit",
        "_was_lost",
        "_watched",
        "_writable_waiters",
        "drained",
        "last_received",
        "socket",
    )

    def __init__(self, socket: Socket, *, resets: bool = False, now: float | None = None) -> None:
        self.socket: Final = socket
        self.last_received: float = trio.current_time() if now is None else now
        self._sending_since: float | None = None
        self._taken_last: tuple[int, float] | None = None
        self._outlasts = False
        self._lent: Final = LentSocket(socket, resets=resets)
        self._was_lost = False
        self._calls = 0
        self._unsent_limit: int | None = None
        self._writable_waiters: trio.lowlevel.ParkingLot | None = None
        self._end_sent = False
        self._watched: int | None = None  # the descriptor, while it is watched
        self.drained: bool = False  # until the next edge
        self._hung_up = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        while True:
            try:
                data = os.read(descriptor_of(self.socket), _PIECE if max_bytes is None else max_bytes)
            except BlockingIOError:
                await self._wait_readable()
                waited = True
            except OSError as error:
                raise self._broken(error) from error
            else:
                break
        if not waited:
            await trio.lowlevel.cancel_shielded_checkpoint()
        if not data:
            self._raise_if_reset()
        self.last_received = trio.current_time()
        return data

    async def receive_into(self, buffer: memoryview) -> int:
        """Like `receive_some`, into `buffer`; returns how many bytes came.

        Lets other tasks run only when it has to wait, and at least every eighth time.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        amount = await self._briskly(os.readv, [buffer], self._wait_readable)
        if not amount:
            self._raise_if_reset()
        self.last_received = trio.current_time()
        return amount

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            descriptor_of(self.socket)  # also of an empty send
            self._raise_if_end_sent()
            waited = False
            with memoryview(data) as view:
                position = 0
                while position < len(view):
                    try:
                        position += os.write(descriptor_of(self.socket), view[position:])
                        self._sending_since = trio.current_time()
                    except BlockingIOError:
                        await self._wait_writable()
                        waited = True
                    except OSError as error:
                        raise self._broken(error) from error
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self._sending_since = None

    async def send_pieces(self, pieces: Sequence[Bytes]) -> None:
        """Like `send_all` of all `pieces`, without joining them first.

        Lets other tasks run only when it has to wait, and at least every eighth time.
        """
        if len(pieces) > _MOST_PIECES:
            await self.send_all(b"".join(pieces))
            return
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._raise_if_end_sent()
            sent = await self._briskly(os.writev, pieces, self._wait_writable)
            left = sum(map(len, pieces)) - sent
        finally:
            self._sending_since = None
        if left:
            await self.send_all(b"".join(pieces)[-left:])

    def watch(self, on_readable: Callable[[], object]) -> TcpStream | None:
        reactor = Reactor.current()
        if not (CAN_WATCH and reactor.has_epoll):
            return None
        self._turn = reactor.turn

        def on_events(events: int) -> None:
            self.drained = False
            self._hung_up |= bool(events & HUNG_UP)
            on_readable()

        def on_taken_back() -> None:
            self.unwatch()
            self._turn.run(on_readable)  # `receive_into_nowait` says that it was closed

        descriptor = descriptor_of(self.socket)
        try:
            reactor.watch(descriptor, on_events)
        except OSError:
            return None  # out of memory
        self._watched = descriptor
        self._lent.taken_back = on_taken_back
        return self

    def unwatch(self) -> None:
        if self._watched is not None:
            self._lent.taken_back = None
            Reactor.current().unwatch(self._watched)
            self._watched = None

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        if self._watched is None:
            raise trio.ClosedResourceError("this stream was closed")
        if self.drained:
            return None
        try:
            amount = os.readv(self._watched, (buffer,))
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._broken(error) from error
        if not amount:
            self._raise_if_reset()
        # Edges are reported once: a short read has emptied the socket, unless there are no more edges.
        self.drained = amount < len(buffer) and not self._hung_up
        now = self._turn.started
        self.last_received = self._turn.now() if now is None else now
        return amount

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        if self._sending_since is not None:
            return [*pieces]
        if self._end_sent:
            self._raise_if_end_sent()
        try:
            descriptor = self._watched or descriptor_of(self.socket)
            sent = os.writev(descriptor, pieces if len(pieces) <= _MOST_PIECES else pieces[:_MOST_PIECES])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._broken(error) from error
        return [] if sent == sum(map(len, pieces)) else without(pieces, sent)

    async def wait_send_all_might_not_block(self) -> None:
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            descriptor_of(self.socket)
            await self._wait_writable()
        finally:
            self._sending_since = None

    async def send_eof(self) -> None:
        self._begin_sending()
        try:
            await trio.lowlevel.checkpoint()
            descriptor_of(self.socket)
            if self._end_sent:
                return
            self._end_sent = True
            try:
                self._lent.shut_down()
            except OSError as error:
                raise self._broken(error) from error
        finally:
            self._sending_since = None

    async def aclose(self) -> None:
        """Close with a FIN, and with a RST if cancelled and the socket `resets`."""
        self._lent.take_back()
        if trio.current_effective_deadline() == -math.inf:
            self._lent.drop()
        else:
            self._lent.close()
        await trio.lowlevel.checkpoint()

    def reset(self) -> None:
        """Close with a RST, which drops unsent data. After `aclose` this changes nothing."""
        self._lent.take_back()
        self._lent.reset()

    async def abort(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    @property
    def sending_since(self) -> float | None:
        """When the peer was last seen to take bytes; None while none wait for it.

        It measures the lack of progress, not the time to finish: a slow path is not a dead one. On Linux the bytes are
        those that the peer has not acknowledged, and the time is that of the latest access that saw a change.
        Elsewhere they are those of the current send.
        """
        delivery = delivery_of(self.socket)
        if delivery is None:
            return self._sending_since
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
        return self._lent

    @property
    def plain_socket(self) -> LentSocket:
        return self._lent

    def leg(self) -> SocketLeg | None:
        if not CAN_WATCH:
            return None
        reactor = Reactor.current()
        return SocketLeg(self._lent, reactor) if reactor.has_epoll else None

    def _begin_sending(self) -> None:
        if self._sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self._sending_since = trio.current_time()

    def _raise_if_end_sent(self) -> None:
        if self._end_sent:
            raise trio.ClosedResourceError("this stream has sent its end")

    async def _wait_readable(self) -> None:
        self._lent.waited_for = True
        await trio.lowlevel.wait_readable(self.socket)

    async def _wait_writable(self) -> None:
        if self._unsent_limit is None:
            self.limit_unsent(UNSENT_LIMIT)  # Trio's sockets have a lower limit
        if self._writable_waiters is not None:  # in Trio one task may wait for a descriptor
            await self._writable_waiters.park()
            return
        self._lent.waited_for = True
        waiters = self._writable_waiters = trio.lowlevel.ParkingLot()
        try:
            await trio.lowlevel.wait_writable(self.socket)
        finally:
            self._writable_waiters = None
            waiters.unpark_all()

    async def _briskly(
        self, call: Callable[[int, Any], int], argument: object, wait: Callable[[], Awaitable[None]]
    ) -> int:
        while True:
            try:
                amount = call(descriptor_of(self.socket), argument)
            except BlockingIOError:
                await wait()
                self._calls = 0
                continue
            except OSError as error:
                raise self._broken(error) from error
            self._calls += 1
            if not self._calls % 8:
                await trio.lowlevel.cancel_shielded_checkpoint()
            return amount

    def _raise_if_reset(self) -> None:
        # The kernel reports a loss once. If a send gets the report, a receive gets EOF, and a truncated answer would
        # look complete.
        if self._was_lost:
            raise trio.BrokenResourceError("the connection is broken: it was lost")

    def _broken(self, error: OSError) -> trio.BrokenResourceError:
        self._was_lost |= means_loss(error)
        return trio.BrokenResourceError(f"the connection is broken: {error.strerror}")


def without(pieces: Sequence[Bytes], amount: int) -> list[Bytes]:
    """`pieces` without their first `amount` bytes."""
    for position, piece in enumerate(pieces):
        if amount < len(piece):
            return [memoryview(piece)[amount:], *pieces[position + 1 :]]
        amount -= len(piece)
    return []
