"""A relay: it opens the listeners, ends TLS, and passes each connection to the gateways' or the visitors' side.

The command line runs a `Relay` as a process. To run one inside your own program:

    relay = Relay(config)
    addresses = await nursery.start(relay.serve)
    ...
    await relay.apply(another_config)        # other tunnels; unchanged tunnels are not interrupted
    await relay.drain()                      # stop, and let visitors finish; to stop at once, cancel `serve`
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Final, final

import attrs
import trio

from .._async_library import need_trio
from .._http.head import RequestHead
from .._model.addresses import Address, bracketed, is_ip_address, is_loopback, normal_audience
from .._model.certificate_status import CertificateStatus
from .._model.exception_groups import lone_error_bare
from .._model.log_fields import about
from .._net.adopted import Watched
from .._net.descriptor_limit import descriptor_limit
from .._net.leg import Leg
from .._net.prefixed_stream import PrefixedStream
from .._net.tls.certificate import Certificate
from .._net.tls.stream import TlsServerStream
from .._storage.networks import is_within
from ..access.guard import check_files
from ..access_log.writer import AccessLog
from ..certificates.opening import open_certificates
from ..exchange.carrier import Carrier
from ..monitoring.address import SiteAddress
from ..websocket import EngineName
from ..yamux import Limits
from .accept_loop import AcceptLoop, Handler
from .admission import Admission
from .config import RelayConfig
from .connection import Connection, log_unforeseen
from .counts import RelayCounts
from .gateways.endpoint import GatewayEndpoint, wants_gateway
from .gateways.expected import Expected
from .gateways.registry import Directory, LocalDirectory, LocalRegistry, Registry
from .handover import Handover
from .identity import identity_of
from .inherited import Inherited
from .listeners import BoundListeners, bound_address, name_of, open_listeners
from .names import NameBook
from .reload import Changes
from .request_head import Refusal, read_head
from .sites import Sites
from .stats import RelayStats
from .tunnels import Route, each_address
from .visitors.arriving import Arriving
from .visitors.ingress import Ingress
from .visitors.proxy_header import introduce
from .visitors.tls import SniRouter, accept_gateway
from .visitors.visit import Visit

__all__ = ["Relay", "RelayAddresses"]

_ANY_HOST: Final = {"0.0.0.0", "::"}  # noqa: S104  # it is read, not bound
_DRAIN_LOOK: Final = 0.1
"""Seconds between looks at what is left, while the relay drains."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.server")


@final
@attrs.frozen(kw_only=True)
class RelayAddresses:
    """Where a relay listens. A port that is 0 in the configuration is the port that the system chose.

    Attributes:
        all_control: the addresses for gateways.
        all_ingress: the addresses for visitors.
        all_tunnels: for each tunnel with a `bind_addr`, by tunnel id, the addresses for its visitors.
        dashboard: the address of the operator's page; None if there is none.
        all_http: the addresses for visitors without TLS beside those with it.
        metrics: the address of metrics and health checks; None if there is none.
    """

    all_control: tuple[Address, ...]
    all_ingress: tuple[Address, ...]
    all_tunnels: dict[str, tuple[Address, ...]]
    dashboard: SiteAddress | None = None
    metrics: SiteAddress | None = None
    all_http: tuple[Address, ...] = ()

    @property
    def control(self) -> Address:
        """The first address for gateways."""
        return self.all_control[0]

    @property
    def ingress(self) -> Address:
        """The first address for visitors."""
        return self.all_ingress[0]

    @property
    def tunnels(self) -> dict[str, Address]:
        """The first address of each tunnel with a `bind_addr`, by tunnel id."""
        return {tunnel_id: addresses[0] for tunnel_id, addresses in self.all_tunnels.items()}


