"""A turn: some callbacks that run one after the other, and what is done once at their end.

What several callbacks of a turn queue for one link leaves in one write. An interrupt (Ctrl-C) is raised after the turn,
so that no callback is cut in two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar, final

import trio

from .interrupts import uninterrupted

__all__ = ["Turn"]

_T = TypeVar("_T")


@final
class Turn:
    """The turns of one Trio run; they never overlap.

    Attributes:
        running: whether callbacks run now.
        started: what `now` returns, if it is known already. To read it costs less than a call.
    """

    __slots__ = ("_at_end", "running", "started")

    def __init__(self) -> None:
        self.running: bool = False
        self.started: float | None = None
        self._at_end: Final[dict[Callable[[], None], None]] = {}

    @staticmethod
    def current() -> Turn:
        """The turns of this Trio run."""
        try:
            return _turn.get()
        except LookupError:
            turn = Turn()
            _turn.set(turn)
            return turn

    def now(self) -> float:
        """`trio.current_time()`, as of the first call in this turn."""
        if not self.running:
            return trio.current_time()
        if self.started is None:
            self.started = trio.current_time()
        return self.started

    def run(self, call: Callable[[], _T]) -> _T:
        """Call `call` in a turn: in the one that runs, or in a new one."""
        return call() if self.running else uninterrupted(self._run, call)

    def _run(self, call: Callable[[], _T]) -> _T:
        self.running = True
        try:
            return call()
        finally:
            self.end()

    def at_end(self, call: Callable[[], None]) -> None:
        """Call `call` once at the end of this turn, however often it is asked for. It must not raise."""
        self._at_end[call] = None

    def end(self) -> None:
        """End the turn."""
        pending = self._at_end
        try:
            while pending:
                call, _ = pending.popitem()
                call()
        finally:
            self.running = False
            self.started = None


_turn: Final[trio.lowlevel.RunVar[Turn]] = trio.lowlevel.RunVar("pioneer_tunnel.turn")
