"""A leg: one end of an exchange, as a source and a sink of bytes that never wait.

A leg calls back when there is something to do. So the bytes of a visitor need no task. `exchange` moves them between
two legs; a stream that can be a leg makes one in `ByteStream.leg`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

from .._model.callbacks import nothing

Bytes: TypeAlias = bytes | bytearray | memoryview

__all__ = ["LARGEST_READ", "SMALLEST_READ", "Bytes", "Leg"]

SMALLEST_READ: Final = 4 * 1024

LARGEST_READ: Final = 255 * 1024
"""Bytes that are moved at once, at the most."""


class Leg(ABC):
    """One end of an exchange. See the module.

    From `attach` to `detach`, the leg belongs to the exchange, and only the exchange may use its stream.

    Attributes:
        smallest_read: how many bytes to ask for as long as it sends little. Larger reads may allocate larger buffers.
        moves_bulk: whether `move_bulk` may move something.
        prefix: bytes that were read before; the exchange takes them first.
        refusal: why it takes no more, when that was found after a `send` had returned; what `send` would raise.
        on_readable: called when `receive` may return something again, and when the leg has broken.
        on_writable: called when `room` is no longer 0, when everything has been sent, and when there is a `refusal`.
    """

    __slots__ = ("on_readable", "on_writable", "prefix", "refusal")

    smallest_read: int = SMALLEST_READ
    moves_bulk: bool = False

    def __init__(self) -> None:
        self.refusal: Exception | None = None
        self.prefix: bytes = b""
        self.on_readable: Callable[[], object] = nothing
        self.on_writable: Callable[[], object] = nothing

    @property
    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        """Tasks that must run while it is attached."""
        return ()

    @abstractmethod
    def attach(self) -> None:
        """Begin to call back; again, it changes nothing. May raise `OSError`: out of descriptors or memory."""

    @abstractmethod
    def detach(self) -> None:
        """Call back no more. What was sent and has not left stays with the stream, see `unsent`."""

    @abstractmethod
    def receive(self, max_bytes: int) -> Bytes | None:
        """Take at most `max_bytes`; b"" at EOF; None when nothing has come: then `on_readable` follows.

        Raises:
            trio.BrokenResourceError: the connection is broken.
            trio.ClosedResourceError: the stream was closed.
        """

    @property
    def drained(self) -> bool:
        """True if `receive` would return None now, as far as the leg knows without trying."""
        return False

    def note_drained(self) -> None:  # noqa: B027  # the default
        """All that has come was read past this leg. `receive` finds that out by itself, but that takes longer."""

    @property
    def held(self) -> int:
        """How many bytes were read already, and wait in this process. They are moved also while there is no room."""
        return 0

    def move_bulk(self, sink: Leg) -> int:  # noqa: ARG002  # the default
        """Move much to `sink` at once, past this process; returns how much. With 0, use `receive`.

        Raises:
            trio.BrokenResourceError: `sink` takes no more.
        """
        return 0

    @abstractmethod
    def send(self, data: Bytes) -> bool:
        """Send all of `data`. What the connection does not take at once is kept, and `room` is 0 meanwhile.

        Returns `sent`.

        Raises:
            As `receive`.
        """

    @property
    @abstractmethod
    def room(self) -> int:
        """How many bytes to read for this leg and send next; 0 while it should wait for `on_writable`."""

    @property
    def sent(self) -> bool:
        """False while what was sent, EOF included, waits in this leg, and will be lost if the stream is closed."""
        return True

    @property
    @abstractmethod
    def broken(self) -> bool:
        """True when the peer has reset the connection or the connection was lost, also after EOF."""

    @property
    def can_half_close(self) -> bool:
        """False if EOF for this leg ends the whole exchange."""
        return True

    def lend(self, amount: int) -> None:  # noqa: B027  # most legs count nothing
        """Count `amount` bytes that were received last as held by their receiver, until the next `receive`."""

    @abstractmethod
    def send_eof(self) -> None:
        """Send EOF after all that was sent.

        Raises:
            As `receive`.
        """

    def close(self) -> bool:
        """Close in order, after EOF both ways. False if this takes time: then await the stream's `aclose`."""
        return False
