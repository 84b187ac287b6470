"""One task watches many descriptors: the reactor of a Trio run.

Theory of operation. To wait for a socket Trio wants a task, and a task for each costs more than the bytes of a short
connection. So there is one epoll of our own, edge-triggered, for all descriptors that are watched here, and Trio
watches that epoll in its turn. Whoever has something watched stays for as long as it is, and those who stay share the
work, as leader and followers: the leader waits for the epoll and calls back for everybody, the others sleep until their
stay is over. A leader whose own stay ends, or who is cancelled, appoints another. So no task runs that nobody can see,
and the last one to leave closes what was shared.

After a few bytes of a conversation the leader looks a few times more before it sleeps. Between two programs of one
host the answer comes within some ten microseconds, and to fall asleep and be woken takes longer than that. Where
nothing comes, it soon stops looking.

Linux only. Neighbours: `splice` moves the bytes of joined sockets here; `transports.data_channels` has those watched
that wait for their visitor.
"""

from __future__ import annotations

import logging
import select
import sys
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, final

import trio

from ..log_limiter import Complaints

__all__ = ["CAN_WATCH", "REMINDED_AFTER", "Reactor", "Stay"]

CAN_WATCH: Final = sys.platform == "linux"
"""Whether this system has what it takes."""

_TURN: Final = 1024 * 1024
"""Bytes that are moved before other tasks get theirs."""

_MOST_EVENTS: Final = 64
"""Callbacks before other tasks run. Each may let a handler begin or end."""
_complaints: Final = Complaints(logging.getLogger("pioneer_tunnel.reactor"))

REMINDED_AFTER: Final = 0.002
"""Seconds."""

_MOST_LOOKS: Final = 16
"""Each lets the other tasks run, so these are some 100 microseconds."""

_FEW: Final = 8
"""With more stays than that there is enough to do, and more of it at once when it is left for a moment."""

_ANOTHER_TRY: Final = 64
"""So often an answer has to be expected before looking is tried again where it was in vain."""

if sys.platform == "linux":
    _WATCHED: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET


