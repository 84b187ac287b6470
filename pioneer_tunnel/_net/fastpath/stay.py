"""The tasks that wait while the event loop calls back. One of them sees to it that it does.

A task holds a `Stay` while its descriptors are registered. One of these tasks, the leader, runs the timers. It waits on
the epoll and runs the callbacks, until these can run in Trio's own wait (`io_wait`). The others sleep until their stay
ends. A leader whose stay ends, or that is cancelled, hands the lead to another. So there is no background task, and the
last one to leave closes the epoll.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, final

import trio

from ..interrupts import uninterrupted
from .event_loop import Reactor
from .io_wait import IoWait

__all__ = ["Stay"]


@final
class Stay:
    """A context manager that a task holds while descriptors of its own are watched.

    Attributes:
        reactor: the event loop of this Trio run.
        over: whether `end` was called.
    """

    __slots__ = ("_stays", "_task", "over", "reactor")

    def __init__(self) -> None:
        self._stays: Final = _Stays.current()
        self.reactor: Final = self._stays.reactor
        self.over: bool = False
        self._task: trio.lowlevel.Task | None = None  # while it sleeps

    def __enter__(self) -> Stay:
        self._stays.enter(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        uninterrupted(self._stays.leave, self)

    def end(self) -> None:
        """Let `wait` return."""
        if not self.over:
            self.over = True
            self._stays.wake(self)

    async def wait(self) -> None:
        """Lead or sleep until `end` is called. No deadline: a visitor may stay for as long as it likes."""
        stays = self._stays
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            while not self.over:
                if stays.leads(self):
                    await stays.lead(self)
                else:
                    await self.sleep()
        finally:
            # Now, and not in `leave`: the owner may have other work to finish before it leaves its stay.
            stays.resign(self)

    # For `_Stays`

    @property
    def sleeps(self) -> bool:
        """Whether the task waits for `wake`."""
        return self._task is not None

    async def sleep(self) -> None:
        """Sleep until `wake` is called."""
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._on_cancellation)

    def _on_cancellation(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def wake(self) -> None:
        """Wake the task if it sleeps: its stay is over, or it becomes the leader."""
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None


@final
class _Stays:
    """The stays of one Trio run, and who leads."""

    def __init__(self) -> None:
        self.reactor: Final = Reactor.current()
        self.reactor.on_queued = self._on_queued
        self.reactor.on_earlier_deadline = self._on_earlier_deadline
        self._all: Final[dict[Stay, None]] = {}
        self._leader: Stay | None = None
        self._waiting = False  # for the epoll
        self._io_wait: IoWait | None = None  # while callbacks run there
        self._tries_io_wait = True  # until one could not be had
        self._exit: BaseException | None = None  # that a callback has asked for there
        self._until_deadline = trio.CancelScope()  # of the leader

    @staticmethod
    def current() -> _Stays:
        """The stays of this Trio run."""
        try:
            return _stays.get()
        except LookupError:
            stays = _Stays()
            _stays.set(stays)
            return stays

    def enter(self, stay: Stay) -> None:
        if not self._all:
            self.reactor.open()
        self._all[stay] = None

    def leave(self, stay: Stay) -> None:
        del self._all[stay]
        if not self._all:
            if self._io_wait is not None:
                self._io_wait.stop()
                self._io_wait = None
            try:
                self.reactor.take_turns()  # what was queued since the last time
            finally:
                self.reactor.close()
            self._raise_exit()

    def wake(self, stay: Stay) -> None:
        """Let `stay` look again whether it is over, and what is queued."""
        if self._leader is stay and self._waiting:
            self._waiting = False
            trio.lowlevel.notify_closing(self.reactor.descriptor)
        else:
            stay.wake()

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
            self._leader = next((other for other in self._all if other.sleeps), None)
            if self._leader is not None:
                self._leader.wake()

    async def lead(self, stay: Stay) -> None:
        """Let callbacks run until `stay` is over, or a deadline has come."""
        reactor = self.reactor
        with trio.CancelScope(deadline=reactor.next_deadline) as self._until_deadline:
            while not stay.over:
                if reactor.ready:
                    await trio.lowlevel.checkpoint()
                elif reactor.descriptor < 0 or self._io_wait is not None:
                    await stay.sleep()
                else:
                    await self._wait_for_events()
                self._raise_exit()
                if self._io_wait is None:
                    uninterrupted(reactor.take_turns)
        if self._io_wait is None:  # also if a timer is always due
            uninterrupted(reactor.take_turns)
        reactor.ring()

    async def _wait_for_events(self) -> None:
        self._waiting = True
        try:
            # No deadline but that of the timers: without events there is nothing to do.
            await trio.lowlevel.wait_readable(self.reactor.descriptor)
            is_registered = self._waiting  # else `wake` was called after the event
        except trio.ClosedResourceError:
            return  # woken by `wake`
        finally:
            self._waiting = False
        if is_registered and self._tries_io_wait:
            uninterrupted(self._begin_io_wait)

    def _begin_io_wait(self) -> None:
        self._io_wait = IoWait.begin(self.reactor.descriptor, self._after_io_wait)
        self._tries_io_wait = self._io_wait is not None

    def _after_io_wait(self) -> None:
        try:
            self.reactor.take_turns()
        except BaseException as error:  # noqa: BLE001  # the leader raises it, or else the last one to leave
            self._exit = error
        if self.reactor.ready or self._exit is not None:
            self._on_queued()

    def _raise_exit(self) -> None:
        if self._exit is not None:
            error, self._exit = self._exit, None
            raise error

    def _on_queued(self) -> None:
        if self._leader is not None:
            self.wake(self._leader)

    def _on_earlier_deadline(self, deadline: float) -> None:
        self._until_deadline.deadline = deadline


_stays: Final[trio.lowlevel.RunVar[_Stays]] = trio.lowlevel.RunVar("pioneer_tunnel.stays")
