"""A node of a fleet: its registry, directory and links, as the relay's file says. Needs the extra `fleet`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from typing import Final, NoReturn, final

import trio

from ..._model.keys import PublicKey
from ..config import RelayConfig
from ..gateways.expected import PATIENCE, Expected
from ..gateways.registry import LocalDirectory
from ..inherited import Inherited
from ..listeners import open_listeners
from ..stats import FleetStats
from .changed_tunnels import ChangedTunnels
from .config import FleetConfig
from .directory import FleetDirectory
from .keys import node_identity, node_public_key
from .neighbours import Neighbours, where_in
from .networks import MachineNetwork
from .node_links import NodeLinks
from .node_tls import NodeTls
from .passing import SocketPassing
from .peers import AskedLater
from .redis_store import RedisStore
from .registry import FleetRegistry
from .store import StoreUnreachable

__all__ = ["FleetNode"]

SETTLE_TIMEOUT: Final = PATIENCE
"""Seconds that a process which ends waits until its sessions are out of the records. Gateways are back by then."""

_SETTLE_LOOK: Final = 0.02
"""Seconds between looks at that."""


@final
class FleetNode:
    """This node. Blocks for a moment when it is made: it reads files.

    Args:
        config: the relay's configuration, with `fleet`.
        reserved: names that no gateway may create below a wildcard.
        inherited: sockets that listen already.
        expected: visitors of these tunnels wait.
        neighbours: the other workers of this machine; None if this is its only process.
        wall_clock: seconds since 1970.

    Attributes:
        passing: passes visitors to the other workers of this machine; None if there are none.
        registry: the tunnels.
        directory: the sessions of all nodes.
        links: the other nodes.
        listeners: the sockets for other nodes, by the name under which a process inherits them.

    Raises:
        StorageError: a file cannot be read or written, or others may access the key or the password.
        InvalidSettingsError: a file holds something else than it should.
    """

    def __init__(
        self,
        config: RelayConfig,
        *,
        reserved: frozenset[str],
        inherited: Inherited,
        expected: Expected,
        neighbours: Neighbours | None,
        wall_clock: Callable[[], float],
    ) -> None:
        fleet = config.fleet_config
        assert fleet is not None  # the caller has looked
        self._fleet: Final = fleet
        self._inherited: Final = inherited
        self._open: Final[list[trio.SocketListener]] = []
        identity = node_identity(fleet.key_file)
        keys = {fleet.node: identity.public_key} | public_keys(fleet)
        self.registry: Final = FleetRegistry(
            config.tunnels, fleet, identity=identity, nodes=keys, reserved=reserved, wall_clock=wall_clock
        )
        self._changed: Final = ChangedTunnels()
        self.registry.on_change = self._changed.note
        name, process = (fleet.node, None) if neighbours is None else (neighbours.store.node, neighbours.store.process)
        store = RedisStore(fleet.redis_access.server(), name, process=process, is_node=self._is_node)
        self._store: Final = store
        asked = AskedLater()
        tls = NodeTls(fleet.key_file, fleet.key_file, {node.name: node.certificate for node in fleet.others})
        addresses = {worker: address for node in fleet.others for worker, address in node.addresses.items()}
        spread = random.Random()  # noqa: S311  # it spreads attempts, and is no secret
        self.links: Final = NodeLinks(
            name,
            store.process,
            asked,
            machines=MachineNetwork(tls, addresses),
            workers=None if neighbours is None else neighbours.network,
            listeners=self._open,
            random=spread,
        )
        self._tasks: trio.Nursery | None = None
        local = LocalDirectory()
        beside = None if neighbours is None else neighbours.sessions
        self.directory: Final = FleetDirectory(store, self.links, local, beside=beside, expected=expected)
        asked.directory = self.directory
        self._neighbours: Final = neighbours
        self.passing: SocketPassing | None = None
        if neighbours is not None:
            if neighbours.network.has_others:
                self.passing = SocketPassing(neighbours.network, where_in(neighbours, local, spread), spread)
            local.on_change = partial(self._show, neighbours)
            neighbours.store.on_change = partial(self._look_at, neighbours)
            neighbours.on_ended = self._break_lease_soon

    def _is_node(self, name: str) -> bool:
        return name == self.links.name or self.links.reaches(name)

    @property
    def listeners(self) -> dict[str, list[trio.SocketListener]]:
        return {str(self._fleet.listen): self._open}

    async def run(
        self,
        registry_changed: Callable[[Collection[str]], Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> NoReturn:
        """Be a node, until cancelled. It starts when other nodes can reach it, and Redis has answered, or some seconds
        have passed.

        Args:
            registry_changed: called with the ids of tunnels that may have changed or ended. It ends their sessions.
            task_status: for `nursery.start`.

        Raises:
            OSError: it cannot listen for other nodes.
            StorageError: the state file cannot be used.
        """
        listen = self._fleet.listen
        self._open.extend(await open_listeners(listen, inherited=self._inherited.take(str(listen))))
        async with trio.open_nursery() as nursery:
            await nursery.start(self.links.run)
            if self._neighbours is not None:
                await nursery.start(self._neighbours.store.run)
            await nursery.start(self.registry.run)
            await nursery.start(self.directory.run)
            nursery.start_soon(self._changed.tell, registry_changed)
            self._tasks = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._tasks = None
        raise AssertionError("it runs until it is cancelled")

    def drain(self, *, handed_over: bool) -> None:
        """From now on, sessions that leave come again elsewhere. Does not wait.

        Args:
            handed_over: whether a successor of this process listens for other nodes.
        """
        self._store.leaving = True
        if handed_over:
            self.links.stop_listening()

    def _show(self, neighbours: Neighbours, tunnel_id: str) -> None:
        neighbours.show(tunnel_id, self.directory.holdings(tunnel_id))

    def _look_at(self, neighbours: Neighbours, tunnel_id: str) -> None:
        self.directory.end_older_than(tunnel_id, neighbours.sessions(tunnel_id))

    def _break_lease_soon(self, process: str) -> None:
        if self._tasks is not None:
            self._tasks.start_soon(self._break_lease, process)

    async def _break_lease(self, process: str) -> None:
        with suppress(StoreUnreachable):
            await self._store.break_lease(process)

    async def settle(self) -> None:
        """Wait until the records say that the sessions have left. Without Redis it does not wait."""
        with trio.move_on_after(SETTLE_TIMEOUT):
            while self._store.reachable and self.directory.to_reconcile:
                await trio.sleep(_SETTLE_LOOK)

    def stats(self) -> FleetStats:
        """The numbers now."""
        registry = self.registry.state
        return FleetStats(
            node=self._fleet.node,
            redis_reachable=self._store.reachable and registry.reachable,
            nodes={node.name: self.links.round_trip(node.name) for node in self._fleet.others},
            hops_open=self.links.hops_open,
            hops_served_total=self.links.hops_served,
            unannounced_tunnels=self.directory.to_reconcile,
            signed_tunnels=registry.signed,
            unconfirmed_seconds=registry.unconfirmed,
        )


def public_keys(fleet: FleetConfig) -> dict[str, PublicKey]:
    """The keys of the other nodes, by name. Blocks.

    Args:
        fleet: with complete paths.

    Raises:
        StorageError: a certificate cannot be read.
        InvalidSettingsError: one holds something else.
    """
    return {node.name: node_public_key(node.certificate) for node in fleet.others}
