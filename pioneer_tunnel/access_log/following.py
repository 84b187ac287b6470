"""What makes entries: `RequestLog` for a stream whose requests are followed, `StreamLog` for any other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, final

import attrs
import trio

from .._http.head import RequestHead
from .._model.addresses import Address
from .._model.counters import Amount
from .entry import Entry, request_entry, shown_address
from .writer import AccessLog

__all__ = ["RequestLog", "StreamLog", "VisitorLog"]


@final
@attrs.define(eq=False)
class _Open:
    """A request without its whole response."""

    entry: Entry
    began: float
    sent: int = 0
    status: int | None = None


@final
class VisitorLog:
    """The log of one visitor's streams to a service.

    Args:
        log: gets the entries.
        visitor: the visitor's address.
        tunnel, service: see `Entry`.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self,
        log: AccessLog,
        visitor: Address | None,
        *,
        tunnel: str | None = None,
        service: str = "",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._log: Final = log
        self._address: Final = shown_address(visitor, shortened=log.shortened)
        self._tunnel: Final = tunnel
        self._service: Final = service
        self._wall_clock: Final = wall_clock

    def write(self, entry: Entry, began: float) -> None:
        """Write an entry that ends now."""
        seconds = trio.current_time() - began
        self._log.write(
            attrs.evolve(
                entry,
                time_unix=self._wall_clock() - seconds,
                seconds=seconds,
                address=self._address,
                tunnel=self._tunnel,
                service=self._service,
            )
        )

    def refused(self, head: RequestHead | None, status: int | None) -> None:
        """A request was answered here, or not at all. `head` is None if it makes no sense."""
        now = trio.current_time()
        entry = Entry(time_unix=0.0, seconds=0.0, address=None) if head is None else request_entry(head)
        self.write(attrs.evolve(entry, status=status, complete=status is not None), now)


@final
class RequestLog:
    """Makes an entry of each request of one stream. `end` has to be called at the end of the stream.

    It is a `ResponseObserver`, and not by inheritance: that one is compiled where the data path is.

    Attributes:
        apology: the status of an answer that the visitor gets in place of a response; None if there is none.
    """

    def __init__(self, visitor: VisitorLog) -> None:
        self.apology: int | None = None
        self._visitor: Final = visitor
        self._open: Final[deque[_Open]] = deque()

    def expected(self, head: RequestHead) -> None:
        self._open.append(_Open(request_entry(head), trio.current_time()))

    def answered(self, status: int) -> None:
        if self._open:
            self._open[0].status = status

    def passed(self, amount: int) -> None:
        if self._open:
            self._open[0].sent += amount

    def ended(self) -> None:
        if self._open:
            self._write(self._open.popleft(), complete=True)

    def end(self, *, in_order: bool) -> None:
        """The stream has ended; `in_order` if both sides ended it.

        Then a response that lasts until the end is complete.
        """
        apology = self.apology
        while self._open:
            request = self._open.popleft()
            apologised = apology is not None and request.status is None
            if apologised:
                request.status, apology = apology, None
            self._write(request, complete=apologised or (in_order and request.status is not None))

    def _write(self, request: _Open, *, complete: bool) -> None:
        entry = attrs.evolve(request.entry, status=request.status, sent_bytes=request.sent, complete=complete)
        self._visitor.write(entry, request.began)


@final
class _Share(Amount):
    """Counts the bytes of one stream, and adds them to another amount."""

    __slots__ = ("_own", "_whole")

    def __init__(self, whole: Amount) -> None:
        self._whole: Final = whole
        self._own = 0

    @property
    def total(self) -> int:
        """The bytes of the stream."""
        return self._own

    @total.setter
    def total(self, value: int) -> None:
        self._whole.total += value - self._own
        self._own = value


@final
class StreamLog:
    """Makes an entry of a stream. `end` has to be called at its end.

    Args:
        visitor: whose stream it is.
        host: the name that it was asked for; None if there is none.
        from_visitor, to_visitor: what counts the bytes of all streams of the service.

    Attributes:
        from_visitor, to_visitor: count the bytes of the stream, and add them to those of all.
    """

    def __init__(
        self, visitor: VisitorLog, *, host: str | None = None, from_visitor: Amount, to_visitor: Amount
    ) -> None:
        self._visitor: Final = visitor
        self._host: Final = host
        self._began: Final = trio.current_time()
        self.from_visitor: Final = _Share(from_visitor)
        self.to_visitor: Final = _Share(to_visitor)

    def end(self, *, in_order: bool) -> None:
        """The stream has ended; `in_order` if both sides ended it."""
        entry = Entry(
            time_unix=0.0,
            seconds=0.0,
            address=None,
            host=self._host,
            sent_bytes=self.to_visitor.total,
            received_bytes=self.from_visitor.total,
            complete=in_order,
        )
        self._visitor.write(entry, self._began)
