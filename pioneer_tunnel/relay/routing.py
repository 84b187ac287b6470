"""Routes each accepted connection: to the gateways' or the visitors' side.

The address that it came to says who may come there, and in which way:

    control_addr              gateways, over TLS where `control_tls` is on
    ingress_addr              visitors of all tunnels, over TLS where `ingress_tls` is on
    both are the same         gateways and visitors; the first request says which
    http_addr                 visitors without TLS, who are sent to https://
    a tunnel's bind_addr      visitors of this tunnel, in any protocol

A visitor's connection may begin with the PROXY header of a balancer. A method that begins never waits: it starts a task
of the connection for what does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Final, final

import attrs
import trio

from .._http.head import RequestHead, likely_host
from .._model.addresses import normal_audience
from .._net.adopted import Watched
from .._net.leg import Leg
from .._net.prefixed_stream import PrefixedStream
from .._net.tls.by_name import Certificates
from .._net.tls.certificate import Certificate
from .._net.tls.stream import TlsServerStream
from .._storage.networks import is_within
from ..exchange.carrier import Carrier
from .accept_loop import EarlyRoute
from .config import RelayConfig
from .connection import Connection
from .gateways.endpoint import GatewayEndpoint, wants_gateway
from .gateways.gateway_passer import GatewayPasser
from .gateways.other_nodes import OtherNodes
from .request_head import Refusal, read_head
from .tunnels import Route
from .visitors.arriving import Arriving
from .visitors.ingress import Ingress
from .visitors.passing import Passed, Passing, Stage
from .visitors.proxy_header import introduce
from .visitors.tls import SniRouter, accept_gateway
from .visitors.visit import Visit

__all__ = ["Router"]


@final
class Router:
    """Routes the connections of a relay.

    Args:
        config: the configuration. Its tunnels do not matter.
        gateways: serves gateways.
        ingress: serves visitors.
        sni_router: ends visitors' TLS, or passes it through.
        carrier: reads first requests without a task.
        certificate: for gateways at an address of their own; None without TLS.
        passing: passes connections to other processes that listen at the same addresses; None if there are none.
        nodes: the other nodes of a fleet; None if there is none.
    """

    def __init__(
        self,
        config: RelayConfig,
        gateways: GatewayEndpoint,
        ingress: Ingress,
        sni_router: SniRouter,
        *,
        carrier: Carrier,
        certificate: Certificate | Certificates | None,
        passing: Passing | None = None,
        nodes: OtherNodes | None = None,
    ) -> None:
        self._config: Final = config
        self._gateways: Final = gateways
        self._ingress: Final = ingress
        self._sni_router: Final = sni_router
        self._carrier: Final = carrier
        self._certificate: Final = certificate
        self._passing: Final = passing
        self._public_hosts: Final = frozenset(config.public_hosts)
        self._gateway_passer: Final = None if nodes is None else GatewayPasser(nodes, passing)

    def drain(self) -> None:
        """Let gateways go whose connections were passed to other nodes: they come back at another one."""
        if self._gateway_passer is not None:
            self._gateway_passer.drain()

    def begin_control(self, connection: Connection) -> None:
        """Begin with a connection at an address for gateways alone."""
        connection.start(self._serve_control, connection)

    def begin_ingress(self, connection: Connection) -> None:
        """Begin with a connection at an address for visitors."""
        self._begin_with_head(connection, self._begin_visitor, self._serve_ingress)

    def begin_either(self, connection: Connection) -> None:
        """Begin with a connection at an address that gateways and visitors share.

        It is a gateway's when its first request is an upgrade to our protocol on a public name of the relay.
        """
        self._begin_with_head(connection, self._begin_gateway_or_visitor, self._serve_either)

    def begin_http(self, connection: Connection) -> None:
        """Begin with a connection at an address for visitors without TLS, beside one with TLS."""
        connection.start(self._serve_http, connection)

    def begin_bound(self, route: Route, connection: Connection) -> None:
        """Begin with a connection at an address of `route` alone."""
        if self._awaits_introduction(connection):
            connection.start(self._serve_bound, route, connection)
        else:
            self._ingress.begin_bound(Visit.of(connection), route)

    def begin_passed(self, passed: Passed, route: Route | None, connection: Connection) -> None:
        """Begin with a connection that another process has accepted.

        Args:
            passed: the connection.
            route: its route, if it came to an address of this one alone.
            connection: the same connection, as this relay counts it.
        """
        tls, received = passed.tls, passed.received
        if passed.stage is Stage.REQUEST:
            self._read_head(
                connection, partial(self._begin_visitor, tls=tls), partial(self._serve_request, tls=tls), received
            )
        elif passed.stage is Stage.HELLO:
            connection.start(self._serve_hello, connection, received, tls)
        elif passed.stage is Stage.GATEWAY:
            connection.start(self._serve_passed_gateway, connection, received, tls)
        elif route is not None:
            self._ingress.begin_bound(Visit.of(connection, tls), route)
        else:
            connection.evict()  # the address is closed

    async def _serve_request(self, connection: Connection, received: bytes, *, tls: bool | None) -> None:
        await self._ingress.serve(_prefixed(Visit.of(connection, tls), received))

    async def _serve_hello(self, connection: Connection, received: bytes, tls: bool | None) -> None:
        visit = _prefixed(Visit.of(connection, tls), received)
        routed = await self._sni_router.route(visit, tls=self._config.ingress_tls)
        if routed is not None:
            await self._ingress.serve(routed)

    async def _serve_passed_gateway(self, connection: Connection, received: bytes, tls: bool | None) -> None:
        visit = Visit.of(connection, tls)
        request = await self._gateways.read_request(_prefixed(visit, received).stream)
        if request is not None:
            await self._serve_gateway(connection, visit, *request)

    async def _serve_control(self, connection: Connection) -> None:
        stream: trio.abc.Stream
        stream = watched = connection.stream
        _end_with_fin(watched)
        if self._config.control_tls:
            assert self._certificate is not None
            secured = await accept_gateway(watched, self._certificate)
            if secured is None:
                return
            stream = secured
        request = await self._gateways.read_request(stream)
        if request is not None:
            await self._serve_gateway(connection, attrs.evolve(Visit.of(connection), stream=stream), *request)

    async def _serve_http(self, connection: Connection) -> None:
        await self._ingress.serve(attrs.evolve(await self._introduced(connection), in_clear=True))

    @property
    def early_route(self) -> EarlyRoute | None:
        """As of `AcceptLoop.serve`, at an address of visitors."""
        config = self._config
        in_task = self._passing is None or config.ingress_tls or config.accept_proxy_from
        return None if in_task else self._likely_route

    def _begin_with_head(
        self,
        connection: Connection,
        on_head: Callable[[Connection, Leg, RequestHead, bytes], object],
        serve: Callable[..., Awaitable[object]],
    ) -> None:
        """Read the head of the first request, where nothing else may come before it: no PROXY header, and no TLS."""
        if self._config.ingress_tls or self._awaits_introduction(connection):
            connection.start(serve, connection)
        else:
            received, connection.received = connection.received, b""
            self._read_head(connection, on_head, serve, received)

    def _read_head(
        self,
        connection: Connection,
        on_head: Callable[[Connection, Leg, RequestHead, bytes], object],
        serve: Callable[..., Awaitable[object]],
        received: bytes = b"",
    ) -> None:
        """Read the head of the first request without a task, for `on_head`. In a task, `serve` does all.

        Args:
            received: was read already.
        """
        leg = connection.stream.leg() if self._carrier.running else None
        if leg is None:
            connection.start(serve, connection, received)
            return
        Arriving(
            connection,
            leg,
            self._carrier,
            on_head=on_head,
            in_task=partial(connection.start, serve, connection),
            passes=self._passes,
            answer=self._refuse,
        ).begin(received)

    def _passes(self, connection: Connection, received: bytes) -> bool:
        """Pass a visitor on before its request is read, if the first bytes say where it goes.

        So the head is read by one process, not by two.
        """
        return self._passing is not None and self._ingress.passes(connection, self._likely_route(received), received)

    def _likely_route(self, received: bytes) -> Route | None:
        """Where a visitor goes whose first bytes these are, if they say so. It decides only who reads the request.

        What is for a name of the relay may be a gateway's, and is read.
        """
        host = likely_host(received)
        return None if host is None or host in self._public_hosts else self._ingress.route_nowait(host)

    async def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        await self._ingress.refuse(Visit.of(connection), refusal)

    def _begin_visitor(
        self, connection: Connection, leg: Leg, head: RequestHead, received: bytes, *, tls: bool | None = False
    ) -> None:
        self._ingress.begin_request(Visit.of(connection, tls), leg, head, received)

    def _begin_gateway_or_visitor(self, connection: Connection, leg: Leg, head: RequestHead, received: bytes) -> None:
        if wants_gateway(head) and _is_named(head, self._config.public_names):
            leg.detach()
            connection.start(self._serve_gateway, connection, Visit.of(connection), head, received)
        else:
            self._begin_visitor(connection, leg, head, received)

    async def _serve_ingress(self, connection: Connection, received: bytes = b"") -> None:
        visit = await self._route(connection, received)
        if visit is not None:
            await self._ingress.serve(visit)

    async def _serve_either(self, connection: Connection, received: bytes = b"") -> None:
        visit = await self._route(connection, received)
        if visit is None:
            return
        try:
            head, received = await read_head(visit.stream)
        except Refusal as refusal:
            await self._ingress.refuse(visit, refusal)
            return
        if head is None:
            await visit.stream.aclose()
        elif wants_gateway(head) and _is_named(head, self._config.public_names):
            await self._serve_gateway(connection, visit, head, received)
        else:
            await self._ingress.serve_request(visit, head, received)

    async def _route(self, connection: Connection, received: bytes) -> Visit | None:
        visit = await self._introduced(connection)
        return await self._sni_router.route(_prefixed(visit, received), tls=self._config.ingress_tls)

    async def _serve_gateway(self, connection: Connection, visit: Visit, head: RequestHead, received: bytes) -> None:
        """Serve a gateway whose first request was read, or pass it to the node that has its session."""
        _end_with_fin(connection.stream)
        stream, passer = visit.stream, self._gateway_passer
        if passer is not None and await passer.passes(
            connection, visit, head, received, certificate=self._certificate_of(stream)
        ):
            return
        await self._gateways.serve_request(
            PrefixedStream(stream, received),
            connection.stream,
            connection.arrival,
            certificate=self._certificate_of(stream),
        )

    async def _serve_bound(self, route: Route, connection: Connection) -> None:
        await self._ingress.serve_bound(await self._introduced(connection), route)

    def _awaits_introduction(self, connection: Connection) -> bool:
        """Whether a balancer may have to send a PROXY header first."""
        peer, balancers = connection.peer, self._config.accept_proxy_from
        return bool(balancers) and (peer is None or is_within(peer.host, balancers))

    async def _introduced(self, connection: Connection) -> Visit:
        """A new connection at an address for visitors, after the PROXY header if a balancer has to send one."""
        return await introduce(Visit.of(connection), connection.arrival, self._config.accept_proxy_from)

    def _certificate_of(self, stream: trio.abc.Stream) -> bytes | None:
        """The hash of the certificate that gateways of this relay have to see; None if it is unknown."""
        if not self._config.announce_certificate or not isinstance(stream, TlsServerStream):
            return None
        return stream.certificate_hash


def _prefixed(visit: Visit, received: bytes) -> Visit:
    """The same visit, when `received` was read of it."""
    return attrs.evolve(visit, stream=PrefixedStream(visit.stream, received)) if received else visit


def _is_named(head: RequestHead, names: Collection[str]) -> bool:
    """Whether a request is for one of the relay's own names."""
    try:
        written = normal_audience(head.host_header.decode("ascii").removesuffix(":"))  # an empty port is no port
    except ValueError:
        return False
    # A proxy in front may have removed the port. That is safe: the gateway's proof is bound to the whole name.
    return written in names or any(name.rpartition(":")[0] == written for name in names)


def _end_with_fin(link: Watched) -> None:
    """Close a gateway's link with a FIN, not a RST: yamux marks in the link which streams are complete."""
    lent = link.plain_socket
    if lent is not None:
        lent.disarm_reset()
