"""The interface that all our byte streams implement, and the base of those that wrap another one.

`ByteStream` is Trio's `HalfCloseableStream` with what a tunnel needs beyond it: a reset, flushing, and access to the
socket below. A Trio stream of another class gets this interface from `adopted.adopt`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Protocol, final

import trio

from .leg import Bytes, Leg
from .lent_socket import LentSocket

__all__ = ["ByteStream", "Bytes", "DelegatingStream", "GuardedStream", "Nowait", "OneAtATime"]


class ByteStream(trio.abc.HalfCloseableStream):
    """A byte stream that can also be reset. The defaults are those of a stream over no socket of its own."""

    __slots__ = ()

    @abstractmethod
    async def abort(self) -> None:
        """Close at once. The peer sees a reset, never EOF; what was not sent is dropped.

        Never blocks. If cancelled, it closes all the same.
        """

    async def wait_flushed(self) -> None:
        """Wait until all that was sent has left this stream, as far as the stream knows, or never will.

        The caller sets the deadline. To be awaited before `abort`, whose reset would overtake the data.
        """

    async def wait_broken(self) -> bool:
        """Wait until the peer resets the stream or its connection is lost; False when it was closed at this end.

        Waits forever where the stream learns of a reset only when it receives or sends.
        """
        await trio.sleep_forever()
        raise AssertionError

    @property
    def can_half_close(self) -> bool:
        """False if `send_eof` closes both directions."""
        return True

    @property
    def timed_out(self) -> bool:
        """True if this end broke the stream because the peer did not accept it in time."""
        return False

    @property
    def room(self) -> int | None:
        """How many bytes to send next, so that few of them wait in this process; None if the kernel holds them.

        0 while `wait_send_all_might_not_block` would wait.
        """
        return None

    @property
    def lowest_socket(self) -> LentSocket | None:
        """The socket at the bottom, below TLS and wrappers; None if there is none, or it is not known."""
        return None

    @property
    def plain_socket(self) -> LentSocket | None:
        """The socket whose bytes are those of this stream; None if they are transformed, or some were read ahead."""
        return None

    def leg(self) -> Leg | None:
        """This stream as a leg of an exchange, which then is its only user; None if it needs tasks for that."""
        return None

    async def receive_into(self, buffer: memoryview) -> int:
        """Receive into `buffer`; returns the number of bytes, 0 at EOF."""
        data = await self.receive_some(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    async def send_pieces(self, pieces: Sequence[Bytes]) -> None:
        """Send all of `pieces`, in one system call where possible."""
        await self.send_all(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def watch(self, on_readable: Callable[[], object]) -> Nowait | None:  # noqa: ARG002  # the default
        """Call `on_readable` when something may have come, until `Nowait.unwatch` or a close.

        The caller holds a stay in the event loop. None, and nothing happens, if this stream cannot do that.
        """
        return None


class Nowait(Protocol):
    """Reads and writes a stream that is watched, without waiting. What sends by waiting is still the stream."""

    @property
    def drained(self) -> bool:
        """True if `receive_into_nowait` would return None now, as far as is known without trying."""

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        """Like `receive_into`, but it never waits: None when nothing has come."""

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        """Send as much of `pieces` as is possible without waiting; returns the rest.

        Raises:
            As `send_all`.
        """

    def unwatch(self) -> None:
        """Call back no more. To be called before the stay ends."""


class DelegatingStream(ByteStream):
    """Forwards to `transport_stream`. A subclass overrides what it changes.

    `room`, `plain_socket`, `receive_into` and `send_pieces` are not forwarded. They would bypass a subclass that
    changes the bytes.
    """

    def __init__(self, stream: ByteStream) -> None:
        self.transport_stream = stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self.transport_stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        await self.transport_stream.aclose()

    async def abort(self) -> None:
        await self.transport_stream.abort()

    async def wait_flushed(self) -> None:
        await self.transport_stream.wait_flushed()

    async def wait_broken(self) -> bool:
        return await self.transport_stream.wait_broken()

    @property
    def can_half_close(self) -> bool:
        return self.transport_stream.can_half_close

    @property
    def lowest_socket(self) -> LentSocket | None:
        return self.transport_stream.lowest_socket


class GuardedStream(DelegatingStream):
    """Adds the checks of Trio's contract: one task per direction, nothing after close, nothing sent after EOF.

    One task may send and one may receive at a time; a second one gets `trio.BusyResourceError`.
    """

    def __init__(self, stream: ByteStream) -> None:
        super().__init__(stream)
        self._receiving: Final = OneAtATime("another task is receiving from this stream")
        self._sending: Final = OneAtATime("another task is sending on this stream")
        self._closed = False
        self._end_sent = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        with self._receiving:
            self._raise_if_closed()
            return await self.transport_stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with self._sending:
            self._raise_if_not_sendable()
            await self.transport_stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        with self._sending:
            self._raise_if_not_sendable()
            await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        with self._sending:
            self._raise_if_closed()
            if self._end_sent:
                await trio.lowlevel.checkpoint()
                return
            self._end_sent = True
            await self.transport_stream.send_eof()

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")

    def _raise_if_not_sendable(self) -> None:
        self._raise_if_closed()
        if self._end_sent:
            raise trio.ClosedResourceError("send_eof was called on this stream")


@final
class OneAtATime:
    """Raises `trio.BusyResourceError` when a second task enters, as Trio's own streams do."""

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
