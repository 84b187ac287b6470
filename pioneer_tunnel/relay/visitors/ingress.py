"""Serve visitors: find the tunnel by the Host of the first request, and pass every byte on unchanged.

A visitor that cannot be served gets a plain answer with the reason, see docs/operating.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, final

import attrs
import trio

from ..._http.head import RequestHead, error_response
from ..._http.requests import host_of
from ..._model.addresses import Address
from ..._model.services import FIRST_SERVICE
from ..._net.adopted import adopt
from ..._net.closing import abandon, close_after_answer
from ..._net.streams import ByteStream
from ..._net.tls.client_hello import Alert
from ..._wire.proxy_v2 import ProxyHeader
from ...exchange.pump import pump
from ...exchange.task_leg import leg_of
from ..admission import Admission, OverLimit
from ..gateways.expected import Expected
from ..gateways.registry import Directory, LiveSession, Registry
from ..limits import RelayLimits
from ..networks import Network, is_within
from ..request_head import HEAD_TIMEOUT, Refusal, read_head, refuse
from ..tunnels import Route, TunnelEntry
from .followed_leg import FollowedLeg
from .forwarded_for import named_visitor
from .turns import Turn, Turns

__all__ = ["Ingress", "Visit"]

OPEN_TIMEOUT: Final = 10.0
"""Seconds for opening a stream to the gateway."""

_TAKES_NO_VISITORS: Final = "the gateway takes no visitors at the moment"
_BROKE_OFF: Final = "the gateway broke off before it answered"


def _no_limit() -> None:
    """The `settle` of a visit that no limit applies to."""


@final
@attrs.frozen(kw_only=True)
class Visit:
    """A visitor's connection.

    Attributes:
        stream: the connection, in clear.
        visitor: the visitor's address; None where it is unknown.
        local: the relay's address that the visitor connected to; None where it is unknown.
        tls: whether the visitor came over TLS; None where only a balancer in front knows, and does not say.
        source: the visitor's address as limits count it; None when it is exempt from limits per address.
        settle: called when the tunnel is known; raises `OverLimit` when there are too many visitors.
    """

    stream: ByteStream = attrs.field(converter=adopt)
    visitor: Address | None
    local: Address | None
    tls: bool | None
    source: str | None = None
    settle: Callable[[], None] = _no_limit


@final
class Ingress:
    """Carries visitors to their tunnels.

    Args:
        registry: the route of each host.
        directory: the session of each tunnel.
        admission: counts the visitors of each tunnel; by default a new one with `limits`.
        limits: its keep-alive timeout is used; by default `RelayLimits()`.
        expected: visitors of these tunnels wait; by default there are none.
        trust_forwarded_from: the networks of HTTP proxies that say whom each request is from.
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
    ) -> None:
        limits = limits or RelayLimits()
        self._registry: Final = registry
        self._directory: Final = directory
        self._admission: Final = admission or Admission(limits)
        self._expected: Final = expected or Expected()
        self._turns: Final = Turns()
        self._trusted: Final = trust_forwarded_from
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
            await refuse(visit.stream, refusal)
        else:
            if head is None:
                await visit.stream.aclose()
            else:
                await self.serve_request(visit, head, received)

    async def serve_request(self, visit: Visit, head: RequestHead, received: bytes) -> None:
        """Serve an HTTP connection whose first head was read; `received` is the head and all that was read after it."""
        request: tuple[RequestHead, bytes] | None = (head, received)
        while request is not None:
            head, received = request
            try:
                followed = await self._carry(visit, head, received)
            except Refusal as refusal:
                refusal.omit_body = head.omit_body
                await refuse(visit.stream, refusal)
                return
            if not followed.handed_over:
                return
            if followed.refused_request is not None:
                await refuse(visit.stream, Refusal.of(followed.refused_request))
                return
            request = followed.next_request
        await close_after_answer(visit.stream)  # keep-alive timeout

    async def _carry(self, visit: Visit, head: RequestHead, received: bytes) -> FollowedLeg:
        """Carry the request of `head` to its tunnel, and the following requests that may use the same stream.

        Raises:
            Refusal: the tunnel is unknown or cannot be reached, or a limit is exceeded.
        """
        route = await self._registry.by_host(head.host)
        if route is None:
            raise Refusal(404, "there is no tunnel for this host")
        if route.passes_tls:
            # The tunnel's owner chose that the relay can read nothing of what reaches the gateway.
            raise Refusal(421, "this host takes TLS alone, from end to end; use https:// and a connection of its own")
        _settle(visit)  # not earlier: a connection without a tunnel stays evictable while it is refused
        source: str | None = None
        stream_of: Callable[[RequestHead], Hashable] = host_of
        proxy = self._trusted_proxy(visit)
        if proxy is not None:
            visit = self._from_proxy(visit, proxy, head)
            source = visit.source
            stream_of = partial(self._host_and_visitor, proxy)
        followed = FollowedLeg(
            leg_of(visit.stream),
            head,
            received[head.length :],
            Turn(self._turns, route.entry.id, visit.source),
            head_timeout=HEAD_TIMEOUT,
            keep_alive_timeout=0.0 if self._draining else self._keep_alive_timeout,
            stream_of=stream_of,
        )
        with self._counted(route.entry, source), self._among_followed(followed):
            stream, service = await self._open(route)
            preface = b"".join([_proxy_header(visit, service), received[: head.length], *followed.take_ready()])

            def apology() -> bytes:
                status, why = (504, _TAKES_NO_VISITORS) if stream.timed_out else (502, _BROKE_OFF)
                return error_response(status, why, omit_body=head.omit_body)

            await pump(stream, visit.stream, second_leg=followed, preface=preface, apology=apology)
        return followed

    async def serve_hello(self, visit: Visit, route: Route, received: bytes) -> None:
        """Serve a TLS connection for `route`; `received` is its ClientHello and all that was read after it.

        Raises:
            Refusal: the gateway cannot be reached, or a limit is exceeded.
        """
        _settle(visit)
        with self._counted(route.entry):
            stream, service = await self._open(route)
            preface = _proxy_header(visit, service) + received
            await pump(stream, visit.stream, preface=preface, apology=Alert.INTERNAL_ERROR.record)

    async def serve_bound(self, visit: Visit, route: Route) -> None:
        """Serve a connection at a `bind_addr`, in any protocol. If that is not possible, reset it."""
        try:
            _settle(visit)
            with self._counted(route.entry):
                stream, service = await self._open(route)
                await pump(stream, visit.stream, preface=_proxy_header(visit, service))
        except Refusal:
            await abandon(visit.stream)

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

    @contextmanager
    def _among_followed(self, followed: FollowedLeg) -> Iterator[None]:
        self._followed.add(followed)
        try:
            yield
        finally:
            self._followed.remove(followed)

    @contextmanager
    def _counted(self, entry: TunnelEntry, source: str | None = None) -> Iterator[None]:
        """Count a visitor of the tunnel while the block runs, see `Admission.visit`.

        Raises:
            Refusal: the tunnel or the visitor's address is at a limit.
        """
        try:
            with self._admission.visit(entry.id, trio.current_time(), source=source):
                yield
        except OverLimit as reason:
            raise Refusal(503, str(reason)) from None

    async def _open(self, route: Route) -> tuple[ByteStream, str | None]:
        """Open a stream to the tunnel's gateway. Returns it with the name of the service for its header.

        Raises:
            Refusal: the gateway is not connected, does not serve this service, or takes no stream within
                `OPEN_TIMEOUT`.
        """
        tried: LiveSession | None = None
        self.opening += 1
        try:
            with trio.move_on_after(OPEN_TIMEOUT):
                await self._expected.wait(route.entry.id)
                while (session := await self._directory.find(route.entry.id)) is not tried and session is not None:
                    service = _name_for(route, session.services)
                    try:
                        return await session.open_stream(), service
                    except trio.BrokenResourceError:
                        tried = session  # it just ended or was retired: look for its successor
                raise Refusal(503, "the gateway is not connected")
            raise Refusal(504, _TAKES_NO_VISITORS)
        finally:
            self.opening -= 1


def _settle(visit: Visit) -> None:
    """Count the connection as a visitor of the relay.

    Raises:
        Refusal: the relay has too many visitors.
    """
    try:
        visit.settle()
    except OverLimit as reason:
        raise Refusal(503, str(reason)) from None


def _name_for(route: Route, served: Collection[str] | None) -> str | None:
    """The name of the route's service in a header for a gateway that takes visitors of `served`; None for no name.

    Raises:
        Refusal: the gateway takes no visitors of it. An older gateway would hand them all to the same local server.
    """
    if served is not None and route.service in served:
        return route.service
    if route.first and (served is None or FIRST_SERVICE in served):
        return None
    raise Refusal(503, "the gateway does not serve this service")


def _proxy_header(visit: Visit, service: str | None) -> bytes:
    return ProxyHeader(visitor=visit.visitor, local=visit.local, tls=visit.tls, service=service).encode()
