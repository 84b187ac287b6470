"""Checks each request of a visitor before a byte of it reaches the local server.

A connection to the local server is made after the first request was checked. Later requests use it too, as long as they
may pass at once. Any other is checked when every request before it has its whole response, and gets another connection.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, final

import trio

from .._http.forwarded import HeaderRules
from .._http.head import BadRequest, HeadReader, RequestHead, error_response
from .._net.streams import ByteStream
from ..access.guard import Guard
from ..access_log.following import RequestLog, VisitorLog
from ..exchange.pump import pump
from ..exchange.task_leg import leg_of
from ..transports.tunnel_stream import TunnelStream
from .rewriting_leg import RewritingLeg

__all__ = ["pump_checked"]

HEAD_TIMEOUT: Final = 10.0
"""Seconds for the head of the first request."""

_READ_SIZE: Final = 16 * 1024


async def pump_checked(
    stream: TunnelStream,
    connect: Callable[[], Awaitable[ByteStream | None]],
    rules: HeaderRules,
    guard: Guard,
    *,
    visitor: str | None,
    source: str,
    log: VisitorLog | None = None,
) -> tuple[str, bytes] | None:
    """Carry a visitor's requests to the local server, each after its check.

    Args:
        stream: the visitor's stream.
        connect: makes a connection to the local server; None if there is none.
        rules: what to change in each request.
        guard: checks them.
        visitor, source: see `Guard.check`.
        log: gets the requests; None for none.

    Returns:
        Why a request is refused, as for `VisitorRefused`, and the answer to send as the last one; None when the
        visitor's connection is over, or has to be reset.

    Raises:
        trio.BrokenResourceError: the visitor's connection is broken.
    """
    received = b""
    while True:
        try:
            head, received = await _read_head(stream, received)
        except BadRequest as refused:
            if log is not None:
                log.refused(None, refused.status)
            return "bad_request", error_response(refused.status, refused.reason, omit_body=refused.omit_body)
        if head is None:
            await stream.aclose()
            return None
        denial = await guard.check(head, visitor, source)
        if denial is not None:
            if log is not None:
                log.refused(head, denial.status)
            return "access_denied", denial.response(omit_body=head.omit_body)
        connection = await connect()
        if connection is None:
            if log is not None:
                log.refused(head, None)
            return None
        gate = _Gate(guard, visitor, source)
        requests = None if log is None else RequestLog(log)
        leg = RewritingLeg(leg_of(stream), rules, received=received, allows=gate.allows, observer=requests)
        in_order = False
        try:
            in_order = await pump(connection, stream, second_leg=leg)
        finally:
            if requests is not None:
                requests.end(in_order=in_order)
        if not leg.handed_over:
            return None
        request = leg.refused_request
        if request is not None:
            if log is not None:
                log.refused(None, request.status)
            return "bad_request", error_response(request.status, request.reason, omit_body=request.omit_body)
        assert leg.next_request is not None
        _, received = leg.next_request


@final
class _Gate:
    """Lets the requests of one connection pass: the first one, which was checked, and those that may pass at once."""

    def __init__(self, guard: Guard, visitor: str | None, source: str) -> None:
        self._guard: Final = guard
        self._visitor: Final = visitor
        self._source: Final = source
        self._first = True

    def allows(self, head: RequestHead) -> bool:
        if self._first:
            self._first = False
            return True
        return self._guard.allows_now(head, self._visitor, self._source)


async def _read_head(stream: TunnelStream, received: bytes) -> tuple[RequestHead | None, bytes]:
    """Read a head, of which `received` has come already. Returns it, and all bytes that were read.

    The head is None when the visitor ended the connection before its first byte.

    Raises:
        BadRequest: it is malformed, truncated or too slow.
        trio.BrokenResourceError: the connection is broken.
    """
    reader = HeadReader()
    head = reader.feed(received) if received else None
    with trio.move_on_after(HEAD_TIMEOUT):
        while head is None:
            data = await stream.receive_some(_READ_SIZE)
            if not data:
                if not reader.received:
                    return None, b""
                raise BadRequest(400, "The request ended before its head did.", omit_body=reader.omit_body)
            head = reader.feed(data)
    if head is None:
        reason = f"No whole request head came within {HEAD_TIMEOUT:g} seconds."
        raise BadRequest(408, reason, omit_body=reader.omit_body)
    return head, reader.received
