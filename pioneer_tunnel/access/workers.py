"""Threads that compute bcrypt hashes: few at a time, with a bounded queue, so that visitors cannot use up the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

import trio

__all__ = ["MOST_WAITING", "THREADS", "Busy", "Workers"]

THREADS: Final = 2
MOST_WAITING: Final = 256
"""Passwords that wait for a thread. An address has at most the attempts that `Attempts` gives it."""


class Busy(Exception):
    """Too many passwords wait."""


@final
class Workers:
    """The threads of this process."""

    def __init__(self) -> None:
        self._limiter: Final = trio.CapacityLimiter(THREADS)
        self._waiting = 0

    async def run(self, verify: Callable[[], bool]) -> bool:
        """Call `verify` in a thread, and return its result.

        Raises:
            Busy: the queue is full.
        """
        if self._waiting >= MOST_WAITING:
            raise Busy
        self._waiting += 1
        try:
            # It cannot be cancelled while it computes, which takes about a second at the highest cost.
            return await trio.to_thread.run_sync(verify, limiter=self._limiter)
        finally:
            self._waiting -= 1
