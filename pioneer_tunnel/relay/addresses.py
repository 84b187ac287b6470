"""The addresses of a relay: it listens at them, passes each connection on to the router, and says which they are."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Final, TypeAlias, final

import attrs
import trio

from .._model.addresses import Address, bracketed
from ..monitoring.address import SiteAddress
from .accept_loop import AcceptLoop, EarlyRoute, Handler
from .config import RelayConfig
from .inherited import Inherited
from .listeners import BoundListeners, bound_address, name_of, open_listeners
from .routing import Router
from .tunnels import Route, each_address

__all__ = ["Listening", "RelayAddresses"]

_Serve: TypeAlias = Callable[[Sequence[trio.SocketListener]], Awaitable[object]]
_ANY_HOST: Final = {"0.0.0.0", "::"}  # noqa: S104  # it is read, not bound


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
class Listening:
    """Listens at the addresses of a relay.

    Args:
        config: the configuration to begin with.
        inherited: sockets that listen already.
    """

    def __init__(self, config: RelayConfig, inherited: Inherited) -> None:
        self._config: Final = config
        self._inherited: Final = inherited
        self._listeners: Final[dict[str, list[trio.SocketListener]]] = {}
        self._serving: Final[dict[str, _Serve]] = {}
        self._bound: BoundListeners | None = None

    async def begin_tunnels(self, accept_loop: AcceptLoop, router: Router, connections: trio.Nursery) -> None:
        """Open the addresses of the tunnels.

        Args:
            accept_loop: accepts the connections.
            router: serves them.
            connections: the nursery of connections, and of these listeners.

        Raises:
            OSError: the relay cannot listen at an address.
        """
        self._bound = BoundListeners(
            accept_loop, connections, lambda route: partial(router.begin_bound, route), self._inherited
        )
        await self.update(self._config)

    async def begin(
        self, accept_loop: AcceptLoop, router: Router, *, accepting: trio.Nursery, connections: trio.Nursery
    ) -> RelayAddresses:
        """Open all other addresses, except those of `Sites`. After `begin_tunnels`.

        Args:
            accept_loop, router: as of `begin_tunnels`.
            accepting: when it is cancelled, these listeners close.
            connections: the nursery of connections.

        Raises:
            OSError: the relay cannot listen at an address.
        """
        config = self._config

        async def listen(
            address: Address, handler: Handler, *, only_visitors: bool = False, early_route: EarlyRoute | None = None
        ) -> Address:
            name = name_of(address)
            listeners = await open_listeners(address, config.all_addresses, inherited=self._inherited.take(name))
            serve = partial(
                accept_loop.serve,
                handler=handler,
                connections=connections,
                only_visitors=only_visitors,
                early_route=early_route,
            )
            accepting.start_soon(serve, listeners)
            self._serving[name], self._listeners[name] = serve, listeners
            return bound_address(address, listeners)

        control, ingress = each_address(config.control_addr), each_address(config.ingress_addr)
        listening: dict[Address, Address] = {}
        early = router.early_route
        for address in control:
            if address in ingress:
                listening[address] = await listen(address, router.begin_either, early_route=early)
            else:
                listening[address] = await listen(address, router.begin_control)
        for address in ingress:
            if address not in control:
                listening[address] = await listen(address, router.begin_ingress, only_visitors=True, early_route=early)
        http = each_address(config.http_addr)
        in_clear = [await listen(address, router.begin_http, only_visitors=True) for address in http]
        return RelayAddresses(
            all_control=tuple(listening[address] for address in control),
            all_ingress=tuple(listening[address] for address in ingress),
            all_tunnels=self.of_tunnels,
            all_http=tuple(in_clear),
        )

    async def accept_at(self, name: str, sockets: Sequence[socket.socket]) -> None:
        """Accept at further sockets of an address until cancelled, and close them. Returns if there is no such address.

        Raises:
            OSError: a socket is broken.
        """
        serve = self._serving.get(name) or self._of_tunnels.serving(name)
        if serve is not None:
            await serve([trio.SocketListener(trio.socket.from_stdlib_socket(given)) for given in sockets])

    async def update(self, config: RelayConfig) -> None:
        """Listen at the addresses of the tunnels of `config`, and at those of no other tunnel.

        Raises:
            OSError: the relay cannot listen at an address. Nothing has changed then.
        """
        await self._of_tunnels.update(config.tunnels, config.all_addresses)

    async def end_tunnels(self) -> None:
        """Close the listeners of all tunnels."""
        await self._of_tunnels.update(())

    @property
    def of_tunnels(self) -> dict[str, tuple[Address, ...]]:
        """The addresses of each tunnel with a `bind_addr`, by its id."""
        return self._of_tunnels.addresses

    @property
    def listeners(self) -> dict[str, list[trio.SocketListener]]:
        """All listeners, by the names of their addresses."""
        return self._listeners | self._of_tunnels.listeners

    def address_of(self, route: Route) -> str:
        """Where visitors reach `route`: its URL, or else the relay and the port that is the route's own."""
        if route.url is not None:
            return str(route.url)
        address = None if self._bound is None else self._bound.address_of(route)
        address = address or each_address(route.bind_addr)[0]
        public = self._config.public_hosts[0]
        return f"tcp://{public if address.host in _ANY_HOST else bracketed(address.host)}:{address.port}"

    def route_of(self, tunnel_id: str, service: str | None) -> Route | None:
        """The route of a service with a `bind_addr`; None if there is none."""
        return self._of_tunnels.route_of(tunnel_id, service)

    @property
    def _of_tunnels(self) -> BoundListeners:
        assert self._bound is not None  # `begin_tunnels` has made it
        return self._bound
