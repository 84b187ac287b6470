"""A visitor's stream that has a connection to the relay of its own.

What a yamux stream does in frames, this does with the connection: an orderly end is a FIN, abandonment is a RST. The
one thing a bare socket gets wrong is a close while the visitor is still talking: that is a RST too, and takes back
what the visitor was told last. So `aclose` ends our half, and a task of the transport's reads what still comes, for two
seconds at most, before it lets go.

Neighbours: `transports.data_channels` makes them, and wraps them in a `TunnelStream`; `pump` takes the short way
through `plain_socket`.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import trio

from ..._net.closing import close_after_answer
from ..._net.lent_socket import LentSocket
from ..._net.streams import ByteStream, GuardedStream
from ..._net.tls.stream import TlsStream

__all__ = ["ChannelStream"]

_DISCARDED: Final = 64 * 1024
_GOODBYE_TIMEOUT: Final = 30.0


@final
class ChannelStream(GuardedStream):
    """One connection that is one visitor's. It keeps the contract of `tunnel_stream.CarriedStream`.

    Args:
        stream: the connection; what `streams.watch` makes, or a `TlsStream` over that.
        leave_taking: where connections are let go of that were closed while the visitor still talks. Whoever has it
            calls `abandon` before it ends.
        on_accepted: called once, when somebody takes care of the visitor.
        on_over: called once, when the connection is let go of.

    Attributes:
        accepted: whether somebody has.
    """

    def __init__(
        self,
        stream: ByteStream,
        leave_taking: trio.Nursery,
        *,
        on_accepted: Callable[[], None],
        on_over: Callable[[ChannelStream], None],
    ) -> None:
        super().__init__(stream)
        self.accepted: bool = False
        self._on_accepted: Final = on_accepted
        self._leave_taking: Final = leave_taking
        self._on_over: Final = on_over
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
        """False once it was closed or reset at either end."""
        return not self._closed and not self._is_lost()

    def _is_lost(self) -> bool:
        """Ask the system, since nobody reads from a stream that waits to be accepted."""
        if not self._lost and self._below is not None and hasattr(select, "poll"):
            poll = select.poll()
            poll.register(self._below.socket.fileno(), 0)
            self._lost = any(events & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, events in poll.poll(0))
        return self._lost

    @property
    def plain_socket(self) -> LentSocket | None:
        return None if self._closed or self._end_sent else self._plain

    def acknowledge(self) -> None:
        """Note it at this end: this protocol has no word for it."""
        if not self.accepted and not self._over:
            self.accepted = True
            self._on_accepted()

    async def aclose(self) -> None:
        """End our half orderly; what the visitor still says is not heard. Cancelled, reset."""
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._close()
        try:
            if self._below is None:
                await self.transport_stream.aclose()
                self._note_over()
                return
            trio.lowlevel.notify_closing(self._below.socket)  # wakes whoever still waits for it
            if self._plain is not None and self._has_ended():
                self._let_go()  # which says that we have ended, too
                await trio.lowlevel.checkpoint()
                return
            with self._sending, suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                with trio.move_on_after(_GOODBYE_TIMEOUT):
                    await self.transport_stream.send_eof()
        except trio.BusyResourceError:
            self.abandon()  # somebody was in the middle of something, which now ends there
            await trio.lowlevel.checkpoint()
        except trio.Cancelled:
            self.abandon()
            raise
        if self._over:
            return
        if self._has_ended():
            self._let_go()
        else:
            self._leave_taking.start_soon(self._take_leave)

    async def wait_broken(self) -> bool:
        """Wait until the session ends; False when the stream was closed here.

        A reset by the visitor is not noticed here: the system tells of it only a task that receives or sends.
        """
        while not self._closed:
            # No deadline: most streams never break.
            await self._breaking.park()
        return self._abandoned

    def reset(self) -> None:
        """Abandon the connection: the relay sees a RST at once. On a stream that was closed this changes nothing."""
        if not self._closed:
            self._close()
            self.abandon()

    async def abort(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    def abandon(self) -> None:
        """End the stream with its session: like `reset`, also of one that was closed and has not been let go of yet."""
        if not self._closed:
            self._abandoned = True
            self._close()
        if self._over:
            return
        if self._below is not None:
            self._below.reset()
        else:
            self._leave_taking.start_soon(self.transport_stream.abort)
        self._note_over()

    async def _take_leave(self) -> None:
        try:
            await close_after_answer(self.transport_stream)
        finally:
            self.abandon()

    def _close(self) -> None:
        self._closed = True
        self._breaking.unpark_all()
        if self._plain is not None:
            self._plain.take_back()

    def _let_go(self) -> None:
        assert self._below is not None
        self._below.close()  # which wakes who waits for it
        self._note_over()

    def _closed_by_borrower(self) -> None:
        self._closed = True
        self._breaking.unpark_all()
        self._note_over()

    def _note_over(self) -> None:
        if not self._over:
            self._over = True
            if self._plain is not None:
                self._plain.on_close = None  # or the two would wait for the garbage collector
            self._on_over(self)

    def _has_ended(self) -> bool:
        """Whether the visitor, too, has said all: then there is nothing to wait for."""
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
