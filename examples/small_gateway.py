"""A small HTTP gateway on loopback for the examples. Requests need a bearer token.

    GET /hello            200 and a greeting
    GET /download?n=N     N bytes, at most 1 GiB
    GET /echo             a WebSocket that echoes messages

The tunnel sends a PROXY protocol v2 header at the start of each connection. It is the only source of the visitor's
address:

- The peer address is always loopback.
- The visitor controls `X-Forwarded-For`, and also a second PROXY header after the first.
- Other users of this host can connect to this port and send any header. So use the address for logs only; the token
  decides about access.

Run it alone with `python examples/small_gateway.py [PORT]`; the demo embeds it.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends it at once, without a traceback

import hmac
import itertools
import secrets
import sys
from collections.abc import Callable, Iterable
from typing import Final

import attrs
import h11
import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from pioneer_tunnel import Address, PrefixedStream, ProxyHeader

PIECE = bytes(range(256)) * 256
OPENING_TIMEOUT: Final = 10
DOWNLOAD_LIMIT: Final = 1 << 30


@attrs.frozen
class Gateway:
    """The bearer token, and a callback with the address and the request target of each visitor."""

    token: str
    on_visitor: Callable[[Address | None, str], None]

    async def serve(self, connection: trio.SocketStream) -> None:
        """Serve one connection, which begins with a PROXY header. Its errors do not affect other connections."""
        async with connection:
            try:
                await self._serve(connection)
            except* Exception as failed:  # noqa: BLE001  # one bad visitor must not end the server
                print(f"a connection came to nothing: {', '.join(type(error).__name__ for error in failed.exceptions)}")

    async def _serve(self, connection: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        with trio.fail_after(OPENING_TIMEOUT):
            opened = await _read_header(connection)
            if opened is None:
                return
            stream, visitor = opened
            head = b""
            while not isinstance(event := http.next_event(), h11.Request):
                data = await stream.receive_some(16384)
                if not data:
                    return
                head += data
                http.receive_data(bytes(data))
        target = event.target.decode("ascii")
        self.on_visitor(visitor, target)
        # Two headers with one name are ambiguous, so treat them as none.
        authorization, upgrade = (_values(event, name) for name in (b"authorization", b"upgrade"))
        if len(authorization) != 1 or not hmac.compare_digest(authorization[0], f"Bearer {self.token}".encode()):
            await _answer(stream, http, 401, [b"who are you?\n"], length=13)
        elif [value.lower() for value in upgrade] == [b"websocket"]:
            await _echo(PrefixedStream(stream, head))
        elif target.startswith("/download?n="):
            wanted = target.removeprefix("/download?n=")
            if not (wanted.isdecimal() and len(wanted) <= 10 and int(wanted) <= DOWNLOAD_LIMIT):
                await _answer(stream, http, 400, [b"how many bytes?\n"], length=16)
                return
            size = int(wanted)
            pieces = itertools.chain(itertools.repeat(PIECE, size // len(PIECE)), [PIECE[: size % len(PIECE)]])
            await _answer(stream, http, 200, pieces, length=size)
        else:
            await _answer(stream, http, 200, [b"hello\n"], length=6)


def _values(request: h11.Request, name: bytes) -> list[bytes]:
    return [value for given, value in request.headers if given == name]


async def _read_header(connection: trio.SocketStream) -> tuple[PrefixedStream, Address | None] | None:
    """Read the PROXY header; returns the stream after it and the visitor's address, or None after EOF."""
    received = b""
    while (parsed := ProxyHeader.parse(received)) is None:
        data = await connection.receive_some(4096)
        if not data:
            return None  # the tunnel only checked that this port listens
        received += data
    header, used = parsed
    return PrefixedStream(connection, received[used:]), header.visitor


async def _answer(
    stream: PrefixedStream, http: h11.Connection, status: int, pieces: Iterable[bytes], *, length: int
) -> None:
    headers = [("Content-Length", str(length)), ("Connection", "close")]
    await stream.send_all(http.send(h11.Response(status_code=status, headers=headers)) or b"")
    for piece in pieces:
        await stream.send_all(http.send(h11.Data(data=piece)) or b"")
    await stream.send_all(http.send(h11.EndOfMessage()) or b"")


async def _echo(stream: PrefixedStream) -> None:
    async with trio.open_nursery() as nursery:
        request = await wrap_server_stream(nursery, stream)
        websocket = await request.accept()
        try:
            while True:
                await websocket.send_message(await websocket.get_message())
        except ConnectionClosed:
            nursery.cancel_scope.cancel()


async def main(port: int) -> None:
    """Listen on loopback. 17878 is the default of `local_addr`."""
    token = secrets.token_urlsafe(24)
    gateway = Gateway(token, lambda visitor, target: print(f"{visitor or 'somebody'} asks for {target}"))
    print(f"expects PROXY v2 on 127.0.0.1:{port}; the token is {token}")
    await trio.serve_tcp(gateway.serve, port, host="127.0.0.1")


if __name__ == "__main__":
    port = (sys.argv[1:] or ["17878"])[0]
    if len(sys.argv) > 2 or not port.isdecimal() or int(port) > 65535:
        sys.exit(f"usage: {sys.argv[0]} [PORT]")
    try:
        trio.run(main, int(port))
    except* OSError as failed:
        sys.exit(f"cannot listen: {failed.exceptions[0]}")
