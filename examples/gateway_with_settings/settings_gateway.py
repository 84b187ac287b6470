"""A gateway with a settings screen for browsers: remote access on and off, the relay key, and the status as it changes.

    python examples/gateway_with_settings/settings_gateway.py FOLDER [PORT]

FOLDER contains `gateway.toml`, with the relay's address in the table `[gateway.remote_access]`. The gateway writes its
settings, its keystore and a file with the bearer token there. It prints the address of the screen, on loopback. While
the tunnel is up, the screen is also at the gateway's public URL.

A browser shows the bearer token once and gets a session; browsers.py has the checks. Other programs speak JSON-RPC to
the same port with the bearer token in each connection: ../remote_access_client.py does.

The screen talks JSON-RPC over a WebSocket. What to do about each error kind comes from `pioneer_tunnel.explain`. The
page has no inline script, and takes nothing from other sites.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C during the imports below shows no traceback

import functools
import json
import logging
import sys
from contextlib import nullcontext
from http import HTTPStatus
from pathlib import Path
from typing import Final

import attrs
import h11
import trio
from browsers import (
    SESSION_SECONDS,
    Door,
    Guesses,
    Refused,
    Session,
    Sessions,
    check_host,
    check_origin,
    header,
    host_of,
    set_cookie,
)
from trio_websocket import ConnectionClosed, HandshakeError, wrap_server_stream

sys.path.append(str(Path(__file__).parents[1]))
from embedded_gateway import MESSAGE_LIMIT, OPENING_TIMEOUT, JsonRpc, has_token, load_token, run_gateway

from pioneer_tunnel import (
    ErrorKind,
    FileKeystore,
    PrefixedStream,
    RemoteAccess,
    RemoteAccessConfig,
    SettingsFile,
    TunnelStream,
    explain,
)

SCREEN: Final = Path(__file__).parent / "screen"
SUBPROTOCOL: Final = "remote-access"
SECRET_PREFIX: Final = "page-secret."  # noqa: S105  # the secret itself comes after it
MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
NO_HEADERS: Final[list[tuple[str, str]]] = []

log: Final = logging.getLogger("gateway")


@attrs.frozen
class Answer:
    """The answer to an HTTP request, without the headers that all have."""

    status: HTTPStatus
    headers: list[tuple[str, str]] = attrs.field(factory=list)
    body: bytes = b""


def load_pages() -> dict[str, Answer]:
    """The screen's files, and the explanations of the error kinds."""
    explanations = {kind: attrs.asdict(explain(kind)) for kind in ErrorKind}
    files = {f"/{path.name}": (MEDIA_TYPES[path.suffix], path.read_bytes()) for path in SCREEN.iterdir()}
    files["/"] = files.pop("/index.html")
    files["/explanations.json"] = "application/json", json.dumps(explanations).encode()
    return {path: Answer(HTTPStatus.OK, [("Content-Type", kind)], body) for path, (kind, body) in files.items()}


def safety_headers(door: Door, host: str) -> list[tuple[str, str]]:
    """What every answer tells the browser. The WebSocket is named because not every browser counts it as 'self'."""
    websocket = f"{'wss' if door.scheme == 'https' else 'ws'}://{host}"
    policy = [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        f"connect-src 'self' {websocket}",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ]
    return [
        ("Content-Security-Policy", "; ".join(policy)),
        ("X-Frame-Options", "DENY"),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "same-origin"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Cache-Control", "no-store"),
    ]


