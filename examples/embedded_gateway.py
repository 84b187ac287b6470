"""A gateway that embeds remote access: JSON-RPC over WebSocket, on loopback and through a tunnel.

    python examples/embedded_gateway.py FOLDER [PORT]

FOLDER contains `gateway.toml`, with the relay's address in the table `[gateway.remote_access]`. The gateway writes its
settings, its keystore and a file with the bearer token there. examples/remote_access_client.py is a client.

Every client needs the token. The gateway also knows where each client comes from:

- A local client connects to the listener on loopback.
- A client through the tunnel arrives in this process as a `TunnelStream`, without a port. The stream has the visitor's
  address.
- With `proxy_protocol = "v2"` in the table, the tunnel forwards connections to `local_addr`, as for a gateway in
  another program. They begin with a PROXY header with the visitor's address. A connection from loopback is not trusted.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below shows no traceback

import functools
import hmac
import json
import logging
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NoReturn

import trio
from trio_websocket import ConnectionClosed, HandshakeError, WebSocketConnection, wrap_server_stream

from pioneer_tunnel import (
    Address,
    FileKeystore,
    PrefixedStream,
    ProxyHeader,
    RemoteAccess,
    RemoteAccessConfig,
    RemoteAccessRpc,
    RemoteProtocolError,
    RpcError,
    SettingsFile,
    TunnelError,
    TunnelStream,
)

OPENING_TIMEOUT: Final = 10
MESSAGE_LIMIT: Final = 64 * 1024

log: Final = logging.getLogger("gateway")


class Gateway:
    """The part of a gateway that does remote access."""

    def __init__(self, folder: Path, token: str) -> None:
        self._token = token
        self._config = RemoteAccessConfig.load(folder / "gateway.toml")
        self._forwarded = self._config.proxy_protocol == "v2"
        self._remote_access = RemoteAccess(
            self._config,
            settings=SettingsFile(folder / "gateway-settings.toml"),
            keystore=FileKeystore(folder / "keystore"),
            handler=None if self._forwarded else self._serve_tunnelled,
        )
        self._rpc = JsonRpc(self._remote_access)

    async def run(self, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on loopback and run remote access by the settings, until cancelled."""
        async with trio.open_nursery() as nursery:
            serve = functools.partial(trio.serve_tcp, host="127.0.0.1")
            listeners: list[trio.SocketListener] = await nursery.start(serve, self._serve_local, port)
            if self._forwarded:
                local = self._config.local_addr
                assert isinstance(local, Address)
                await nursery.start(functools.partial(serve, host=local.host), self._serve_forwarded, local.port)
            await nursery.start(self._remote_access.run)
            task_status.started(listeners[0].socket.getsockname()[1])

    async def _serve_local(self, stream: trio.SocketStream) -> None:
        await self._serve(stream, "this host")

    async def _serve_tunnelled(self, stream: TunnelStream) -> None:
        await self._serve(stream, f"{stream.visitor}, through the tunnel")

    async def _serve_forwarded(self, stream: trio.SocketStream) -> None:
        received, parsed = b"", None
        with trio.move_on_after(OPENING_TIMEOUT), suppress(RemoteProtocolError, trio.BrokenResourceError):
            while (parsed := ProxyHeader.parse(received)) is None:
                data = await stream.receive_some(4096)
                if not data:
                    return  # the tunnel only checked that this port listens
                received += data
        if parsed is not None:
            header, used = parsed
            await self._serve(PrefixedStream(stream, received[used:]), f"{header.visitor}, forwarded by the tunnel")

    async def _serve(self, stream: trio.abc.Stream, whence: str) -> None:
        try:
            async with stream, trio.open_nursery() as nursery:
                websocket = await self._open(nursery, stream)
                if websocket is not None:
                    print(f"a client from {whence}", flush=True)
                    await self._rpc.serve(websocket)
                nursery.cancel_scope.cancel()
        except* (ConnectionClosed, HandshakeError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client closed the connection
        except* Exception:
            log.exception("the connection of a client from %s failed", whence)  # other connections continue

    async def _open(self, nursery: trio.Nursery, stream: trio.abc.Stream) -> WebSocketConnection | None:
        with trio.move_on_after(OPENING_TIMEOUT):
            request = await wrap_server_stream(nursery, stream, max_message_size=MESSAGE_LIMIT)
            if has_token(request.headers, self._token):
                return await request.accept()
            await request.reject(401, body=b"who are you?\n")
        return None


class JsonRpc:
    """JSON-RPC 2.0 over WebSockets: answers to requests, and a notification of each new status."""

    def __init__(self, remote_access: RemoteAccess) -> None:
        self._rpc = RemoteAccessRpc(remote_access, other_sections=lambda: {"gateway": {"name": "example"}})

    async def serve(self, websocket: WebSocketConnection) -> NoReturn:
        """Serve one client. It ends in a group with `ConnectionClosed`."""
        async with trio.open_nursery() as nursery:
            # A slow client delays only its own task: `notifications` skips outdated statuses.
            nursery.start_soon(self._notify, websocket)
            await self._answer(websocket)

    async def _notify(self, websocket: WebSocketConnection) -> None:
        notifications: AsyncIterator[dict[str, Any]] = self._rpc.notifications()
        try:
            async for notification in notifications:
                await websocket.send_message(json.dumps(notification))
        except ConnectionClosed:
            pass  # `_answer` raises the same

    async def _answer(self, websocket: WebSocketConnection) -> NoReturn:
        while True:
            answer = await self._answer_to(await websocket.get_message())
            if answer is not None:
                await websocket.send_message(json.dumps({"jsonrpc": "2.0", **answer}, allow_nan=False))

    async def _answer_to(self, message: str | bytes) -> dict[str, Any] | None:
        """The answer to a request; None for a notification."""
        try:
            request = read_json(message)
        except ValueError:
            return {"id": None, "error": {"code": -32700, "message": "not JSON"}}
        finally:
            del message  # it may hold a key, and a traceback may show local variables
        if not is_request(request):
            return {"id": None, "error": {"code": -32600, "message": "not a request"}}
        number = request.get("id")
        try:
            answer = {"id": number, "result": await self._rpc.handle(request["method"], request.pop("params", None))}
        except RpcError as error:
            answer = {"id": number, "error": error.to_wire()}
        return answer if "id" in request else None


def has_token(headers: Iterable[tuple[bytes, bytes]], token: str) -> bool:
    """Whether there is exactly one header Authorization, and it has the token. Two of them are ambiguous."""
    shown = [value for name, value in headers if name.lower() == b"authorization"]
    return len(shown) == 1 and hmac.compare_digest(shown[0], f"Bearer {token}".encode())


def read_json(text: str | bytes) -> Any:
    """Parse untrusted JSON strictly.

    Raises:
        ValueError: it is not JSON, is bytes or nested too deeply, repeats a key in an object, or has NaN or Infinity,
            which `json.loads` accepts by default.
    """
    if not isinstance(text, str):
        raise ValueError("JSON comes as text")  # noqa: TRY004  # one exception type for all bad input
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def is_request(request: Any) -> bool:
    """Whether it is a request or notification of JSON-RPC 2.0. An id is a string, an integer or null."""
    return (
        isinstance(request, dict)
        and request.get("jsonrpc") == "2.0"
        and isinstance(request.get("method"), str)
        and isinstance(request.get("id"), str | int | None)
        and not isinstance(request.get("id"), bool)
    )


def load_token(folder: Path) -> str:
    """Read the bearer token; the first call makes it, in a file that only this user can read."""
    path = folder / "token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_urlsafe(24))
    return path.read_text().strip()


async def main(folder: Path, port: int) -> None:
    """Run the gateway until interrupted."""
    token = load_token(folder)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(Gateway(folder, token).run, port)
        print(f"listening at ws://127.0.0.1:{port}", flush=True)
        print(f"clients show the bearer token {token}", flush=True)


def run_gateway(main: Callable[[Path, int], Awaitable[None]]) -> None:
    """Run `main(FOLDER, PORT)` with the arguments of the command line, until interrupted."""
    logging.basicConfig(level=logging.INFO)
    folder, port = Path(*sys.argv[1:2]), (sys.argv[2:] or ["0"])[0]
    if not 2 <= len(sys.argv) <= 3 or not port.isdecimal() or int(port) > 65535:
        sys.exit(f"usage: {sys.argv[0]} FOLDER [PORT]")
    if not folder.is_dir():
        sys.exit("FOLDER has to be a folder that exists, with gateway.toml in it")
    problem: str | int | None = None
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on the gateway ends gracefully
        trio.run(main, folder, int(port))
    except* KeyboardInterrupt:
        problem = 130
    except* (TunnelError, OSError) as failed:  # files that cannot be used, or a port that is taken
        error: BaseException = failed
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        problem = str(error)
    sys.exit(problem)


if __name__ == "__main__":
    run_gateway(main)
