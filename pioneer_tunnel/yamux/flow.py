"""Flow control as pure arithmetic: how much each end may send, and how much may wait to be sent.

Both directions of a stream start with 256 KiB of credit. `SendWindow` is the credit that the peer gives us.
`ReceiveWindow` is the credit that we give the peer. For it, one equation always holds:

    size  =  credit (the peer may still send it)  +  unread (arrived, not yet read)  +  owed (read, not yet granted)

So a peer can make us hold at most `size` bytes, and it gets credit back only when the application has read.

`size` starts at 256 KiB. It grows while the window, and not the path, limits what comes. A window that is larger than
that fills no path faster. It only lets bytes queue on the path, and in a queue the small answers of other streams wait
behind them. So the size follows what the path holds:

    what the path holds  =  rate  x  round trip without a queue

- The rate is measured in rounds. A round begins when credit is granted, and ends when bytes have come that needed this
  credit. So it takes a round trip at least: bytes that had piled up, because this end was slow, look no faster. A round
  also takes `_SHORTEST_ROUND` at least: on a fast path, a shorter one says more of the scheduler than of the path.
- The round trip is the shortest that was measured (`RoundTrips`). Pings are sent while data comes, so most of them wait
  in the queue that our own windows allow. But a path may also become longer. So when some pings in a row took twice as
  long, and at most every ten seconds, all windows that may grow are cut to a quarter for two pings. If the windows fill
  a queue, these take a quarter of the time, and the windows stay as they are. If the path is longer, they take as long
  as the others, they replace the shortest one, and the windows grow.

The growth of all streams of a session comes from one `WindowBudget`, and is given back when the stream ends.

`SendBudget` bounds the data that waits to be sent: to a peer that grants no credit or does not read, and, for data that
the application has read, to wherever it sends it.
"""

from __future__ import annotations

from typing import Final, final

from .._model.errors import LocalProtocolError, RemoteProtocolError

__all__ = [
    "ASK_INTERVAL",
    "INITIAL_WINDOW",
    "SEND_AHEAD",
    "SEND_BOUND",
    "SEND_RESERVE",
    "TRUSTED",
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
TRUSTED: Final = 40
"""Measurements for which a round trip without a queue is trusted: as many as are made in ten seconds of data."""
_ENOUGH: Final = 2
"""Measurements without a queue that replace the shortest one."""
_FEW: Final = 4
"""Measurements that are too few: each may have been delayed by something else."""

_GAIN: Final = 2.5
"""A window grows while it is less than so many times what the path holds. Credit is granted by halves, so 2 fill it."""
_CUT: Final = 4
"""What windows are divided by to measure without a queue. More than `_GAIN`: they must not grow for their own queue."""
_SHORTEST_ROUND: Final = 0.005
"""Seconds over which the rate is measured at least."""
_SHORTEST_ROUND_TRIP: Final = 0.001
"""A shorter round trip counts as this many seconds.

With less data on its way, the ends of a fast path wait for each other after each batch, and each byte costs up to twice
the processor time. So at the highest rate, what comes next may wait for 2.5 ms (`_GAIN`).
"""

_QUICK_ROUND_TRIP: Final = _SHORTEST_ROUND_TRIP / 2
"""On a path that is no longer, a quarter of what comes in 2.5 ms still holds more than the path does."""


@final
class RoundTrips:
    """The round trips of a session.

    Attributes:
        shortest: in seconds: the shortest since the last ones without a queue; None before the first.
        few: whether more should be measured soon, though at least one was.
        doubted: whether the shortest one may be too short by now, so that more should be measured, without a queue.
    """

    __slots__ = ("_longer", "_measured", "_trusted_until", "_without_queue", "doubted", "few", "shortest")

    def __init__(self) -> None:
        self._measured = self._trusted_until = 0
        self._longer = 0  # how many in a row were much longer than the shortest
        self._without_queue: list[float] = []
        self.shortest: float | None = None
        self.few: bool = False
        self.doubted: bool = False

    def add(self, measured: float) -> None:
        """Note a round trip of `measured` seconds, which has just ended."""
        self._measured += 1
        if self.doubted:
            self._without_queue.append(measured)
            if len(self._without_queue) == _ENOUGH:
                self.shortest = min(self._without_queue)
                self._without_queue, self._longer = [], 0
                self._trusted_until = self._measured + TRUSTED
        elif self.shortest is None or measured <= 2 * self.shortest:
            self._longer = 0
        else:
            self._longer += 1
        self.shortest = measured if self.shortest is None else min(self.shortest, measured)
        self.few = self._measured < _FEW
        self.doubted = self._longer >= _FEW and self._measured >= self._trusted_until


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
        """As `bound`, for data that is likely to leave at once. Large pieces cost less time."""
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
        opened_here: whether the peer can send nothing before it knows of the stream.
    """

    __slots__ = ("_budget", "_began", "_before", "_granted", "_limit", "_needed", "credit", "size", "unread")

    def __init__(self, budget: WindowBudget, limit: int, now: float, *, opened_here: bool = False) -> None:
        self._budget = budget
        self._limit = min(max(limit, INITIAL_WINDOW), _MAX_CREDIT)
        self._granted = INITIAL_WINDOW  # all credit so far
        # When the round began, how much of the credit had been used then, and beyond which part of it the round ends.
        self._began, self._before, self._needed = now, 0, 0 if opened_here else INITIAL_WINDOW
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

    def read(self, amount: int, now: float, round_trip: float | None, *, cut: bool = False, quick: bool = False) -> int:
        """Count `amount` bytes that the application read; returns the credit to send to the peer now, often 0.

        Credit is granted in portions of at least half a window, so that not every read costs a frame. The window may
        grow here, if `round_trip`, in seconds, is known.

        Args:
            cut: whether a window that may grow is cut to a quarter for now. The rest is granted later.
            quick: whether the application may wait for a small answer. Then a window that has grown on a short path is
                cut in the same way, though not below its initial size.
        """
        self.unread -= amount
        assert self.unread >= 0
        size = self.size
        if not size:  # closed
            return 0
        if cut and size < self._limit:
            size //= _CUT
        elif quick and size > INITIAL_WINDOW and round_trip is not None and round_trip <= _QUICK_ROUND_TRIP:
            size = max(size // _CUT, INITIAL_WINDOW)
        if size - self.credit - self.unread < size // 2:
            return 0
        used = self._granted - self.credit
        if used > self._needed and now >= self._began + _SHORTEST_ROUND:
            if round_trip is not None:
                counted = max(round_trip, _SHORTEST_ROUND_TRIP)
                size += self._grow(used - self._before, max(now - self._began, counted) / counted)
            self._began, self._before, self._needed = now, used, self._granted
        grant = size - self.credit - self.unread
        self.credit += grant
        self._granted += grant
        return grant

    def _grow(self, amount: int, round_trips: float) -> int:
        """Grow if the path holds more: `amount` bytes came in so many round trips. Returns by how much it grew."""
        if amount * _GAIN <= self.size * round_trips:
            return 0
        # This is looked at twice in a window. So up to half a window more may have come in the same time.
        wanted = int((amount + self.size // 2) * _GAIN / round_trips)
        grown = self._budget.take(max(min(wanted, 2 * self.size, self._limit) - self.size, 0))
        self.size += grown
        return grown

    def close(self) -> None:
        """End the window: the peer sends nothing more. Growth goes back to the budget, and reads grant no credit."""
        if self.size:
            self._budget.give_back(self.size - INITIAL_WINDOW)
        self.size = 0
        self.credit = 0
