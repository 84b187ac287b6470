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

from .fastpath.event_loop import CAN_WATCH, HUNG_UP, Reactor
from .fastpath.socket_leg import SocketLeg
from .lent_socket import LentSocket
from .socket_options import Socket, descriptor_of, limit_unsent, means_loss, wait_sent
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

    Attributes:
        last_received: `trio.current_time()` when the last byte arrived; before that, when this was made.
        sending_since: when the current send last made progress; None while there is none. It measures the lack of
            progress, not the time to finish: a slow path is not a dead one.
        plain_socket: see `ByteStream`. Bytes that the fast path moves do not count for the attributes above.
    """

    def __init__(self, socket: Socket, *, resets: bool = False) -> None:
        self.socket: Final = socket
        self.last_received: float = trio.current_time()
        self.sending_since: float | None = None
        self._lent: Final = LentSocket(socket, resets=resets)
        self._was_lost = False
        self._calls = 0
        self._had_to_wait = False
        self._end_sent = False
        self._turn: Final = Turn.current()
        self._watched: int | None = None  # the descriptor, while it is watched
        self._empty = False  # nothing to read until the next edge
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
                        self.sending_since = trio.current_time()
                    except BlockingIOError:
                        await self._wait_writable()
                        waited = True
                    except OSError as error:
                        raise self._broken(error) from error
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()
        finally:
            self.sending_since = None

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
            self.sending_since = None
        if left:
            await self.send_all(b"".join(pieces)[-left:])

    def watch(self, on_readable: Callable[[], object]) -> bool:
        reactor = Reactor.current()
        if not (CAN_WATCH and reactor.has_epoll):
            return False

        def on_events(events: int) -> None:
            self._empty = False
            self._hung_up |= bool(events & HUNG_UP)
            on_readable()

        def on_taken_back() -> None:
            self.unwatch()
            self._turn.run(on_readable)  # `receive_into_nowait` says that it was closed

        descriptor = descriptor_of(self.socket)
        try:
            reactor.watch(descriptor, on_events)
        except OSError:
            return False  # out of memory
        self._watched = descriptor
        self._lent.taken_back = on_taken_back
        return True

    def unwatch(self) -> None:
        if self._watched is not None:
            self._lent.taken_back = None
            Reactor.current().unwatch(self._watched)
            self._watched = None

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        if self._watched is None:
            raise trio.ClosedResourceError("this stream was closed")
        if self._empty:
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
        self._empty = amount < len(buffer) and not self._hung_up
        self.last_received = self._turn.now()
        return amount

    @property
    def sends_at_once(self) -> bool:
        return True

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        if self.sending_since is not None:
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
            self.sending_since = None

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
            self.sending_since = None

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
        return SocketLeg(self._lent) if CAN_WATCH and Reactor.current().has_epoll else None

    def _begin_sending(self) -> None:
        if self.sending_since is not None:
            raise trio.BusyResourceError("another task is sending on this stream")
        self.sending_since = trio.current_time()

    def _raise_if_end_sent(self) -> None:
        if self._end_sent:
            raise trio.ClosedResourceError("this stream has sent its end")

    async def _wait_readable(self) -> None:
        self._lent.waited_for = True
        await trio.lowlevel.wait_readable(self.socket)

    async def _wait_writable(self) -> None:
        if not self._had_to_wait:
            self._had_to_wait = True
            limit_unsent(self.socket)  # Trio's sockets have a lower limit
        self._lent.waited_for = True
        await trio.lowlevel.wait_writable(self.socket)

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
