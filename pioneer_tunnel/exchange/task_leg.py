"""Any stream as a leg: two tasks wait where a callback would come. For streams that cannot be a leg themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, final

import trio

from .._net.leg import LARGEST_READ, Bytes, Leg
from .._net.streams import ByteStream
from .exchange import HandedOver

__all__ = ["TaskLeg", "leg_of"]


def leg_of(stream: ByteStream) -> Leg:
    """`stream` as a leg: its own if it has one, otherwise one with tasks."""
    return stream.leg() or TaskLeg(stream)


@final
class TaskLeg(Leg):
    """A stream in an exchange, driven by two tasks."""

    __slots__ = (
        "_asked",
        "_awaits_room",
        "_broken",
        "_data",
        "_eof_due",
        "_failure",
        "_reader",
        "_stream",
        "_wanted",
        "_waiting",
        "_writer",
    )

    def __init__(self, stream: ByteStream) -> None:
        super().__init__()
        self._stream: Final = stream
        self._reader: Final = trio.lowlevel.ParkingLot()
        self._writer: Final = trio.lowlevel.ParkingLot()
        self._wanted = 0
        self._data: Bytes | None = None  # was read, and not yet taken
        self._failure: Exception | None = None  # what the last read raised
        self._broken = False
        self._waiting: Bytes | None = None  # was sent, and not yet written
        self._eof_due = False
        self._awaits_room = False

    @property
    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return self._read, self._write

    def attach(self) -> None:
        """Nothing to do: the tasks begin to call back."""

    def detach(self) -> None:
        """Nothing to do: the tasks end."""

    def receive(self, max_bytes: int) -> Bytes | None:
        data = self._data
        if data is None:
            if self._failure is not None:
                raise self._failure
            self._wanted = max_bytes
            self._reader.unpark()
            return None
        if len(data) > max_bytes:
            view = memoryview(data)
            self._data = view[max_bytes:]
            return view[:max_bytes]
        if len(data):
            self._data = None
        return data

    def send(self, data: Bytes) -> bool:
        self._waiting = data if self._waiting is None else b"".join((self._waiting, data))
        self._writer.unpark()
        return False

    @property
    def held(self) -> int:
        return 0 if self._data is None else len(self._data)

    @property
    def room(self) -> int:
        if self._waiting is not None:
            return 0
        room = self._stream.room
        if room is None:
            return LARGEST_READ
        if not room:
            self._awaits_room = True
            self._writer.unpark()
        return room

    @property
    def sent(self) -> bool:
        return self._waiting is None and not self._eof_due

    @property
    def broken(self) -> bool:
        return self._broken

    @property
    def can_half_close(self) -> bool:
        return self._stream.can_half_close

    def send_eof(self) -> None:
        self._eof_due = True
        self._writer.unpark()

    async def _read(self) -> None:
        """The task that reads the stream, and waits for a break after EOF."""
        while self._data is None or len(self._data):
            while not self._wanted:
                await self._reader.park()
            try:
                data = await self._stream.receive_some(self._wanted)
            except (trio.BrokenResourceError, trio.ClosedResourceError, HandedOver) as error:
                self._failure = error
                self.on_readable()
                return
            self._wanted = 0
            self._data = data
            self.on_readable()
        # Otherwise a visitor that sent EOF and then left, or a lost link, would be noticed only by a write.
        if await self._stream.wait_broken():
            self._broken = True
            self.on_readable()

    async def _write(self) -> None:
        """The task that writes to the stream."""
        while self.refusal is None:
            try:
                if self._waiting is not None:
                    data = bytes(self._waiting)
                    await self._stream.send_pieces([data])
                    # More may have been sent meanwhile.
                    self._waiting = memoryview(self._waiting)[len(data) :] if len(self._waiting) > len(data) else None
                elif self._eof_due:
                    await self._stream.send_eof()
                    self._eof_due = False
                elif self._awaits_room:
                    # No deadline: the peer may read as slowly as it likes.
                    await self._stream.wait_send_all_might_not_block()
                    self._awaits_room = False
                else:
                    await self._writer.park()
                    continue
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.refusal, self._waiting, self._eof_due = error, None, False
                self._broken |= isinstance(error, trio.BrokenResourceError)
                self.on_readable()
            self.on_writable()
