"""Flow control: how much each end may send, and how much it may hold until then, as pure arithmetic.

Both directions of a stream start with 256 KiB of credit. `SendWindow` is what the peer lets us send. `ReceiveWindow`
is what we let the peer send, and keeps one equation at all times:

    size  =  credit (the peer may still send it)  +  unread (arrived, not yet read)  +  owed (read, not yet granted)

so a peer can make us hold at most `size` bytes, and credit comes back only when the application has read. `size`
starts at 256 KiB and doubles while the window is what holds the sender up: when half of it was sent and read within
two round trips, the path could carry more (bandwidth x round trip). A half that had arrived before, because the
application had fallen behind, does not count. Growth is paid from a `WindowBudget` that all streams of a session
share, and goes back to it when the stream ends.

`SendBudget` bounds what waits to be sent on: to the peer, which may grant no credit or read nothing, and to where the
application takes what it has read.
"""

from __future__ import annotations

import math
from typing import Final, final

from .._model.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
    "INITIAL_WINDOW",
    "SEND_AHEAD",
    "SEND_BOUND",
    "SEND_RESERVE",
    "ReceiveWindow",
    "SendBudget",
    "SendWindow",
    "WindowBudget",
]

INITIAL_WINDOW: Final = 256 * 1024
SEND_BOUND: Final = 64 * 1024
"""Bytes that one stream may hold for sending when the peer grants it no credit."""
SEND_AHEAD: Final = 256 * 1024
"""Bytes that it may hold where they are likely to leave at once, while its session and process hold little."""
SEND_RESERVE: Final = 4 * 1024
"""Bytes that it may hold also when its session or process has used up its budget, so that no stream stands still."""
_MAX_CREDIT: Final = 2**32 - 1

# A round trip is taken for at least this many seconds: below it the clock measures the scheduler, not the path.
_SHORTEST_ROUND_TRIP: Final = 0.0005


@final
class SendWindow:
    """What the peer lets us send on one stream, in bytes."""

    __slots__ = ("credit",)

    def __init__(self) -> None:
        self.credit = INITIAL_WINDOW

    def grant(self, amount: int) -> None:
        """The peer grants `amount` bytes more.

        Raises:
            RemoteProtocolError: the sum does not fit the protocol's 32 bits.
        """
        if self.credit + amount > _MAX_CREDIT:
            raise RemoteProtocolError(f"credit of {amount} on top of {self.credit} overflows 32 bits")
        self.credit += amount

    def spend(self, amount: int) -> None:
        """We send `amount` bytes.

        Raises:
            LocalProtocolError: the peer has not granted that much.
        """
        if amount > self.credit:
            raise LocalProtocolError(f"{amount} bytes to send, but a credit of {self.credit}")
        self.credit -= amount


@final
class SendBudget:
    """What all streams that share it may hold for sending, in bytes.

    The less is left, the less one stream may hold. So streams that get nothing sent cannot take all of it, and others
    go on. Beyond `limit`, each stream may hold `SEND_RESERVE`.

    Args:
        limit: bytes.
        parent: the budget of the process, for that of a session.
    """

    __slots__ = ("_limit", "_parent", "held")

    def __init__(self, limit: int, parent: SendBudget | None = None) -> None:
        self._limit = limit
        self._parent = parent
        self.held = 0

    @property
    def bound(self) -> int:
        """What one stream may hold now."""
        bound = max((self._limit - self.held) // 8, SEND_RESERVE)
        return min(bound, SEND_BOUND if self._parent is None else self._parent.bound)

    @property
    def ahead(self) -> int:
        """The same where it is likely to leave at once, and large pieces cost less time."""
        bound = self.bound
        return SEND_AHEAD if bound == SEND_BOUND else bound

    def take(self, amount: int) -> None:
        """A stream holds `amount` bytes more; less when negative."""
        self.held += amount
        if self._parent is not None:
            self._parent.take(amount)

    def close(self) -> None:
        """Nothing of this session will be sent any more: give all of it back to the process."""
        if self._parent is not None:
            self._parent.take(-self.held)
            self._parent = None


@final
class WindowBudget:
    """What all receive windows of a session may grow by together, in bytes, beyond their initial size."""

    __slots__ = ("left",)

    def __init__(self, limit: int) -> None:
        self.left = limit

    def take(self, wanted: int) -> int:
        """As much of `wanted` as is left."""
        taken = min(wanted, self.left)
        self.left -= taken
        return taken

    def give_back(self, amount: int) -> None:
        """What a stream took and needs no more."""
        self.left += amount


@final
class ReceiveWindow:
    """What we let the peer send on one stream. See the module's equation.

    Args:
        budget: pays for growth.
        limit: the largest size, in bytes. Every stream starts with 256 KiB, so less than that means: no growth.
        now: when the stream was opened, in seconds of any steady clock.
    """

    __slots__ = ("_budget", "_limit", "_since", "credit", "size", "unread")

    def __init__(self, budget: WindowBudget, limit: int, now: float) -> None:
        self._budget = budget
        self._limit = min(max(limit, INITIAL_WINDOW), _MAX_CREDIT)
        self._since = now
        self.size = INITIAL_WINDOW
        self.credit = INITIAL_WINDOW
        self.unread = 0

    @property
    def owed(self) -> int:
        """Bytes that were read and not yet granted again."""
        return self.size - self.credit - self.unread

    def receive(self, amount: int) -> None:
        """The peer announces `amount` bytes.

        Raises:
            RemoteProtocolError: it has no credit for them. It is not clamped: the peer's arithmetic is broken.
        """
        if amount > self.credit:
            raise RemoteProtocolError(f"{amount} bytes of DATA, but a credit of {self.credit}")
        self.credit -= amount
        self.unread += amount

    def read(self, amount: int, now: float, round_trip: float | None) -> int:
        """The application has read `amount` bytes; returns the credit to send to the peer now, often 0.

        Credit is given in portions of half a window or more, so that not every read costs a frame. With a known
        `round_trip`, in seconds, this is where the window grows.
        """
        self.unread -= amount
        assert self.unread >= 0
        if not self.size:  # closed
            return 0
        assert self.owed >= 0
        if self.owed < self.size // 2:
            return 0
        if round_trip is not None and now - self._since < 2 * max(round_trip, _SHORTEST_ROUND_TRIP):
            self.size += self._budget.take(min(self.size, self._limit - self.size))
        self._since = now if self.unread < self.size // 4 else -math.inf
        grant = self.owed
        self.credit += grant
        assert self.size == self.credit + self.unread
        return grant

    def close(self) -> None:
        """The peer sends no more: growth goes back to the budget, and what is read from now on grants nothing."""
        if self.size:
            self._budget.give_back(self.size - INITIAL_WINDOW)
        self.size = 0
        self.credit = 0
