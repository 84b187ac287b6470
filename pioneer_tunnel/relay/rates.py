"""How often is too often: token buckets, and waits that grow with each failure. Pure; the time is given in.

Both remember a bounded number of keys, and forget the one that was not heard of for the longest time. Whoever has so
many addresses that this forgets some is held back by the limits on all of them together.

Neighbours: `admission` and the gateways' door ask.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, final

__all__ = ["REMEMBERED", "Failures", "TokenBuckets"]

REMEMBERED: Final = 4096
"""Keys that each of these remembers."""

BURST_SECONDS: Final = 4.0
FORGET_AFTER: Final = 600.0

_MOST_DOUBLINGS: Final = 32


@final
class TokenBuckets:
    """For each key a bucket that holds four seconds' worth of tokens and fills as they come.

    Args:
        rate: tokens a second; 0 for as many as anybody wants.
        remembered: how many buckets are kept.
    """

    def __init__(self, rate: float, *, remembered: int = REMEMBERED) -> None:
        self._rate: Final = rate
        self._size: Final = max(rate * BURST_SECONDS, 1.0)
        self._remembered: Final = remembered
        self._buckets: Final[OrderedDict[Hashable, tuple[float, float]]] = OrderedDict()

    def take(self, key: Hashable, now: float) -> bool:
        """Take a token of `key`; False when there is none."""
        if not self._rate:
            return True
        tokens, filled_at = self._buckets.pop(key, (self._size, now))
        tokens = min(tokens + (now - filled_at) * self._rate, self._size)
        enough = tokens >= 1
        self._buckets[key] = (tokens - 1 if enough else tokens, now)
        if len(self._buckets) > self._remembered:
            self._buckets.popitem(last=False)
        return enough


@final
class Failures:
    """How long the answer to a failure waits: twice as long as the one before, up to a bound.

    Args:
        first: seconds that the first one waits; 0 for no wait at all.
        longest: seconds that any waits at most.
        remembered: how many keys are kept.
    """

    def __init__(self, first: float, longest: float, *, remembered: int = REMEMBERED) -> None:
        self._first: Final = first
        self._longest: Final = longest
        self._remembered: Final = remembered
        self._failures: Final[OrderedDict[Hashable, tuple[int, float]]] = OrderedDict()

    def failed(self, key: Hashable, now: float) -> float:
        """Count a failure of `key`, and return the seconds that its answer waits."""
        count, last = self._failures.pop(key, (0, now))
        if now - last >= FORGET_AFTER:
            count = 0
        self._failures[key] = (min(count + 1, _MOST_DOUBLINGS), now)
        if len(self._failures) > self._remembered:
            self._failures.popitem(last=False)
        return min(self._first * 2.0**count, self._longest)
