"""A relay as a whole: what it is made of, and how it begins, takes another configuration, drains and ends.

The command line runs a `Relay` as a process. To run one inside your own program:

    relay = Relay(config)
    addresses = await nursery.start(relay.serve)
    ...
    await relay.apply(another_config)        # other tunnels; unchanged tunnels are not interrupted
    await relay.drain()                      # stop, and let visitors finish; to stop at once, cancel `serve`
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from .._async_library import need_trio
from .._model.certificate_status import CertificateStatus
from .._model.exception_groups import lone_error_bare
from .._model.log_fields import about
from .._net.descriptor_limit import descriptor_limit
from .._net.turn import Turn
from .._wire.node import is_node_name
from ..access_log.writer import AccessLog
from ..exchange.carrier import Carrier
from ..websocket import EngineName
from ..yamux import Limits
from .accept_loop import AcceptLoop
from .addresses import Listening, RelayAddresses
from .admission import Admission
from .beside import Beside
from .certificates import RelayCertificates
from .config import RelayConfig
from .connection import log_unforeseen
from .counts import RelayCounts
from .fleet.extra import node_of_fleet
from .gateways.endpoint import GatewayEndpoint
from .gateways.expected import Expected
from .gateways.other_nodes import OtherNodes
from .gateways.registry import Directory, LocalDirectory, LocalRegistry, Registry
from .handover import Handover
from .identity import identity_of
from .inherited import Inherited
from .names import NameBook
from .passed_connections import PassedConnections
from .reload import Changes, check_access
from .routing import Router
from .sharing import Announce, Sharing
from .sites import Sites
from .start_log import log_changes, log_start
from .stats import RelayStats
from .visitors.ingress import Ingress
from .visitors.passing import Passing
from .visitors.tls import SniRouter

if TYPE_CHECKING:
    from .fleet.neighbours import Neighbours

__all__ = ["Relay"]

_DRAIN_LOOK: Final = 0.1
"""Seconds between looks at what is left, while the relay drains."""

_log: Final = logging.getLogger("pioneer_tunnel.relay.server")


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
        passing: passes connections to other processes that listen at the same addresses; by default there are none.
        announce: lets other processes of the same relay know something, for `beside.hear` there; by default there are
            none.
        nodes: the other nodes of a fleet; by default there is none. The relay sets its `serve_gateway`.
        neighbours: the other workers of this machine, if this is one of several and `config` has a fleet.
        wall_clock: seconds since 1970, for the `*_unix` fields of statistics.

    Attributes:
        beside: for other processes of the same relay.

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
        passing: Passing | None = None,
        announce: Announce | None = None,
        nodes: OtherNodes | None = None,
        neighbours: Neighbours | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        check_access(config)
        self._config = config
        self._inherited: Final = inherited or Inherited()
        self._expected: Final = Expected(self._inherited.connected)
        names, own_registry, node = None, None, None
        if config.fleet is not None and registry is None and directory is None:
            node = node_of_fleet(
                config,
                reserved=self._reserved,
                inherited=self._inherited,
                expected=self._expected,
                neighbours=neighbours,
                wall_clock=wall_clock,
            )
            registry, directory, nodes, passing = node.registry, node.directory, node.links, node.passing
        elif registry is None:
            names = NameBook(config.names_path, reserved=self._reserved)
            registry = own_registry = LocalRegistry(config.tunnels, names)
        directory = directory or LocalDirectory()
        self._fleet: Final = node
        self._own_registry: Final = own_registry if node is None else node.registry
        self._listening: Final = Listening(config, self._inherited)
        self._addresses: RelayAddresses | None = None
        self._apply_lock: Final = trio.Lock()
        self._drain_asked: Final = trio.Event()
        self._ended = trio.Event()
        self._since: Final = wall_clock()
        self._wall_clock: Final = wall_clock
        self._handed_over = False
        self._counts: Final = RelayCounts()
        self._access_log: Final = AccessLog.configured(
            config.access_log_path,
            config.access_log_format,
            config.access_log_addresses,
            shared=announce is not None,
        )
        self._admission: Final = Admission(
            config.limits,
            descriptors=descriptor_limit(),
            proxies=(*config.accept_proxy_from, *config.trust_forwarded_from),
            counts=self._counts,
        )
        self._certificates: Final = RelayCertificates(config, own_registry)
        if names is not None:
            names.on_claim = self._certificates.want
        sharing = None if announce is None else Sharing(announce, names, self._certificates.acme)
        self.beside: Final = Beside(self._expected, self._listening, sharing, self._drain_asked)
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
            address_of=self._listening.address_of,
            # The id of a relay, which names its workers, may have characters that no header can have.
            node=None if nodes is None or not is_node_name(nodes.name) else nodes.name,
            wall_clock=wall_clock,
        )
        self._passing: Final = passing
        self._carrier: Final = Carrier(log_unforeseen)
        self._ingress: Final = Ingress(
            registry,
            directory,
            self._admission,
            limits=config.limits,
            # In a fleet, the directory lets them wait: the gateway may come to another node.
            expected=self._expected if node is None else None,
            trust_forwarded_from=config.trust_forwarded_from,
            carrier=self._carrier,
            folder=config.base_dir,
            http_answer=self._certificates.http_answer,
            access_log=self._access_log,
            wall_clock=wall_clock,
            health_host=config.health_host,
            ready=lambda: not self._drain_asked.is_set(),
            passing=passing,
        )
        self._router: Final = Router(
            config,
            self._gateways,
            self._ingress,
            SniRouter(registry, self._ingress, self._certificates.shown, passing),
            carrier=self._carrier,
            certificate=self._certificates.shown,
            passing=passing,
            nodes=nodes,
        )
        self._passed: Final = PassedConnections(self._admission, self._listening, self._router, self._gateways)
        if nodes is not None:
            nodes.serve_gateway = self._passed.serve_gateway

    @property
    def _reserved(self) -> frozenset[str]:
        """Names that no gateway may create: it would take the relay's own visitors, and other gateways."""
        hosts = (*self._config.public_names, *filter(None, [self._config.health_host]))
        return frozenset(host.partition(".")[0] for host in hosts).union(self._config.reserved_names)

    @property
    def certificates(self) -> dict[str, CertificateStatus]:
        """The status of each certificate that `acme` orders, by host; empty without `acme`."""
        return self._certificates.status

    @property
    def orders_certificates(self) -> bool:
        """Whether it is this process that orders certificates."""
        return self._certificates.acme is not None and self._certificates.acme.orders

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
            self._addresses = None
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
            if self._addresses is None:
                raise RuntimeError("a relay that does not serve cannot be reconfigured: make another one")
            changes = Changes.between(self._config, config)
            await trio.to_thread.run_sync(check_access, config)
            applied = attrs.evolve(self._config, tunnels=config.tunnels)
            if not self._drain_asked.is_set():
                await self._listening.update(applied)
            self._config = applied
            if self._own_registry is not None:
                self._own_registry.replace(applied.tunnels)
                self._counts.drop(changes.removed)
            self._certificates.want_at_once()
            await self._gateways.registry_changed()
            self._addresses = attrs.evolve(self._addresses, all_tunnels=self._listening.of_tunnels)
            log_changes(changes)
            return self._addresses

    def reopen_access_log(self) -> None:
        """Reopen the file of the access log, after it was renamed. Does not wait.

        Without an access log it does nothing.
        The command does that on SIGHUP.
        """
        if self._access_log is not None:
            self._access_log.reopen()

    def stats(self) -> RelayStats:
        """What the relay has done and holds, as of now. Also before and after `serve`. Does not wait.

        It takes time in proportion to the tunnels and sessions, some milliseconds for a thousand of them.
        """
        sessions, tunnels, fleet = self._gateways.sessions(), self._config.tunnels, None
        if self._fleet is not None:
            fleet = self._fleet.stats()
            tunnels = (*tunnels, *self._fleet.registry.signed({*sessions, *self._counts.with_streams()}))
        stats = self._counts.stats(
            tunnels,
            sessions,
            since_unix=self._since,
            draining=self._drain_asked.is_set(),
            connections=self._admission.stats(),
        )
        return attrs.evolve(stats, fleet=fleet, **self._gateways.holds())

    def handover(self) -> Handover:
        """What a successor of this process needs. Call it while `serve` runs."""
        self._handed_over = True
        of_fleet = {} if self._fleet is None else self._fleet.listeners
        return Handover(
            descriptors={
                name: [listener.socket.fileno() for listener in listeners]
                for name, listeners in (self._listening.listeners | self._sites.listeners | of_fleet).items()
            },
            connected=[*self._gateways.connected],
        )

    async def _serve(self, task_status: trio.TaskStatus[RelayAddresses]) -> None:
        logging_access = nullcontext() if self._access_log is None else self._access_log.kept()
        async with logging_access, trio.open_nursery() as connections:
            connections.start_soon(self._gateways.keep_told)
            await connections.start(self._carrier.run)
            self._gateways.let_sessions_resume(connections)
            if self._fleet is not None:
                await connections.start(self._fleet.run, self._gateways.registry_changed)
            acme = self._certificates.acme
            if acme is not None:
                await acme.load()
            async with trio.open_nursery() as accepting:
                if acme is not None:
                    accepting.start_soon(acme.run)  # a successor orders when this one does no more
                self._expected.begin()  # before visitors come, who wait for these gateways
                accept_loop = AcceptLoop(self._admission, self._passing)
                await self._listening.begin_tunnels(accept_loop, self._router, connections)
                if self._passing is not None:  # before gateways come, for whose visitors others look for it
                    take = partial(self._passed.take, connections, copy_context(), Turn.current())
                    await accepting.start(self._passing.serve, take)
                self._addresses = await self._listen(accept_loop, accepting, connections)
                self._inherited.close_rest()
                log_start(self._config, self._addresses, most_connections=self._admission.most_connections)
                task_status.started(self._addresses)
                # No deadline: a relay serves until it is drained or cancelled.
                await self._drain_asked.wait()
                if self._handed_over:
                    self._sites.stop()
                if self._fleet is not None:
                    self._fleet.drain(handed_over=self._handed_over or self.beside.has_successor)
                accepting.cancel_scope.cancel()
            async with self._apply_lock:
                await self._listening.end_tunnels()
            await self._let_finish()
            if self._fleet is not None:
                await self._fleet.settle()
            connections.cancel_scope.cancel()

    async def _listen(
        self, accept_loop: AcceptLoop, accepting: trio.Nursery, connections: trio.Nursery
    ) -> RelayAddresses:
        config = self._config
        addresses = await self._listening.begin(accept_loop, self._router, accepting=accepting, connections=connections)
        sites = await self._sites.open(self._inherited)
        connections.start_soon(self._sites.serve, lambda: self._handed_over)
        return attrs.evolve(
            addresses,
            dashboard=None if config.dashboard is None else sites[config.dashboard],
            metrics=None if config.metrics is None else sites[config.metrics],
        )

    async def _let_finish(self) -> None:
        """Wait until no connection is left, for `drain_timeout_ms` at most."""
        self._gateways.drain()
        self._ingress.drain()
        self._router.drain()
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
