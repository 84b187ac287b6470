"""Virtual time for tests: a clock that jumps to the next deadline when all tasks wait, so that a day takes seconds.

    @given(plan=fault_plans())
    @virtual_time                     # a fresh clock for each example
    async def test_my_gateway(plan): ...

The clock is `trio.testing.MockClock`, with three additions. It does not jump while a thread works; Trio's would jump to
the deadline of the task that waits for the thread. A seed decides the order of tasks that Trio could run in any order,
so that a failure repeats. A test that waits for ever ends with `trio.TooSlowError`.
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
"""Virtual seconds that a test may take: enough for several `HostSleep`s of 8 hours."""

EPOCH: Final = 1_700_000_000.0
"""What `wall_clock` returns at virtual time 0."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def wall_clock() -> float:
    """Seconds since 1970 in virtual time, which begins in November 2023. For arguments `wall_clock=...`."""
    return EPOCH + trio.current_time()


@overload
def virtual_time(test: Callable[_P, Awaitable[_T]], /) -> Callable[_P, _T]: ...
@overload
def virtual_time(
    *, seed: int = 0, limit: float = LIMIT
) -> Callable[[Callable[_P, Awaitable[_T]]], Callable[_P, _T]]: ...
def virtual_time(test: Callable[..., Awaitable[Any]] | None = None, /, *, seed: int = 0, limit: float = LIMIT) -> Any:
    """Turn an async test into a plain function that runs it in virtual time. Each call starts a new clock at 0.

    With Hypothesis, put it below `@given`. It needs neither pytest-trio nor a fixture.

    Args:
        test: the test, for `@virtual_time` without arguments.
        seed: decides the order of tasks that Trio could run in any order (default 0).
        limit: virtual seconds that the test may take (default: two days).

    Raises:
        trio.TooSlowError: from the test, if it takes longer than `limit`.
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
    """Replace `trio.to_thread.run_sync`: run the function in the event loop, after a checkpoint.

    So no thread makes the order of events random. It applies to the whole process: use it around a run.
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
    """From now on, let an autojump clock jump only while no thread works for this `trio.run`.

    A second call does nothing; nor does a call with another clock.
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
    """Seed the random choices of Trio's scheduler.

    Trio has no public API for this. These two private names are those that its Hypothesis integration uses. Without
    them, failures may not repeat, but tests still run.
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
