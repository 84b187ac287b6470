"""Two plain sockets joined, past everything: the short way of `pump`, when nothing stands between it and two sockets.

Theory of operation. A Trio task for each direction of each connection costs more than the bytes of a short one, so
there is none. All joined sockets of a Trio run are watched by one epoll of our own, edge-triggered, which Trio watches
in its turn. One of the tasks that wait in `join` is the leader: it waits for that epoll and moves the bytes of all;
the others sleep until their connection is over. A leader whose own connection is over, or who is cancelled, appoints
another. So no task runs that nobody can see, and the last one to leave closes what was shared.

How a direction's bytes move:

    little at a time      read into a buffer that all share, write from it at once: two system calls
    much at a time        `os.splice` through a borrowed pipe: the bytes never come into this process
    much, no pipe         the shared buffer again, which is large

Nothing is set up for one connection alone, and the buffer is empty again before the next one's turn: what a sink does
not take is copied and kept, and its source is not read before that is gone. Turns are short, so that a bulk transfer
delays neither the other connections nor the other tasks of this run.

Linux only. Neighbours: `pump` decides when to come here, and what a break means; `sockets.LentSocket` is what is
joined.
"""

from __future__ import annotations

import enum
import errno
import os
import select
import socket
import sys
from collections import deque
from contextlib import suppress
from typing import Final, final

import trio

from .pipes import Pipe, Pipes
from .sockets import LentSocket, descriptor_of

__all__ = ["CAN_JOIN", "Ending", "join"]

CAN_JOIN: Final = sys.platform == "linux"
"""Whether this system has what it takes."""

_BUFFER_SIZE: Final = 256 * 1024
_TURN: Final = 1024 * 1024
"""Bytes that are moved before other tasks get theirs."""

_WORTH_A_PIPE: Final = 64 * 1024
_NOT_WORTH_IT: Final = 16 * 1024
_MOST_EVENTS: Final = 256

if sys.platform == "linux":
    _FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
    _ENDED: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
    _WATCHED: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


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


