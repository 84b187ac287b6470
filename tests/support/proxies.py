"""A proxy for tests, HTTP and SOCKS5 at one port, which knows names that nobody else resolves."""

from __future__ import annotations

import base64
import itertools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Final, TypeAlias, final

import trio
from rig import read_exactly, read_until

from pioneer_tunnel._model.addresses import Address

__all__ = ["Asked", "ProxyRig", "saying", "open_proxy"]

Asked: TypeAlias = tuple[str, int]

USER, PASSWORD = "user-name", "p%ss:wörd@/#"


@final
class ProxyRig:
    """Connects to the addresses of `names`, and to nothing else.

    Args:
        names: where the relays of a test really are.
        wants: the user and the password to ask for.

    Attributes:
        names, wants: as given.
        asked: what it was asked for.
        address: where it listens.
    """

    def __init__(self, names: dict[Asked, Address], wants: tuple[str, str] | None) -> None:
        self.asked: list[Asked] = []
        self.address = Address("127.0.0.1", 1)
        self._carried = trio.Event()
        self.names: Final = names
        self.wants = wants

    def cut(self) -> None:
        """Break the connections that it has made."""
        self._carried.set()
        self._carried = trio.Event()

    async def serve(self, stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, AssertionError):
            async with AsyncExitStack() as opened:
                await opened.enter_async_context(stream)
                first = await read_exactly(stream, 1)
                handshake = self._socks5(stream, opened) if first == b"\5" else self._connect(stream, first, opened)
                if target := await handshake:
                    await self._carry(stream, target)

    async def _carry(self, one: trio.abc.Stream, other: trio.abc.Stream) -> None:
        cut = self._carried
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_both_ways, one, other, nursery.cancel_scope)
            await cut.wait()
            nursery.cancel_scope.cancel()

    async def _reach(self, asked: Asked, opened: AsyncExitStack) -> trio.SocketStream | None:
        self.asked.append(asked)
        found = self.names.get(asked)
        if found is None:
            return None
        try:
            return await opened.enter_async_context(await trio.open_tcp_stream(found.host, found.port))
        except OSError:
            return None

    async def _connect(self, stream: trio.abc.Stream, first: bytes, opened: AsyncExitStack) -> trio.SocketStream | None:
        head = (first + await read_until(stream, b"\r\n\r\n")).decode().split("\r\n")
        assert head[0].startswith("CONNECT ")
        if self.wants is not None:
            token = base64.b64encode(":".join(self.wants).encode()).decode()
            if f"Proxy-Authorization: Basic {token}".lower() not in (line.lower() for line in head):
                answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=x\r\n\r\n"
                await stream.send_all(answer)
                return None
        host, _, port = head[0].split(" ")[1].rpartition(":")
        target = await self._reach((host.strip("[]"), int(port)), opened)
        await stream.send_all(
            b"HTTP/1.1 502 Bad Gateway\r\n\r\n" if target is None else b"HTTP/1.1 200 Connection established\r\n\r\n"
        )
        return target

    async def _socks5(self, stream: trio.abc.Stream, opened: AsyncExitStack) -> trio.SocketStream | None:
        (count,) = await read_exactly(stream, 1)
        methods = await read_exactly(stream, count)
        if self.wants is None:
            await stream.send_all(b"\5\0")
        elif 2 not in methods:
            await stream.send_all(b"\5\xff")
            return None
        else:
            await stream.send_all(b"\5\2")
            given = []
            assert await read_exactly(stream, 1) == b"\1"
            for _ in range(2):
                (length,) = await read_exactly(stream, 1)
                given.append((await read_exactly(stream, length)).decode())
            accepted = tuple(given) == self.wants
            await stream.send_all(b"\1\0" if accepted else b"\1\1")
            if not accepted:
                return None
        assert await read_exactly(stream, 3) == b"\5\1\0"
        (kind,) = await read_exactly(stream, 1)
        if kind == 3:
            (length,) = await read_exactly(stream, 1)
            host = (await read_exactly(stream, length)).decode()
        else:
            host = str(ip_address(await read_exactly(stream, {1: 4, 4: 16}[kind])))
        target = await self._reach((host, int.from_bytes(await read_exactly(stream, 2), "big")), opened)
        await stream.send_all(b"\5\4\0\1" + bytes(6) if target is None else b"\5\0\0\3\4name\0\1")
        return target


async def _both_ways(one: trio.abc.Stream, other: trio.abc.Stream, until_over: trio.CancelScope) -> None:
    async def carry(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
            if isinstance(sink, trio.abc.HalfCloseableStream):
                await sink.send_eof()
            else:
                nursery.cancel_scope.cancel()
        except trio.BrokenResourceError:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, one, other)
        await carry(other, one)
    until_over.cancel()


@asynccontextmanager
async def open_proxy(
    names: dict[Asked, Address], *, wants: tuple[str, str] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[ProxyRig]:
    proxy = ProxyRig(names, wants)

    async def serve(stream: trio.SocketStream) -> None:
        await proxy.serve(stream if tls is None else trio.SSLStream(stream, tls, server_side=True))

    async with _listening(serve) as proxy.address:
        yield proxy


@asynccontextmanager
async def saying(*pieces: bytes, then: Callable[[], Awaitable[object]] = trio.sleep_forever) -> AsyncIterator[Address]:
    """A server that answers whatever it is told with `pieces`, one at a time, waits for `then`, and closes."""

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            async with stream:
                await stream.receive_some()
                for piece in pieces:
                    await stream.send_all(piece)
                    await trio.sleep(0.001)
                await then()

    async with _listening(serve) as address:
        yield address


@asynccontextmanager
async def _listening(serve: Callable[[trio.SocketStream], Awaitable[object]]) -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield Address(*listener.socket.getsockname())
        nursery.cancel_scope.cancel()


def in_pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """`data`, cut at these positions."""
    borders = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(borders)]
