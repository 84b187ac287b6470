"""Joins two plain sockets: the fast path of `pump` when nothing stands between it and two sockets. Linux only.

How the bytes of a direction move when the event loop reports the source readable:

    a few          read into a buffer that all connections share, and write from it: two system calls
    a bulk         `os.splice` through a borrowed pipe: the bytes never enter this process
    bulk, no pipe  through the shared buffer, which is large

Nothing is allocated per connection. The shared buffer is empty again before the next turn: what a sink does
not take is copied, and its source is not read until that copy is written. Turns are short, so a bulk transfer delays
neither other connections nor other tasks.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import sys
from contextlib import suppress
from typing import Final, final

import trio

from ..lent_socket import LentSocket
from ..socket_options import descriptor_of, limit_unsent
from .event_loop import CAN_WATCH, Reactor, Stay
from .pipe_pool import CAN_PIPE, Pipe, Pipes

__all__ = ["CAN_JOIN", "Ending", "join"]

CAN_JOIN: Final = CAN_WATCH and CAN_PIPE
"""Whether this system has epoll and splice."""

_BUFFER_SIZE: Final = 256 * 1024
_WORTH_A_PIPE: Final = 64 * 1024
_NOT_WORTH_IT: Final = 16 * 1024

if sys.platform == "linux":
    _FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
    _ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


@final
class Ending(enum.Enum):
    """How an exchange between two connections ended."""

    CLOSED = enum.auto()
    """Both sent EOF, everything was passed on, and both are closed."""
    ENDED = enum.auto()
    """Both sent EOF. Neither is closed."""
    FIRST_BROKE = enum.auto()
    """Neither is closed."""
    SECOND_BROKE = enum.auto()
    """Neither is closed."""
    HANDED_OVER = enum.auto()
    """The second goes on without the first. Neither is closed."""


async def join(first: LentSocket, second: LentSocket) -> Ending:
    """Copy both ways until both sockets have sent EOF, pass each EOF on, then close both.

    If one of them takes no more while the other still sends, neither is closed: the close would reset the sender, since
    its data is unread.

    Raises:
        OSError: out of descriptors or memory; nothing was moved.
        trio.ClosedResourceError: the owner of one of them closed it.
        trio.BusyResourceError: one of them is joined already.
        trio.Cancelled: neither is closed.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        shared = _shared.get()
    except LookupError:
        shared = _Shared(Reactor.current())
        _shared.set(shared)
    with shared.reactor.stay() as stay:
        joint = _Joint(first, second, shared, stay)
        try:
            joint.begin()
            await stay.wait()
        finally:
            joint.leave()
    if isinstance(joint.ending, trio.ClosedResourceError):
        raise joint.ending
    assert joint.ending is not None
    return joint.ending


