"""What `forward` does with a visitor's requests, besides passing them on: changes, checks and the access log."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, Literal, final

import attrs
import trio

from .._http.forwarded import HeaderRules
from .._http.head import error_response
from .._model.addresses import normal_audience
from .._model.log_fields import about
from .._model.services import ANY_SERVICE, FIRST_SERVICE
from .._net.closing import close_after_answer
from .._net.log_limiter import LogLimiter
from .._net.streams import ByteStream
from .._storage.networks import customer_of
from .._wire.proxy_v2 import ProxyHeader
from ..access.guard import Guard, guard_of
from ..access.rules import Access
from ..access_log.following import RequestLog, VisitorLog
from ..access_log.watching import Watch
from ..access_log.writer import AccessLog
from ..exchange.pump import pump
from ..exchange.task_leg import leg_of
from ..transports.interface import Report, VisitorRefused
from ..transports.tunnel_stream import TunnelStream
from .guarded import pump_checked
from .logged_leg import LoggedLeg
from .rewriting_leg import RewritingLeg

__all__ = ["Requests", "requests_of"]

REFUSAL_TIMEOUT: Final = 10.0
"""Seconds for the answer to a request that is refused here."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.forward"))


def requests_of(
    stream: TunnelStream,
    service: str,
    *,
    forwarded_headers: Literal["set"] | None,
    host_header: str | None,
    request_id: Literal["set", "keep"] | None,
    raw: bool,
    only_service: bool,
    access: Access | Mapping[str, Access | None] | None,
    access_log: AccessLog | None,
    report: Report,
) -> Requests | str:
    """What to do for a visitor of `service`; or the reason why it is refused at once, as for `VisitorRefused`.

    Args:
        raw: whether the service is not HTTP.
        only_service: whether it is the only one, whose requests are changed in any case.
        forwarded_headers, host_header, request_id, access, access_log, report: see `forward`.

    Raises:
        ValueError: as `forward`.
    """
    rules = _header_rules(stream.proxy_header, forwarded_headers, host_header, request_id)
    if raw and not only_service:
        rules = None
    try:
        guard = _guard(access, service)
    except KeyError:
        line = f"there are no access rules for the service {service!r}"
        _log_limiter.log(("access", service), line, about=about("unknown_service", service=service))
        return "unknown_service"
    if guard is not None and raw and guard.access.needs_http:
        raise ValueError(f"the service {service!r} is not HTTP, so its visitors cannot send a password or a token")
    if guard is not None and rules is None and not guard.access.needs_http:
        if not guard.admits(_host(stream)):
            return "access_denied"
        guard = None
    log = (
        None if access_log is None else VisitorLog(access_log, stream.visitor, service=stream.service or FIRST_SERVICE)
    )
    return Requests(stream, rules, guard, log, raw=raw, report=report)


@final
class Requests:
    """Carries the requests of one visitor to the local server.

    Args:
        stream: the visitor's stream.
        rules: what to change in requests; None for nothing.
        guard: checks each request; None to check none.
        log: gets its requests; None for none.
        raw: whether it is known that they are no HTTP requests.
        report: gets what is refused.
    """

    def __init__(
        self,
        stream: TunnelStream,
        rules: HeaderRules | None,
        guard: Guard | None,
        log: VisitorLog | None,
        *,
        raw: bool,
        report: Report,
    ) -> None:
        self._stream: Final = stream
        self._rules: Final = rules
        self._guard: Final = guard
        self._log: Final = log
        self._raw: Final = raw
        self._report: Final = report

    async def carry(self, connect: Callable[[], Awaitable[ByteStream | None]]) -> None:
        """Carry them until the visitor's connection is over.

        Args:
            connect: makes a connection to the local server; None if there is none.
        """
        stream, rules, log, report = self._stream, self._rules, self._log, self._report
        if self._guard is not None:
            rules = rules or HeaderRules(set_forwarded=False)
            await _pump_checked(stream, connect, rules, self._guard, report=report, log=log)
        elif (connection := await connect()) is None:
            if log is not None:
                Watch(log).end(in_order=False)
        elif rules is not None:
            await _pump_requests(stream, connection, rules, report, log)
        elif log is not None:
            await _pump_watched(stream, connection, Watch(log, raw=self._raw))
        else:
            await pump(stream, connection)


def _host(stream: TunnelStream) -> str | None:
    return None if stream.visitor is None else stream.visitor.host


def _guard(access: Access | Mapping[str, Access | None] | None, service: str) -> Guard | None:
    """The guard of a service; None if everybody is admitted.

    Raises:
        KeyError: a mapping has no rules for it.
    """
    if isinstance(access, Mapping):
        access = access[service if service in access else ANY_SERVICE]
    return None if access is None else guard_of(access)


def _header_rules(
    header: ProxyHeader,
    forwarded_headers: Literal["set"] | None,
    host_header: str | None,
    request_id: Literal["set", "keep"] | None,
) -> HeaderRules | None:
    """What to change in the requests of a visitor; None for nothing.

    Raises:
        ValueError: `host_header` is no host.
    """
    if forwarded_headers is None and host_header is None and request_id is None:
        return None
    return HeaderRules(
        set_forwarded=forwarded_headers == "set",
        visitor=None if header.visitor is None else header.visitor.host.partition("%")[0],
        tls=header.tls,
        host_header=None if host_header is None else normal_audience(host_header).encode("ascii"),
        request_id=request_id,
    )


async def _pump_watched(stream: TunnelStream, connection: ByteStream, watch: Watch) -> None:
    in_order = False
    try:
        in_order = await pump(connection, stream, second_leg=LoggedLeg(leg_of(stream), watch))
    finally:
        watch.end(in_order=in_order)


async def _pump_requests(
    stream: TunnelStream, connection: ByteStream, rules: HeaderRules, report: Report, log: VisitorLog | None
) -> None:
    """Pump, and change the heads of requests. A request that cannot be followed is answered here."""
    requests = None if log is None else RequestLog(log)
    leg = RewritingLeg(leg_of(stream), rules, observer=requests)
    in_order = False
    try:
        in_order = await pump(connection, stream, second_leg=leg)
    finally:
        if requests is not None:
            requests.end(in_order=in_order)
    refused = leg.refused_request
    if refused is not None:
        if log is not None:
            log.refused(None, refused.status)
        report(VisitorRefused("bad_request"))
        line = f"a visitor's request was refused: {refused.reason}"
        fields = about("bad_request", service=stream.service, reason=refused.reason)
        _log_limiter.log("refused", line, level=logging.INFO, about=fields)
        if leg.handed_over:
            await _answer(stream, error_response(refused.status, refused.reason, omit_body=refused.omit_body))


async def _pump_checked(
    stream: TunnelStream,
    connect: Callable[[], Awaitable[ByteStream | None]],
    rules: HeaderRules,
    guard: Guard,
    *,
    report: Report,
    log: VisitorLog | None,
) -> None:
    visitor = _host(stream)
    rules = attrs.evolve(rules, removed=guard.removes)
    # Visitors whose address is unknown count as one.
    source = "" if visitor is None else customer_of(visitor)
    try:
        refused = await pump_checked(stream, connect, rules, guard, visitor=visitor, source=source, log=log)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        return
    if refused is not None:
        reason, answer = refused
        report(VisitorRefused(reason))
        await _answer(stream, answer)


async def _answer(stream: TunnelStream, answer: bytes) -> None:
    with trio.move_on_after(REFUSAL_TIMEOUT), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(answer)
        await close_after_answer(stream)
