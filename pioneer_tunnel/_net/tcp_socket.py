"""What a TCP connection does without waiting: the reads and writes that every byte passes. POSIX only.

`tcp` has what waits. Both kinds of calls may follow each other, so the state that both need is here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar, final

import trio

from .fastpath.event_loop import CAN_WATCH, HUNG_UP, Reactor
from .leg import Bytes
from .lent_socket import LentSocket
from .socket_options import descriptor_of, means_loss
from .turn import Turn

__all__ = ["MOST_PIECES", "TcpSocket", "without"]

MOST_PIECES: Final = 64
"""Pieces of one write. The system has a limit, too."""

_Into = TypeVar("_Into")
_Read = TypeVar("_Read", bound=bytes | int)


@final
class TcpSocket:
    """Reads and writes a socket by its descriptor. See `Nowait`.

    Args:
        lent: the socket, connected and non-blocking.
        now: `trio.current_time()`.

    Attributes:
        lent: see the argument.
        last_received: `trio.current_time()` when the last byte arrived; before that, `now`.
        sending_since: while a task sends, when it began, or when the socket last took bytes from it. Its owner sets it.
        end_sent: whether EOF was sent. Its owner sets it.
        drained: see `Nowait`.
    """

    _turn: Turn  # from `watch` on

    __slots__ = (
        "_hung_up",
        "_on_readable",
        "_turn",
        "_was_lost",
        "_watched",
        "drained",
        "end_sent",
        "last_received",
        "lent",
        "sending_since",
    )

    def __init__(self, lent: LentSocket, now: float) -> None:
        self.lent: Final = lent
        self.last_received: float = now
        self.sending_since: float | None = None
        self.end_sent: bool = False
        self.drained: bool = False  # until the next edge
        self._hung_up = False
        self._was_lost = False
        self._watched: int | None = None  # the descriptor, while it is watched
        self._on_readable: Callable[[], object] | None = None  # at the same time

    # For tasks, which wait when the answer is None, and try again

    def read(self, call: Callable[[int, _Into], _Read], into: _Into) -> _Read | None:
        """Read what has come, by `os.read` or `os.readv`; b"" or 0 at EOF."""
        try:
            read = call(descriptor_of(self.lent.socket), into)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.broken(error) from error
        if not read:
            self._raise_if_lost()
        self.last_received = trio.current_time()
        return read

    def write(self, pieces: Sequence[Bytes]) -> int | None:
        """Write as much of at most `MOST_PIECES` as is possible; returns how many bytes."""
        try:
            return os.writev(descriptor_of(self.lent.socket), pieces)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.broken(error) from error

    def raise_if_end_sent(self) -> None:
        if self.end_sent:
            raise trio.ClosedResourceError("this stream has sent its end")

    def broken(self, error: OSError) -> trio.BrokenResourceError:
        """What to raise for `error` of a call."""
        self._was_lost |= means_loss(error)
        return trio.BrokenResourceError(f"the connection is broken: {error.strerror}")

    def _raise_if_lost(self) -> None:
        # The kernel reports a loss once. If a send gets the report, a receive gets EOF, and a truncated answer would
        # look complete.
        if self._was_lost:
            raise trio.BrokenResourceError("the connection is broken: it was lost")

    # For who watches it

    def watch(self, on_readable: Callable[[], object]) -> bool:
        """See `ByteStream.watch`. False, and nothing happens, if that is not possible."""
        reactor = Reactor.current()
        if not (CAN_WATCH and reactor.has_epoll):
            return False
        descriptor = descriptor_of(self.lent.socket)
        try:
            reactor.watch(descriptor, self._on_events)
        except OSError:
            return False  # out of memory
        self._turn, self._on_readable, self._watched = reactor.turn, on_readable, descriptor
        self.lent.taken_back = self._on_taken_back
        return True

    def unwatch(self) -> None:
        """See `Nowait`."""
        if self._watched is not None:
            self.lent.taken_back = None
            Reactor.current().unwatch(self._watched)
            self._watched = self._on_readable = None

    def _on_events(self, events: int) -> None:
        assert self._on_readable is not None
        self.drained = False
        self._hung_up |= bool(events & HUNG_UP)
        self._on_readable()

    def _on_taken_back(self) -> None:
        on_readable = self._on_readable
        assert on_readable is not None
        self.unwatch()
        self._turn.run(on_readable)  # `receive_into_nowait` says that it was closed

    def receive_into_nowait(self, buffer: memoryview) -> int | None:
        """See `Nowait`."""
        if self._watched is None:
            raise trio.ClosedResourceError("this stream was closed")
        if self.drained:
            return None
        try:
            amount = os.readv(self._watched, (buffer,))
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.broken(error) from error
        if not amount:
            self._raise_if_lost()
        # Edges are reported once: a short read has emptied the socket, unless there are no more edges.
        self.drained = amount < len(buffer) and not self._hung_up
        now = self._turn.started
        self.last_received = self._turn.now() if now is None else now
        return amount

    def send_nowait(self, pieces: Sequence[Bytes]) -> list[Bytes]:
        """See `Nowait`. It sends nothing while a task sends."""
        if self.sending_since is not None:
            return [*pieces]
        if self.end_sent:
            self.raise_if_end_sent()
        descriptor = self._watched or descriptor_of(self.lent.socket)
        try:
            sent = os.writev(descriptor, pieces if len(pieces) <= MOST_PIECES else pieces[:MOST_PIECES])
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self.broken(error) from error
        return [] if sent == sum(map(len, pieces)) else without(pieces, sent)


def without(pieces: Sequence[Bytes], amount: int) -> list[Bytes]:
    """`pieces` without their first `amount` bytes."""
    for position, piece in enumerate(pieces):
        if amount < len(piece):
            return [memoryview(piece)[amount:], *pieces[position + 1 :]]
        amount -= len(piece)
    return []
