"""Serve visitors: find the tunnel by the Host of the first request, and pass every byte on unchanged.

A visitor that cannot be served gets a plain answer with the reason, see docs/operating.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, final

import attrs
import trio

from ..._http.head import RequestHead, error_response
from ..._http.removing import without_headers
from ..._http.requests import host_of
from ..._model.addresses import Address
from ..._model.counters import StreamCounter
from ..._model.services import FIRST_SERVICE
from ..._net.closing import abandon, close_after_answer
from ..._net.leg import Leg
from ..._net.streams import ByteStream
from ..._net.tls.client_hello import Alert
from ..._storage.networks import Network, is_within
from ..._wire.proxy_v2 import ProxyHeader
from ...access.guard import Guard, guard_of
from ...access.rules import Access
from ...access_log.following import RequestLog, StreamLog, VisitorLog
from ...access_log.writer import AccessLog
from ...certificates.authority import CHALLENGE_PATH
from ...exchange.carrier import Carrier
from ...exchange.pump import Pump
from ...exchange.task_leg import leg_of
from ..admission import Admission, OverLimit
from ..connection import Connection
from ..gateways.expected import Expected
from ..gateways.registry import Directory, GatewayAway, LiveSession, Registry
from ..limits import RelayLimits
from ..request_head import HEAD_TIMEOUT, Refusal, read_head, refuse
from ..tunnels import Route
from .followed_leg import FollowedLeg
from .forwarded_for import named_visitor
from .plain import HttpAnswer, send_text, to_https
from .turns import Turn, Turns
from .visit import Visit

__all__ = ["Ingress"]

OPEN_TIMEOUT: Final = 10.0
"""Seconds for opening a stream to the gateway."""

_TAKES_NO_VISITORS: Final = "the gateway takes no visitors at the moment"
_AWAY: Final = "the gateway has lost its connection; try again in a moment"
_BROKE_OFF: Final = "the gateway broke off before it answered"


class _Opened(NamedTuple):
    """A stream to a gateway.

    Attributes:
        route: where it leads.
        stream: the stream.
        header: the PROXY header that it begins with.
        counter: counts the streams of its service.
    """

    route: Route
    stream: ByteStream
    header: bytes
    counter: StreamCounter


class _Asker(NamedTuple):
    """Who asks in a request: the visitor, or whom a trusted proxy names.

    Attributes:
        visit: as of the one who asks.
        source: counts as a connection of that address; None if the connection is counted already.
        stream_of: see `RequestFollower`.
        guard: has let the request through, and checks later ones; None where there are no rules.
    """

    visit: Visit
    source: str | None
    stream_of: Callable[[RequestHead], Hashable]
    guard: Guard | None = None

    def guarded_by(self, guard: Guard) -> _Asker:
        """The same, so that each later request that is not let through at once needs a stream of its own."""
        return self._replace(guard=guard, stream_of=partial(_stream_of_allowed, guard, self.visit, self.stream_of))


@final
class _Passage:
    """A visit to a tunnel: one stream to its gateway."""

    __slots__ = ("counter", "followed", "log", "pump", "route", "source", "visit")

    def __init__(
        self,
        visit: Visit,
        route: Route,
        pump: Pump,
        *,
        counter: StreamCounter,
        followed: FollowedLeg | None = None,
        source: str | None = None,
        log: RequestLog | StreamLog | None = None,
    ) -> None:
        counter.begin()
        self.log: Final = log
        self.visit: Final = visit
        self.route: Final = route
        self.counter: Final = counter
        self.pump: Final = pump
        self.followed: Final = followed
        self.source: Final = source  # of a visitor who shares the connection of a proxy


@final
class Ingress:
    """Carries visitors to their tunnels.

    Args:
        registry: the route of each host.
        directory: the session of each tunnel.
        admission: counts visitors, streams and refusals; by default a new one with `limits`.
        limits: its keep-alive timeout is used; by default `RelayLimits()`.
        expected: visitors of these tunnels wait; by default there are none.
        trust_forwarded_from: the networks of HTTP proxies that say whom each request is from.
        carrier: carries visitors whose `Visit` has a connection, without a task for each.
        folder: where relative paths of access rules start from.
        http_answer: answers an ACME authority, at any host; by default nobody does.
        access_log: gets the requests and streams of visitors; None for none.
        wall_clock: seconds since 1970, for the access log.
        health_host: requests for this Host are answered here, whether the relay takes visitors.

    Attributes:
        counts: as of the admission.

    The methods that serve return when the visit has ended, or when the carrier has taken it over.
    """

    def __init__(
        self,
        registry: Registry,
        directory: Directory,
        admission: Admission | None = None,
        *,
        limits: RelayLimits | None = None,
        expected: Expected | None = None,
        trust_forwarded_from: Sequence[Network] = (),
        carrier: Carrier | None = None,
        folder: Path = Path(),
        http_answer: HttpAnswer | None = None,
        access_log: AccessLog | None = None,
        wall_clock: Callable[[], float] = time.time,
        health_host: str | None = None,
    ) -> None:
        limits = limits or RelayLimits()
        self._registry: Final = registry
        self._directory: Final = directory
        self._admission: Final = admission or Admission(limits)
        self.counts: Final = self._admission.counts
        self._expected: Final = expected or Expected()
        self._carrier: Final = carrier
        self._turns: Final = Turns()
        self._trusted: Final = trust_forwarded_from
        self._folder: Final = folder
        self._http_answer: Final = http_answer
        self._access_log: Final = access_log
        self._wall_clock: Final = wall_clock
        self._health_host: Final = health_host
        self._rules: Final[dict[Access, Access]] = {}
        self._keep_alive_timeout: Final = limits.keep_alive_timeout_ms / 1000 or math.inf
        self._followed: Final[set[FollowedLeg]] = set()
        self._draining = False
        self.opening: int = 0
        """Visitors whose tunnel is known, and that have no stream to its gateway yet."""

    def drain(self) -> None:
        """Close each HTTP connection as soon as it is idle between requests, since the relay stops."""
        self._draining = True
        for followed in self._followed:
            followed.end_when_idle()

    async def serve(self, visit: Visit) -> None:
        """Serve an HTTP connection from its first byte until it ends."""
        try:
            head, received = await read_head(visit.stream)
        except Refusal as refusal:
            await self.refuse(visit, refusal)
        else:
            if head is None:
                await visit.stream.aclose()
            else:
                await self.serve_request(visit, head, received)

    async def serve_request(self, visit: Visit, head: RequestHead, received: bytes) -> None:
        """Serve an HTTP connection whose first head was read; `received` is the head and all that was read after it."""
        request: tuple[RequestHead, bytes] | None = (head, received)
        while request is not None:
            followed = await self._carry(visit, *request)
            request = None if followed is None else await self._after(visit, followed)

    async def refuse(
        self, visit: Visit, refusal: Refusal, route: Route | None = None, head: RequestHead | None = None
    ) -> None:
        """Count a refusal, send its answer, and close.

        Args:
            visit: whose.
            refusal: the answer.
            route: where the visitor wanted to go, if that is known.
            head: of the request, if it makes sense.
        """
        self.counts.refused(refusal.reason, None if route is None else route.entry.id)
        if self._access_log is not None:
            self._visitor_log(self._access_log, visit, route).refused(head, refusal.status)
        await refuse(visit.stream, refusal)

    def _visitor_log(self, log: AccessLog, visit: Visit, route: Route | None) -> VisitorLog:
        return VisitorLog(
            log,
            visit.visitor,
            tunnel=None if route is None else route.entry.id,
            service=(route and route.service) or FIRST_SERVICE,
            wall_clock=self._wall_clock,
        )

    async def _say_health(self, visit: Visit, head: RequestHead) -> None:
        """Answer a health check, and close."""
        if self._draining:
            await refuse(visit.stream, Refusal(503, "the relay drains", omit_body=head.omit_body))
        else:
            await send_text(visit.stream, b"ready\n", omit_body=head.omit_body)

    async def _go_on(self, visit: Visit, followed: FollowedLeg) -> None:
        """Serve what follows an exchange that had no task and has left the visitor's connection open."""
        request = await self._after(visit, followed)
        if request is not None:
            await self.serve_request(visit, *request)

    async def _after(self, visit: Visit, followed: FollowedLeg) -> tuple[RequestHead, bytes] | None:
        """Returns the next request, as for `serve_request`, if there is one. Otherwise this ends the connection."""
        if not followed.handed_over:
            return None
        if followed.refused_request is not None:
            await self.refuse(visit, Refusal.of(followed.refused_request))
        elif followed.next_request is not None:
            return followed.next_request
        else:
            await close_after_answer(visit.stream)  # keep-alive timeout
        return None

    async def _carry(self, visit: Visit, head: RequestHead, received: bytes) -> FollowedLeg | None:
        """Carry the request of `head` to its tunnel, and the following requests that may use the same stream.

        Returns:
            The visitor's leg after the exchange; None if the request was refused, or if the carrier has the visit.
        """
        text = None if self._http_answer is None else self._http_answer(head.host, head.target)
        if text is not None:
            await send_text(visit.stream, text, omit_body=head.omit_body)
            return None
        if head.host == self._health_host:
            await self._say_health(visit, head)
            return None
        route, asker = None, None
        try:
            route = await self._registry.by_host(head.host)
            if route is None:
                raise Refusal(404, "there is no tunnel for this host", reason="unknown_host")
            if visit.in_clear and not head.target.startswith(CHALLENGE_PATH):
                await refuse(visit.stream, to_https(head, route))
                return None
            if route.passes_tls:
                # The tunnel's owner chose that the relay can read nothing of what reaches the gateway.
                raise Refusal(
                    421,
                    "this host takes TLS alone, from end to end; use https:// and a connection of its own",
                    reason="passthrough_only",
                )
            asker = self._asker(visit, head)
            if visit.in_clear:
                asker = asker._replace(stream_of=_a_stream_of_its_own)  # so that each request is looked at here
            guard = self._guard(route)
            if guard is not None:
                await _check(guard, asker.visit, head)
                asker = asker.guarded_by(guard)
            # Not earlier: a connection without a tunnel, or without access, stays evictable while it is refused.
            opened = await self._enter_and_open(asker.visit, route, asker.source)
        except Refusal as refusal:
            refusal.omit_body = head.omit_body
            await self.refuse(visit if asker is None else asker.visit, refusal, route, head)
            return None
        passage = self._request_passage(visit, asker, leg_of(visit.stream), (head, received), opened)
        return passage.followed if await self._run(passage) else None

    def begin_request(self, visit: Visit, leg: Leg, head: RequestHead, received: bytes) -> bool:
        """Like `serve_request`, from the beginning without a task.

        Args:
            leg: of the visit's stream; the exchange begins with it as it is.

        Returns:
            False if that takes a task. Then `serve_request` is to be called.
        """
        if head.host == self._health_host:
            return False
        try:
            route = self._registry.by_host_nowait(head.host)
        except trio.WouldBlock:
            return False
        if head.target.startswith(CHALLENGE_PATH):
            return False
        if route is None or route.passes_tls or route.access is not None or self._trusted_proxy(visit) is not None:
            return False
        opened = self._enter_and_open_nowait(visit, route)
        if opened is None:
            return False
        asker = _Asker(visit, None, host_of)
        self._begin(self._request_passage(visit, asker, leg, (head, received), opened))
        return True

    def _request_passage(
        self, visit: Visit, asker: _Asker, leg: Leg, request: tuple[RequestHead, bytes], opened: _Opened
    ) -> _Passage:
        head, received = request
        route, stream, proxy_header, counter = opened
        log = None
        if self._access_log is not None:
            log = RequestLog(self._visitor_log(self._access_log, asker.visit, route))
        followed = FollowedLeg(
            leg,
            head,
            received[head.length :],
            Turn(self._turns, route.entry.id, asker.visit.source),
            head_timeout=HEAD_TIMEOUT,
            keep_alive_timeout=0.0 if self._draining else self._keep_alive_timeout,
            stream_of=asker.stream_of,
            removes=() if asker.guard is None else asker.guard.removes,
            observer=log,
        )
        self._followed.add(followed)
        first = received[: head.length] if asker.guard is None else without_headers(head, received, asker.guard.removes)
        preface = b"".join([proxy_header, first, *followed.take_ready()])
        counter.from_visitors.total += len(preface) - len(proxy_header)

        def apology() -> bytes:
            status, why = (504, _TAKES_NO_VISITORS) if stream.timed_out else (502, _BROKE_OFF)
            self.counts.refused("gateway_timeout" if stream.timed_out else "gateway_broke_off", route.entry.id)
            if log is not None:
                log.apology = status
            return error_response(status, why, omit_body=head.omit_body)

        pump = Pump(
            stream,
            asker.visit.stream,
            second_leg=followed,
            preface=preface,
            apology=apology,
            forth=counter.to_visitors,
            back=counter.from_visitors,
        )
        return _Passage(visit, route, pump, counter=counter, followed=followed, source=asker.source, log=log)

    async def serve_hello(self, visit: Visit, route: Route, received: bytes) -> None:
        """Serve a TLS connection for `route`; `received` is its ClientHello and all that was read after it.

        Raises:
            Refusal: the visitor's address is not admitted, the gateway cannot be reached, or a limit is exceeded.
        """
        self._admit(visit, route)
        opened = await self._enter_and_open(visit, route)
        await self._run(self._stream_passage(visit, opened, received, apology=Alert.INTERNAL_ERROR.record))

    async def serve_bound(self, visit: Visit, route: Route) -> None:
        """Serve a connection at a tunnel's `bind_addr`, in any protocol. If that is not possible, reset it."""
        try:
            self._admit(visit, route)
            opened = await self._enter_and_open(visit, route)
        except Refusal as refusal:
            self.counts.refused(refusal.reason, route.entry.id)
            await abandon(visit.stream)
        else:
            await self._run(self._stream_passage(visit, opened))

    def begin_bound(self, visit: Visit, route: Route) -> bool:
        """Like `serve_bound`, from the beginning without a task. False if that takes one: then call `serve_bound`."""
        opened = None if route.access is not None else self._enter_and_open_nowait(visit, route)
        if opened is None:
            return False
        self._begin(self._stream_passage(visit, opened))
        return True

    def _stream_passage(
        self, visit: Visit, opened: _Opened, received: bytes = b"", *, apology: bytes = b""
    ) -> _Passage:
        """A passage whose bytes are not followed, of which `received` has come already."""
        route, stream, proxy_header, counter = opened
        log, forth, back = None, counter.to_visitors, counter.from_visitors
        if self._access_log is not None:
            visitor = self._visitor_log(self._access_log, visit, route)
            log = StreamLog(visitor, host=route.host, from_visitor=back, to_visitor=forth)
            forth, back = log.to_visitor, log.from_visitor
        back.total += len(received)
        pump = Pump(stream, visit.stream, preface=proxy_header + received, apology=apology, forth=forth, back=back)
        return _Passage(visit, route, pump, counter=counter, log=log)

    def _begin(self, passage: _Passage) -> None:
        """Begin without a task, if possible."""
        if not self._carry_on(passage):
            assert passage.visit.connection is not None
            passage.visit.connection.start(self._run_and_go_on, passage)

    async def _run_and_go_on(self, passage: _Passage) -> None:
        if await self._run(passage) and passage.followed is not None:
            await self._go_on(passage.visit, passage.followed)

    async def _run(self, passage: _Passage) -> bool:
        """Run the pump to its end, and end the tunnel's visit. False if the carrier does that."""
        if self._carry_on(passage):
            return False
        try:
            await passage.pump.run()
        finally:
            self._end(passage)
        return True

    def _carry_on(self, passage: _Passage) -> bool:
        """Let the carrier run the pump, and then what follows. False if that is not possible."""
        carrier, connection = self._carrier, passage.visit.connection
        if carrier is None or connection is None or not carrier.takes(passage.pump):
            return False
        connection.release()
        carrier.carry(passage.pump, partial(self._after_carried, passage, connection))
        return True

    def _end(self, passage: _Passage) -> None:
        """Note that a visit of a tunnel is over."""
        if passage.followed is not None:
            self._followed.remove(passage.followed)
        passage.counter.end()
        if passage.log is not None:
            passage.log.end(in_order=passage.pump.in_order)
        self._admission.end_visit(passage.route.entry.id, source=passage.source)

    def _after_carried(self, passage: _Passage, connection: Connection) -> None:
        self._end(passage)
        if passage.followed is not None and passage.followed.handed_over:
            connection.start(self._go_on, passage.visit, passage.followed)
        else:
            connection.close()

    def _asker(self, visit: Visit, head: RequestHead) -> _Asker:
        proxy = self._trusted_proxy(visit)
        if proxy is None:
            return _Asker(visit, None, host_of)
        named = self._from_proxy(visit, proxy, head)
        return _Asker(named, named.source, partial(self._host_and_visitor, proxy))

    def _guard(self, route: Route) -> Guard | None:
        return None if route.access is None else guard_of(self._located(route.access))

    def _located(self, access: Access) -> Access:
        """The same rules, with paths from the folder of the configuration."""
        if access not in self._rules:
            self._rules[access] = access.below(self._folder)
        return self._rules[access]

    def _admit(self, visit: Visit, route: Route) -> None:
        """Check the address of a visitor in any protocol.

        Raises:
            Refusal: it is not admitted, or the rules want a password or a token, which only HTTP has.
        """
        guard = self._guard(route)
        if guard is not None and (guard.access.needs_http or not guard.admits(visit.host)):
            raise Refusal(403, "visitors from this address are not admitted here", reason="access_denied")

    def _trusted_proxy(self, visit: Visit) -> Address | None:
        """The proxy that a connection is from, if it says whom its requests are from."""
        proxy = visit.visitor
        return proxy if self._trusted and proxy is not None and is_within(proxy.host, self._trusted) else None

    def _from_proxy(self, visit: Visit, proxy: Address, head: RequestHead) -> Visit:
        """The visit of the visitor whom the proxy names in a request."""
        visitor, tls = named_visitor(head, proxy, self._trusted)
        source = self._admission.source_of(visitor.host)
        return attrs.evolve(visit, visitor=visitor, source=source, tls=visit.tls if tls is None else tls)

    def _host_and_visitor(self, proxy: Address, head: RequestHead) -> Hashable:
        return head.host, named_visitor(head, proxy, self._trusted)

    async def _enter_and_open(self, visit: Visit, route: Route, source: str | None = None) -> _Opened:
        """Count the visitor, and open a stream for it. The tunnel's visit has to be ended after that.

        Raises:
            Refusal: the tunnel cannot be reached, or a limit is exceeded.
        """
        try:
            visit.settle()
            self._admission.begin_visit(route.entry.id, trio.current_time(), source=source)
        except OverLimit as over:
            raise Refusal(503, str(over), reason=over.reason) from None
        try:
            return await self._open(visit, route)
        except BaseException:
            self._admission.end_visit(route.entry.id, source=source)
            raise

    def _enter_and_open_nowait(self, visit: Visit, route: Route) -> _Opened | None:
        """Like `_enter_and_open`; None if that is not possible at once, or not at all."""
        try:
            session = self._directory.find_nowait(route.entry.id)
            if session is None:
                return None
            proxy_header = _proxy_header(visit, _name_for(route, session.services))
            visit.settle()
            self._admission.begin_visit(route.entry.id, trio.current_time())
        except (trio.WouldBlock, OverLimit, Refusal):
            return None
        try:
            return _Opened(route, session.open_stream_nowait(), proxy_header, self.counts.streams_of(route))
        except (trio.WouldBlock, trio.BrokenResourceError):
            self._admission.cancel_visit(route.entry.id)  # `_enter_and_open` counts the visitor again
            return None

    async def _open(self, visit: Visit, route: Route) -> _Opened:
        """Open a stream to the tunnel's gateway.

        Raises:
            Refusal: the gateway is not connected, does not serve this service, or takes no stream within
                `OPEN_TIMEOUT`.
        """
        tried: list[LiveSession] = []
        self.opening += 1
        try:
            with trio.move_on_after(OPEN_TIMEOUT):
                await self._expected.wait(route.entry.id)
                while (session := await self._directory.find(route.entry.id)) is not None and session not in tried:
                    try:
                        stream = await session.open_stream()
                    except GatewayAway as away:
                        retry_after = ("Retry-After", str(away.retry_after))
                        raise Refusal(503, _AWAY, headers=[retry_after], reason="gateway_away") from None
                    except trio.BrokenResourceError:
                        tried.append(session)  # it just ended or was retired: look for another one
                        continue
                    try:
                        # Not earlier: a gateway that comes back may offer other services.
                        header = _proxy_header(visit, _name_for(route, session.services))
                        return _Opened(route, stream, header, self.counts.streams_of(route))
                    except Refusal:
                        await abandon(stream)
                        raise
                raise Refusal(503, "the gateway is not connected", reason="gateway_away")
            raise Refusal(504, _TAKES_NO_VISITORS, reason="gateway_timeout")
        finally:
            self.opening -= 1


