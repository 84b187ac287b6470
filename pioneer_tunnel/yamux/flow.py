"""Flow control as pure arithmetic: how much each end may send, and how much may wait to be sent.

Both directions of a stream start with 256 KiB of credit. `SendWindow` is the credit that the peer gives us.
`ReceiveWindow` is the credit that we give the peer. For it, one equation always holds:

    size  =  credit (the peer may still send it)  +  unread (arrived, not yet read)  +  owed (read, not yet granted)

So a peer can make us hold at most `size` bytes, and it gets credit back only when the application has read. `size`
starts at 256 KiB. It doubles while the window is the bottleneck: if half of it was sent and read within two round
trips, the path could carry more (bandwidth x round trip). Data that had piled up unread before, because the application
was slow, does not count. A path may become longer, so the round trip is measured again and again while data comes, and
the shortest of the last half second counts (`RoundTrips`). The growth of all streams of a session comes from one
`WindowBudget`, and is given back when the stream ends.

`SendBudget` bounds the data that waits to be sent: to a peer that grants no credit or does not read, and, for data that
the application has read, to wherever it sends it.
"""

from __future__ import annotations

import math
from typing import Final, final

from .._model.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
    "ASK_INTERVAL",
    "INITIAL_WINDOW",
    "SEND_AHEAD",
    "SEND_BOUND",
    "SEND_RESERVE",
    "ReceiveWindow",
    "RoundTrips",
    "SendBudget",
    "SendWindow",
    "WindowBudget",
]

INITIAL_WINDOW: Final = 256 * 1024
SEND_BOUND: Final = 64 * 1024
"""Bytes that one stream may hold for sending when the peer grants it no credit."""
SEND_AHEAD: Final = 256 * 1024
"""Bytes that one stream may hold when there is credit for them, while its session and process hold little."""
SEND_RESERVE: Final = 4 * 1024
"""Bytes that one stream may always hold, so that it makes progress when its session or process is at its limit."""
_MAX_CREDIT: Final = 2**32 - 1

_SHARES: Final = 8
"""One stream may hold this part of what is left of a budget."""
ASK_INTERVAL: Final = 0.25
"""Seconds between pings that measure the round trip while credit is granted."""
_REMEMBERED: Final = 0.5
"""Seconds in which the shortest round trip counts. A longer one may only mean that our own bytes queue on the path."""

# A shorter round trip counts as this many seconds: below it, the clock measures the scheduler and not the path.
_SHORTEST_ROUND_TRIP: Final = 0.0005


@final
class RoundTrips:
    """The recent round trips of a session.

    Attributes:
        shortest: in seconds: the shortest that was measured in the last half second, or else the latest one. None
            before the first.
    """

    __slots__ = ("_recent", "shortest")

    def __init__(self) -> None:
        self._recent: list[tuple[float, float]] = []
        self.shortest: float | None = None

    def add(self, measured: float, now: float) -> None:
        """Note a round trip of `measured` seconds that ended at `now`."""
        self._recent.append((now, measured))
        while self._recent[0][0] < now - _REMEMBERED:
            del self._recent[0]
        self.shortest = min(measured for _, measured in self._recent)


@final
class SendWindow:
    """The credit that the peer gives us on one stream, in bytes."""

    __slots__ = ("credit",)

    def __init__(self) -> None:
        self.credit: int = INITIAL_WINDOW

    def grant(self, amount: int) -> None:
        """Add `amount` bytes that the peer grants.

        Raises:
            RemoteProtocolError: the sum does not fit into 32 bits.
        """
        if self.credit + amount > _MAX_CREDIT:
            raise RemoteProtocolError(f"credit of {amount} on top of {self.credit} overflows 32 bits")
        self.credit += amount

    def spend(self, amount: int) -> None:
        """Subtract `amount` bytes that we send.

        Raises:
            LocalProtocolError: that is more than the credit.
        """
        if amount > self.credit:
            raise LocalProtocolError(f"{amount} bytes to send, but a credit of {self.credit}")
        self.credit -= amount


