"""Rate limits: token buckets, delays that double with each failure, and handshakes. No I/O; the caller passes the time.

Buckets and failures keep a bounded number of keys, and drop the one that was used least recently. A client with enough
addresses to make them drop keys is bounded by the limits on all addresses together.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, final

from .._wire.messages import LONGEST_WAIT

__all__ = ["REMEMBERED", "FailureBackoff", "HandshakeRate", "TokenBuckets"]

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
        tokens, filled_at = self._buckets.get(key, (self._size, now))
        tokens = min(tokens + (now - filled_at) * self._rate, self._size)
        enough = tokens >= 1
        self._buckets[key] = (tokens - 1 if enough else tokens, now)
        self._buckets.move_to_end(key)
        if len(self._buckets) > self._remembered:
            self._buckets.popitem(last=False)
        return enough

    def give_back(self, key: Hashable) -> None:
        """Undo the last `take` of `key`, which got a token that was not used."""
        if key in self._buckets:
            tokens, filled_at = self._buckets[key]
            self._buckets[key] = (min(tokens + 1, self._size), filled_at)


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


@final
class HandshakeRate:
    """Which gateways may go on with their handshake, and when each of the others shall come again.

    A handshake takes a token when its proof is verified, so a stranger takes none. The tokens of a second may gather.
    While there is none, newcomers are refused before they cost more. Each of them gets a turn, at the end of a line
    that moves at the rate, so that they do not come again all at once. A turn is a time and no promise: nothing is kept
    for its owner.

    Args:
        rate: handshakes per second; 0 means no limit.
    """

    def __init__(self, rate: float) -> None:
        self._rate: Final = rate
        self._size: Final = max(rate, 1.0)
        self._tokens = self._size
        self._filled_at = -math.inf
        self._last_turn = -math.inf

    def wait(self, now: float) -> float | None:
        """Seconds until the turn of a newcomer; None if it may go on."""
        if not self._rate:
            return None
        self._fill(now)
        if self._tokens >= 1:
            return None
        turn = max(self._last_turn, now) + 1 / self._rate
        if turn > now + LONGEST_WAIT:  # no gateway waits longer: begin a second line beside this one
            turn = now + 1 / self._rate
        self._last_turn = turn
        return turn - now

    def proved(self, now: float) -> None:
        """A gateway has proved its key. Those that are under way may take more tokens than there are."""
        self._fill(now)
        self._tokens -= 1

    def _fill(self, now: float) -> None:
        self._tokens = min(self._tokens + (now - self._filled_at) * self._rate, self._size)
        self._filled_at = now
