"""Deadlines of many connections in one structure. No I/O: the event loop asks when to run what is due.

Most deadlines are moved many times and never come. So moving one later only sets an attribute: its entry in the heap
finds that out when it comes up.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from itertools import count
from typing import Final, final

__all__ = ["Timer", "Timers"]

_FEW: Final = 1024
"""Entries that are not worth the work of removing them."""


@final
class Timer:
    """Calls back once when its deadline has come. Made by `Timers.add`.

    Attributes:
        deadline: in seconds of the clock of its `Timers`; infinity for none. Set it with `move`.
    """

    __slots__ = ("_entry", "_timers", "call", "deadline")

    def __init__(self, timers: Timers, call: Callable[[], object]) -> None:
        self._timers: Final = timers
        self._entry = math.inf  # the earliest deadline for which there is an entry in the heap
        self.call: Callable[[], object] = call
        self.deadline: float = math.inf

    def move(self, deadline: float) -> None:
        """Call back at `deadline` instead."""
        self.deadline = deadline
        if deadline < self._entry:
            self._entry = deadline
            self._timers.enter(deadline, self)

    def close(self) -> None:
        """Never call back again."""
        self.deadline = math.inf
        self.call = _closed
        if self._entry < math.inf:
            self._entry = math.inf
            self._timers.note_closed()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.call is _closed

    def come_up(self, entry: float) -> bool:
        """Its entry in the heap has come up. True if the deadline has, too; else there is a later entry, or none."""
        if entry != self._entry:
            return False  # there is an earlier entry, which will come up or did
        self._entry = math.inf
        if self.deadline > entry:
            self.move(self.deadline)
            return False
        self.deadline = math.inf
        return True


def _closed() -> None:
    """What a closed timer calls, and by which it is known."""


@final
class Timers:
    """The timers of one event loop.

    Args:
        on_earlier: called with a deadline that is earlier than all others.
    """

    def __init__(self, on_earlier: Callable[[float], object]) -> None:
        self._on_earlier: Final = on_earlier
        self._heap: Final[list[tuple[float, int, Timer]]] = []
        self._numbers: Final = count()
        self._closed = 0  # at least so many entries are of closed timers

    def add(self, call: Callable[[], object]) -> Timer:
        """A new timer, without a deadline."""
        return Timer(self, call)

    def enter(self, deadline: float, timer: Timer) -> None:
        """Put an entry into the heap. For `Timer`."""
        earlier = not self._heap or deadline < self._heap[0][0]
        heapq.heappush(self._heap, (deadline, next(self._numbers), timer))
        if earlier:
            self._on_earlier(deadline)

    def note_closed(self) -> None:
        """Count a closed timer whose entry is in the heap. For `Timer`.

        Connections come and go faster than their deadlines would. So the entries of closed timers are removed when they
        are many.
        """
        self._closed += 1
        if self._closed > max(len(self._heap) // 2, _FEW):
            self._heap[:] = [entry for entry in self._heap if not entry[2].closed]
            heapq.heapify(self._heap)
            self._closed = 0

    def next_due(self, now: float) -> Timer | None:
        """Take a timer whose deadline has come; None if there is none."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry, _, timer = heapq.heappop(heap)
            if timer.come_up(entry):
                return timer
        return None

    @property
    def next_look(self) -> float:
        """When to call `next_due` next; infinity if there is no timer with a deadline."""
        heap = self._heap
        # A look costs the event loop as much as a connection. So none is for timers that were closed or moved later.
        while heap and heap[0][2].deadline > heap[0][0]:
            entry, _, timer = heapq.heappop(heap)
            timer.come_up(entry)
        return heap[0][0] if heap else math.inf
