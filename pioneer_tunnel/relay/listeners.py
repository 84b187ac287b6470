"""The relay's listeners: those for gateways and visitors, and those of tunnels with a `bind_addr`.

A reload can add and remove listeners of tunnels; the others stay open until the relay stops.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Final, TypeAlias, final

import trio

from .._model.addresses import Address
from .._model.log_fields import about
from .._net.socket_options import reset_on_close
from .._net.tcp import CAN_USE_DESCRIPTORS
from .accept_loop import AcceptLoop, Handler
from .connection import Connection
from .inherited import Inherited
from .tunnels import Route, TunnelEntry, each_address

__all__ = ["BoundListeners", "bound_address", "name_of", "open_listeners"]

BACKLOG: Final = 1024
RESOLVE_TIMEOUT: Final = 10.0
"""Seconds to resolve a name that the relay listens at; the rest is done at once."""
_ANY_IPV6: Final = "::"
_log: Final = logging.getLogger("pioneer_tunnel.relay.server")

HandlerOf: TypeAlias = Callable[[Route], Handler]
"""Makes the handler of one connection to a tunnel's own address."""


async def open_listeners(
    address: Address, beside: Collection[Address] = (), *, inherited: Sequence[socket.socket] = ()
) -> list[trio.SocketListener]:
    """Listen at `address`, or go on listening with the sockets that were `inherited` for it.

    `[::]:port` accepts IPv4 as well as IPv6. It accepts IPv6 alone when an address in `beside` has an IPv4 host and the
    same port, and, with a warning, when another process listens at that port over IPv4.

    Accepted sockets send RST when they are closed, until that is disarmed (see `LentSocket`). So if the process dies, a
    truncated stream does not look complete. Where descriptors cannot be used, they behave as usual.

    Raises:
        OSError: the system refused, or the name does not resolve in time; the message names the address.
    """
    try:
        with trio.fail_after(RESOLVE_TIMEOUT):
            listeners = _listening(address, inherited) if inherited else await _open(address, beside)
    except trio.TooSlowError:
        why = f"no name server answered within {RESOLVE_TIMEOUT:g} seconds"
        raise OSError(errno.ETIMEDOUT, f"cannot listen at {address}: {why}") from None
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
    if CAN_USE_DESCRIPTORS:
        for listener in listeners:
            reset_on_close(listener.socket)
    return listeners


async def _open(address: Address, beside: Collection[Address]) -> list[trio.SocketListener]:
    if address.host != _ANY_IPV6 or _takes_ipv4(beside, address.port):
        return await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    try:
        return [await _open_for_both(address.port)]
    except OSError as error:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
        fields = about("no_ipv4", reason=error.strerror)
        _log.warning("%s serves IPv6 alone; IPv4 at this port: %s", address, error.strerror, extra=fields)
        return listeners


def _listening(address: Address, inherited: Sequence[socket.socket]) -> list[trio.SocketListener]:
    listeners = []
    for given in inherited:
        try:
            listeners.append(trio.SocketListener(trio.socket.from_stdlib_socket(given)))
        except ValueError as error:  # a systemd unit with Accept=yes, for example
            raise OSError(errno.EINVAL, f"the socket that was passed for it cannot be used: {error}") from None
    fields = about("socket_inherited")
    _log.info("the socket for %s was passed by the process before, or by systemd", address, extra=fields)
    return listeners


def _takes_ipv4(addresses: Iterable[Address], port: int) -> bool:
    return any(port == address.port != 0 and address.is_ip and ":" not in address.host for address in addresses)


async def _open_for_both(port: int) -> trio.SocketListener:
    """Open one socket for IPv4 and IPv6. Trio's `open_tcp_listeners` cannot."""
    opened = trio.socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # on Windows, two processes could then listen at one port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        await opened.bind((_ANY_IPV6, port))
        opened.listen(BACKLOG)
        return trio.SocketListener(opened)
    except BaseException:
        opened.close()
        raise


def bound_address(address: Address, listeners: list[trio.SocketListener]) -> Address:
    """`address`, with the port that the system chose if it is 0."""
    return Address(address.host, listeners[0].socket.getsockname()[1])


