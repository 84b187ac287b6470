"""The stream that a tunnel hands out: a visitor's connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias, cast, final

import trio

from .._deprecation import warn_deprecated
from .._model.addresses import Address
from .._net.adopted import adopt
from .._net.leg import Leg
from .._net.lent_socket import LentSocket
from .._net.prefixed_stream import PrefixedStream
from .._net.streams import ByteStream
from .._wire.proxy_v2 import ProxyHeader

__all__ = ["CarriedStream", "Handler", "TunnelStream"]

_NO_HEADER: Final = ProxyHeader(visitor=None)


class CarriedStream(Protocol):
    """What a transport's stream implements in addition to `trio.abc.HalfCloseableStream`.

    A stream that is also a `ByteStream` reports more: resets, room, its socket.
    """

    @property
    def usable(self) -> bool:
        """False once it was closed, was reset, or lost its connection."""

    def acknowledge(self) -> None:
        """Tell the relay that it was accepted, if the protocol can."""

    def reset(self) -> None:
        """Abandon it; see `TunnelStream.reset`."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """See `trio.abc.ReceiveStream.receive_some`."""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """See `trio.abc.SendStream.send_all`."""

    async def wait_send_all_might_not_block(self) -> None:
        """See `trio.abc.SendStream.wait_send_all_might_not_block`."""

    async def send_eof(self) -> None:
        """See `trio.abc.HalfCloseableStream.send_eof`."""

    async def aclose(self) -> None:
        """See `trio.abc.AsyncResource.aclose`."""


@final
class TunnelStream(ByteStream):
    """A visitor's connection, carried by the tunnel.

    It implements `trio.abc.HalfCloseableStream`. `aclose` sends what is queued and then FIN, with or without `send_eof`
    before it. If `aclose` is cancelled, or after `reset`, the visitor's connection is reset, so a truncated answer
    never looks complete. `trio.serve_listeners` closes forcefully what a handler leaves open. So a handler closes its
    stream itself, best with `async with stream:`.

    Attributes:
        visitor: the visitor's address as the relay saw it; None if the transport does not report it.
        tls: whether the visitor used TLS; None if the transport does not report it.
        service: the service that the visitor wants; None for the tunnel's first service, where the relay does not name
            it.
        tunnelled: True, to tell this stream from one that the host's own listener accepted.

    Not promised: that the data has reached the visitor, or has left this host, when `send_all` returns.
    """

    __slots__ = ("_adopted", "_carried", "_prefixed", "proxy_header", "service", "tls", "visitor")

    tunnelled: Final = True

    def __init__(self, carried: CarriedStream, header: ProxyHeader | None = None, prefix: bytes = b"") -> None:
        self.visitor: Final[Address | None] = None if header is None else header.visitor
        self.tls: Final[bool | None] = None if header is None else header.tls
        self.service: Final[str | None] = None if header is None else header.service
        self.proxy_header: Final = header or _NO_HEADER
        self._carried: Final = carried
        self._adopted: Final = adopt(cast("trio.abc.Stream", carried))
        # Only until the prefix is read, so that the bytes after it pass no extra layer.
        self._prefixed = PrefixedStream(self._adopted, prefix) if prefix else None

    @property
    def usable(self) -> bool:
        """False once the stream was closed, was reset by either end, or lost its link."""
        return self._carried.usable

    def leg(self) -> Leg | None:
        leg = (self._prefixed or self._adopted).leg()
        if leg is not None:
            self._prefixed = None
        return leg

    def acknowledge(self) -> None:
        """Tell the relay that this visitor was accepted. `Tunnel.accept` has done so."""
        self._carried.acknowledge()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        """Wait for data from the visitor; b"" after EOF. See `trio.abc.ReceiveStream`.

        Raises:
            trio.BrokenResourceError: the visitor's connection was reset, or the link to the relay was lost.
            trio.ClosedResourceError: this stream was closed at this end.
        """
        prefixed = self._prefixed
        if prefixed is None:
            return await self._adopted.receive_some(max_bytes)
        data = await prefixed.receive_some(max_bytes)
        if not prefixed.prefixed:
            self._prefixed = None
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send `data` to the visitor; returns once little of it waits. See `trio.abc.SendStream`.

        Raises:
            trio.BrokenResourceError: the visitor's connection was reset, or the link to the relay was lost.
            trio.ClosedResourceError: this stream was closed, or `send_eof` was called.
        """
        await self._adopted.send_all(data)

    @property
    def room(self) -> int | None:
        """How many bytes to read for this stream and to send next, so that the tunnel holds few of them.

        0 while `wait_send_all_might_not_block` would wait; None if the visitor has a connection of its own.
        """
        return self._adopted.room

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until `send_all` would take data at once. See `trio.abc.SendStream`."""
        await self._adopted.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Send EOF to the visitor. Receiving goes on. See `trio.abc.HalfCloseableStream`."""
        await self._adopted.send_eof()

    async def aclose(self) -> None:
        """Send what is queued, then FIN; if cancelled, reset. See `trio.abc.AsyncResource`."""
        self._prefixed = None
        await self._adopted.aclose()

    async def wait_broken(self) -> bool:
        """Wait until the visitor resets its connection or the link is lost; False when the stream was closed here.

        For a handler that has read to EOF and works on an answer. Over `tcp` and `tls` a visitor's reset is not noticed
        here. It waits forever if the transport's stream is not a `ByteStream`.
        """
        return await self._adopted.wait_broken()

    async def wait_flushed(self) -> None:
        """Wait until what was sent is on its way to the relay, or never will be. The caller sets the deadline."""
        await self._adopted.wait_flushed()

    async def drain(self) -> None:
        """Deprecated since 0.1.0: the same as `wait_flushed`."""
        warn_deprecated("TunnelStream.drain", since="0.1.0", instead="TunnelStream.wait_flushed")
        await self.wait_flushed()

    async def abort(self) -> None:
        """`reset`, as an async method that every stream has. Completes also when cancelled."""
        self.reset()
        await trio.aclose_forcefully(self._adopted)

    @property
    def lowest_socket(self) -> LentSocket | None:
        return self._adopted.lowest_socket

    def reset(self) -> None:
        """Reset the visitor's connection at once. What was queued is dropped."""
        self._prefixed = None
        self._carried.reset()

    def __repr__(self) -> str:
        return f"<TunnelStream from {self.visitor or 'an unknown visitor'}>"


Handler: TypeAlias = Callable[[TunnelStream], Awaitable[None]]
"""Serves a visitor's stream and closes it."""
