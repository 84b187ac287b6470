"""A plain socket as a leg: read and written by its descriptor when the event loop reports it ready. Linux only.

How the bytes of a direction between two such legs move:

    a few          `os.read` and `os.write`
    a bulk         `os.splice` through a borrowed pipe: the bytes never enter this process
    bulk, no pipe  `os.read` and `os.write` of large pieces
"""

from __future__ import annotations

import errno
import os
import select
import sys
from typing import Final, final

import trio

from ..leg import LARGEST_READ, Bytes, Leg
from ..lent_socket import LentSocket
from ..socket_options import descriptor_of, limit_unsent, means_loss
from .event_loop import HUNG_UP, Reactor
from .pipe_pool import CAN_PIPE, Pipe

__all__ = ["SocketLeg"]

if sys.platform == "linux":
    _FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
    _READABLE: Final = select.EPOLLIN | HUNG_UP


@final
class SocketLeg(Leg):
    """A connected socket. `close` sends a FIN.

    Args:
        lent: the socket. From `attach` to `detach` the event loop watches it.
        reactor: the event loop; by default that of this Trio run.
    """

    __slots__ = (
        "_attached",
        "_closed",
        "_descriptor",
        "_eof_due",
        "_failed",
        "_hung_up",
        "_lent",
        "_pipe",
        "_piped",
        "_pipes",
        "_reactor",
        "_rest",
        "_spliceable",
        "_was_lost",
        "_watched_writable",
        "drained",
    )

    moves_bulk = True

    def __init__(self, lent: LentSocket, reactor: Reactor | None = None) -> None:
        super().__init__()
        self._lent: Final = lent
        self._descriptor: Final = descriptor_of(lent.socket)
        self._reactor: Final = reactor or Reactor.current()
        self._pipes: Final = self._reactor.pipes
        self._attached = False
        self._closed = False
        # Edges are reported once. `drained`: nothing to read until the next edge.
        self.drained: bool = False
        # No more edges come after a hang-up: read until EOF.
        self._hung_up = False
        self._failed = False
        # The kernel reports a loss once. If a write gets the report, EOF on this socket means a loss.
        self._was_lost = False
        self._spliceable = CAN_PIPE
        # What was sent and the socket has not taken yet: a copy, or in a pipe.
        self._rest: memoryview | None = None
        self._pipe: Pipe | None = None
        self._piped = 0
        self._eof_due = False
        self._watched_writable = False

    def attach(self) -> None:
        if self._attached:
            return
        self._reactor.watch(self._descriptor, self._on_events)
        self._pipes.users += 1
        self._attached, self._closed = True, False
        self._lent.taken_back = self._on_taken_back

    def detach(self) -> None:
        if self._attached:
            self._forget()
            self._reactor.unwatch(self._descriptor)

    def close(self) -> bool:
        if self._attached:
            self._forget()
            self._reactor.unwatch_closing(self._descriptor)
            self._lent.close()
        return True

    def _forget(self) -> None:
        self._attached, self._closed = False, True
        self._lent.taken_back = None
        self._release()
        self._pipes.leave()

    def receive(self, max_bytes: int) -> bytes | None:
        """See `Leg`. It may also be called before `attach`, to take what has come already."""
        if self._closed:
            raise trio.ClosedResourceError("this connection was closed")
        if self.drained:
            return None
        try:
            data = os.read(self._descriptor, max_bytes)
        except BlockingIOError:
            self.drained = True
            return None
        except OSError as error:
            raise self._broken_by(error) from error
        if not data:
            if self._was_lost:
                raise trio.BrokenResourceError("the connection is broken: it was lost")
        elif self._hung_up:
            self._reactor.queue(self._read_on)
        elif len(data) < max_bytes:
            self.drained = True  # more data makes an edge
        return data

    def note_drained(self) -> None:
        self.drained = True  # what comes now makes an edge, also before `attach`

    def move_bulk(self, sink: Leg) -> int:
        pipe = self._pipes.borrow() if self._spliceable and not self.drained and isinstance(sink, SocketLeg) else None
        if pipe is None:
            return 0
        assert isinstance(sink, SocketLeg)
        try:
            amount = os.splice(self._descriptor, pipe.writable, pipe.size, flags=_FLAGS)
        except BlockingIOError:
            self.drained = True
            amount = 0
        except OSError as error:
            self._spliceable = error.errno != errno.EINVAL  # this kind of socket cannot be spliced
            self._was_lost |= self._spliceable
            amount = 0
        if not amount:
            self._pipes.give_back(pipe, empty=True)
            return 0  # `receive` finds out why
        sink._take_pipe(pipe, amount)
        return amount

    def send(self, data: Bytes) -> bool:
        if not self._attached:
            raise trio.ClosedResourceError("this connection was closed")
        if self._rest is not None or self._piped:
            self._rest = memoryview(b"".join((self._rest or b"", data)))
            return False
        try:
            written = os.write(self._descriptor, data)
        except BlockingIOError:
            written = 0
        except OSError as error:
            raise self._broken_by(error) from error
        if written < len(data):
            self._rest = memoryview(data)[written:]
            self._watch_writable()
            return False
        return True

    @property
    def room(self) -> int:
        return 0 if self._rest is not None or self._piped else LARGEST_READ

    @property
    def sent(self) -> bool:
        return self._rest is None and not self._piped and not self._eof_due

    @property
    def broken(self) -> bool:
        return self._failed or not self._attached

    def send_eof(self) -> None:
        if not self._attached:
            raise trio.ClosedResourceError("this connection was closed")
        if self._rest is not None or self._piped:
            self._eof_due = True
            return
        try:
            self._lent.shut_down()
        except OSError as error:
            raise self._broken_by(error) from error

    def _on_events(self, events: int) -> None:
        """The socket is readable, writable again, or hung up."""
        readable = events & _READABLE
        if readable:
            self.drained = False
        if events & HUNG_UP:
            self._hung_up = True
            self._failed |= bool(events & select.EPOLLERR)
        if self._rest is not None or self._piped:
            self._push()
        if readable:
            self.on_readable()

    def _read_on(self) -> int:
        self.on_readable()
        return 0

    def _take_pipe(self, pipe: Pipe, amount: int) -> None:
        self._pipe, self._piped = pipe, amount
        if self._write_waiting():
            self._release()
        else:
            self._watch_writable()

    def _push(self) -> None:
        """Write what waits, as far as the socket takes it."""
        try:
            if not self._write_waiting():
                return
            self._release()
            if self._eof_due:
                self._eof_due = False
                self.send_eof()
        except trio.BrokenResourceError as error:
            self.refusal = error
        self.on_writable()

    def _write_waiting(self) -> bool:
        """Write what waits; False if some is left. If the socket takes no more, drop it."""
        try:
            while self._piped:
                assert self._pipe is not None
                self._piped -= os.splice(self._pipe.readable, self._descriptor, self._piped, flags=_FLAGS)
            while self._rest:
                written = os.write(self._descriptor, self._rest)
                self._rest = self._rest[written:]
        except BlockingIOError:
            return False
        except OSError as error:
            self._release()
            self._eof_due = False
            raise self._broken_by(error) from error
        return True

    def _release(self) -> None:
        """Return the pipe, and drop what waits."""
        if self._pipe is not None:
            self._pipes.give_back(self._pipe, empty=not self._piped)
        self._pipe, self._piped, self._rest = None, 0, None

    def _watch_writable(self) -> None:
        if not self._watched_writable:
            self._watched_writable = True
            limit_unsent(self._lent.socket)
            self._reactor.watch_writable(self._descriptor)

    def _on_taken_back(self) -> None:
        self.detach()
        self.on_readable()

    def _broken_by(self, error: OSError) -> trio.BrokenResourceError:
        self._failed = True
        self._was_lost |= means_loss(error)
        return trio.BrokenResourceError(f"the connection is broken: {error.strerror}")
