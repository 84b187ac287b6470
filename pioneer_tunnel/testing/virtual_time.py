"""Virtual time for a test: a clock that jumps to the next deadline when all tasks wait, so that a day takes seconds.

    @given(plan=fault_plans())
    @virtual_time                     # a fresh clock for each example
    async def test_my_gateway(plan): ...

Trio has the clock (`trio.testing.MockClock`). What is added: the clock stands still while a thread works, where Trio's
would jump to the deadline of whoever waits for the thread; Trio's choice among tasks that could run is made by a seed,
so that a test that fails fails again; and a test that waits for what never comes is ended, instead of hanging.

Neighbours: `scenario.run` puts a relay into it; `wall_clock` is for whoever publishes statuses.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, ParamSpec, TypeVar, final, overload

import trio
import trio.testing

__all__ = [
    "EPOCH",
    "LIMIT",
    "run_virtually",
    "stop_the_clock_for_threads",
    "virtual_time",
    "wall_clock",
    "without_threads",
]

LIMIT: Final = 48 * 3600.0
"""Virtual seconds that a test may take: enough for a host to sleep through a few nights of 8 hours."""

EPOCH: Final = 1_700_000_000.0
"""What `wall_clock` shows when virtual time begins."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def wall_clock() -> float:
    """Seconds since 1970 in virtual time, which begins in November 2023. For the `wall_clock` of what is tested."""
    return EPOCH + trio.current_time()


@overload
def virtual_time(test: Callable[_P, Awaitable[_T]], /) -> Callable[_P, _T]: ...
@overload
def virtual_time(
    *, seed: int = 0, limit: float = LIMIT
) -> Callable[[Callable[_P, Awaitable[_T]]], Callable[_P, _T]]: ...
def virtual_time(test: Callable[..., Awaitable[Any]] | None = None, /, *, seed: int = 0, limit: float = LIMIT) -> Any:
    """Make an async test one that a test runner calls, and run it in virtual time, from 0 on, each time anew.

    It stands below `@given`. It needs neither pytest-trio nor a fixture.

    Args:
        test: the test, when it is used without arguments: `@virtual_time`.
        seed: decides which of several tasks runs first, wherever that is open.
        limit: virtual seconds that the test may take (default: two days).

    Raises:
        trio.TooSlowError: from the test, when it takes longer than `limit`.
    """
    if test is None:
        return functools.partial(virtual_time, seed=seed, limit=limit)

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> Any:
        return run_virtually(functools.partial(test, *args, **kwargs), seed=seed, limit=limit)

    return run


def run_virtually(work: Callable[[], Awaitable[_T]], *, seed: int = 0, limit: float = LIMIT) -> _T:
    """Run `work` as `virtual_time` does, and return what it returns."""

    async def within_limit() -> _T:
        stop_the_clock_for_threads()
        with trio.fail_after(limit):
            return await work()

    with _order_of_tasks_from(seed):
        return trio.run(within_limit, clock=trio.testing.MockClock(autojump_threshold=0))


@contextmanager
def without_threads() -> Iterator[None]:
    """Let what would work in a thread be done where it is asked for, so that also that happens again as it did.

    Whoever awaits a thread gets one checkpoint, the work, and its result. For whole runs: it holds for the process.
    """

    async def run_sync(call: Callable[..., _T], *args: Any, **_: Any) -> _T:
        await trio.lowlevel.checkpoint()
        return call(*args)

    there: Any = trio.to_thread
    before = there.run_sync
    there.run_sync = run_sync
    try:
        yield
    finally:
        there.run_sync = before


def stop_the_clock_for_threads() -> None:
    """From now on, let an autojump clock jump only while no thread works for this `trio.run`. Twice is once.

    With any other clock this does nothing.
    """
    clock = trio.lowlevel.current_clock()
    if not isinstance(clock, trio.testing.MockClock) or clock.autojump_threshold == math.inf:
        return
    if not _stopping.get(False):
        _stopping.set(True)
        trio.lowlevel.add_instrument(_ThreadsStopTheClock(clock))


_stopping: Final = trio.lowlevel.RunVar[bool]("pioneer_tunnel.testing: threads stop the clock")


@final
class _ThreadsStopTheClock(trio.abc.Instrument):
    def __init__(self, clock: trio.testing.MockClock) -> None:
        self._clock: Final = clock
        self._threshold: Final = clock.autojump_threshold
        self._threads: Final = trio.to_thread.current_default_thread_limiter()
        self._stopped = False

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        working = self._threads.borrowed_tokens > 0
        if working is not self._stopped:
            self._stopped = working
            self._clock.autojump_threshold = math.inf if working else self._threshold


@contextmanager
def _order_of_tasks_from(seed: int) -> Iterator[None]:
    """Let Trio's scheduler draw from `seed`.

    Trio has no public way to this. These are the two names that its own integration with Hypothesis uses; should they
    go, all that is lost is that a failure repeats.
    """
    scheduler: Any = sys.modules["trio._core._run"]
    random, switch = getattr(scheduler, "_r", None), "_ALLOW_DETERMINISTIC_SCHEDULING"
    if random is None or not hasattr(scheduler, switch):
        yield
        return
    state, allowed = random.getstate(), getattr(scheduler, switch)
    random.seed(seed)
    setattr(scheduler, switch, True)
    try:
        yield
    finally:
        random.setstate(state)
        setattr(scheduler, switch, allowed)
