"""A small event loop inside a Trio run: one epoll, without tasks of its own, for many descriptors.

Trio needs a task for each socket that is waited for, and for a short connection that task costs more than its bytes. So
one edge-triggered epoll holds all descriptors that are watched here, and Trio waits for the epoll's own descriptor.

Nothing here waits: `stay` decides where the callbacks and timers run. Without an epoll, on other systems or when
descriptors have run out, queued turns and timers still work, and `watch` does not.
"""

from __future__ import annotations

import errno
import logging
import select
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import trio

from ..._model.callbacks import nothing
from ..._model.log_fields import about
from ..log_limiter import LogLimiter
from ..turn import Turn
from .pipe_pool import Pipes
from .timers import Timer, Timers

__all__ = ["CAN_WATCH", "HUNG_UP", "Reactor"]

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
class Reactor:
    """The event loop of one Trio run. A callback must not raise; if one does, the exception is only logged.

    Attributes:
        turn: the turns that callbacks run in.
        pipes: the pipes for splicing.
        ready: what was queued and has not run.
        descriptor: of the epoll; -1 while there is none.
        on_queued: called when something was queued that `take_turns` does not see.
        on_earlier_deadline: called when `next_deadline` is earlier than before.
    """

    def __init__(self) -> None:
        self.turn: Final = Turn.current()
        self._clock: Final = trio.lowlevel.current_clock()  # half the calls of `trio.current_time`
        self.pipes: Final = Pipes.current()
        self.ready: Final[OrderedDict[Callable[[], int], None]] = OrderedDict()
        self.descriptor: int = -1
        self.on_queued: Callable[[], object] = nothing
        self.on_earlier_deadline: Callable[[float], object] = nothing
        self._watched: Final[dict[int, Callable[[int], None]]] = {}
        self._timers: Final = Timers(self._on_earlier_deadline)
        self._takes_turns = False
        self._epoll: select.epoll | None = None  # exists while there are stays, if the system has it

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
        self.ready[turn] = None
        if not self._takes_turns:
            self.on_queued()

    def timer(self, call: Callable[[], object]) -> Timer:
        """A timer that calls `call`. It works while there are stays."""
        return self._timers.add(call)

    # For the stays

    def open(self) -> None:
        """Make the epoll. To be called before the first stay."""
        if CAN_WATCH:
            with suppress(OSError):  # out of descriptors
                self._epoll = select.epoll()
                self.descriptor = self._epoll.fileno()

    def close(self) -> None:
        """Drop what is queued, and close the epoll. To be called after the last stay."""
        self.ready.clear()
        if self._epoll is not None:
            trio.lowlevel.notify_closing(self.descriptor)
            self._epoll.close()
            self._epoll, self.descriptor = None, -1

    @property
    def next_deadline(self) -> float:
        """When to call `ring`."""
        return self._timers.next_look

    def ring(self) -> None:
        """Run the timers whose deadlines have come."""
        now = trio.current_time()
        while (timer := self._timers.next_due(now)) is not None:
            self._run_callback(timer.call)

    def _on_earlier_deadline(self, deadline: float) -> None:
        self.on_earlier_deadline(deadline)

    def take_turns(self) -> None:
        """Run callbacks until there are none, or for a while. An interrupt must not be raised meanwhile."""
        turn, left, until = self.turn, _TURN, 0.0
        self._takes_turns = True
        try:
            for _ in range(_MOST_ROUNDS):
                events = [] if self._epoll is None else self._epoll.poll(0, _MOST_EVENTS)
                if not events and not self.ready:
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
                if self.ready:
                    left = self._take_queued_turns(left)
                try:
                    turn.end()
                except Exception as error:  # noqa: BLE001  # as above
                    _log_failure(error)
                if left <= 0 or now > until:
                    break
        finally:  # a callback may ask for an exit
            self._takes_turns = turn.running = False
            turn.started = None

    def _take_queued_turns(self, left: int) -> int:
        """Run the queue, until `left` bytes were moved. Returns how many are left."""
        for _ in range(len(self.ready)):  # one that queues itself again waits for the next round
            if left <= 0 or not self.ready:
                break
            turn, _ = self.ready.popitem(last=False)
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
