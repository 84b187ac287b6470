"""A small event loop inside a Trio run: one epoll, served by one task, for many descriptors.

Trio needs a task for each socket that is waited for, and for a short connection that task costs more than its bytes. So
one edge-triggered epoll holds all descriptors that are watched here, and Trio waits for the epoll's own descriptor.

A task holds a `Stay` while its descriptors are registered. One of these tasks, the leader, waits on the epoll and runs
all callbacks and timers; the others sleep until their stay ends. A leader whose stay ends, or that is cancelled, hands
the lead to another. So there is no background task, and the last one to leave closes the epoll. Without an epoll, on
other systems or when descriptors have run out, queued turns and timers still work, and `watch` does not.
"""

from __future__ import annotations

import errno
import logging
import select
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, final

import trio

from ..._model.log_fields import about
from ..log_limiter import LogLimiter
from ..turn import Turn
from .pipe_pool import Pipes
from .timers import Timer, Timers

__all__ = ["CAN_WATCH", "HUNG_UP", "Reactor", "Stay"]

CAN_WATCH: Final = sys.platform == "linux"
"""Whether this system has epoll."""

_TURN: Final = 1024 * 1024
"""Bytes that are moved before other tasks run."""

_MOST_EVENTS: Final = 64
"""Callbacks before other tasks run. Each may start or end a handler."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.reactor"))

_MOST_ROUNDS: Final = 4
"""Times that the epoll is asked again before other tasks run."""

_TURN_SECONDS: Final = 0.005
"""A round that begins so many seconds after the first one is the last before other tasks run."""

HUNG_UP: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR if sys.platform == "linux" else 0
"""The flags after which there may be no more edges."""

if sys.platform == "linux":
    _WATCHED: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


@final
class Stay:
    """A context manager that a task holds while descriptors of its own are watched.

    Attributes:
        reactor: the event loop.
        over: whether `end` was called.
    """

    __slots__ = ("over", "reactor", "task")

    def __init__(self, reactor: Reactor) -> None:
        self.reactor: Final = reactor
        self.over: bool = False
        self.task: trio.lowlevel.Task | None = None  # while it sleeps

    def __enter__(self) -> Stay:
        self.reactor._enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reactor._leave(self)

    def end(self) -> None:
        """Let `wait` return."""
        if not self.over:
            self.over = True
            self.reactor._wake(self)

    async def wait(self) -> None:
        """Lead or sleep until `end` is called. No deadline: a visitor may stay for as long as it likes."""
        reactor = self.reactor
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            while not self.over:
                if reactor.leads(self):
                    await reactor.lead(self)
                else:
                    await self.sleep()
        finally:
            # Now, and not in `_leave`: the owner may have other work to finish before it leaves its stay.
            reactor.resign(self)

    async def sleep(self) -> None:
        """Sleep until `wake` is called."""
        self.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._on_cancellation)

    def _on_cancellation(self, _: object) -> trio.lowlevel.Abort:
        self.task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def wake(self) -> None:
        """Wake the task if it sleeps: its stay is over, or it becomes the leader."""
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None


@final
class Reactor:
    """The event loop of one Trio run. A callback must not raise; if one does, the exception is only logged.

    Attributes:
        turn: the turns that callbacks run in.
        pipes: the pipes for splicing.
    """

    def __init__(self) -> None:
        self._stays: Final[dict[Stay, None]] = {}
        self._leader: Stay | None = None
        self._waiting = False
        self._watched: Final[dict[int, Callable[[int], None]]] = {}
        self._ready: Final[OrderedDict[Callable[[], int], None]] = OrderedDict()
        self.turn: Final = Turn.current()
        self._clock: Final = trio.lowlevel.current_clock()  # half the calls of `trio.current_time`
        self.pipes: Final = Pipes.current()
        self._timers: Final = Timers(self._on_earlier_deadline)
        self._until_deadline = trio.CancelScope()  # of the leader
        self._epoll: select.epoll | None = None  # exists while there are stays, if the system has it
        self._epoll_descriptor = -1

    @staticmethod
    def current() -> Reactor:
        """The event loop of this Trio run."""
        try:
            return _reactor.get()
        except LookupError:
            reactor = Reactor()
            _reactor.set(reactor)
            return reactor

    @property
    def has_epoll(self) -> bool:
        """Whether `watch` works: there is a stay, and the system has an epoll for it."""
        return self._epoll is not None

    def stay(self) -> Stay:
        """A new stay, to be used in a `with` statement."""
        return Stay(self)

    def watch(self, descriptor: int, on_events: Callable[[int], None]) -> None:
        """Call `on_events` with epoll's flags at each edge of `EPOLLIN`, `EPOLLRDHUP`, `EPOLLHUP` and `EPOLLERR`.

        Raises:
            trio.BusyResourceError: it is watched already.
            OSError: the kernel has no memory for it.
        """
        if self._epoll is None:
            raise OSError(errno.ENOSYS, "there is no epoll")
        if descriptor in self._watched:
            raise trio.BusyResourceError("this connection is watched already")
        self._epoll.register(descriptor, _WATCHED)
        self._watched[descriptor] = on_events

    def watch_writable(self, descriptor: int) -> None:
        """Call back at each edge of `EPOLLOUT` as well, from now on."""
        assert self._epoll is not None
        self._epoll.modify(descriptor, _WATCHED | select.EPOLLOUT)

    def unwatch(self, descriptor: int) -> None:
        """Stop. To be called before the descriptor is closed."""
        del self._watched[descriptor]
        assert self._epoll is not None
        self._epoll.unregister(descriptor)

    def unwatch_closing(self, descriptor: int) -> None:
        """Like `unwatch`, for one that is closed next: the kernel then removes it from the epoll."""
        del self._watched[descriptor]

    def queue(self, turn: Callable[[], int]) -> None:
        """Call `turn` soon, after those in the queue. It returns how many bytes it moved.

        Turns must be short. After 1 MiB of them other tasks run. One that is in the queue keeps its place: it runs
        once, however often it was asked for.
        """
        self._ready[turn] = None
        if self._leader is not None:
            self._wake(self._leader)

    def timer(self, call: Callable[[], object]) -> Timer:
        """A timer that calls `call`. It works while there are stays."""
        return self._timers.add(call)

    def _enter(self, stay: Stay) -> None:
        if not self._stays and CAN_WATCH:
            with suppress(OSError):  # out of descriptors
                self._epoll = select.epoll()
                self._epoll_descriptor = self._epoll.fileno()
        self._stays[stay] = None

    def _leave(self, stay: Stay) -> None:
        del self._stays[stay]
        if not self._stays:
            self._ready.clear()
            if self._epoll is not None:
                trio.lowlevel.notify_closing(self._epoll_descriptor)
                self._epoll.close()
                self._epoll = None

    def _wake(self, stay: Stay) -> None:
        if self._leader is stay and self._waiting:
            trio.lowlevel.notify_closing(self._epoll_descriptor)
        else:
            stay.wake()

    # For the stays

    def leads(self, stay: Stay) -> bool:
        """Whether `stay` is the leader. It becomes the leader if there is none."""
        if self._leader is None:
            self._leader = stay
        return self._leader is stay

    def resign(self, stay: Stay) -> None:
        """Appoint another leader if `stay` is the leader."""
        if self._leader is stay:
            self._until_deadline = trio.CancelScope()
            # One that sleeps. If there is none, the next task that waits becomes the leader.
            self._leader = next((other for other in self._stays if other.task is not None), None)
            if self._leader is not None:
                self._leader.wake()

    async def lead(self, stay: Stay) -> None:
        """Run callbacks until `stay` is over, or a deadline has come."""
        with trio.CancelScope(deadline=self._timers.next_look) as self._until_deadline:
            while not stay.over:
                if self._ready:
                    await trio.lowlevel.checkpoint()
                elif self._epoll is None:
                    await stay.sleep()
                else:
                    self._waiting = True
                    try:
                        # No deadline but that of the timers: without events there is nothing to do.
                        await trio.lowlevel.wait_readable(self._epoll_descriptor)
                    except trio.ClosedResourceError:
                        pass  # woken by `_wake`
                    finally:
                        self._waiting = False
                self._take_turns()
        self._ring()

    def _ring(self) -> None:
        """Run the timers whose deadlines have come."""
        now = trio.current_time()
        while (timer := self._timers.next_due(now)) is not None:
            self._run_callback(timer.call)

    def _on_earlier_deadline(self, deadline: float) -> None:
        self._until_deadline.deadline = deadline

    @trio.lowlevel.enable_ki_protection
    def _take_turns(self) -> None:
        """Run callbacks until there are none, or for a while."""
        turn, left, until = self.turn, _TURN, 0.0
        for _ in range(_MOST_ROUNDS):
            events = [] if self._epoll is None else self._epoll.poll(0, _MOST_EVENTS)
            if not events and not self._ready:
                break
            now = self._clock.current_time()
            until = until or now + _TURN_SECONDS
            turn.running, turn.started = True, now
            for descriptor, flags in events:
                on_events = self._watched.get(descriptor)
                if on_events is not None:  # otherwise an earlier callback unwatched it
                    try:
                        on_events(flags)
                    except Exception as error:  # noqa: BLE001  # it must not affect the others
                        _log_failure(error)
            if self._ready:
                left = self._take_queued_turns(left)
            try:
                turn.end()
            except Exception as error:  # noqa: BLE001  # as above
                _log_failure(error)
            if left <= 0 or now > until:
                break

    def _take_queued_turns(self, left: int) -> int:
        """Run the queue, until `left` bytes were moved. Returns how many are left."""
        for _ in range(len(self._ready)):  # one that queues itself again waits for the next round
            if left <= 0 or not self._ready:
                break
            turn, _ = self._ready.popitem(last=False)
            try:
                left -= turn()
            except Exception as error:  # noqa: BLE001  # as above
                _log_failure(error)
        return left

    def _run_callback(self, call: Callable[[], object]) -> None:
        try:
            self.turn.run(call)
        except Exception as error:  # noqa: BLE001  # as above
            _log_failure(error)


def _log_failure(error: Exception) -> None:
    line = "a callback failed in an unforeseen way"
    fields = about("unforeseen", reason=type(error).__name__)
    _log_limiter.log("callback", line, level=logging.ERROR, error=error, about=fields)


_reactor: Final[trio.lowlevel.RunVar[Reactor]] = trio.lowlevel.RunVar("pioneer_tunnel.reactor")
