"""Two plain sockets joined, past everything: the short way of `pump`, when nothing stands between it and two sockets.

How a direction's bytes move, when the reactor says that there are some:

    little at a time      read into a buffer that all share, write from it at once: two system calls
    much at a time        `os.splice` through a borrowed pipe: the bytes never come into this process
    much, no pipe         the shared buffer again, which is large
    much, small pieces    the same, of more at a time: the system tells of it only when that much is there

Nothing is set up for one connection alone, and the buffer is empty again before the next one's turn: what a sink does
not take is copied and kept, and its source is not read before that is gone. Turns are short, so that a bulk transfer
delays neither the other connections nor the other tasks of this run.

Linux only. Neighbours: `pump` decides when to come here, and what a break means; `sockets.LentSocket` is what is
joined; `reactor` watches all of them in one task.
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
from .event_loop import CAN_WATCH, REMINDED_AFTER, Reactor, Stay
from .pipe_pool import CAN_PIPE, Pipe, Pipes

__all__ = ["CAN_JOIN", "Ending", "join"]

CAN_JOIN: Final = CAN_WATCH and CAN_PIPE
"""Whether this system has what it takes."""

_BUFFER_SIZE: Final = 256 * 1024
_WORTH_A_PIPE: Final = 64 * 1024
_NOT_WORTH_IT: Final = 16 * 1024

_GATHERED: Final = 256 * 1024
"""Bytes that are waited for when a bulk comes fast and in small pieces, each of which costs as much as a large one."""

_PIECE: Final = range(4 * 1024, _GATHERED + 1)
_FAST: Final = 2 * _GATHERED / REMINDED_AFTER
"""Bytes per second; so the wait is mostly over before the reminder."""

_LONG: Final = 4 * 1024 * 1024
"""Bytes in small pieces after which gathering is tried: a wait in vain at the end of them hardly counts then."""

_CONVERSATION: Final = 8
"""Changes of who speaks after which two ends are taken to be talking to and fro."""

if sys.platform == "linux":
    _FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
    _ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


@final
class Ending(enum.Enum):
    """What became of two connections that were carried into each other."""

    CLOSED = enum.auto()
    """Both have ended, everything was passed on, and both are closed."""
    ENDED = enum.auto()
    """Both have said all that they had to say, and are open still."""
    FIRST_BROKE = enum.auto()
    """Neither is closed."""
    SECOND_BROKE = enum.auto()
    """Neither is closed."""
    HANDED_OVER = enum.auto()
    """The second goes on without the first. Neither is closed."""


async def join(first: LentSocket, second: LentSocket) -> Ending:
    """Carry bytes both ways until both sockets have ended, each end passed on to the other, then close them.

    When one of them takes no more while the other still speaks, neither is closed at the end: what the other one says
    has nowhere to go, and it would be told so by a reset.

    Raises:
        OSError: the system has nothing left to watch them with; nothing was moved.
        trio.ClosedResourceError: the owner of one of them has closed it.
        trio.BusyResourceError: one of them is joined already.
        trio.Cancelled: when cancelled; they are open.
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
    """What all joints of one Trio run use in turns."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor: Final = reactor
        self.buffer: Final = memoryview(bytearray(_BUFFER_SIZE))
        self.into: Final = [self.buffer]
        self.pipes: Final = Pipes()
        self.joints = 0


@final
class _Joint:
    """Two sockets that are being joined."""

    __slots__ = ("_changes", "_ends", "_shared", "_speaker", "_stay", "ending", "refused")

    def __init__(self, first: LentSocket, second: LentSocket, shared: _Shared, stay: Stay) -> None:
        self._shared: Final = shared
        self._stay: Final = stay
        self.ending: Ending | trio.ClosedResourceError | None = None
        self.refused = False
        self._speaker = -1  # its descriptor
        self._changes = 0
        one, other = _End(first, self, shared), _End(second, self, shared)
        one.peer, other.peer = other, one
        self._ends: tuple[_End, ...] = (one, other)
        shared.joints += 1

    def begin(self) -> None:
        """Have both watched."""
        for end in self._ends:
            self._shared.reactor.watch(end.descriptor, end.on_events)
            end.watched = True
            end.lent.taken_back = self._taken_back
        self._ends[0].move()  # as a rule the visitor has spoken already, and the local gateway waits for it

    def leave(self) -> None:
        """Let go of both: over, or cancelled."""
        # Cancelled, it has no ending yet. An end that is queued still must not be moved: its descriptor is somebody
        # else's soon.
        self.end(trio.ClosedResourceError("this connection is not joined any more"))
        shared, ends = self._shared, self._ends
        for end in ends:
            end.leave()
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
        # Circles would be left to the garbage collector, whose rounds cost each short connection some 20 us.
        self._ends = ()
        for end in ends:
            del end.peer

    def end(self, ending: Ending | trio.ClosedResourceError) -> None:
        """Settle how it ended; what comes later changes nothing."""
        if self.ending is None:
            self.ending = ending
            self._stay.end()

    def note_speech(self, descriptor: int) -> None:
        """A few words of one of the two were passed on."""
        if descriptor != self._speaker:
            self._speaker = descriptor
            self._changes += 1
        if self._changes > _CONVERSATION:
            self._shared.reactor.expect_answer()

    def break_off(self, end: _End) -> None:
        """One of the two broke."""
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
        "_gather_after",
        "_gathered",
        "_gathers",
        "_hung_up",
        "_joint",
        "_pipe",
        "_piped",
        "_queued",
        "_rest",
        "_shared",
        "_small",
        "_small_since",
        "_watched_for_room",
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
        self._watched_for_room = False
        self._queued = False
        self._bulk = False
        # Small pieces in a row: their bytes, and when the first of them came.
        self._small = 0
        self._small_since = 0.0
        # After how many of them to gather; how many bytes have come since.
        self._gather_after = _LONG
        self._gathers = False
        self._gathered = 0
        # What the peer has not taken yet, in a pipe or as a copy. While there is some, nothing more is read.
        self._pipe: Pipe | None = None
        self._piped = 0
        self._rest: memoryview | None = None
        # Nothing more is read at all.
        self.done = False
        # No edge will come any more, so what is there to be read has to be read to its end.
        self._hung_up = False
        # The system has told of a reset already, and tells of it once: the end of this socket will be none.
        self._was_reset = False

    def on_events(self, events: int) -> None:
        """There is something to read, or there is room again, or an end."""
        if events & _ENDED:
            self._hung_up = True
        if not self.done:
            self._queue()
        elif events & select.EPOLLERR:
            self._joint.break_off(self)
        peer = self.peer
        if peer._piped or peer._rest:
            peer._queue()

    def leave(self) -> None:
        """Nothing is moved any more."""
        self.let_go_of_what_is_held()
        if self._gathers:
            self._shared.reactor.do_not_remind(self._stop_gathering)
            self._be_told_of(1)

    def _queue(self) -> None:
        if not self._queued:
            self._queued = True
            self._shared.reactor.queue(self._take_turn)

    def _take_turn(self) -> int:
        self._queued = False
        return self.move()

    def move(self) -> int:
        """Bring the peer what there is, a turn's worth at the most; returns how many bytes were read."""
        if self._joint.ending is not None:
            return 0
        if (self._piped or self._rest) and not self._push():
            return 0
        if self.done:
            return 0
        try:
            return self._splice() if self._bulk else self._copy()
        except BlockingIOError:
            return 0  # it will have more at the next edge
        except OSError:
            self._joint.break_off(self)
            return 0

    def _copy(self) -> int:
        shared = self._shared
        amount = os.readv(self.descriptor, shared.into)
        if not amount:
            self._end()
            return 0
        self._note_amount(amount, enough=_WORTH_A_PIPE)
        try:
            written = os.write(self.peer.descriptor, shared.buffer[:amount])
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._refuse(error)
            return amount
        if written < amount:
            self._rest = memoryview(bytes(shared.buffer[written:amount]))
            self._watch_for_room()
        elif self._bulk or self._hung_up:
            # Otherwise the read has emptied it, and whatever comes after makes an edge.
            self._go_on()
        else:
            self._joint.note_speech(self.descriptor)
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
            if error.errno == errno.EINVAL:  # a socket that is not made for it
                return self._copy()
            raise
        if not amount:
            pipes.give_back(pipe, empty=True)
            self._end()
            return 0
        self._pipe, self._piped = pipe, amount
        self._note_amount(amount, enough=_NOT_WORTH_IT)
        if self._push():
            self._go_on()
        return amount

    def _go_on(self) -> None:
        """There may be more, which only the next read tells."""
        if self._gathers:
            self._shared.reactor.watch_anew(self.descriptor, room=self._watched_for_room)
            self._shared.reactor.remind(self._stop_gathering)
        else:
            self._queue()

    def _note_amount(self, amount: int, *, enough: int) -> None:
        """See from what has come how the next is read best."""
        if self._gathers:
            self._gathered += amount
            return
        self._bulk = amount >= enough
        if amount not in _PIECE:
            self._small = 0
            return
        if not self._small:
            self._small_since = trio.current_time()
        self._small += amount
        if self._small >= self._gather_after:
            elapsed = trio.current_time() - self._small_since
            if elapsed and self._small > _FAST * elapsed:  # a test's clock may stand still
                self._gather()
            self._small = 0

    def _gather(self) -> None:
        """Have the system tell of this source only when much is there, or its end. A reminder is due all the while."""
        self._gathers, self._gathered, self._bulk = True, 0, True
        self._be_told_of(_GATHERED)
        self._shared.reactor.remind(self._stop_gathering)

    def _stop_gathering(self) -> None:
        """Not much has come in time: what is there is brought now."""
        self._gathers = False
        if self._gathered < self._gather_after:
            self._gather_after *= 2  # requests, each of which waits for its answer, look like a bulk
        self._be_told_of(1)
        self._queue()

    def _be_told_of(self, least: int) -> None:
        with suppress(OSError):  # where it has no such thing, or was closed
            self.lent.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)

    def _push(self) -> bool:
        """Bring the peer what is held; False when something is left, or the peer takes no more."""
        sink = self.peer.descriptor
        try:
            while self._piped:
                assert self._pipe is not None
                self._piped -= os.splice(self._pipe.readable, sink, self._piped, flags=_FLAGS)
            while self._rest:
                self._rest = self._rest[os.write(sink, self._rest) :]
        except BlockingIOError:
            self._watch_for_room()
            return False
        except OSError as error:
            self._refuse(error)
            return False
        self.let_go_of_what_is_held()
        return True

    def _watch_for_room(self) -> None:
        sink = self.peer
        if not sink._watched_for_room:
            sink._watched_for_room = True
            limit_unsent(sink.lent.socket)
            self._shared.reactor.watch_for_room(sink.descriptor)

    def let_go_of_what_is_held(self) -> None:
        """It will not be brought any more, or has been."""
        if self._pipe is not None:
            self._shared.pipes.give_back(self._pipe, empty=not self._piped)
        self._pipe, self._piped, self._rest = None, 0, None

    def _end(self) -> None:
        """Everything was passed on, so the end is, too."""
        if self._was_reset:
            self._joint.break_off(self)
            return
        if not self.peer.done or self._joint.refused:  # or else it is about to be closed, which says the same
            with suppress(OSError):  # the other direction finds what is wrong
                self.peer.lent.socket.shutdown(socket.SHUT_WR)
        self._finish()

    def _refuse(self, error: OSError) -> None:
        """The peer takes no more. What it has to say itself is carried all the same.

        It may be the answer to a request that it did not want to read to the end.
        """
        self.let_go_of_what_is_held()
        self._joint.refused = True
        # The system tells of a reset once. When the one who writes hears of it, the one who reads is told of an end,
        # and half an answer would pass for a whole one.
        self.peer._was_reset = error.errno == errno.ECONNRESET
        self._finish()

    def _finish(self) -> None:
        self.done = True
        if self.peer.done:
            self._joint.end(Ending.ENDED if self._joint.refused else Ending.CLOSED)


_shared: Final[trio.lowlevel.RunVar[_Shared]] = trio.lowlevel.RunVar("pioneer_tunnel.splice")
