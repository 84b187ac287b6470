"""How much the writer sends at once, how much of it is of one stream, and how much the kernel may hold unsent.

All three follow the rate of the link. What was sent cannot be overtaken: a ping or a small answer that comes next has
to wait behind it. So they are small on a slow path. On a fast path they are large, which costs less time for each byte.

The rate is measured while there is more to send than a batch, over many batches. A few say little: acknowledgements
come in bursts, in which the kernel takes what it is given, and then it takes nothing until the next burst.
"""

from __future__ import annotations

from typing import Final, final

from .frames import LARGEST_FRAME

__all__ = ["FIRST_BATCH", "LARGEST_BATCH", "SMALLEST_BATCH", "Pacing"]

BATCH_SECONDS: Final = 0.005
"""How long a batch should take."""

SMALLEST_BATCH: Final = 2 * 1024
"""More than a packet. The kernel makes small packets of small pieces, and each packet's headers cost capacity."""

FIRST_BATCH: Final = 16 * 1024
LARGEST_BATCH: Final = 4 * LARGEST_FRAME
"""Whole frames: what is left of one would be sent as another, and cost as much."""

TURNS_OF_BATCH: Final = 4
"""Turns that a batch has at least, while it follows the rate. So a turn takes a quarter of `BATCH_SECONDS`."""

_MEASURED_BATCHES: Final = 16
_LONGEST_MEASUREMENT: Final = 0.25
_MOST_GROWTH: Final = 4
"""One measurement raises the batch to this many times its size at most."""


@final
class Pacing:
    """The size of the next batch.

    Attributes:
        batch: bytes to send at once.
        turn: bytes that a stream may send at once while others wait. Where batches are as large as they get, this still
            grows with the rate, up to a batch.
    """

    __slots__ = ("_amount", "_seconds", "batch", "turn")

    def __init__(self) -> None:
        self.batch: int = FIRST_BATCH
        self.turn: int = FIRST_BATCH // TURNS_OF_BATCH
        self._amount = 0
        self._seconds = 0.0

    @property
    def unsent(self) -> int:
        """Bytes that the kernel may hold unsent: one batch to send while the next one is made."""
        return 2 * self.batch

    def sent(self, amount: int, seconds: float) -> bool:
        """Note that the link took a batch of `amount` bytes in `seconds`; returns whether the next one differs in size.

        A batch that was not full ends the measurement: the link may have had to wait for us.
        """
        self._amount += amount
        self._seconds += seconds
        enough = self._seconds >= BATCH_SECONDS and self._amount >= _MEASURED_BATCHES * self.batch
        if not (enough or self._seconds >= _LONGEST_MEASUREMENT):
            if amount < self.batch:
                self._amount, self._seconds = 0, 0.0
            return False
        wanted = round(self._amount / self._seconds * BATCH_SECONDS)
        self._amount, self._seconds = 0, 0.0
        before = self.batch
        self.batch = max(min(wanted, before * _MOST_GROWTH, LARGEST_BATCH), SMALLEST_BATCH)
        self.turn = min(wanted // TURNS_OF_BATCH, before)  # not what it was: from almost nothing it would never grow
        return self.batch != before