@final
class Stay:
    """A task's time with a reactor, as a context manager: what it has watched, is watched within.

    Attributes:
        reactor: whose it is.
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
        """Until `end`: share the work, or sleep. No deadline: a visitor may stay for as long as it likes."""
        await self.reactor._wait(self)

    async def sleep(self) -> None:
        """Until woken."""

        def on_cancellation(_: object) -> trio.lowlevel.Abort:
            self.task = None
            return trio.lowlevel.Abort.SUCCEEDED

        self.task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(on_cancellation)

    def wake(self) -> None:
        """Let the task run if it sleeps: it is over, or the lead is its."""
        if self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None


@final
class Reactor:
    """Everything that is watched in one Trio run. What it calls back must not raise: it is no more than logged."""

    def __init__(self) -> None:
        self._stays: Final[dict[Stay, None]] = {}
        self._leader: Stay | None = None
        self._waiting = False
        self._watched: Final[dict[int, Callable[[int], None]]] = {}
        self._ready: Final[deque[Callable[[], int]]] = deque()
        self._reminders: Final[dict[Callable[[], None], float]] = {}  # in the order in which they are due
        self._looks = 0
        self._looks_worth_while = _MOST_LOOKS
        self._looks_wanted = 0
        self._epoll: select.epoll  # while somebody stays
        self._news: int  # its descriptor

    @staticmethod
    def current() -> Reactor:
        """That of this Trio run."""
        try:
            return _reactor.get()
        except LookupError:
            reactor = Reactor()
            _reactor.set(reactor)
            return reactor

    def stay(self) -> Stay:
        """For `with`: until it is left, what this task has watched is."""
        return Stay(self)

    def watch(self, descriptor: int, on_events: Callable[[int], None]) -> None:
        """Call `on_events` with the flags of `select.EPOLLIN` and so on whenever there is news, by its edge.

        Raises:
            trio.BusyResourceError: it is watched already.
        """
        if descriptor in self._watched:
            raise trio.BusyResourceError("this connection is watched already")
        self._epoll.register(descriptor, _WATCHED)
        self._watched[descriptor] = on_events

    def watch_for_room(self, descriptor: int) -> None:
        """Also when it takes more; from now on."""
        self._epoll.modify(descriptor, _WATCHED | select.EPOLLOUT)

    def watch_anew(self, descriptor: int, *, room: bool) -> None:
        """Call back again if there is news now, as if nothing had been told of it yet."""
        self._epoll.modify(descriptor, _WATCHED | select.EPOLLOUT if room else _WATCHED)

    def unwatch(self, descriptor: int) -> None:
        """No more. To be told before it is closed."""
        del self._watched[descriptor]
        self._epoll.unregister(descriptor)

    def unwatch_closing(self, descriptor: int) -> None:
        """Like `unwatch`, of one that is closed next: the epoll forgets it by itself."""
        del self._watched[descriptor]

    def queue(self, turn: Callable[[], int]) -> None:
        """Have `turn` called soon, after those that wait already. It returns how many bytes it has moved.

        Turns are to be short: after a MiB of them all other tasks get theirs.
        """
        self._ready.append(turn)

    def remind(self, callback: Callable[[], None]) -> None:
        """Call `callback` in `REMINDED_AFTER` seconds, and not before; asked again, from then on."""
        self._reminders.pop(callback, None)
        self._reminders[callback] = trio.current_time() + REMINDED_AFTER

    def do_not_remind(self, callback: Callable[[], None]) -> None:
        """After all. Without a `remind` before it this does nothing."""
        self._reminders.pop(callback, None)

    def expect_answer(self) -> None:
        """A few bytes have gone out in a conversation: the answer may come within microseconds."""
        if len(self._stays) <= _FEW:
            self._looks_wanted += 1
            if not self._looks_wanted % _ANOTHER_TRY:
                self._looks_worth_while = _MOST_LOOKS
            self._looks = self._looks_worth_while

    def _enter(self, stay: Stay) -> None:
        if not self._stays:
            self._epoll = select.epoll()
            self._news = self._epoll.fileno()
        self._stays[stay] = None

    def _leave(self, stay: Stay) -> None:
        del self._stays[stay]
        if not self._stays:
            trio.lowlevel.notify_closing(self._news)
            self._epoll.close()
            self._ready.clear()

    def _wake(self, stay: Stay) -> None:
        if self._leader is not stay:
            stay.wake()
        elif self._waiting:
            trio.lowlevel.notify_closing(self._news)

    async def _wait(self, stay: Stay) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            while not stay.over:
                if self._leader is None:
                    self._leader = stay
                if self._leader is stay:
                    await self._lead(stay)
                else:
                    await stay.sleep()
        finally:
            # At once, and not when the stay is left: what else its owner has to do first may take its time.
            if self._leader is stay:
                self._appoint_another()

    def _appoint_another(self) -> None:
        # One that sleeps. Where there is none, whoever comes next takes the lead.
        self._leader = next((other for other in self._stays if other.task is not None), None)
        if self._leader is not None:
            self._leader.wake()

    async def _lead(self, stay: Stay) -> None:
        """Call back for all, until `stay` is over."""
        while not stay.over:
            if self._ready or self._looks:
                await trio.lowlevel.checkpoint()
            else:
                self._waiting = True
                try:
                    await self._wait_for_news()
                except trio.ClosedResourceError:
                    pass  # woken
                finally:
                    self._waiting = False
            if self._reminders:
                self._remind_whoever_is_due()
            self._take_turns()

    async def _wait_for_news(self) -> None:
        if not self._reminders:
            # No deadline: when nobody has anything to say, there is nothing to do.
            await trio.lowlevel.wait_readable(self._news)
            return
        with trio.move_on_at(next(iter(self._reminders.values()))):
            await trio.lowlevel.wait_readable(self._news)

    def _remind_whoever_is_due(self) -> None:
        now = trio.current_time()
        while self._reminders:
            callback, due = next(iter(self._reminders.items()))
            if due > now:
                break
            del self._reminders[callback]
            callback()

    def _take_turns(self) -> None:
        events = self._epoll.poll(0, _MOST_EVENTS)
        if self._looks:
            self._note_look(fruitful=bool(events))
        for descriptor, flags in events:
            on_events = self._watched.get(descriptor)
            if on_events is None:
                continue  # it was let go of in this very turn
            try:
                on_events(flags)
            except Exception as error:  # noqa: BLE001  # whatever it is, the others have nothing to do with it
                line = "what is watched failed in an unforeseen way"
                _complaints.tell("watched", line, level=logging.ERROR, error=error)
        left = _TURN
        while left > 0 and self._ready:
            turn = self._ready.popleft()
            try:
                left -= turn()
            except Exception as error:  # noqa: BLE001  # as above
                _complaints.tell("turn", "a turn failed in an unforeseen way", level=logging.ERROR, error=error)

    def _note_look(self, *, fruitful: bool) -> None:
        if fruitful:
            self._looks = 0
            self._looks_worth_while = _MOST_LOOKS
        else:
            self._looks -= 1
            if not self._looks:
                self._looks_worth_while //= 2


_reactor: Final[trio.lowlevel.RunVar[Reactor]] = trio.lowlevel.RunVar("pioneer_tunnel.reactor")