@final
class SendBudget:
    """The bytes that all streams which share this budget may hold for sending.

    The less is left, the less one stream may hold. So blocked streams cannot use all of it, and other streams continue.
    When the limit is reached, each stream may still hold `SEND_RESERVE`.

    Args:
        limit: bytes.
        parent: for the budget of a session, the budget of the process.
    """

    __slots__ = ("_limit", "_parent", "_plenty", "held")

    def __init__(self, limit: int, parent: SendBudget | None = None) -> None:
        self._limit = limit
        self._plenty = limit - _SHARES * SEND_BOUND
        self._parent = parent
        self.held: int = 0

    @property
    def bound(self) -> int:
        """Bytes that one stream may hold now."""
        parent = self._parent
        if self.held <= self._plenty and (parent is None or parent.held <= parent._plenty):
            return SEND_BOUND
        bound = min(max((self._limit - self.held) // _SHARES, SEND_RESERVE), SEND_BOUND)
        return bound if parent is None else min(bound, parent.bound)

    @property
    def is_short(self) -> bool:
        """Whether streams may hold less than usual."""
        return self.bound < SEND_BOUND

    @property
    def ahead(self) -> int:
        """The same for data that is likely to leave at once. Large pieces cost less time."""
        bound = self.bound
        return SEND_AHEAD if bound == SEND_BOUND else bound

    def take(self, amount: int) -> None:
        """Add `amount` bytes to what streams hold; a negative amount gives bytes back."""
        self.held += amount
        if self._parent is not None:
            self._parent.take(amount)

    def close(self) -> None:
        """Give all bytes back to the process: this session sends nothing more."""
        if self._parent is not None:
            self._parent.take(-self.held)
            self._parent = None


@final
class WindowBudget:
    """How many bytes all receive windows of a session together may grow beyond their initial size."""

    __slots__ = ("left",)

    def __init__(self, limit: int) -> None:
        self.left: int = limit

    def take(self, wanted: int) -> int:
        """Take `wanted` bytes, or all that are left if these are fewer; returns the number."""
        taken = min(wanted, self.left)
        self.left -= taken
        return taken

    def give_back(self, amount: int) -> None:
        """Return bytes that a stream took."""
        self.left += amount


@final
class ReceiveWindow:
    """The credit that we give the peer on one stream. See the module's equation.

    Args:
        budget: where growth comes from.
        limit: the largest size, in bytes. Every stream starts with 256 KiB; a smaller limit means no growth.
        now: when the stream was opened, in seconds of any monotonic clock.
    """

    __slots__ = ("_budget", "_limit", "_since", "credit", "size", "unread")

    def __init__(self, budget: WindowBudget, limit: int, now: float) -> None:
        self._budget = budget
        self._limit = min(max(limit, INITIAL_WINDOW), _MAX_CREDIT)
        self._since = now
        self.size: int = INITIAL_WINDOW
        self.credit: int = INITIAL_WINDOW
        self.unread: int = 0

    @property
    def owed(self) -> int:
        """Bytes that were read, and for which no new credit was granted yet."""
        return self.size - self.credit - self.unread

    def receive(self, amount: int) -> None:
        """Count `amount` bytes that the peer announces in a header.

        Raises:
            RemoteProtocolError: the peer has not enough credit.
        """
        if amount > self.credit:
            raise RemoteProtocolError(f"{amount} bytes of DATA, but a credit of {self.credit}")
        self.credit -= amount
        self.unread += amount

    def read(self, amount: int, now: float, round_trip: float | None) -> int:
        """Count `amount` bytes that the application read; returns the credit to send to the peer now, often 0.

        Credit is granted in portions of at least half a window, so that not every read costs a frame. The window may
        grow here, if `round_trip`, in seconds, is known.
        """
        self.unread -= amount
        assert self.unread >= 0
        size = self.size
        if not size:  # closed
            return 0
        owed = size - self.credit - self.unread
        assert owed >= 0
        if owed < size // 2:
            return 0
        if round_trip is not None and now - self._since < 2 * max(round_trip, _SHORTEST_ROUND_TRIP):
            self.size += self._budget.take(min(self.size, self._limit - self.size))
        self._since = now if self.unread < self.size // 4 else -math.inf
        grant = self.owed
        self.credit += grant
        assert self.size == self.credit + self.unread
        return grant

    def close(self) -> None:
        """End the window: the peer sends nothing more. Growth goes back to the budget, and reads grant no credit."""
        if self.size:
            self._budget.give_back(self.size - INITIAL_WINDOW)
        self.size = 0
        self.credit = 0