@final
class BoundListeners:
    """The listeners of tunnels with a `bind_addr`.

    Args:
        connections: the nursery of connections. They outlive their listener; they end with their tunnel's session.
        handler_of: is called for each connection, with the route that its address has at that time.
        inherited: sockets that listen already.
    """

    def __init__(
        self, accept_loop: AcceptLoop, connections: trio.Nursery, handler_of: HandlerOf, inherited: Inherited
    ) -> None:
        self._accept_loop: Final = accept_loop
        self._connections: Final = connections
        self._handler_of: Final = handler_of
        self._inherited: Final = inherited
        self._bound: dict[str, _Bound] = {}

    @property
    def listeners(self) -> dict[str, list[trio.SocketListener]]:
        """All of them, by the names of their addresses."""
        return {name: bound.listeners for name, bound in self._bound.items()}

    @property
    def addresses(self) -> dict[str, tuple[Address, ...]]:
        """The addresses of each tunnel, by its id."""
        found: dict[str, tuple[Address, ...]] = {}
        for bound in self._bound.values():
            tunnel_id = bound.route.entry.id
            found[tunnel_id] = (*found.get(tunnel_id, ()), bound.address)
        return found

    def address_of(self, route: Route) -> Address | None:
        """The first address of a route; None when it has none of its own, or does not listen."""
        for address in each_address(route.bind_addr):
            bound = self._bound.get(name_of(address, route))
            if bound is not None:
                return bound.address
        return None

    def serving(self, name: str) -> Callable[[Sequence[trio.SocketListener]], Awaitable[object]] | None:
        """What accepts at further sockets of an address; None if nothing listens there."""
        bound = self._bound.get(name)
        if bound is None:
            return None
        return partial(bound.accept, self._accept_loop, self._connections, self._handler_of)

    def route_of(self, tunnel_id: str, service: str | None) -> Route | None:
        """The route of a service that has an address of its own; None if there is none."""
        for bound in self._bound.values():
            if (bound.route.entry.id, bound.route.service) == (tunnel_id, service):
                return bound.route
        return None

    async def update(self, tunnels: Iterable[TunnelEntry], beside: Collection[Address] = ()) -> None:
        """Listen at the addresses of `tunnels`, and close all other listeners.

        A listener whose address stays is not closed in between, even if the address now belongs to another tunnel.

        Args:
            beside: every address of the relay, see `open_listeners`.

        Raises:
            OSError: the relay cannot listen at an address. Nothing has changed then.
        """
        wanted = {
            name_of(address, route): (route, address)
            for entry in tunnels
            for route in entry.routes
            for address in each_address(route.bind_addr)
        }
        opened: dict[str, _Bound] = {}
        try:
            for key, (route, address) in wanted.items():
                if key not in self._bound:
                    inherited = self._inherited.take(key)
                    opened[key] = _Bound(route, address, await open_listeners(address, beside, inherited=inherited))
            for bound in opened.values():
                self._connections.start_soon(bound.serve, self._accept_loop, self._connections, self._handler_of)
        except BaseException:
            for bound in opened.values():
                bound.close_sockets()
            raise
        removed = [self._bound.pop(key) for key in self._bound.keys() - wanted.keys()]
        all_bound = self._bound | opened
        self._bound = {key: all_bound[key] for key in wanted}  # in the order of the configuration
        for key, (route, _) in wanted.items():
            self._bound[key].route = route
        with trio.CancelScope(shield=True):  # quick; an update is carried out as a whole
            for bound in removed:
                await bound.close()


def name_of(address: Address, route: Route | None = None) -> str:
    """The name of a listener: its address. Port 0 is a different port each time, so there it has the route."""
    if route is None or address.port != 0:
        return str(address)
    return f"{address} of {route.entry.id}, service {route.service}"


@final
class _Bound:
    """The listeners of one address, and the route that they serve now."""

    def __init__(self, route: Route, address: Address, listeners: list[trio.SocketListener]) -> None:
        self.route = route
        self.address: Final = bound_address(address, listeners)
        self.listeners: Final = listeners
        self._serving: Final = trio.CancelScope()
        self._closed: Final = trio.Event()

    async def serve(self, accept_loop: AcceptLoop, connections: trio.Nursery, handler_of: HandlerOf) -> None:
        try:
            with self._serving:
                await self.accept(accept_loop, connections, handler_of, self.listeners)
        finally:
            self.close_sockets()
            self._closed.set()

    async def accept(
        self,
        accept_loop: AcceptLoop,
        connections: trio.Nursery,
        handler_of: HandlerOf,
        listeners: Sequence[trio.SocketListener],
    ) -> None:
        """Accept at listeners of this address until cancelled, and close them."""

        def handle(connection: Connection) -> None:
            handler_of(self.route)(connection)

        await accept_loop.serve(listeners, handle, connections, only_visitors=True)

    async def close(self) -> None:
        """Stop listening, and wait until the sockets are closed."""
        self._serving.cancel()
        await self._closed.wait()

    def close_sockets(self) -> None:
        for listener in self.listeners:
            listener.socket.close()