async def join(first: LentSocket, second: LentSocket) -> Ending:
    """Carry bytes both ways until both sockets have ended, each end passed on to the other, then close them.

    When one of them takes no more while the other still speaks, neither is closed at the end: what the other one says
    has nowhere to go, and it would be told so by a reset.

    Raises:
        trio.ClosedResourceError: the owner of one of them has closed it.
        trio.BusyResourceError: one of them is joined already.
        trio.Cancelled: when cancelled; they are open.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        joiner = _joiner.get()
    except LookupError:
        joiner = _Joiner()
        _joiner.set(joiner)
    return await joiner.join(_Joint(first, second))


@final
class _End:
    """One of two joined sockets: a source, whose bytes go to its peer."""

    __slots__ = (
        "bulk",
        "descriptor",
        "done",
        "hung_up",
        "joint",
        "lent",
        "peer",
        "pipe",
        "piped",
        "queued",
        "rest",
        "was_reset",
        "watched_for_room",
    )

    peer: _End

    def __init__(self, lent: LentSocket, joint: _Joint) -> None:
        self.lent: Final = lent
        self.joint: Final = joint
        self.descriptor: Final = descriptor_of(lent.socket)
        self.queued = False
        self.bulk = False
        # What the peer has not taken yet, in a pipe or as a copy. While there is some, nothing more is read.
        self.pipe: Pipe | None = None
        self.piped = 0
        self.rest: memoryview | None = None
        # Nothing more is read at all.
        self.done = False
        # No edge will come any more, so what is there to be read has to be read to its end.
        self.hung_up = False
        # The system has told of a reset already, and tells of it once: the end of this socket will be none.
        self.was_reset = False
        self.watched_for_room = False


@final
class _Joint:
    """Two joined sockets, and the task that waits for their end."""

    __slots__ = ("ending", "ends", "refused", "task")

    def __init__(self, first: LentSocket, second: LentSocket) -> None:
        one, other = _End(first, self), _End(second, self)
        one.peer, other.peer = other, one
        self.ends: Final = (one, other)
        self.refused = False
        self.ending: Ending | trio.ClosedResourceError | None = None
        self.task: trio.lowlevel.Task | None = None

    def end(self, ending: Ending | trio.ClosedResourceError) -> None:
        """Settle how it ended; what comes later changes nothing."""
        if self.ending is None:
            self.ending = ending
            self.wake()

    def wake(self) -> None:
        """Let the task run if it sleeps: it is over, or the lead is its."""
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None

    async def sleep(self) -> None:
        """Until woken. No deadline: a visitor may stay for as long as it likes."""

        def on_cancellation(_: object) -> trio.lowlevel.Abort:
            self.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(on_cancellation)


@final
class _Joiner:
    """Everything that is joined in one Trio run."""

    def __init__(self) -> None:
        self._joints: Final[dict[_Joint, None]] = {}
        self._leader: _Joint | None = None
        self._ends: Final[dict[int, _End]] = {}
        self._ready: Final[deque[_End]] = deque()
        self._buffer: Final = memoryview(bytearray(_BUFFER_SIZE))
        self._into: Final = [self._buffer]
        self._pipes: Final = Pipes()
        self._epoll: select.epoll  # while there are joints
        self._news: int  # its descriptor

    async def join(self, joint: _Joint) -> Ending:
        """See the module's `join`."""
        self._enter(joint)
        try:
            while joint.ending is None:
                if self._leader is None:
                    self._leader = joint
                if self._leader is joint:
                    await self._lead(joint)
                else:
                    await joint.sleep()
        finally:
            self._leave(joint)
        if isinstance(joint.ending, trio.ClosedResourceError):
            raise joint.ending
        return joint.ending

    def _enter(self, joint: _Joint) -> None:
        if any(end.descriptor in self._ends for end in joint.ends):
            raise trio.BusyResourceError("this connection is joined to another one already")
        if not self._joints:
            self._epoll = select.epoll()
            self._news = self._epoll.fileno()
        self._joints[joint] = None

        def taken_back() -> None:
            self._unwatch(joint)
            joint.ending = trio.ClosedResourceError("this connection was closed")
            if self._leader is joint:
                trio.lowlevel.notify_closing(self._news)  # the leader does not sleep, but waits for news
            joint.wake()

        for end in joint.ends:
            end.lent.taken_back = taken_back
            self._ends[end.descriptor] = end
            self._epoll.register(end.descriptor, _WATCHED)
        self._move(joint.ends[0])  # as a rule the visitor has spoken already, and the local gateway waits for it

    def _leave(self, joint: _Joint) -> None:
        # Cancelled, it has no ending yet. An end that is queued still must not be moved: its descriptor is somebody
        # else's soon.
        joint.end(trio.ClosedResourceError("this connection is not joined any more"))
        for end in joint.ends:
            end.lent.taken_back = None
            self._let_go_of_what_is_held(end)
        if joint.ending is Ending.CLOSED:
            for end in joint.ends:
                del self._ends[end.descriptor]
                end.lent.close()  # which takes it out of the epoll, too
        else:
            self._unwatch(joint)
        del self._joints[joint]
        if self._leader is joint:
            # One that sleeps. Where there is none, whoever comes next takes the lead.
            self._leader = next((other for other in self._joints if other.task is not None), None)
            if self._leader is not None:
                self._leader.wake()
        if not self._joints:
            trio.lowlevel.notify_closing(self._news)
            self._epoll.close()
            self._pipes.close()
            self._ready.clear()

    def _unwatch(self, joint: _Joint) -> None:
        for end in joint.ends:
            if self._ends.get(end.descriptor) is end:
                del self._ends[end.descriptor]
                self._epoll.unregister(end.descriptor)

    async def _lead(self, joint: _Joint) -> None:
        """Move the bytes of all, until `joint` is over."""
        while joint.ending is None:
            if self._ready:
                await trio.lowlevel.checkpoint()
            else:
                with suppress(trio.ClosedResourceError):
                    # No deadline: when nobody has anything to say, there is nothing to do.
                    await trio.lowlevel.wait_readable(self._news)
            self._take_a_turn()

    def _take_a_turn(self) -> None:
        for descriptor, events in self._epoll.poll(0, _MOST_EVENTS):
            end = self._ends.get(descriptor)
            if end is None:
                continue  # of a joint that this very turn has ended
            if events & _ENDED:
                end.hung_up = True
            if not end.done:
                self._queue(end)
            elif events & select.EPOLLERR:
                self._break(end)
            if end.peer.piped or end.peer.rest:
                self._queue(end.peer)
        left = _TURN
        while left > 0 and self._ready:
            source = self._ready.popleft()
            source.queued = False
            left -= self._move(source)

    def _queue(self, source: _End) -> None:
        if not source.queued:
            source.queued = True
            self._ready.append(source)

    def _move(self, source: _End) -> int:
        """Bring the peer what `source` has, a turn's worth at the most; returns how many bytes were read."""
        if source.joint.ending is not None:
            return 0
        if (source.piped or source.rest) and not self._push(source):
            return 0
        if source.done:
            return 0
        try:
            return self._splice(source) if source.bulk else self._copy(source)
        except BlockingIOError:
            return 0  # it will have more at the next edge
        except OSError:
            self._break(source)
            return 0

    def _copy(self, source: _End) -> int:
        amount = os.readv(source.descriptor, self._into)
        if not amount:
            self._end(source)
            return 0
        source.bulk = amount >= _WORTH_A_PIPE
        try:
            written = os.write(source.peer.descriptor, self._buffer[:amount])
        except BlockingIOError:
            written = 0
        except OSError as error:
            self._refuse(source, error)
            return amount
        if written < amount:
            source.rest = memoryview(bytes(self._buffer[written:amount]))
            self._watch_for_room(source.peer)
        elif source.bulk or source.hung_up:
            # Otherwise the read has emptied it, and whatever comes after makes an edge.
            self._queue(source)
        return amount

    def _splice(self, source: _End) -> int:
        pipe = self._pipes.borrow()
        if pipe is None:
            return self._copy(source)
        try:
            amount = os.splice(source.descriptor, pipe.writable, pipe.size, flags=_FLAGS)
        except OSError as error:
            self._pipes.give_back(pipe, empty=True)
            if error.errno == errno.EINVAL:  # a socket that is not made for it
                return self._copy(source)
            raise
        if not amount:
            self._pipes.give_back(pipe, empty=True)
            self._end(source)
            return 0
        source.pipe, source.piped = pipe, amount
        source.bulk = amount >= _NOT_WORTH_IT
        if self._push(source):
            self._queue(source)  # that it is empty only the next read tells
        return amount

    def _push(self, source: _End) -> bool:
        """Bring the peer what is held; False when something is left, or the peer takes no more."""
        sink = source.peer.descriptor
        try:
            while source.piped:
                assert source.pipe is not None
                source.piped -= os.splice(source.pipe.readable, sink, source.piped, flags=_FLAGS)
            while source.rest:
                source.rest = source.rest[os.write(sink, source.rest) :]
        except BlockingIOError:
            self._watch_for_room(source.peer)
            return False
        except OSError as error:
            self._refuse(source, error)
            return False
        self._let_go_of_what_is_held(source)
        return True

    def _watch_for_room(self, sink: _End) -> None:
        if not sink.watched_for_room:
            sink.watched_for_room = True
            self._epoll.modify(sink.descriptor, _WATCHED | select.EPOLLOUT)

    def _let_go_of_what_is_held(self, source: _End) -> None:
        if source.pipe is not None:
            self._pipes.give_back(source.pipe, empty=not source.piped)
        source.pipe, source.piped, source.rest = None, 0, None

    def _end(self, source: _End) -> None:
        """Everything that `source` said was passed on, so its end is, too."""
        if source.was_reset:
            self._break(source)
            return
        if not source.peer.done or source.joint.refused:  # or else it is about to be closed, which says the same
            with suppress(OSError):  # the other direction finds what is wrong
                source.peer.lent.socket.shutdown(socket.SHUT_WR)
        self._finish(source)

    def _refuse(self, source: _End, error: OSError) -> None:
        """The peer takes no more of `source`. What it has to say itself is carried all the same.

        It may be the answer to a request that it did not want to read to the end.
        """
        self._let_go_of_what_is_held(source)
        source.joint.refused = True
        # The system tells of a reset once. When the one who writes hears of it, the one who reads is told of an end,
        # and half an answer would pass for a whole one.
        source.peer.was_reset = error.errno == errno.ECONNRESET
        self._finish(source)

    def _finish(self, source: _End) -> None:
        source.done = True
        if source.peer.done:
            source.joint.end(Ending.ENDED if source.joint.refused else Ending.CLOSED)

    def _break(self, end: _End) -> None:
        first, _ = end.joint.ends
        end.joint.end(Ending.FIRST_BROKE if end is first else Ending.SECOND_BROKE)


_joiner: Final[trio.lowlevel.RunVar[_Joiner]] = trio.lowlevel.RunVar("pioneer_tunnel.splice")
