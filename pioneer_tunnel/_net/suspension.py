"""Notices that this process did not run for a while: the machine slept, or the process was stopped.

A timer that is much too late shows it. Where a clock counts the time of sleep, that clock decides: CLOCK_BOOTTIME of
Linux, CLOCK_MONOTONIC of macOS. On Windows all clocks do.

A Linux timer of CLOCK_BOOTTIME that was due during the sleep fires at once after it. Elsewhere a timer may go on where
it was when the machine fell asleep, so it is a short one.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final, NoReturn, TypeAlias

import trio

__all__ = ["watch_suspension"]

NOTICED: Final = 5.0
"""Seconds that the timer must be late. A link survives a shorter sleep."""

_LONG: Final = 10.0
_SHORT: Final = 2.0

_CLOCK: Final = {"linux": "CLOCK_BOOTTIME", "darwin": "CLOCK_MONOTONIC"}.get(sys.platform)

_Timer: TypeAlias = tuple[float, Callable[[float], Awaitable[object]]]
"""How many seconds to sleep at a time, and the function that does."""


def _now() -> float:
    """Seconds, those in which the machine slept included."""
    return time.monotonic() if _CLOCK is None else time.clock_gettime(getattr(time, _CLOCK))


@contextmanager
def _timer() -> Iterator[_Timer]:
    descriptor = _timerfd_create() if sys.platform == "linux" else -1
    if descriptor < 0:
        yield _SHORT, trio.sleep
        return

    async def sleep(seconds: float) -> None:
        _timerfd_settime(descriptor, seconds)
        await trio.lowlevel.wait_readable(descriptor)
        os.read(descriptor, 8)

    try:
        yield _LONG, sleep
    finally:
        os.close(descriptor)


async def watch_suspension(
    resumed: Callable[[float], object],
    *,
    clock: Callable[[], float] = _now,
    timer: Callable[[], AbstractContextManager[_Timer]] = _timer,
) -> NoReturn:
    """Call `resumed` with the seconds for which this process did not run, after each time, until cancelled.

    Args:
        clock: seconds, those of sleep included.
        timer: sleeps.
    """
    with timer() as (period, sleep):
        while True:
            due = clock() + period
            await sleep(period)
            late = clock() - due
            if late > NOTICED:
                resumed(late)


# `os` has these from Python 3.13 on.


def _timerfd_create() -> int:
    """A descriptor, or -1 if there can be none."""
    try:
        created: int = ctypes.CDLL(None).timerfd_create(time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return -1
    return created


def _timerfd_settime(descriptor: int, seconds: float) -> None:
    whole = int(seconds)
    once = struct.pack("@llll", 0, 0, whole, round((seconds - whole) * 1e9))
    ctypes.CDLL(None).timerfd_settime(descriptor, 0, once, None)