class Gateway:
    """The gateway: remote access, and its settings screen."""

    def __init__(self, folder: Path, token: str) -> None:
        self._token = token
        self._pages = load_pages()
        self._sessions = Sessions()
        self._guesses = Guesses()
        self._local_hosts: frozenset[str] = frozenset()
        self.remote_access = RemoteAccess(
            RemoteAccessConfig.load(folder / "gateway.toml"),
            settings=SettingsFile(folder / "gateway-settings.toml"),
            keystore=FileKeystore(folder / "keystore"),
            handler=self._serve_tunnelled,
        )
        self._rpc = JsonRpc(self.remote_access)

    async def run(self, port: int, *, task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen on loopback and run remote access by the settings, until cancelled."""
        async with trio.open_nursery() as nursery:
            serve = functools.partial(trio.serve_tcp, self._serve_local, port, host="127.0.0.1")
            listeners: list[trio.SocketListener] = await nursery.start(serve)
            port = listeners[0].socket.getsockname()[1]
            urls = [f"http://{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
            self._local_hosts = frozenset(map(host_of, urls))
            await nursery.start(self.remote_access.run)
            task_status.started(port)

    async def _serve_local(self, stream: trio.SocketStream) -> None:
        await self._serve(stream, Door("http", self._local_hosts, "this host"))

    async def _serve_tunnelled(self, stream: TunnelStream) -> None:
        """Only the names that the relay has told are the gateway's own; over `tcp` and `tls` it tells none."""
        status = self.remote_access.status
        urls = [url for url in (status.public_url, *(status.services or {}).values()) if url is not None]
        secure = stream.tls if stream.tls is not None else (status.public_url or "").startswith("https:")
        client = "unknown" if stream.visitor is None else stream.visitor.host
        await self._serve(stream, Door("https" if secure else "http", frozenset(map(host_of, urls)), client))

    async def _serve(self, stream: trio.abc.Stream, door: Door) -> None:
        try:
            async with stream:
                await self._serve_request(stream, door)
        except* (ConnectionClosed, HandshakeError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client closed the connection
        except* Exception:
            log.exception("the connection of a client from %s failed", door.client)  # other connections continue

    async def _serve_request(self, stream: trio.abc.Stream, door: Door) -> None:
        """Serve the one request of a connection."""
        admitted = None
        with trio.move_on_after(OPENING_TIMEOUT):
            admitted = await self._open(stream, door)
        if admitted is not None:
            session, stream = admitted
            with session.held() if session is not None else nullcontext():
                async with trio.open_nursery() as nursery:
                    request = await wrap_server_stream(nursery, stream, max_message_size=MESSAGE_LIMIT)
                    subprotocol = SUBPROTOCOL if SUBPROTOCOL in request.proposed_subprotocols else None
                    await self._rpc.serve(await request.accept(subprotocol=subprotocol))

    async def _open(self, stream: trio.abc.Stream, door: Door) -> tuple[Session | None, PrefixedStream] | None:
        """Answer an HTTP request. A WebSocket that is let in is returned, with its session if it is a browser's."""
        http, head, headers, method = h11.Connection(h11.SERVER), b"", NO_HEADERS, b""
        try:
            while not isinstance(request := http.next_event(), h11.Request):
                data = await stream.receive_some(16 * 1024)
                if not data:
                    return None
                head += data
                http.receive_data(bytes(data))
            method = request.method
            host = check_host(request, door)
            headers = safety_headers(door, host)
            check_origin(request, door, host, needed=method != b"GET")
            if header(request, b"upgrade") is not None:
                return self._admit(request, door, host), PrefixedStream(stream, head)
            answer = self._answer_to(request, door)
        except Refused as refused:
            answer = Answer(refused.status, refused.headers, f"{refused}\n".encode())
        except h11.RemoteProtocolError as error:
            answer = Answer(HTTPStatus(error.error_status_hint), [], b"this is no HTTP\n")
        length = [] if answer.status == HTTPStatus.NO_CONTENT else [("Content-Length", str(len(answer.body)))]
        fields = [*headers, *answer.headers, *length, ("Connection", "close")]
        parts = [
            h11.Response(status_code=answer.status, headers=fields),
            h11.Data(data=b"" if method == b"HEAD" else answer.body),
            h11.EndOfMessage(),
        ]
        await stream.send_all(b"".join(http.send(part) or b"" for part in parts))
        return None

    def _admit(self, request: h11.Request, door: Door, host: str) -> Session | None:
        """Let a WebSocket in. None is for a program with the token, which needs no session."""
        if request.target != b"/":
            raise Refused(HTTPStatus.NOT_FOUND, "there is no WebSocket here")
        if header(request, b"authorization") is not None:
            self._check_token(request, door)
            return None
        check_origin(request, door, host, needed=True)
        offered = (header(request, b"sec-websocket-protocol") or "").replace(" ", "").split(",")
        secrets = [text.removeprefix(SECRET_PREFIX) for text in offered if text.startswith(SECRET_PREFIX)]
        return self._session(request, door, *secrets[:1])

    def _answer_to(self, request: h11.Request, door: Door) -> Answer:
        match request.method, request.target.partition(b"?")[0].decode("ascii"):
            case b"GET", path if path in self._pages:
                return self._pages[path]
            case b"POST", "/session":
                self._check_token(request, door)
                cookie, session = self._sessions.begin()
                fields = [set_cookie(door, cookie, SESSION_SECONDS), ("Content-Type", "application/json")]
                return Answer(HTTPStatus.CREATED, fields, json.dumps({"pageSecret": session.page_secret}).encode())
            case b"GET" | b"DELETE" as method, "/session":
                self._session(request, door, header(request, b"page-secret"))
                if method == b"GET":
                    return Answer(HTTPStatus.NO_CONTENT)
                self._sessions.end(request, door)
                return Answer(HTTPStatus.NO_CONTENT, [set_cookie(door, "", 0)])
        raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _check_token(self, request: h11.Request, door: Door) -> None:
        self._guesses.check(door.client)
        if not has_token(request.headers, self._token):
            self._guesses.count_wrong(door.client)
            raise Refused(HTTPStatus.UNAUTHORIZED, "who are you?", [("WWW-Authenticate", "Bearer")])

    def _session(self, request: h11.Request, door: Door, page_secret: str | None = None) -> Session:
        session = self._sessions.find(request, door, page_secret)
        if session is None:
            raise Refused(HTTPStatus.UNAUTHORIZED, "there is no such session")
        return session


async def main(folder: Path, port: int) -> None:
    """Run the gateway until interrupted."""
    token = load_token(folder)
    async with trio.open_nursery() as nursery:
        port = await nursery.start(Gateway(folder, token).run, port)
        print(f"the settings screen is at http://127.0.0.1:{port}/", flush=True)
        print(f"it asks for the token {token}", flush=True)


if __name__ == "__main__":
    run_gateway(main)
