"""Serve visitors: find the tunnel by the Host of the first request, and pass every byte on unchanged.

What happens to a visit, in order:

    rules       whether its tunnel admits it
    asking      for whom the request is
    opening     a stream to the gateway
    passage     the bytes between the two, until one of them ends it

A visitor that cannot be served gets a plain answer with the reason, see docs/operating.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, final

from ..._http.head import RequestHead
from ..._net.closing import abandon, close_after_answer
from ..._net.leg import Leg
from ..._net.tls.client_hello import Alert
from ..._storage.networks import Network
from ...access_log.writer import AccessLog
from ...certificates.authority import CHALLENGE_PATH
from ...exchange.carrier import Carrier
from ...exchange.task_leg import leg_of
from ..admission import Admission
from ..connection import Connection
from ..gateways.expected import Expected
from ..gateways.registry import Directory, Registry, RegistryAway
from ..limits import RelayLimits
from ..request_head import Refusal, read_head, refuse
from ..tunnels import Route
from .asking import Asker, Askers
from .followed_leg import FollowedLeg
from .opening import Opened, StreamOpener
from .passage import Passages
from .passing import Passing, Stage
from .plain import HttpAnswer, send_text, to_https
from .rules import Rules, check
from .visit import Visit
from .visitor_logs import VisitorLogs

__all__ = ["Ingress"]


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
        ready: whether it does.
        passing: passes visitors to the process that has their tunnel's session; None if there are no others.

    Attributes:
        counts: as of the admission.
        route_nowait: `Registry.by_host_nowait`.

    The methods that serve return when the visit has ended, or when the carrier has taken it over. Those that begin
    never wait, and start a task of the visit's connection for what does.
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
        ready: Callable[[], bool] = lambda: True,
        passing: Passing | None = None,
    ) -> None:
        limits = limits or RelayLimits()
        admission = admission or Admission(limits)
        self._registry: Final = registry
        self.route_nowait: Final = registry.by_host_nowait
        self.counts: Final = admission.counts
        self._http_answer: Final = http_answer
        self._health_host: Final = health_host
        self._passing: Final = passing
        self._ready: Final = ready
        self._logs: Final = VisitorLogs(access_log, wall_clock)
        self._askers: Final = Askers(trust_forwarded_from, admission)
        self._rules: Final = Rules(folder)
        self._opener: Final = StreamOpener(directory, admission, expected or Expected())
        self._passages: Final = Passages(
            admission,
            carrier,
            self._logs,
            keep_alive_timeout=limits.keep_alive_timeout_ms / 1000 or math.inf,
            go_on=self._go_on,
        )

    @property
    def opening(self) -> int:
        """Visitors whose tunnel is known, and that have no stream to its gateway yet."""
        return self._opener.opening

    def drain(self) -> None:
        """Close each HTTP connection as soon as it is idle between requests, since the relay stops."""
        self._passages.drain()

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
        connection = visit.connection
        if self._passing is not None and connection is not None and visit.is_bare and not visit.in_clear:
            route = await self._registry.by_host(head.host)
            if route is not None and self._passing.pass_visitor(
                connection, Stage.REQUEST, route, received, visit=visit
            ):
                return
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
        self._log_answer(visit, route, head, refusal.status)
        await refuse(visit.stream, refusal)

    def _log_answer(self, visit: Visit, route: Route | None, head: RequestHead | None, status: int) -> None:
        """Note an answer of the relay itself in the access log."""
        log = self._logs.of(visit, route)
        if log is not None:
            log.refused(head, status)

    async def _say_health(self, visit: Visit, head: RequestHead) -> None:
        """Answer a health check, and close."""
        if self._ready():
            await send_text(visit.stream, b"ready\n", omit_body=head.omit_body)
        else:
            await refuse(visit.stream, Refusal(503, "the relay drains", omit_body=head.omit_body))

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
            self._log_answer(visit, None, head, 200)
            await send_text(visit.stream, text, omit_body=head.omit_body)
            return None
        if head.host == self._health_host:
            await self._say_health(visit, head)
            return None
        route, asker = None, None
        try:
            route = await self._route(head)
            if route is None:
                raise Refusal(404, "there is no tunnel for this host", reason="unknown_host")
            if visit.in_clear and not head.target.startswith(CHALLENGE_PATH):
                redirect = to_https(head, route)
                self._log_answer(visit, route, head, redirect.status)
                await refuse(visit.stream, redirect)
                return None
            if route.passes_tls:
                # The tunnel's owner chose that the relay can read nothing of what reaches the gateway.
                raise Refusal(
                    421,
                    "this host takes TLS alone, from end to end; use https:// and a connection of its own",
                    reason="passthrough_only",
                )
            asker = self._askers.of(visit, head)
            if visit.in_clear:
                asker = asker.once()  # so that each request is looked at here
            guard = self._rules.guard(route)
            if guard is not None:
                await check(guard, asker.visit, head)
                asker = asker.guarded_by(guard)
            # Not earlier: a connection without a tunnel, or without access, stays evictable while it is refused.
            opened = await self._opener.open(asker.visit, route, asker.source)
        except Refusal as refusal:
            refusal.omit_body = head.omit_body
            await self.refuse(visit if asker is None else asker.visit, refusal, route, head)
            return None
        passage = self._passages.of_requests(visit, asker, leg_of(visit.stream), (head, received), opened)
        return passage.followed if await self._passages.run(passage) else None

    async def _route(self, head: RequestHead) -> Route | None:
        try:
            return await self._registry.by_host(head.host)
        except RegistryAway as away:
            retry_after = ("Retry-After", str(away.retry_after))
            raise Refusal(503, str(away), headers=[retry_after], reason="registry_away") from None

    def begin_request(self, visit: Visit, leg: Leg, head: RequestHead, received: bytes) -> None:
        """Like `serve_request`, for a visit with a connection, and without a task as long as none is needed.

        Args:
            leg: of the visit's stream; the exchange begins with it as it is.
        """
        connection, route = _connection_of(visit), self.route_nowait(head.host)
        if connection.may_pass and self.passes(connection, route, received):
            leg.detach()
            connection.close()
            return
        opened = None if route is None else self._opened_at_once(visit, head, route)
        if opened is None:
            leg.detach()
            connection.start(self.serve_request, visit, head, received)
        else:
            asker = Asker.visitor(visit)
            self._passages.begin(self._passages.of_requests(visit, asker, leg, (head, received), opened))

    def _opened_at_once(self, visit: Visit, head: RequestHead, route: Route) -> Opened | None:
        """A stream for a request; None if it takes a task to open one, or to look at the request before."""
        if head.host == self._health_host or head.target.startswith(CHALLENGE_PATH):
            return None
        if route.passes_tls or route.access is not None or self._askers.proxy_of(visit) is not None:
            return None
        return self._opener.open_nowait(visit, route)

    def passes(self, connection: Connection, route: Route | None, received: bytes) -> bool:
        """Pass a connection on if another process has the session for it. Does not wait.

        Args:
            connection: the caller closes it after that.
            route: where its first request goes; None if that is not known.
            received: all that was read.
        """
        return (
            self._passing is not None
            and route is not None
            and self._passing.pass_visitor(connection, Stage.REQUEST, route, received)
        )

    async def serve_hello(self, visit: Visit, route: Route, received: bytes) -> None:
        """Serve a TLS connection for `route`; `received` is its ClientHello and all that was read after it.

        Raises:
            Refusal: the visitor's address is not admitted, the gateway cannot be reached, or a limit is exceeded.
        """
        self._rules.admit(visit, route)
        opened = await self._opener.open(visit, route)
        await self._passages.run(self._passages.of_stream(visit, opened, received, apology=Alert.INTERNAL_ERROR.record))

    async def serve_bound(self, visit: Visit, route: Route) -> None:
        """Serve a connection at a tunnel's `bind_addr`, in any protocol. If that is not possible, reset it."""
        connection = visit.connection
        if (
            self._passing is not None
            and connection is not None
            and visit.is_bare
            and self._passing.pass_visitor(connection, Stage.BOUND, route, visit=visit)
        ):
            return
        try:
            self._rules.admit(visit, route)
            opened = await self._opener.open(visit, route)
        except Refusal as refusal:
            self.counts.refused(refusal.reason, route.entry.id)
            await abandon(visit.stream)
        else:
            await self._passages.run(self._passages.of_stream(visit, opened))

    def begin_bound(self, visit: Visit, route: Route) -> None:
        """Like `serve_bound`, for a visit with a connection, and without a task as long as none is needed."""
        connection = _connection_of(visit)
        if self._passing is not None and self._passing.pass_visitor(connection, Stage.BOUND, route):
            connection.close()
            return
        opened = None if route.access is not None else self._opener.open_nowait(visit, route)
        if opened is None:
            connection.start(self.serve_bound, visit, route)
        else:
            self._passages.begin(self._passages.of_stream(visit, opened))


def _connection_of(visit: Visit) -> Connection:
    assert visit.connection is not None
    return visit.connection
