"""Carries many visitors without a task for each. One task owns their exchanges, and ends them when it is cancelled."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Final, NoReturn, Protocol, final

import trio

from .._net.fastpath.event_loop import Reactor
from .._net.fastpath.stay import Stay
from .pump import Pump

__all__ = ["Carrier", "Stoppable"]

_STOPS_PER_TURN: Final = 32
"""Exchanges that are stopped before other tasks run. Each one starts a task that resets two streams."""


class Stoppable(Protocol):
    """What a carrier can own."""

    def stop(self) -> None:
        """End it at once."""


@final
class Carrier:
    """Owns the exchanges of any number of visitors.

    An exchange has a task only at its end, and only if the end takes time: to send an apology, or to flush and reset.

    Args:
        on_bug: called with an exception that only a bug raises.
    """

    _reactor: Reactor  # since it runs

    def __init__(self, on_bug: Callable[[Exception], object]) -> None:
        self._on_bug: Final = on_bug
        self._carried: Final[dict[Pump, None]] = {}  # in order
        self._owned: Final[set[Stoppable]] = set()
        self._endings: trio.Nursery | None = None  # while it runs
        self._context = copy_context()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Own exchanges until cancelled. Then both streams of each are reset, and nothing is left behind."""
        with Stay() as stay:
            self._reactor = stay.reactor
            async with trio.open_nursery() as nursery:
                self._endings, self._context = nursery, copy_context()
                task_status.started()
                try:
                    await stay.wait()
                finally:
                    self._endings = None
                    await self._stop_all()
        raise AssertionError("it ends only by being cancelled")

    @property
    def running(self) -> bool:
        """Whether it may own something."""
        return self._endings is not None

    def own(self, work: Stoppable) -> None:
        """Stop `work` when this is cancelled, unless it was `disown`ed. It runs without a task, too."""
        self._owned.add(work)

    def disown(self, work: Stoppable) -> None:
        """Do not stop `work`, which is over."""
        self._owned.discard(work)

    def takes(self, pump: Pump) -> bool:
        """Whether `carry` may be called: this runs, and `pump` needs no tasks. Otherwise use `Pump.run`."""
        return self.running and not pump.prepare()

    def carry(self, pump: Pump, after: Callable[[], object]) -> None:
        """Run `pump` without a task; `takes` was asked before. `after` is called at its end, perhaps in here."""
        nursery = self._endings
        assert nursery is not None
        self._carried[pump] = None
        pump.begin(partial(self._on_end, pump, after, nursery), self._reactor)

    def _on_end(self, pump: Pump, after: Callable[[], object], nursery: trio.Nursery) -> None:
        del self._carried[pump]
        if pump.closed:
            after()
        else:
            # Otherwise the task would inherit whichever context the callbacks run in.
            self._context.run(nursery.start_soon, self._finish, pump, after)

    async def _finish(self, pump: Pump, after: Callable[[], object]) -> None:
        try:
            await pump.finish()
        except Exception as error:  # noqa: BLE001  # it ends this exchange, never the others
            self._on_bug(error)
        finally:
            after()

    async def _stop_all(self) -> None:
        with trio.CancelScope(shield=True):
            stopped = 0
            while self._carried or self._owned:
                (self._owned.pop() if self._owned else next(iter(self._carried))).stop()
                stopped += 1
                if not stopped % _STOPS_PER_TURN:
                    await trio.lowlevel.checkpoint()