@final
class Relay:
    """A relay.

    Args:
        config: the configuration.
        registry: the tunnels; by default those of `config`.
        directory: the connected sessions; by default they are kept in this process.
        limits: of each gateway's yamux session; by default they follow from `config.limits`.
        engine: the WebSocket engine; None chooses the fastest that is installed.
        inherited: sockets that listen already, see `relay.inherited`; by default none.
        wall_clock: seconds since 1970, for the `*_unix` fields of statistics.

    Raises:
        InvalidSettingsError: a certificate, a key or a file of access rules cannot be used; or the extra `acme` is
            missing.
        StorageError: the identity key file or a file of access rules cannot be read, or the group or others may read or
            write it; or the folder of automatic certificates cannot be used.
    """

    def __init__(
        self,
        config: RelayConfig,
        *,
        registry: Registry | None = None,
        directory: Directory | None = None,
        limits: Limits | None = None,
        engine: EngineName | None = None,
        inherited: Inherited | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        _check_access(config)
        own_registry = None
        if registry is None:
            # A gateway that creates a name of the relay's own would take its visitors, and other gateways.
            hosts = (*config.public_names, *filter(None, [config.health_host]))
            own = {host.partition(".")[0] for host in hosts}
            names = NameBook(config.names_path, reserved=own.union(config.reserved_names))
            names.on_claim = self._want_certificates
            own_registry = LocalRegistry(config.tunnels, names)
        registry = registry or own_registry
        assert registry is not None
        directory = directory or LocalDirectory()
        self._config = config
        self._own_registry: Final = own_registry
        self._inherited: Final = inherited or Inherited()
        self._expected: Final = Expected(self._inherited.connected)
        self._listeners: Final[dict[str, list[trio.SocketListener]]] = {}
        self._bound: BoundListeners | None = None
        self._addresses: RelayAddresses | None = None
        self._apply_lock: Final = trio.Lock()
        self._drain_asked: Final = trio.Event()
        self._ended = trio.Event()
        self._since: Final = wall_clock()
        self._wall_clock: Final = wall_clock
        self._handed_over = False
        self._counts: Final = RelayCounts()
        self._access_log: Final = AccessLog.configured(
            config.access_log_path, config.access_log_format, config.access_log_addresses
        )
        self._admission: Final = Admission(
            config.limits,
            descriptors=descriptor_limit(),
            proxies=(*config.accept_proxy_from, *config.trust_forwarded_from),
            counts=self._counts,
        )
        acme = config.acme_config
        # With an address in clear, no other listener has to be at port 443 for the authority.
        by_http = config.http_addr is not None or not config.ingress_tls
        self._acme: Final = None if acme is None else open_certificates(acme, http=by_http)
        self._certificate: Final = self._acme or _certificate(config)
        self._want_certificates()
        self._sites: Final = Sites(
            self, lambda: self._config, ready=lambda: not self._drain_asked.is_set(), wall_clock=wall_clock
        )
        self._gateways: Final = GatewayEndpoint(
            config,
            registry,
            directory,
            expected=self._expected,
            counts=self._counts,
            identity=identity_of(config),
            limits=limits,
            engine=engine,
            address_of=self._address_of,
            wall_clock=wall_clock,
        )
        self._carrier: Final = Carrier(log_unforeseen)
        self._ingress: Final = Ingress(
            registry,
            directory,
            self._admission,
            limits=config.limits,
            expected=self._expected,
            trust_forwarded_from=config.trust_forwarded_from,
            carrier=self._carrier,
            folder=config.base_dir,
            http_answer=None if self._acme is None else self._acme.http_answer,
            access_log=self._access_log,
            wall_clock=wall_clock,
            health_host=config.health_host,
        )
        self._sni_router: Final = SniRouter(registry, self._ingress, self._certificate)

    @property
    def certificates(self) -> dict[str, CertificateStatus]:
        """The status of each certificate that `acme` orders, by host; empty without `acme`."""
        return {} if self._acme is None else self._acme.status

    def _want_certificates(self) -> None:
        """Say which hosts need a certificate. Those of a `registry` that was given to `Relay` are its owner's."""
        if self._acme is None:
            return
        config, hosts = self._config, [*self._config.public_hosts]
        if self._own_registry is not None and config.ingress_tls:
            hosts += [
                host
                for host, route in self._own_registry.all_hosts
                if not route.passes_tls and route.url is not None and route.url.scheme == "https"
            ]
        # No authority knows a name without a dot, and few know addresses.
        self._acme.want(host for host in hosts if "." in host and not is_ip_address(host))

    async def serve(self, *, task_status: trio.TaskStatus[RelayAddresses] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen and serve, until cancelled or drained. Then send each gateway a go-away and close code 1001.

        Returns after `drain`. A relay serves once.

        Raises:
            OSError: the relay cannot listen at an address.
            RuntimeError: asyncio is running; the relay has no face for it.
        """
        need_trio("pioneer_tunnel.relay.Relay", "a process of its own: pioneer-tunnel relay")
        try:
            with lone_error_bare():
                await self._serve(task_status)
        finally:
            self._bound = self._addresses = None
            self._ended.set()

    async def drain(self) -> None:
        """Stop in order, and wait until `serve` has ended.

        - The listeners close.
        - Each gateway is asked for another session, which goes to the relay that answers then.
        - Visitors that have connected are served. Connections that are idle between HTTP requests are closed.
        - A session ends with its last visitor. After `drain_timeout_ms` the remaining visitors are reset.

        A second call, or one after the end, only waits. Before `serve` it waits until that has begun and ended. When
        cancelled, the relay goes on draining.
        """
        self._drain_asked.set()
        await self._ended.wait()

    async def apply(self, config: RelayConfig) -> RelayAddresses:
        """Serve the tunnels of `config` from now on. Unchanged tunnels are not interrupted.

        - A new tunnel works at once.
        - A removed tunnel ends: its listeners close, its session ends, its visitors are reset.
        - A session whose key was removed from its tunnel ends, and its visitors are reset.
        - Any other change of a tunnel applies to new visitors and new gateways. Connected ones stay.
        - A change of the relay's own keys is logged; it takes a restart.

        If `registry` was given to `Relay`, its owner maintains its entries. `apply` then only ends the sessions whose
        key no longer opens their tunnel.

        Returns:
            Where the relay listens now.

        Raises:
            InvalidSettingsError: the tunnels conflict with the addresses that the relay listens at, or a file of access
                rules cannot be used.
            StorageError: such a file cannot be read, or others may access it.
            OSError: the relay cannot listen at a tunnel's address.
            RuntimeError: `serve` does not run.
            In each case nothing has changed.
        """
        async with self._apply_lock:
            if self._bound is None or self._addresses is None:
                raise RuntimeError("a relay that does not serve cannot be reconfigured: make another one")
            changes = Changes.between(self._config, config)
            await trio.to_thread.run_sync(_check_access, config)
            applied = attrs.evolve(self._config, tunnels=config.tunnels)
            if not self._drain_asked.is_set():
                await self._bound.update(applied.tunnels, applied.all_addresses)
            self._config = applied
            if self._own_registry is not None:
                self._own_registry.replace(applied.tunnels)
                self._counts.keep_only({entry.id for entry in applied.tunnels})
            if self._acme is not None:
                self._want_certificates()
                self._acme.retry_now()
            await self._gateways.registry_changed()
            self._addresses = attrs.evolve(self._addresses, all_tunnels=self._bound.addresses)
            _log.info(
                "the configuration was applied; changes of tunnels: %s", changes, extra=about("configuration_applied")
            )
            if changes.for_a_restart:
                keys = ", ".join(changes.for_a_restart)
                fields = about("restart_needed", reason=keys)
                _log.warning("these have changed too, and take a restart: %s", keys, extra=fields)
            return self._addresses

    def reopen_access_log(self) -> None:
        """Open the file of the access log anew, after it was renamed. Does not wait.

        Without an access log it does nothing.
        The command does that on SIGHUP.
        """
        if self._access_log is not None:
            self._access_log.reopen()

    def stats(self) -> RelayStats:
        """What the relay has done and holds, as of now. Also before and after `serve`. Does not wait.

        It takes time in proportion to the tunnels and sessions, some milliseconds for a thousand of them.
        """
        stats = self._counts.stats(
            self._config.tunnels,
            self._gateways.sessions(),
            since_unix=self._since,
            draining=self._drain_asked.is_set(),
            connections=self._admission.stats(),
        )
        return attrs.evolve(stats, **self._gateways.holds())

    def handover(self) -> Handover:
        """What a successor of this process needs. Call it while `serve` runs."""
        assert self._bound is not None
        self._handed_over = True
        return Handover(
            descriptors={
                name: [listener.socket.fileno() for listener in listeners]
                for name, listeners in (self._listeners | self._sites.listeners | self._bound.listeners).items()
            },
            connected=[*self._gateways.connected],
        )

    async def _serve(self, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        logging_access = nullcontext() if self._access_log is None else self._access_log.kept()
        async with logging_access, trio.open_nursery() as connections:
            connections.start_soon(self._gateways.keep_told)
            await connections.start(self._carrier.run)
            self._gateways.let_sessions_resume(connections)
            if self._acme is not None:
                await self._acme.load()
            async with trio.open_nursery() as accepting:
                if self._acme is not None:
                    accepting.start_soon(self._acme.run)  # a successor orders when this one does no more
                self._addresses = await self._listen(accepting, connections)
                self._inherited.close_rest()
                self._expected.begin()
                self._log_start(self._addresses)
                task_status.started(self._addresses)
                # No deadline: a relay serves until it is drained or cancelled.
                await self._drain_asked.wait()
                if self._handed_over:
                    self._sites.stop()
                accepting.cancel_scope.cancel()
            async with self._apply_lock:
                assert self._bound is not None
                await self._bound.update(())
            await self._let_finish()
            connections.cancel_scope.cancel()

    async def _listen(self, accepting: trio.Nursery, connections: trio.Nursery) -> RelayAddresses:
        config = self._config
        control, ingress = each_address(config.control_addr), each_address(config.ingress_addr)
        accept_loop = AcceptLoop(self._admission)

        async def listen(address: Address, handler: Handler, *, only_visitors: bool = False) -> Address:
            name = name_of(address)
            listeners = await open_listeners(address, config.all_addresses, inherited=self._inherited.take(name))
            serve = functools.partial(accept_loop.serve, only_visitors=only_visitors)
            accepting.start_soon(serve, listeners, handler, connections)
            self._listeners[name] = listeners
            return bound_address(address, listeners)

        listening: dict[Address, Address] = {}
        for address in control:
            listening[address] = await listen(
                address, self._begin_either if address in ingress else _in_task(self._serve_control)
            )
        for address in ingress:
            if address not in control:
                listening[address] = await listen(address, self._begin_ingress, only_visitors=True)
        http = [
            await listen(address, _in_task(self._serve_http), only_visitors=True)
            for address in each_address(config.http_addr)
        ]
        self._bound = BoundListeners(
            accept_loop, connections, lambda route: functools.partial(self._begin_bound, route), self._inherited
        )
        await self._bound.update(config.tunnels, config.all_addresses)
        sites = await self._sites.open(self._inherited)
        connections.start_soon(self._sites.serve, lambda: self._handed_over)
        return RelayAddresses(
            all_control=tuple(listening[address] for address in control),
            all_ingress=tuple(listening[address] for address in ingress),
            all_tunnels=self._bound.addresses,
            dashboard=None if config.dashboard is None else sites[config.dashboard],
            metrics=None if config.metrics is None else sites[config.metrics],
            all_http=tuple(http),
        )

    def _log_start(self, addresses: RelayAddresses) -> None:
        gateways, visitors = _listed(addresses.all_control), _listed(addresses.all_ingress)
        _log.info("gateways at %s, visitors at %s", gateways, visitors, extra=about("listening"))
        for tunnel_id, bound in addresses.all_tunnels.items():
            fields = about("listening", tunnel=tunnel_id)
            _log.info("visitors of tunnel %s at %s", tunnel_id, _listed(bound), extra=fields)
        if addresses.dashboard is not None:
            _log.info("the operator's page at %s", addresses.dashboard, extra=about("listening"))
        if addresses.metrics is not None:
            _log.info("metrics and health checks at %s", addresses.metrics, extra=about("listening"))
        self._warn_of_clear_text(addresses)
        if self._admission.most_connections < self._config.limits.connections:
            _log.warning(
                "this process may have so few descriptors that it takes %d connections at the most, not the %d"
                " of its limits; see ulimit -n", self._admission.most_connections, self._config.limits.connections,
                extra=about("few_descriptors"),
            )  # fmt: skip

    async def _let_finish(self) -> None:
        """Wait until no connection is left, for `drain_timeout_ms` at most."""
        self._gateways.drain()
        self._ingress.drain()
        seconds = self._config.drain_timeout_ms / 1000
        with trio.move_on_after(seconds):
            # A visitor that has connected still gets its stream.
            while self._admission.pending or self._ingress.opening:
                await trio.sleep(_DRAIN_LOOK)
            self._gateways.finish()
            while self._admission.connections:
                await trio.sleep(_DRAIN_LOOK)
            return
        _log.warning("visitors are left after %g seconds; they are reset", seconds, extra=about("visitors_reset"))

    def _warn_of_clear_text(self, addresses: RelayAddresses) -> None:
        """Log a warning of each side that others than this host can reach without TLS."""
        routes = [route for tunnel in self._config.tunnels for route in tunnel.routes]
        by_host = any(not route.passes_tls and route.host is not None for route in routes)
        for who, clear, listening in (
            ("gateways", not self._config.control_tls, addresses.all_control),
            ("visitors", not self._config.ingress_tls and by_host, addresses.all_ingress),
        ):
            reachable = tuple(address for address in listening if not is_loopback(address.host))
            if clear and reachable:
                _log.warning(
                    "%s come to %s without TLS: on the way, what visitors send and get can be read and changed; set"
                    " tls_certificate and tls_private_key, or let a proxy in front end TLS", who, _listed(reachable),
                    extra=about("in_clear"),
                )  # fmt: skip
        if isinstance(addresses.metrics, Address) and not is_loopback(addresses.metrics.host):
            line = "metrics at %s have no login: whoever can connect there can read them"
            _log.warning(line, addresses.metrics, extra=about("metrics_open"))

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
        await self._gateways.serve(stream, watched, connection.arrival, certificate=self._certificate_of(stream))

    async def _serve_http(self, connection: Connection) -> None:
        await self._ingress.serve(attrs.evolve(await self._introduced(connection), in_clear=True))

    def _begin_ingress(self, connection: Connection) -> None:
        self._begin_with_head(connection, self._begin_visitor, self._serve_ingress)

    def _begin_either(self, connection: Connection) -> None:
        """Begin with a connection at an address that gateways and visitors share.

        It is a gateway's when its first request is an upgrade to our protocol on a public name of the relay.
        """
        self._begin_with_head(connection, self._begin_gateway_or_visitor, self._serve_either)

    def _begin_with_head(
        self,
        connection: Connection,
        on_head: Callable[[Connection, Leg, RequestHead, bytes], object],
        serve: Callable[..., Awaitable[object]],
    ) -> None:
        """Read the head of the first request without a task, for `on_head`. In a task, `serve` does all.

        It takes a task where something else may come before the head: a PROXY header or TLS.
        """
        leg = None
        if not self._config.ingress_tls and self._carrier.running and not self._awaits_introduction(connection):
            leg = connection.stream.leg()
        if leg is None:
            connection.start(serve, connection)
            return

        def on_tls(received: bytes) -> None:
            connection.start(serve, connection, received)

        arriving = Arriving(connection, leg, self._carrier, on_head=on_head, on_tls=on_tls, answer=self._refuse)
        try:
            arriving.begin()
        except OSError:
            connection.start(serve, connection)

    async def _refuse(self, connection: Connection, refusal: Refusal) -> None:
        await self._ingress.refuse(Visit.of(connection), refusal)

    def _begin_visitor(self, connection: Connection, leg: Leg, head: RequestHead, received: bytes) -> None:
        self._ingress.begin_request(Visit.of(connection), leg, head, received)

    def _begin_gateway_or_visitor(self, connection: Connection, leg: Leg, head: RequestHead, received: bytes) -> None:
        if wants_gateway(head) and self._is_public(head):
            leg.detach()
            connection.start(self._serve_gateway, connection, connection.stream, received)
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
        elif wants_gateway(head) and self._is_public(head):
            await self._serve_gateway(connection, visit.stream, received)
        else:
            await self._ingress.serve_request(visit, head, received)

    async def _route(self, connection: Connection, received: bytes) -> Visit | None:
        visit = await self._introduced(connection)
        if received:
            visit = attrs.evolve(visit, stream=PrefixedStream(visit.stream, received))
        return await self._sni_router.route(visit, tls=self._config.ingress_tls)

    async def _serve_gateway(self, connection: Connection, stream: trio.abc.Stream, received: bytes) -> None:
        """Serve a gateway whose first request was read."""
        _end_with_fin(connection.stream)
        await self._gateways.serve_request(
            PrefixedStream(stream, received),
            connection.stream,
            connection.arrival,
            certificate=self._certificate_of(stream),
        )

    def _begin_bound(self, route: Route, connection: Connection) -> None:
        if self._awaits_introduction(connection):
            connection.start(self._serve_bound, route, connection)
        else:
            self._ingress.begin_bound(Visit.of(connection), route)

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
        """The hash of the certificate that gateways of this relay have to see; None if nobody can tell."""
        if not self._config.announce_certificate or not isinstance(stream, TlsServerStream):
            return None
        return stream.certificate_hash

    def _address_of(self, route: Route) -> str:
        """Where visitors reach `route`: its URL, or else the relay and the port that is the route's own."""
        if route.url is not None:
            return str(route.url)
        address = None if self._bound is None else self._bound.address_of(route)
        address = address or each_address(route.bind_addr)[0]
        public = self._config.public_hosts[0]
        return f"tcp://{public if address.host in _ANY_HOST else bracketed(address.host)}:{address.port}"

    def _is_public(self, head: RequestHead) -> bool:
        try:
            written = normal_audience(head.host_header.decode("ascii").removesuffix(":"))  # an empty port is no port
        except ValueError:
            return False
        names = self._config.public_names
        # A proxy in front may have removed the port. That is safe: the gateway's proof is bound to the whole name.
        return written in names or any(name.rpartition(":")[0] == written for name in names)


def _in_task(serve: Callable[[Connection], Awaitable[None]]) -> Handler:
    def handle(connection: Connection) -> None:
        connection.start(serve, connection)

    return handle


def _end_with_fin(link: Watched) -> None:
    """Close a gateway's link with a FIN, not a RST: yamux marks in the link which streams are complete."""
    lent = link.plain_socket
    if lent is not None:
        lent.disarm_reset()


def _listed(addresses: tuple[Address, ...]) -> str:
    return " and ".join(map(str, addresses))


def _certificate(config: RelayConfig) -> Certificate | None:
    certificate, private_key = config.tls_certificate_path, config.tls_private_key_path
    return None if certificate is None or private_key is None else Certificate(certificate, private_key)


def _check_access(config: RelayConfig) -> None:
    """Read the files of access rules, so that what is wrong with them is known before a visitor comes."""
    for tunnel in config.tunnels:
        for route in tunnel.routes:
            if route.access is not None:
                check_files(route.access.below(config.base_dir))
