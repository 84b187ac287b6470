"""A node of a fleet: its registry, directory and links, as the relay's file says. Needs the extra `fleet`."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection
from typing import Final, NoReturn, final

import trio

from ..._model.keys import PublicKey
from ..config import RelayConfig
from ..gateways.expected import PATIENCE
from ..gateways.registry import LiveSession
from ..inherited import Inherited
from ..listeners import open_listeners
from ..stats import FleetStats
from .changed_tunnels import ChangedTunnels
from .config import FleetConfig
from .directory import FleetDirectory
from .keys import node_identity, node_public_key
from .networks import MachineNetwork
from .node_links import NodeLinks
from .node_tls import NodeTls
from .peers import Asked, Order
from .redis_store import RedisStore
from .registry import FleetRegistry

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
        wall_clock: seconds since 1970.

    Attributes:
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
        store = RedisStore(fleet.redis_access.server(), fleet.node, is_node=keys.__contains__)
        self._store: Final = store
        asked = _Asked()
        tls = NodeTls(fleet.key_file, fleet.key_file, {node.name: node.certificate for node in fleet.others})
        self.links: Final = NodeLinks(
            fleet.node,
            store.process,
            asked,
            machines=MachineNetwork(tls, {node.name: node.address for node in fleet.others}),
            listeners=self._open,
            random=random.Random(),  # noqa: S311  # it spreads attempts, and is no secret
        )
        self.directory: Final = FleetDirectory(store, self.links)
        asked.directory = self.directory

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
            await nursery.start(self.registry.run)
            await nursery.start(self.directory.run)
            nursery.start_soon(self._changed.tell, registry_changed)
            task_status.started()
        raise AssertionError("it runs until it is cancelled")

    def drain(self, *, handed_over: bool) -> None:
        """From now on, sessions that leave come again elsewhere. Does not wait.

        Args:
            handed_over: whether a successor of this process listens for other nodes.
        """
        self._store.leaving = True
        if handed_over:
            self.links.stop_listening()

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


@final
class _Asked(Asked):
    """The directory, which is made after what needs it."""

    directory: FleetDirectory

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        return self.directory.local(tunnel_id, session_id)

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        return await self.directory.carry_out(tunnel_id, session_id, order)