@final
class _Shared:
    """What all joints of one Trio run share."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor: Final = reactor
        self.buffer: Final = memoryview(bytearray(_BUFFER_SIZE))
        self.into: Final = [self.buffer]
        self.pipes: Final = Pipes()
        self.joints = 0


@final
class _Joint:
    """Two sockets that are being joined."""

    __slots__ = ("_ends", "_shared", "_stay", "ending", "refused")

    def __init__(self, first: LentSocket, second: LentSocket, shared: _Shared, stay: Stay) -> None:
        self._shared: Final = shared
        self._stay: Final = stay
        self.ending: Ending | trio.ClosedResourceError | None = None
        self.refused = False
        one, other = _End(first, self, shared), _End(second, self, shared)
        one.peer, other.peer = other, one
        self._ends: tuple[_End, ...] = (one, other)
        shared.joints += 1

    def begin(self) -> None:
        """Watch both."""
        for end in self._ends:
            self._shared.reactor.watch(end.descriptor, end.on_events)
            end.watched = True
            end.lent.taken_back = self._taken_back
        self._ends[0].move()  # most visitors have sent something already

    def leave(self) -> None:
        """Stop watching both: the exchange is over, or was cancelled."""
        # If cancelled, it has no ending yet. An end that is still queued does nothing once there is one: its descriptor
        # may soon be another connection's.
        self.end(trio.ClosedResourceError("this connection is not joined any more"))
        shared, ends = self._shared, self._ends
        for end in ends:
            end.release()
            if end.watched:
                end.lent.taken_back = None
                if self.ending is Ending.CLOSED:
                    shared.reactor.unwatch_closing(end.descriptor)
                else:
                    shared.reactor.unwatch(end.descriptor)
            if self.ending is Ending.CLOSED:
                end.lent.close()
        shared.joints -= 1
        if not shared.joints:
            shared.pipes.close()
        # Break reference cycles: collecting them costs each short connection some 20 us.
        self._ends = ()
        for end in ends:
            del end.peer

    def end(self, ending: Ending | trio.ClosedResourceError) -> None:
        """Record how it ended. Later calls change nothing."""
        if self.ending is None:
            self.ending = ending
            self._stay.end()

    def break_off(self, end: _End) -> None:
        """End because the connection of `end` broke."""
        self.end(Ending.FIRST_BROKE if end is self._ends[0] else Ending.SECOND_BROKE)

    def _taken_back(self) -> None:
        for end in self._ends:
            end.lent.taken_back = None
            end.watched = False
            self._shared.reactor.unwatch(end.descriptor)
        self.end(trio.ClosedResourceError("this connection was closed"))


@final
class _End:
    """One of two joined sockets: a source, whose bytes go to its peer."""

    __slots__ = (
        "_bulk",
        "_hung_up",
        "_joint",
        "_pipe",
        "_piped",
        "_queued",
        "_rest",
        "_shared",
        "_watched_writable",
        "_was_reset",
        "descriptor",
        "done",
        "lent",
        "peer",
        "watched",
    )

    peer: _End

    def __init__(self, lent: LentSocket, joint: _Joint, shared: _Shared) -> None:
        self._joint: Final = joint
        self._shared: Final = shared
        self.lent: Final = lent
        self.descriptor: Final = descriptor_of(lent.socket)
        self.watched = False
        self._watched_writable = False
        self._queued = False
        self._bulk = False
        # What the peer has not taken yet, in a pipe or as a copy. Until it is taken, nothing more is read.
        self._pipe: Pipe | None = None
        self._piped = 0
        self._rest: memoryview | None = None
        # Nothing more will be read.
        self.done = False
        # No more edges come after a hang-up, so read until EOF.
        self._hung_up = False
        # The kernel reports a reset once, and a write got the report. So EOF on this socket means a reset.
        self._was_reset = False

    def on_events(self, events: int) -> None:
        """The socket is readable, writable again, or hung up."""
        if events & _ENDED:
            self._hung_up = True
        if not self.done:
            self._queue()
        elif events & select.EPOLLERR:
            self._joint.break_off(self)
        peer = self.peer
        if peer._piped or peer._rest:
            peer._queue()

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self._shared.reactor.queue(self._take_turn)

    def _take_turn(self) -> int:
        self._queued = False
        return self.move()

    def move(self) -> int:
        """Move at most one turn's worth to the peer; returns how many bytes were read."""
        if self._joint.ending is not None:
            return 0
        if (self._piped or self._rest) and not self._push():
            return 0
        if self.done:
            return 0
        try:
            return self._splice() if self._bulk else self._copy()
        except BlockingIOError:
            return 0  # the next edge tells of more
        except OSError:
            self._joint.break_off(self)
            return 0

    def _copy(self) -> int:
        shared = self._shared
        amount = os.readv(self.descriptor, shared.into)
        if not amount:
            self._end()
            return 0
        self._bulk = amount >= _WORTH_A_PIPE
        try:
            written = os.write(self.peer.descriptor, shared.buffer[:amount])
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._refuse(error)
            return amount
        if written < amount:
            self._rest = memoryview(bytes(shared.buffer[written:amount]))
            self._watch_peer_writable()
        elif self._bulk or self._hung_up:
            # Otherwise this read emptied the socket, and more data makes an edge.
            self._queue()
        return amount

    def _splice(self) -> int:
        pipes = self._shared.pipes
        pipe = pipes.borrow()
        if pipe is None:
            return self._copy()
        try:
            amount = os.splice(self.descriptor, pipe.writable, pipe.size, flags=_FLAGS)
        except OSError as error:
            pipes.give_back(pipe, empty=True)
            if error.errno == errno.EINVAL:  # this kind of socket cannot be spliced
                return self._copy()
            raise
        if not amount:
            pipes.give_back(pipe, empty=True)
            self._end()
            return 0
        self._pipe, self._piped = pipe, amount
        self._bulk = amount >= _NOT_WORTH_IT
        if self._push():
            self._queue()
        return amount

    def _push(self) -> bool:
        """Write what is held to the peer; False if some is left, or the peer takes no more."""
        sink = self.peer.descriptor
        try:
            while self._piped:
                assert self._pipe is not None
                self._piped -= os.splice(self._pipe.readable, sink, self._piped, flags=_FLAGS)
            while self._rest:
                self._rest = self._rest[os.write(sink, self._rest) :]
        except BlockingIOError:
            self._watch_peer_writable()
            return False
        except OSError as error:
            self._refuse(error)
            return False
        self.release()
        return True

    def _watch_peer_writable(self) -> None:
        sink = self.peer
        if not sink._watched_writable:
            sink._watched_writable = True
            limit_unsent(sink.lent.socket)
            self._shared.reactor.watch_writable(sink.descriptor)

    def release(self) -> None:
        """Return the pipe and drop what is held."""
        if self._pipe is not None:
            self._shared.pipes.give_back(self._pipe, empty=not self._piped)
        self._pipe, self._piped, self._rest = None, 0, None

    def _end(self) -> None:
        """Everything was passed on: pass EOF on."""
        if self._was_reset:
            self._joint.break_off(self)
            return
        if not self.peer.done or self._joint.refused:  # otherwise it is closed next, which sends FIN too
            with suppress(OSError):  # the other direction finds the error
                self.peer.lent.socket.shutdown(socket.SHUT_WR)
        self._finish()

    def _refuse(self, error: OSError) -> None:
        """The peer takes no more. What it sends is copied all the same.

        It may be the answer to a request that the peer did not read to the end.
        """
        self.release()
        self._joint.refused = True
        # The kernel reports a reset once. A read after this write gets EOF, and a truncated answer would look complete.
        self.peer._was_reset = error.errno == errno.ECONNRESET
        self._finish()

    def _finish(self) -> None:
        self.done = True
        if self.peer.done:
            self._joint.end(Ending.ENDED if self._joint.refused else Ending.CLOSED)


_shared: Final[trio.lowlevel.RunVar[_Shared]] = trio.lowlevel.RunVar("pioneer_tunnel.splice")
