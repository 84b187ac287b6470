"""Rate limits: token buckets, and delays that double with each failure. No I/O; the caller passes the time.

Both keep a bounded number of keys, and drop the one that was used least recently. A client with enough addresses to
make them drop keys is bounded by the limits on all addresses together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, final

__all__ = ["REMEMBERED", "FailureBackoff", "TokenBuckets"]

REMEMBERED: Final = 4096
"""Keys that each of these keeps."""

BURST_SECONDS: Final = 4.0
"""Size of a bucket: the tokens of so many seconds."""

FORGET_AFTER: Final = 600.0
"""Seconds without a failure after which the delay starts from the beginning."""

_MOST_DOUBLINGS: Final = 32


@final
class TokenBuckets:
    """A token bucket for each key. It holds the tokens of 4 seconds, but at least one, and starts full.

    Args:
        rate: tokens per second; 0 means no limit.
        remembered: how many buckets are kept.
    """

    def __init__(self, rate: float, *, remembered: int = REMEMBERED) -> None:
        self._rate: Final = rate
        self._size: Final = max(rate * BURST_SECONDS, 1.0)
        self._remembered: Final = remembered
        self._buckets: Final[OrderedDict[Hashable, tuple[float, float]]] = OrderedDict()

    def take(self, key: Hashable, now: float) -> bool:
        """Take a token of `key` at time `now`; False when there is none."""
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
class FailureBackoff:
    """The delay of the answer to a failure, for each key: each failure doubles it, up to a bound.

    Args:
        first: seconds for the first failure; 0 means no delay at all.
        longest: the bound in seconds.
        remembered: how many keys are kept.
    """

    def __init__(self, first: float, longest: float, *, remembered: int = REMEMBERED) -> None:
        self._first: Final = first
        self._longest: Final = longest
        self._remembered: Final = remembered
        self._failures: Final[OrderedDict[Hashable, tuple[int, float]]] = OrderedDict()

    def failed(self, key: Hashable, now: float) -> float:
        """Count a failure of `key` at time `now`. Returns the delay in seconds."""
        count, last = self._failures.pop(key, (0, now))
        if now - last >= FORGET_AFTER:
            count = 0
        self._failures[key] = (min(count + 1, _MOST_DOUBLINGS), now)
        if len(self._failures) > self._remembered:
            self._failures.popitem(last=False)
        return min(self._first * 2.0**count, self._longest)
