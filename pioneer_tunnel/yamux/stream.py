"""A yamux stream as a Trio stream.

`YamuxStream` has Trio's contract for half-closeable streams, and `reset`. Sending only queues data, so a cancelled send
never cuts a frame. The data that it has queued is still sent.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, final

import trio

from .._model.counters import StreamCounter
from .._net.fastpath.event_loop import Reactor
from .._net.leg import Bytes
from .._net.streams import ByteStream, Nowait, OneAtATime
from .stream_leg import StreamLeg
from .stream_state import Stream

if TYPE_CHECKING:
    from .driver import Driver

__all__ = ["YamuxStream"]

READ_SIZE: Final = 256 * 1024


@final
class _Use:
    """The tasks that use a stream."""

    __slots__ = ("break_watchers", "readers", "receiving", "sending", "writers")

    def __init__(self) -> None:
        self.sending: Final = OneAtATime("another task is sending on this stream")
        self.receiving: Final = OneAtATime("another task is receiving on this stream")
        self.readers: Final = trio.lowlevel.ParkingLot()
        self.writers: Final = trio.lowlevel.ParkingLot()
        self.break_watchers: Final = trio.lowlevel.ParkingLot()


class _Watch(NamedTuple):
    """Who watches a stream."""

    on_readable: Callable[[], object]
    on_writable: Callable[[], object]


@final
class YamuxStream(ByteStream):
    """One stream of a session.

    The peer gets a FIN after `send_eof` and `aclose`, and a reset after `reset` or a cancelled `aclose`.

    One task may send and one may receive at a time. A second one gets `trio.BusyResourceError`.
    """

    __slots__ = ("_closed", "_driver", "_session", "_stream", "_use")

    def __init__(self, driver: Driver, stream: Stream) -> None:
        self._driver: Final = driver
        self._session: Final = driver.session
        self._stream: Final = stream
        self._closed = False
        # Made when a task first uses the stream. Most are used by a leg.
        self._use: _Use | None = None
        stream.owner = self

    @property
    def _tasks(self) -> _Use:
        if self._use is None:
            self._use = _Use()
        return self._use

    @property
    def usable(self) -> bool:
        """False once the stream was closed, was reset by either end, or lost its connection."""
        return not (self._closed or self._stream.was_reset or self._driver.failure)

    def count_as(self, counter: StreamCounter) -> None:
        """Count this visitor's stream, unless it has ended already, and the bytes that pass from now on."""
        if self.usable:
            self._stream.count_as(counter)

    @property
    def timed_out(self) -> bool:
        return self._stream.timed_out

    def acknowledge(self) -> None:
        """Accept a stream that the peer opened. One that is not accepted within 30 seconds is reset."""
        self._driver.acknowledge(self._stream)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for data and return at most `max_bytes` of it (default 256 KiB); b"" after the peer's FIN.

        Raises:
            trio.BrokenResourceError: the stream was reset, or its connection is gone, before the peer's FIN arrived.
                Data that arrived before is returned first.
            trio.ClosedResourceError: it was closed at this end.
            ValueError: `max_bytes` is less than 1.
        """
        max_bytes = READ_SIZE if max_bytes is None else operator.index(max_bytes)
        if max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        use = self._tasks
        with use.receiving:
            await trio.lowlevel.checkpoint_if_cancelled()
            data = self._receive_nowait(max_bytes)
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
            while data is None:
                # No deadline: a visitor may be silent for any time. The connection's heartbeat detects a dead peer.
                await use.readers.park()
                data = self._receive_nowait(max_bytes)
            return data

    def receive_nowait(self, max_bytes: int) -> bytes | None:
        """Like `receive_some`, but it never waits: None when nothing has arrived."""
        if self._use is None:
            return self._receive_nowait(max_bytes)
        with self._use.receiving:
            return self._receive_nowait(max_bytes)

    def _receive_nowait(self, max_bytes: int) -> bytes | None:
        stream = self._stream
        if not self._closed:
            data = self._session.read(stream, max_bytes, self._driver.turn.now())
            if data:
                self._driver.wake_writer()
                return data
        return self.receive_end()

    def receive_end(self) -> bytes | None:
        """What `receive_nowait` does when nothing is left to read."""
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._stream.end_received:
            return b""
        self._raise_if_broken()
        return None

    def put(self, data: Bytes) -> None:
        """Queue `data`, however much waits already."""
        self._raise_if_not_sendable()
        self._session.send(self._stream, data)
        self._driver.wake_writer()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Queue `data`, and wait until at most 64 KiB of this stream are queued, or fewer when memory is short.

        If cancelled, it has queued all of `data` or nothing. Queued data is still sent.

        Raises:
            trio.BrokenResourceError: the peer reset the stream, or the connection is gone.
            trio.ClosedResourceError: it was closed at this end, or `send_eof` was called.
        """
        with self._tasks.sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self.put(bytes(data))
            await self._wait_until(self._stream.may_return)
            self._stream.compact()

    @property
    def room(self) -> int:
        """Bytes that a sender should read from its source and send next; 0 while it should wait."""
        return self._stream.room

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until at least half of this stream's queue is free: 32 KiB or more, unless memory is short.

        Raises:
            As `send_all`.
        """
        with self._tasks.sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._raise_if_not_sendable()
            await self._wait_until(lambda: self._stream.room > 0)

    async def _wait_until(self, ready: Callable[[], bool]) -> None:
        if ready():
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        while not ready():
            # No deadline: the peer's application may read slowly. The connection's heartbeat detects a dead peer.
            await self._wait_writable()
            self._raise_if_not_sendable()

    async def send_eof(self) -> None:
        """Queue a FIN after all queued data. Receiving is still possible.

        Raises:
            trio.BrokenResourceError: the peer reset the stream, or the connection is gone.
            trio.ClosedResourceError: the stream was closed at this end.
        """
        with self._tasks.sending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self.put_eof()
            await trio.lowlevel.cancel_shielded_checkpoint()

    def put_eof(self) -> None:
        """Queue a FIN."""
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if self._stream.may_send:
            self._raise_if_broken()
            self._session.send_fin(self._stream)
            self._driver.wake_writer()

    def close_soon(self) -> None:
        """Do what `aclose` does, and return at once."""
        if not self._closed:
            self._closed = True
            self._session.close(self._stream, self._driver.turn.now())
            self._driver.wake_writer()
            self._wake()
            self._need_no_events()

    async def aclose(self) -> None:
        """Send what is queued and a FIN, and receive no more. Returns when both were passed to the link.

        When the peer accepts nothing for 30 seconds, or does not end its half in that time, the stream is reset. If
        cancelled, it is reset at once. Raises nothing but `trio.Cancelled`.
        """
        if self._closed:
            if trio.current_effective_deadline() > -math.inf:  # a forceful close costs each short connection two steps
                await trio.lowlevel.checkpoint()
            return
        self._closed = True
        self._wake()
        stream = self._stream
        try:
            await trio.lowlevel.checkpoint()
            self._session.close(stream, trio.current_time())
            self._driver.wake_writer()
            while not stream.flushed and self._driver.failure is None:
                await self._wait_writable()
        except trio.Cancelled:
            self._abandon()
            raise
        finally:
            self._need_no_events()

    async def wait_broken(self) -> bool:
        """Wait until the peer resets the stream, or the connection is gone; False when it was closed here."""
        # The session forgets a stream whose both halves have ended, so register with the driver.
        self._driver.watchers.add(self._stream)
        use = self._tasks
        try:
            while self.usable:
                # No deadline: most streams never break.
                await use.break_watchers.park()
        finally:
            if not use.break_watchers:
                self._driver.watchers.discard(self._stream)
        return not self._closed

    async def wait_flushed(self) -> None:
        """Wait until all queued data was passed to the link, or the stream is broken. The caller sets the deadline."""
        while not self._stream.flushed and self.usable:
            await self._wait_writable()

    def reset(self) -> None:
        """Reset the stream at once. Queued and unread data is dropped.

        It does nothing on a stream that was closed or reset before.
        """
        if not self._closed:
            self._closed = True
            self._abandon()
            self._wake()
            self._need_no_events()

    async def abort(self) -> None:
        self.reset()
        await trio.lowlevel.checkpoint()

    def _need_no_events(self) -> None:
        """It is closed, and no task waits any more. This breaks a reference cycle: to collect those takes time."""
        self._stream.owner = None

    def _abandon(self) -> None:
        self._session.reset(self._stream)
        self._driver.wake_writer()

    async def _wait_writable(self) -> None:
        self._stream.writer_waits = True
        writers = self._tasks.writers
        try:
            await writers.park()
        finally:
            self._stream.writer_waits = bool(writers)  # another task may still wait in `aclose`

    def _raise_if_not_sendable(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        self._raise_if_broken()
        if not self._stream.may_send:
            raise trio.ClosedResourceError("send_eof was called on this stream")

    def _raise_if_broken(self) -> None:
        if self._stream.was_reset:
            raise trio.BrokenResourceError("the stream was reset")
        failure = self._driver.failure
        if failure is not None:
            raise trio.BrokenResourceError(f"the stream's connection is gone: {failure}") from failure

    # Without waiting, for a link over this stream

    def watch(self, on_readable: Callable[[], object]) -> Nowait | None:
        if not Reactor.current().has_epoll:
            return None  # so that it can be watched where sockets can
        self.attach(_Watch(on_readable, self.on_writable))
        return self

    drained: Final = False

    def unwatch(self) -> None:
        self.detach()

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        data = self.receive_nowait(len(buffer))
        if data is None:
            return None
        buffer[: len(data)] = data
        return len(data)

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        left = [*pieces]
        self._raise_if_not_sendable()
        while left and self.room > 0:
            self.put(left.pop(0))
        return left

    # For its leg

    def leg(self) -> StreamLeg:
        return StreamLeg(self, self._stream, self._driver)

    def attach(self, leg: StreamLeg | _Watch) -> None:
        """Call `leg` back from now on, and wake no tasks."""
        self._stream.owner = leg
        self._driver.watchers.add(self._stream)

    def detach(self) -> None:
        """Wake tasks as before."""
        stream = self._stream
        stream.writer_waits = False
        self._driver.watchers.discard(stream)
        if stream.owner is not None:
            stream.owner = self

    # For the driver, while no leg is attached

    def on_readable(self) -> None:
        """Wake tasks that wait to receive, or for a break."""
        use = self._use
        if use is not None:
            use.readers.unpark_all()
            if use.break_watchers and not self.usable:
                use.break_watchers.unpark_all()

    def on_writable(self) -> None:
        """Wake tasks that wait to send."""
        if self._use is not None:
            self._use.writers.unpark_all()

    def _wake(self) -> None:
        owner = self._stream.owner
        owner.on_readable()
        owner.on_writable()

    def __repr__(self) -> str:
        return f"<YamuxStream {self._stream.id}{' closed' if self._closed else ''}>"
