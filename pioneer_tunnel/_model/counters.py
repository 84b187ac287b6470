"""Counters on the way of visitors' bytes. They are plain numbers, so that to count costs an addition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

from .services import ANY_SERVICE
from .stats import StreamStats

__all__ = ["UNCOUNTED", "Amount", "ServiceCounters", "StreamCounter"]

MOST_COUNTED: Final = 256
"""Names of services that one tunnel counts. The streams of further ones count as `*`."""


class Amount:
    """A number of bytes that grows."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total: int = 0


UNCOUNTED: Final = Amount()
"""For bytes whose number is never read."""


@final
class StreamCounter:
    """Counts the streams of one service.

    Attributes:
        open: streams now.
        opened: streams that were opened.
        from_visitors, to_visitors: their bytes.
    """

    __slots__ = ("from_visitors", "open", "opened", "to_visitors")

    def __init__(self) -> None:
        self.open: int = 0
        self.opened: int = 0
        self.from_visitors: Final = Amount()
        self.to_visitors: Final = Amount()

    def begin(self) -> None:
        """A stream is opened."""
        self.open += 1
        self.opened += 1

    def end(self) -> None:
        """A stream has ended."""
        self.open -= 1

    def stats(self) -> StreamStats:
        """The numbers now."""
        return StreamStats(
            open=self.open,
            opened_total=self.opened,
            from_visitors_bytes_total=self.from_visitors.total,
            to_visitors_bytes_total=self.to_visitors.total,
        )


@final
class ServiceCounters:
    """The counters of one tunnel's services, by name. Their number is bounded, since gateways may create names."""

    __slots__ = ("_of",)

    def __init__(self) -> None:
        self._of: Final[dict[str, StreamCounter]] = {}

    def of(self, service: str) -> StreamCounter:
        """The counter of a service."""
        counter = self._of.get(service)
        if counter is None:
            if len(self._of) >= MOST_COUNTED and service != ANY_SERVICE:
                return self.of(ANY_SERVICE)
            counter = self._of[service] = StreamCounter()
        return counter

    def total(self) -> StreamStats:
        """The sum of all."""
        return sum((counter.stats() for counter in self._of.values()), StreamStats())

    def stats(self, configured: Iterable[str] = ()) -> dict[str, StreamStats]:
        """The numbers now, by name; those of `configured` services come first, also without a stream."""
        return dict.fromkeys(configured, StreamStats()) | {name: counter.stats() for name, counter in self._of.items()}
