"""A visitor's stream over a connection of its own to the relay.

It behaves as a yamux stream does: a graceful close is FIN, abandonment is RST. A plain socket does one thing
differently: closing it with unread data sends RST, and the peer may lose data that we had already sent. So `aclose`
sends FIN, and a task of the transport drains what still comes, for up to 2 s, and then closes the socket.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import trio

from ..._net.closing import close_after_answer
from ..._net.leg import Leg
from ..._net.streams import ByteStream, GuardedStream
from ..._net.tls.stream import TlsStream

__all__ = ["ChannelStream"]

_DISCARDED: Final = 64 * 1024
_GOODBYE_TIMEOUT: Final = 30.0


@final
class ChannelStream(GuardedStream):
    """The connection of one visitor. It implements `tunnel_stream.CarriedStream`.

    Args:
        stream: the connection: what `watch` returns, or a `TlsStream` over that.
        draining: a nursery for the tasks that drain closed connections. Its owner calls `abandon` before it ends.
        on_accepted: called once, when the visitor is accepted.
        on_closed: called once, when the connection is closed.

    Attributes:
        accepted: whether the visitor is accepted.
        counted: whether it is counted as open. The owner sets it.
    """

    def __init__(
        self,
        stream: ByteStream,
        draining: trio.Nursery,
        *,
        on_accepted: Callable[[], None],
        on_closed: Callable[[ChannelStream], None],
    ) -> None:
        super().__init__(stream)
        self.accepted: bool = False
        self.counted: bool = False
        self._on_accepted: Final = on_accepted
        self._draining: Final = draining
        self._on_closed: Final = on_closed
        self._plain: Final = stream.plain_socket
        if self._plain is not None:
            self._plain.on_close = self._closed_by_borrower
        self._below: Final = stream.lowest_socket
        self._abandoned = False
        self._breaking: Final = trio.lowlevel.ParkingLot()
        self._over = False
        self._lost = False

    @property
    def usable(self) -> bool:
        """False once it is closed or reset on either side."""
        return not self._closed and not self._is_lost()

    def _is_lost(self) -> bool:
        """Ask the system: no task reads from a stream that waits to be accepted."""
        if not self._lost and self._below is not None and hasattr(select, "poll"):
            poll = select.poll()
            poll.register(self._below.socket.fileno(), 0)
            self._lost = any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))
        return self._lost

    def leg(self) -> Leg | None:
        # Over TLS nothing would tell us of a close by the exchange.
        return None if self._closed or self._end_sent or self._plain is None else self.transport_stream.leg()

    def acknowledge(self) -> None:
        """Count the visitor as accepted. The protocol has no message for it."""
        if not self.accepted and not self._over:
            self.accepted = True
            self._on_accepted()

    async def aclose(self) -> None:
        """Send FIN; what the visitor still sends is discarded. If cancelled, reset."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._close()
        try:
            if self._below is None:
                await self.transport_stream.aclose()
                self._note_over()
                return
            trio.lowlevel.notify_closing(self._below.socket)  # wakes tasks that still wait for it
            if self._plain is not None and self._has_ended():
                self._close_socket()  # closing sends our FIN, too
                await trio.lowlevel.checkpoint()
                return
            with self._sending, suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                with trio.move_on_after(_GOODBYE_TIMEOUT):
                    await self.transport_stream.send_eof()
        except trio.BusyResourceError:
            self.abandon()  # another task was sending; what it sends is cut off
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.abandon()
            raise
        if self._over:
            return
        if self._has_ended():
            self._close_socket()
        else:
            self._draining.start_soon(self._drain)

    async def wait_broken(self) -> bool:
        """Wait until the session ends; returns False when the stream was closed here.

        It does not notice a reset by the visitor: only a receive or a send does.
        """
        while not self._closed:
            # No deadline: most streams never break.
            await self._breaking.park()
        return self._abandoned

    def reset(self) -> None:
        """Abandon the connection: send RST at once. Does nothing on a closed stream."""
        if not self._closed:
            self._close()
            self.abandon()

    async def abort(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """Reset the connection, also when it is closed and still being drained. For the end of the session."""
        if not self._closed:
            self._abandoned = True
            self._close()
        if self._over:
            return
        if self._below is not None:
            self._below.reset()
        else:
            self._draining.start_soon(self.transport_stream.abort)
        self._note_over()

    async def _drain(self) -> None:
        try:
            await close_after_answer(self.transport_stream)
        finally:
            self.abandon()

    def _close(self) -> None:
        self._note_closed()
        if self._plain is not None:
            self._plain.take_back()

    def _close_socket(self) -> None:
        assert self._below is not None
        self._below.close()  # wakes tasks that wait for it
        self._note_over()

    def _closed_by_borrower(self) -> None:
        self._note_closed()
        self._note_over()

    def _note_closed(self) -> None:
        self._closed = True
        if self._breaking:
            self._breaking.unpark_all()

    def _note_over(self) -> None:
        if not self._over:
            self._over = True
            if self._plain is not None:
                self._plain.on_close = None  # breaks a reference cycle
            self._on_closed(self)

    def _has_ended(self) -> bool:
        """Whether the visitor has sent EOF, so that nothing is left to drain."""
        if self._plain is None:
            return isinstance(self.transport_stream, TlsStream) and self.transport_stream.end_received
        try:
            return not os.read(self._plain.socket.fileno(), _DISCARDED)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def __repr__(self) -> str:
        return f"<ChannelStream{' closed' if self._closed else ''}>"
