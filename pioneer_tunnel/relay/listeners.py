"""Listening: one address, and the addresses of their own that tunnels have, which come and go with the registry.

Neighbours: `server` listens for gateways and visitors through `open_listeners`, and keeps a `BoundListeners` for the
tunnels with a `bind_addr`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Final, final

import trio

from ..address import Address
from ..sockets import reset_on_close
from ..tcp_stream import CAN_USE_DESCRIPTORS
from .accepting import Front, Handler
from .admission import Arrival
from .config import TunnelEntry

__all__ = ["BoundListeners", "listened_at", "open_listeners"]

BACKLOG: Final = 1024


async def open_listeners(address: Address) -> list[trio.SocketListener]:
    """Listen at `address`. What is accepted `resets`, see `LentSocket`, where the system lets us use descriptors.

    Raises:
        OSError: it cannot be listened at; the message names it.
    """
    try:
        listeners = await trio.open_tcp_listeners(address.port, host=address.host, backlog=BACKLOG)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen at {address}: {error.strerror}") from error
    if CAN_USE_DESCRIPTORS:
        for listener in listeners:
            reset_on_close(listener.socket)
    return listeners


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
    def addresses(self) -> dict[str, Address]:
        """Where each tunnel is listened for, by its id."""
        return {bound.entry.id: bound.address for bound in self._bound.values()}

    async def arrange(self, tunnels: Iterable[TunnelEntry]) -> None:
        """Listen where `tunnels` say and nowhere else. What is listened at already goes on without a gap, also when
        the address now is another tunnel's.

        Raises:
            OSError: an address cannot be listened at. Then everything is as it was.
        """
        wanted = {_place(entry): entry for entry in tunnels if entry.bind_addr is not None}
        opened: dict[Hashable, _Bound] = {}
        try:
            for place, entry in wanted.items():
                if place not in self._bound:
                    assert entry.bind_addr is not None
                    opened[place] = _Bound(entry, await open_listeners(entry.bind_addr))
            for bound in opened.values():
                self._connections.start_soon(bound.serve, self._front, self._connections, self._handler)
        except BaseException:
            for bound in opened.values():
                bound.close_sockets()
            raise
        ending = [self._bound.pop(place) for place in self._bound.keys() - wanted.keys()]
        self._bound |= opened
        for place, entry in wanted.items():
            self._bound[place].entry = entry
        with trio.CancelScope(shield=True):  # quick, and half of a rearrangement is none
            for bound in ending:
                await bound.close()


def _place(entry: TunnelEntry) -> Hashable:
    """What makes two listeners the same. Port 0 is another port each time, so that it is its tunnel's own."""
    assert entry.bind_addr is not None
    return (entry.bind_addr, entry.id if entry.bind_addr.port == 0 else None)


@final
class _Bound:
    """One address, and the tunnel that it is for now."""

    def __init__(self, entry: TunnelEntry, listeners: list[trio.SocketListener]) -> None:
        assert entry.bind_addr is not None
        self.entry = entry
        self.address: Final = listened_at(entry.bind_addr, listeners)
        self._listeners: Final = listeners
        self._serving: Final = trio.CancelScope()
        self._closed: Final = trio.Event()

    async def serve(self, front: Front, connections: trio.Nursery, handler: Callable[[TunnelEntry], Handler]) -> None:
        async def handle(connected: trio.SocketStream, arrival: Arrival) -> None:
            await handler(self.entry)(connected, arrival)

        try:
            with self._serving:
                await front.serve(self._listeners, handle, connections)
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
