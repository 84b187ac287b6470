"""Carries a visitor from the Trio thread to asyncio: a pair of sockets, and what sockets cannot say.

The kernel moves the bytes and slows down the side that sends too fast; each side uses its own library's streams. A
socket of a pair cannot be reset. So each end notes in a `Link` that it has ended in good order, before it closes. An
end without such a note is a break, and becomes a reset at the other side.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import attrs
import trio

from .._net.closing import close_after_answer
from ..asgi.interface import Disconnected, Interrupted
from ..asgi.on_trio import visitor_of
from ..asgi.scope import Visitor
from ..transports.tunnel_stream import TunnelStream

__all__ = ["AsyncioWire", "Bridge", "Bridged"]

_READ_SIZE: Final = 64 * 1024
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError)
"""A stream of the visitor has ended without EOF: at the other end, or at ours, where a generation has ended."""


@final
@attrs.define
class Link:
    """What the sockets cannot say. Set by one side, before it closes; read by the other, after EOF.

    Attributes:
        visitor_ended: the visitor has sent EOF.
        answer_ended: the application's answers are complete.
        drain: see `asgi.interface.Wire.close`.
    """

    visitor_ended: bool = False
    answer_ended: bool = False
    drain: bool = False


@final
@attrs.frozen
class Bridged:
    """A visitor, as asyncio gets it. `socket` is connected and not blocking."""

    socket: socket.socket
    visitor: Visitor
    link: Link


@final
class Bridge:
    """The Trio side. A handler of visitors' streams.

    Args:
        deliver: takes a visitor, in the event loop in which this was made.
        ended: called there when nothing is left of a visitor that was delivered.
    """

    def __init__(self, deliver: Callable[[Bridged], None], ended: Callable[[], None]) -> None:
        self._deliver: Final = deliver
        self._ended: Final = ended
        self._loop: Final = asyncio.get_running_loop()

    async def handle(self, stream: TunnelStream, *, public_url: str | None = None) -> None:
        """Carry a visitor until its connection has ended. Raises only `trio.Cancelled`."""
        try:
            ours, theirs = socket.socketpair()
        except OSError:  # out of descriptors
            stream.reset()
            return
        theirs.setblocking(False)
        link = Link()
        bridged = Bridged(theirs, visitor_of(stream, public_url), link)
        try:
            self._loop.call_soon_threadsafe(self._deliver, bridged)
        except RuntimeError:  # the loop is closed
            theirs.close()
            ours.close()
            stream.reset()
            return
        end = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        try:
            await _carry(stream, end, link)
        finally:
            stream.reset()  # does nothing after a graceful end
            link.visitor_ended = False
            end.socket.close()
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._ended)


async def _carry(stream: TunnelStream, end: trio.SocketStream, link: Link) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_carry_requests, stream, end, link)
        with suppress(*_GONE):
            while data := await end.receive_some(_READ_SIZE):
                await stream.send_all(data)
        nursery.cancel_scope.cancel()
    if link.answer_ended:
        await (close_after_answer(stream) if link.drain else stream.aclose())


async def _carry_requests(stream: TunnelStream, end: trio.SocketStream, link: Link) -> None:
    try:
        while data := await stream.receive_some(_READ_SIZE):
            await end.send_all(data)
        link.visitor_ended = True
        await end.send_eof()
        if await stream.wait_broken():
            raise trio.BrokenResourceError("the visitor has gone")
    except _GONE:
        link.visitor_ended = False
        with suppress(OSError):
            end.socket.shutdown(socket.SHUT_RDWR)


@final
class AsyncioWire:
    """The asyncio side: what `asgi.interface` calls a `Wire`."""

    def __init__(self, bridged: Bridged) -> None:
        self._socket: Final = bridged.socket
        self._link: Final = bridged.link
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._waiting: asyncio.Timeout | None = None
        self._over = False

    async def open(self) -> None:
        """To be called before anything else."""
        self._streams = await asyncio.open_connection(sock=self._socket, limit=_READ_SIZE)

    @property
    def _reader(self) -> asyncio.StreamReader:
        assert self._streams is not None
        return self._streams[0]

    @property
    def _writer(self) -> asyncio.StreamWriter:
        assert self._streams is not None
        return self._streams[1]

    async def receive(self, seconds: float | None = None) -> bytes:
        try:
            async with asyncio.timeout(seconds) as self._waiting:
                data = await self._reader.read(_READ_SIZE)
        except TimeoutError:
            raise Interrupted from None
        except OSError as error:
            raise Disconnected("the visitor has gone") from error
        finally:
            self._waiting = None
        if not data and not self._link.visitor_ended:
            raise Disconnected("the visitor has gone")
        return data

    def interrupt(self) -> None:
        if self._waiting is not None:
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        try:
            await self._writer.drain()
        except OSError as error:
            raise Disconnected("the visitor has gone") from error

    async def close(self, *, drain: bool) -> None:
        self._link.answer_ended, self._link.drain = True, drain
        self._writer.close()
        with suppress(OSError):
            # No deadline: the visitor reads the rest of the answer as slowly as it likes.
            await self._writer.wait_closed()
        self._over = True

    def reset(self) -> None:
        if self._over:
            return
        self._over = True
        self._link.answer_ended = False
        if self._streams is None:
            self._socket.close()
        else:
            self._writer.transport.abort()
