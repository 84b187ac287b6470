"""What makes a stream of bytes resumable: two counters, and the tail of sent bytes that may have been lost. No I/O.

Both ends count the bytes that they have sent and received since the session began. An end keeps references to what it
has sent until the peer reports that it has received it. When the connection is lost, each end tells the other how much
it has received, and sends again what the other lacks. So no byte is lost, and none is received twice.

    sent          bytes that were passed to a connection
    acknowledged  bytes of them that the peer has reported; the tail is what lies between
    received      bytes of the peer that were taken from a connection
    reported      bytes of them that the peer was told of

A report costs more than the bytes of a small message, so an end reports when a quarter of the peer's tail is due, and
what is less after a short wait (`link`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final, final

from .._model.errors import RemoteProtocolError
from .._net.leg import Bytes
from .._wire.resumption import Counters

__all__ = ["DEFAULT_WINDOW", "LEAST_REPORT", "LEAST_WINDOW", "Tail"]

DEFAULT_WINDOW: Final = 8 * 1024 * 1024
"""Bytes of the largest tail: more than what TCP has on its way with the buffers of a default Linux."""

LEAST_WINDOW: Final = 256 * 1024
"""Bytes that a tail may always have, also while memory is short: a batch of yamux fits."""

LEAST_REPORT: Final = 1024
"""Bytes that are worth a report. Pings on an idle link are not, so it sends nothing more because of this."""

_REPORTS_OF_WINDOW: Final = 4


@final
class Tail:
    """One end's counters and its unacknowledged bytes.

    Args:
        window: bytes that the tail may have; it may exceed that by what is sent between two looks.
        peer_window: the same of the peer's tail, which decides when to report.

    Attributes:
        sent, acknowledged, received, reported: see the module.
        report_every: when so many received bytes are not reported, the peer may soon have to wait.
    """

    __slots__ = ("_batches", "acknowledged", "received", "report_every", "reported", "sent", "window")

    def __init__(self, *, window: int = DEFAULT_WINDOW, peer_window: int = DEFAULT_WINDOW) -> None:
        self.window: Final = max(window, LEAST_WINDOW)
        self.report_every: Final = max(peer_window, LEAST_WINDOW) // _REPORTS_OF_WINDOW
        self.sent: int = 0
        self.acknowledged: int = 0
        self.received: int = 0
        self.reported: int = 0
        # What each send has passed on, and how much was sent then. Of the first one a part may be acknowledged. Chunks
        # are many, so none of them is looked at when it is acknowledged.
        self._batches: deque[tuple[int, tuple[Bytes, ...]]] = deque()

    @property
    def counters(self) -> Counters:
        """How far this end is."""
        return Counters(self.sent, self.received)

    @property
    def held(self) -> int:
        """Bytes of the tail."""
        return self.sent - self.acknowledged

    def is_full(self, *, short: bool = False) -> bool:
        """Whether the sender must wait for a report.

        Args:
            short: memory is short, so that the tail may have `LEAST_WINDOW` bytes only.
        """
        return self.sent - self.acknowledged >= (LEAST_WINDOW if short else self.window)

    def keep(self, chunks: Sequence[Bytes]) -> None:
        """Count and keep `chunks`, which are sent now. They must not change any more."""
        self.sent = sent = self.sent + sum(map(len, chunks))
        self._batches.append((sent, tuple(chunks)))

    def acknowledge(self, total: int) -> bool:
        """The peer reports that it has received `total` bytes. Returns whether the tail is shorter now.

        Reports may overtake each other; one that says less than an earlier one changes nothing.

        Raises:
            RemoteProtocolError: these are more than were sent.
        """
        if total > self.sent:
            raise RemoteProtocolError(f"it reports {total} received bytes, and {self.sent} were sent")
        if total <= self.acknowledged:
            return False
        self.acknowledged = total
        batches = self._batches
        while batches and batches[0][0] <= total:
            batches.popleft()
        return True

    def receive(self, chunks: Sequence[Bytes]) -> int:
        """Count `chunks` of the peer. Returns how many bytes it has sent."""
        self.received = received = self.received + sum(map(len, chunks))
        return received

    def check(self, peer: Counters) -> None:
        """Check that the session can go on with a peer that is at `peer`. Changes nothing.

        Raises:
            RemoteProtocolError: it cannot: one end has lost what it had counted.
        """
        if not self.acknowledged <= peer.received <= self.sent:
            again = f"this end can send again from {self.acknowledged} to {self.sent}"
            raise RemoteProtocolError(f"it has received {peer.received} bytes; {again}")
        if peer.sent < self.received:
            raise RemoteProtocolError(f"it has sent {peer.sent} bytes, and {self.received} have come")

    def resume(self, peer: Counters) -> list[Bytes]:
        """Go on over a new connection, with a peer that is at `peer`.

        Returns:
            What is left of the tail, which is to be sent first.

        Raises:
            As `check`.
        """
        self.check(peer)
        self.acknowledge(peer.received)
        self.reported = self.received  # the peer has got our counters
        again = [chunk for _, chunks in self._batches for chunk in chunks]
        known = sum(map(len, again)) - self.held
        first = 0
        while known and known >= len(again[first]):
            known -= len(again[first])
            first += 1
        if known:
            again[first] = memoryview(again[first])[known:]
        return again[first:]

    def clear(self) -> None:
        """Drop the tail, since the session has ended."""
        self.acknowledged = self.sent
        self._batches.clear()
