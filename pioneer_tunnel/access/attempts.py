"""Limits of wrong passwords and tokens per address, and a short memory of results. No I/O; the caller passes the time.

Both keep a bounded number of entries, and drop the one that was used least recently.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, final

__all__ = ["MOST_ATTEMPTS", "PER_ATTEMPT", "Attempts", "Results"]

MOST_ATTEMPTS: Final = 10
"""Wrong attempts that an address has at once."""

PER_ATTEMPT: Final = 6.0
"""Seconds after which it has one more."""

ACCEPTED_FOR: Final = 300.0
"""Seconds that a right password is not computed again."""

REFUSED_FOR: Final = 60.0
"""The same for a wrong one."""

_REMEMBERED: Final = 4096


@final
class Attempts:
    """Counts the attempts of each address. One that turns out to be right is given back."""

    def __init__(self) -> None:
        self._used: Final[OrderedDict[Hashable, tuple[float, float]]] = OrderedDict()

    def wait(self, key: Hashable, now: float) -> float:
        """Seconds until `key` has an attempt; 0 if it has one now."""
        return max(self._now_used(key, now) + 1 - MOST_ATTEMPTS, 0.0) * PER_ATTEMPT

    def take(self, key: Hashable, now: float) -> None:
        """Take an attempt of `key`."""
        self._set(key, min(self._now_used(key, now) + 1, MOST_ATTEMPTS), now)

    def give_back(self, key: Hashable, now: float) -> None:
        """The attempt that was taken is right, or was not made."""
        self._set(key, max(self._now_used(key, now) - 1, 0.0), now)

    def _now_used(self, key: Hashable, now: float) -> float:
        used, at = self._used.get(key, (0.0, now))
        return max(used - (now - at) / PER_ATTEMPT, 0.0)

    def _set(self, key: Hashable, used: float, now: float) -> None:
        self._used.pop(key, None)
        if used:
            self._used[key] = used, now
        if len(self._used) > _REMEMBERED:
            self._used.popitem(last=False)


@final
class Results:
    """Which passwords were right or wrong a short time ago. Right and wrong ones do not displace each other.

    Keys are digests, so that no password is kept.
    """

    def __init__(self) -> None:
        self._until: Final[dict[bool, OrderedDict[bytes, float]]] = {True: OrderedDict(), False: OrderedDict()}

    def get(self, key: bytes, now: float) -> bool | None:
        """The result of `key`; None if it is not known."""
        for result, until in self._until.items():
            if now < until.get(key, -math.inf):
                until.move_to_end(key)
                return result
        return None

    def set(self, key: bytes, result: bool, now: float) -> None:
        """Remember a result."""
        until = self._until[result]
        until[key] = now + (ACCEPTED_FOR if result else REFUSED_FOR)
        until.move_to_end(key)
        if len(until) > _REMEMBERED:
            until.popitem(last=False)