async def _check(guard: Guard, visit: Visit, head: RequestHead) -> None:
    """Check a request against the rules of its tunnel.

    Raises:
        Refusal: it is not let through.
    """
    denial = await guard.check(head, visit.host, visit.source)
    if denial is not None:
        reason = "access_denied" if denial.status < 500 else "access_unavailable"
        raise Refusal(denial.status, denial.text, headers=denial.headers, reason=reason)


def _a_stream_of_its_own(_head: RequestHead) -> Hashable:
    return object()


def _stream_of_allowed(
    guard: Guard, visit: Visit, stream_of: Callable[[RequestHead], Hashable], head: RequestHead
) -> Hashable:
    """`stream_of` a request that is let through at once. Any other needs a stream of its own, and `_check` before."""
    return stream_of(head) if guard.allows_now(head, visit.host, visit.source) else object()


def _name_for(route: Route, served: Collection[str] | None) -> str | None:
    """The name of the route's service in a header for a gateway that takes visitors of `served`; None for no name.

    Raises:
        Refusal: the gateway takes no visitors of it. An older gateway would hand them all to the same local server.
    """
    if served is not None and route.service in served:
        return route.service
    if route.first and (served is None or FIRST_SERVICE in served):
        return None
    raise Refusal(503, "the gateway does not serve this service", reason="service_away")


def _proxy_header(visit: Visit, service: str | None) -> bytes:
    return ProxyHeader(visitor=visit.visitor, local=visit.local, tls=visit.tls, service=service).encode()
