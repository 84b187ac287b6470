"""HTTP of the operator's page: one GET for each connection, on loopback or a Unix socket.

There is no login: whoever can connect may read. A page of another site must not. Browsers give it no answer of ours,
unless it asks under its own name, and lets that resolve to 127.0.0.1 (DNS rebinding). So the Host has to be a loopback
name. Its port may be any: an operator may forward one with `ssh -L`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from importlib import resources
from typing import Any, Final, NoReturn, TypeAlias, final

import h11
import trio

from ..._net.log_limiter import LogLimiter
from ..config import RelayConfig
from ..stats import RelayStats
from .history import INTERVAL, History
from .report import report

__all__ = ["Dashboard"]

CONNECTIONS: Final = 32
"""Connections at once; a further one is closed."""

REQUEST_TIMEOUT: Final = 10.0
"""Seconds for a connection, from its start to its end."""

_HOST: Final = re.compile(rb"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?", re.IGNORECASE)
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
        " form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
    ),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Connection": "close",
}
_FILES: Final[Mapping[bytes, tuple[str, str]]] = {
    b"/": ("dashboard.html", "text/html; charset=utf-8"),
    b"/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    b"/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    b"/icon.svg": ("icon.svg", "image/svg+xml"),
}
_REPORT: Final = b"/report.json"
_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.relay.dashboard"))

_Answer: TypeAlias = tuple[HTTPStatus, str, bytes]


@final
class Dashboard:
    """The operator's page of a relay.

    Args:
        config: returns the configuration of now.
        stats: returns the relay's statistics of now.
        wall_clock: seconds since 1970.
    """

    def __init__(
        self, config: Callable[[], RelayConfig], stats: Callable[[], RelayStats], wall_clock: Callable[[], float]
    ) -> None:
        self._config: Final = config
        self._stats: Final = stats
        self._wall_clock: Final = wall_clock
        self._history: Final = History()
        self._free: Final = trio.CapacityLimiter(CONNECTIONS)
        page = resources.files(__package__) / "page"
        self._files: Final = {path: (kind, (page / name).read_bytes()) for path, (name, kind) in _FILES.items()}

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> NoReturn:
        """Serve the page and take samples, until cancelled. It closes the listeners."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, self._serve_connection, [*listeners])
            while True:
                self._history.add(self._stats())
                # No deadline: it samples for as long as the relay serves.
                await trio.sleep(INTERVAL)

    async def _serve_connection(self, stream: trio.SocketStream) -> None:
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            return  # `serve_listeners` closes it
        try:
            with trio.move_on_after(REQUEST_TIMEOUT):
                async with stream:
                    await self._answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the browser has gone
        except Exception as error:  # noqa: BLE001  # the relay goes on without the page
            line = "an unforeseen failure in answering a request for the operator's page"
            _log_limiter.log("answer", line, level=logging.ERROR, error=error)
        finally:
            self._free.release()

    async def _answer(self, stream: trio.SocketStream) -> None:
        http = h11.Connection(h11.SERVER)
        method = b""
        try:
            while not isinstance(request := http.next_event(), h11.Request):
                data = await stream.receive_some(16 * 1024)
                if not data:
                    return
                http.receive_data(bytes(data))
            method = request.method
            status, kind, body = self._answer_to(request)
        except h11.RemoteProtocolError as error:
            status, kind, body = _text(HTTPStatus(error.error_status_hint), "this is no HTTP")
        allow = [("Allow", "GET")] if status is HTTPStatus.METHOD_NOT_ALLOWED else []
        headers = [*_HEADERS.items(), *allow, ("Content-Type", kind), ("Content-Length", str(len(body)))]
        content = b"" if method == b"HEAD" else body
        parts = [h11.Response(status_code=status, headers=headers), h11.Data(data=content), h11.EndOfMessage()]
        await stream.send_all(b"".join(http.send(part) or b"" for part in parts))

    def _answer_to(self, request: h11.Request) -> _Answer:
        hosts = [value for name, value in request.headers if name == b"host"]
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
            return _text(HTTPStatus.MISDIRECTED_REQUEST, "this page is at localhost")
        if request.method != b"GET":
            return _text(HTTPStatus.METHOD_NOT_ALLOWED, "this page is for reading")
        path = request.target.partition(b"?")[0]
        if path == _REPORT:
            return HTTPStatus.OK, "application/json", json.dumps(self._report()).encode()
        if path in self._files:
            kind, body = self._files[path]
            return HTTPStatus.OK, kind, body
        return _text(HTTPStatus.NOT_FOUND, "there is nothing here")

    def _report(self) -> dict[str, Any]:
        return report(self._config(), self._stats(), self._history, self._wall_clock())


def _text(status: HTTPStatus, text: str) -> _Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode()
