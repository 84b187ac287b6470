"""Listening: one address, and the addresses of their own that tunnels have, which come and go with the registry.

Neighbours: `server` listens for gateways and visitors through `open_listeners`, and keeps a `BoundListeners` for the
tunnels with a `bind_addr`.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Final, final

import trio

from .._model.addresses import Address
from .._net.socket_options import reset_on_close
from .._net.tcp import CAN_USE_DESCRIPTORS
from .accept_loop import Front, Handler
from .admission import Arrival
from .config import TunnelEntry, each_address

__all__ = ["BoundListeners", "listened_at", "open_listeners"]

BACKLOG: Final = 1024
_ANY_IPV6: Final = "::"
_log: Final = logging.getLogger("pioneer_tunnel.relay.server")


async def open_listeners(address: Address, beside: Collection[Address] = ()) -> list[trio.SocketListener]:
    """Listen at `address`. `[::]:port` takes IPv4 as well as IPv6.

    It takes IPv6 alone where an address in `beside` has an IPv4 host and the same port, or, with a warning, where
    another process listens at that port over IPv4.

    What is accepted `resets`, see `LentSocket`, where the system lets us use descriptors.

    Raises:
        OSError: it cannot be listened at; the message names it.
    """
    try:
        listeners = await _open(address, beside)
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
        _log.warning("%s serves IPv6 alone; IPv4 at this port: %s", address, error.strerror)
        return listeners


def _takes_ipv4(addresses: Iterable[Address], port: int) -> bool:
    return any(port == address.port != 0 and address.is_ip and ":" not in address.host for address in addresses)


async def _open_for_both(port: int) -> trio.SocketListener:
    """One socket for IPv4 and IPv6, which Trio's `open_tcp_listeners` does not make."""
    opened = trio.socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # on Windows it lets two processes take one port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        await opened.bind((_ANY_IPV6, port))
        opened.listen(BACKLOG)
        return trio.SocketListener(opened)
    except BaseException:
        opened.close()
        raise


def listened_at(address: Address, listeners: list[trio.SocketListener]) -> Address:
    """`address` with the port that the system chose where it says 0."""
    return Address(address.host, listeners[0].socket.getsockname()[1])


@final
class BoundListeners:
    """The addresses of their own that tunnels have.

    Args:
        front: accepts connections.
        connections: where connections are served. They outlive their listener: what ends them is their tunnel.
        handler: makes the handler for one connection of a tunnel, given by the entry that it has then.
    """

    def __init__(self, front: Front, connections: trio.Nursery, handler: Callable[[TunnelEntry], Handler]) -> None:
        self._front: Final = front
        self._connections: Final = connections
        self._handler: Final = handler
        self._bound: dict[Hashable, _Bound] = {}

    @property
    def addresses(self) -> dict[str, tuple[Address, ...]]:
        """Where each tunnel is listened for, by its id."""
        found: dict[str, tuple[Address, ...]] = {}
        for bound in self._bound.values():
            found[bound.entry.id] = (*found.get(bound.entry.id, ()), bound.address)
        return found

    async def arrange(self, tunnels: Iterable[TunnelEntry], beside: Collection[Address] = ()) -> None:
        """Listen where `tunnels` say and nowhere else. What is listened at already goes on without a gap, also when
        the address now is another tunnel's.

        Args:
            beside: every address of the relay, see `open_listeners`.

        Raises:
            OSError: an address cannot be listened at. Then everything is as it was.
        """
        wanted = {
            _place(entry, address): (entry, address) for entry in tunnels for address in each_address(entry.bind_addr)
        }
        opened: dict[Hashable, _Bound] = {}
        try:
            for place, (entry, address) in wanted.items():
                if place not in self._bound:
                    opened[place] = _Bound(entry, address, await open_listeners(address, beside))
            for bound in opened.values():
                self._connections.start_soon(bound.serve, self._front, self._connections, self._handler)
        except BaseException:
            for bound in opened.values():
                bound.close_sockets()
            raise
        ending = [self._bound.pop(place) for place in self._bound.keys() - wanted.keys()]
        all_bound = self._bound | opened
        self._bound = {place: all_bound[place] for place in wanted}  # in the order of the configuration
        for place, (entry, _) in wanted.items():
            self._bound[place].entry = entry
        with trio.CancelScope(shield=True):  # quick, and half of a rearrangement is none
            for bound in ending:
                await bound.close()


def _place(entry: TunnelEntry, address: Address) -> Hashable:
    """What makes two listeners the same. Port 0 is another port each time, so that it is its tunnel's own."""
    return (address, entry.id if address.port == 0 else None)


@final
class _Bound:
    """One address, and the tunnel that it is for now."""

    def __init__(self, entry: TunnelEntry, address: Address, listeners: list[trio.SocketListener]) -> None:
        self.entry = entry
        self.address: Final = listened_at(address, listeners)
        self._listeners: Final = listeners
        self._serving: Final = trio.CancelScope()
        self._closed: Final = trio.Event()

    async def serve(self, front: Front, connections: trio.Nursery, handler: Callable[[TunnelEntry], Handler]) -> None:
        async def handle(connected: trio.SocketStream, arrival: Arrival) -> None:
            await handler(self.entry)(connected, arrival)

        try:
            with self._serving:
                await front.serve(self._listeners, handle, connections, only_visitors=True)
        finally:
            self.close_sockets()
            self._closed.set()

    async def close(self) -> None:
        """Listen no more. When this returns, the address is free again."""
        self._serving.cancel()
        await self._closed.wait()

    def close_sockets(self) -> None:
        for listener in self._listeners:
            listener.socket.close()
