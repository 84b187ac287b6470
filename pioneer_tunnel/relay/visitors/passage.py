"""Carries a visit over one stream to its gateway: the exchange, its log and its counts, and the end of the visit.

A carrier runs the exchange without a task, where both ends allow that. Otherwise the task of the visit runs it.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Final, final

from ..._http.head import RequestHead, error_response
from ..._http.removing import without_headers
from ..._net.leg import Leg
from ...access_log.following import RequestLog, StreamLog
from ...exchange.carrier import Carrier
from ...exchange.pump import Pump
from ..admission import Admission
from ..request_head import HEAD_TIMEOUT
from .asking import Asker
from .followed_leg import FollowedLeg
from .opening import TAKES_NO_VISITORS, Opened
from .turns import Turn, Turns
from .visit import Visit
from .visitor_logs import VisitorLogs

__all__ = ["Passage", "Passages"]

_BROKE_OFF: Final = "the gateway broke off before it answered"


@final
class _Apology:
    """Makes the answer to a visitor whose gateway broke off before it answered, and counts it.

    Args:
        admission: counts it.
        opened: the stream to the gateway.
        log: of the access log, if there is one.
        omit_body: whether the request was a HEAD.
    """

    __slots__ = ("_admission", "_log", "_omit_body", "_route", "_stream")

    def __init__(self, admission: Admission, opened: Opened, log: RequestLog | None, *, omit_body: bool) -> None:
        self._admission: Final = admission
        self._route: Final = opened.route
        self._stream: Final = opened.stream
        self._log: Final = log
        self._omit_body: Final = omit_body

    def __call__(self) -> bytes:
        timed_out = self._stream.timed_out
        status, why = (504, TAKES_NO_VISITORS) if timed_out else (502, _BROKE_OFF)
        reason = "gateway_timeout" if timed_out else "gateway_broke_off"
        self._admission.counts.refused(reason, self._route.entry.id)
        if self._log is not None:
            self._log.apology = status
        return error_response(status, why, omit_body=self._omit_body)


@final
class Passage:
    """A visit to a tunnel: one stream to its gateway.

    Args:
        passages: carries it.
        visit: whose connection it is.
        opened: the stream.
        pump: moves the bytes.
        followed: the visitor's leg, if its requests are followed.
        source: as of the `Asker`.
        log: of the access log, if there is one.
    """

    __slots__ = ("_passages", "counter", "followed", "log", "pump", "route", "source", "visit")

    def __init__(
        self,
        passages: Passages,
        visit: Visit,
        opened: Opened,
        pump: Pump,
        *,
        followed: FollowedLeg | None = None,
        source: str | None = None,
        log: RequestLog | StreamLog | None = None,
    ) -> None:
        self._passages: Final = passages
        self.log: Final = log
        self.visit: Final = visit
        self.route: Final = opened.route
        self.counter: Final = opened.counter
        self.pump: Final = pump
        self.followed: Final = followed
        self.source: Final = source
        self.counter.begin()

    def after_carried(self) -> None:
        """The carrier has carried it to its end."""
        self._passages.after_carried(self)


@final
class Passages:
    """Makes the passages of a relay, and carries them to their end.

    Args:
        admission: counts visits and refusals.
        carrier: carries visits that have a connection, without a task for each; None for none.
        logs: of the visitors.
        keep_alive_timeout: seconds that a connection may be idle between requests.
        go_on: serves a visit whose exchange had no task, and has left the connection open.
    """

    def __init__(
        self,
        admission: Admission,
        carrier: Carrier | None,
        logs: VisitorLogs,
        *,
        keep_alive_timeout: float = math.inf,
        go_on: Callable[[Visit, FollowedLeg], Awaitable[None]],
    ) -> None:
        self._admission: Final = admission
        self._carrier: Final = carrier
        self._logs: Final = logs
        self._keep_alive_timeout = keep_alive_timeout
        self._go_on: Final = go_on
        self._turns: Final = Turns()
        self._followed: Final[set[FollowedLeg]] = set()

    def drain(self) -> None:
        """Close each HTTP connection as soon as it is idle between requests, since the relay stops."""
        self._keep_alive_timeout = 0.0
        for followed in self._followed:
            followed.end_when_idle()

    def of_requests(
        self, visit: Visit, asker: Asker, leg: Leg, request: tuple[RequestHead, bytes], opened: Opened
    ) -> Passage:
        """A passage for a request and those that follow it on the same stream.

        Args:
            visit: whose connection it is.
            asker: who asks.
            leg: of the visit's stream.
            request: the head, and all that was read: the head and what came with it.
            opened: the stream.
        """
        head, received = request
        route, stream, proxy_header, counter = opened
        visitor = self._logs.of(asker.visit, route)
        log = None if visitor is None else RequestLog(visitor)
        followed = FollowedLeg(
            leg,
            head,
            received[head.length :],
            Turn(self._turns, route.entry.id, asker.visit.source),
            head_timeout=HEAD_TIMEOUT,
            keep_alive_timeout=self._keep_alive_timeout,
            stream_of=asker.stream_of,
            removes=() if asker.guard is None else asker.guard.removes,
            observer=log,
        )
        self._followed.add(followed)
        first = received[: head.length] if asker.guard is None else without_headers(head, received, asker.guard.removes)
        preface = b"".join([proxy_header, first, *followed.take_ready()])
        counter.from_visitors.total += len(preface) - len(proxy_header)

        pump = Pump(
            stream,
            asker.visit.stream,
            second_leg=followed,
            preface=preface,
            apology=_Apology(self._admission, opened, log, omit_body=head.omit_body),
            forth=counter.to_visitors,
            back=counter.from_visitors,
        )
        return Passage(self, visit, opened, pump, followed=followed, source=asker.source, log=log)

    def of_stream(self, visit: Visit, opened: Opened, received: bytes = b"", *, apology: bytes = b"") -> Passage:
        """A passage for bytes that are not followed, of which `received` has come already.

        Args:
            apology: for the visitor, if the gateway breaks off before it sends a byte.
        """
        route, stream, proxy_header, counter = opened
        forth, back = counter.to_visitors, counter.from_visitors
        visitor, log = self._logs.of(visit, route), None
        if visitor is not None:
            log = StreamLog(visitor, host=route.host, from_visitor=back, to_visitor=forth)
            forth, back = log.to_visitor, log.from_visitor
        back.total += len(received)
        pump = Pump(stream, visit.stream, preface=proxy_header + received, apology=apology, forth=forth, back=back)
        return Passage(self, visit, opened, pump, log=log)

    def begin(self, passage: Passage) -> None:
        """Carry a passage of a visit that has a connection: without a task, if possible."""
        if not self._carry_on(passage):
            assert passage.visit.connection is not None
            passage.visit.connection.start(self._run_and_go_on, passage)

    async def run(self, passage: Passage) -> bool:
        """Carry a passage to its end, in the task of its visit. False if the carrier does that from now on."""
        if self._carry_on(passage):
            return False
        try:
            await passage.pump.run()
        finally:
            self._end(passage)
        return True

    async def _run_and_go_on(self, passage: Passage) -> None:
        if await self.run(passage) and passage.followed is not None:
            await self._go_on(passage.visit, passage.followed)

    def _carry_on(self, passage: Passage) -> bool:
        """Let the carrier run the pump, and then what follows. False if that is not possible."""
        carrier, connection = self._carrier, passage.visit.connection
        if carrier is None or connection is None or not carrier.takes(passage.pump):
            return False
        connection.release()
        carrier.carry(passage.pump, passage.after_carried)
        return True

    def after_carried(self, passage: Passage) -> None:
        """Go on after the carrier has carried a passage to its end. For `Passage`."""
        connection = passage.visit.connection
        assert connection is not None
        self._end(passage)
        if passage.followed is not None and passage.followed.handed_over:
            connection.start(self._go_on, passage.visit, passage.followed)
        else:
            connection.close()

    def _end(self, passage: Passage) -> None:
        """Note that a visit of a tunnel is over."""
        if passage.followed is not None:
            self._followed.remove(passage.followed)
        passage.counter.end()
        if passage.log is not None:
            passage.log.end(in_order=passage.pump.in_order)
        self._admission.end_visit(passage.route.entry.id, source=passage.source)
