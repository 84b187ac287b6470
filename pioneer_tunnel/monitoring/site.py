"""HTTP for operators: pages that are read, one GET for each connection.

There is no login: all who can connect may read. A page of another site must not. Browsers give it no answer of ours,
unless it asks under its own name, and lets that resolve to 127.0.0.1 (DNS rebinding). So at a loopback address the Host
has to be a loopback name. Its port may be any: an operator may forward one with `ssh -L`. A page that tells nothing,
such as that of a health check, is at any Host.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Final, NoReturn, TypeAlias, final

import attrs
import h11
import trio

from .._model.log_fields import about
from .._net.log_limiter import LogLimiter

__all__ = ["Answer", "Page", "Refresh", "Site", "health", "text"]

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
_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.monitoring"))


@final
@attrs.frozen
class Answer:
    """What a page answers.

    Attributes:
        status: of HTTP.
        kind: the Content-Type.
        body: the content.
    """

    status: HTTPStatus
    kind: str
    body: bytes


Accept: TypeAlias = str
"""The `Accept` header of a request; empty if there is none."""

Refresh: TypeAlias = Callable[[], Awaitable[object]]
"""Gets numbers of now from other processes, before a page tells them."""


@final
@attrs.frozen
class Page:
    """A page of a site.

    Attributes:
        answer: returns the answer of now. Its argument is the `Accept` header of the request, empty if there is none.
        any_host: whether it answers under every Host, and without one. For pages that tell strangers nothing.
    """

    answer: Callable[[Accept], Awaitable[Answer]]
    any_host: bool = False


@final
class Site:
    """Serves pages.

    Args:
        pages: by path.
        local: whether the site is for this host alone. Then the Host has to be a loopback name.
    """

    def __init__(self, pages: Mapping[bytes, Page], *, local: bool = True) -> None:
        self._pages: Final = pages
        self._local: Final = local
        self._free: Final = trio.CapacityLimiter(CONNECTIONS)

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> NoReturn:
        """Serve until cancelled. It closes the listeners."""
        await trio.serve_listeners(self._serve_connection, [*listeners])

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
            line = "an unforeseen failure in answering an operator's request"
            _log_limiter.log(
                "answer", line, level=logging.ERROR, error=error, about=about("unforeseen", reason=type(error).__name__)
            )
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
            answer = await self._answer_to(request)
        except h11.RemoteProtocolError as error:
            answer = text(HTTPStatus(error.error_status_hint), "this is no HTTP")
        allow = [("Allow", "GET, HEAD")] if answer.status is HTTPStatus.METHOD_NOT_ALLOWED else []
        length = str(len(answer.body))
        headers = [*_HEADERS.items(), *allow, ("Content-Type", answer.kind), ("Content-Length", length)]
        content = b"" if method == b"HEAD" else answer.body
        parts = [h11.Response(status_code=answer.status, headers=headers), h11.Data(data=content), h11.EndOfMessage()]
        await stream.send_all(b"".join(http.send(part) or b"" for part in parts))

    async def _answer_to(self, request: h11.Request) -> Answer:
        page = self._pages.get(request.target.partition(b"?")[0])
        if self._local and (page is None or not page.any_host):
            hosts = [value for name, value in request.headers if name == b"host"]
            if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
                return text(HTTPStatus.MISDIRECTED_REQUEST, "this page is at localhost")
        if request.method not in {b"GET", b"HEAD"}:
            return text(HTTPStatus.METHOD_NOT_ALLOWED, "this page is for reading")
        if page is None:
            return text(HTTPStatus.NOT_FOUND, "there is nothing here")
        accept = b",".join(value for name, value in request.headers if name == b"accept")
        return await page.answer(accept.decode("latin-1"))


def text(status: HTTPStatus, line: str) -> Answer:
    """An answer of one line of text."""
    return Answer(status, "text/plain; charset=utf-8", f"{line}\n".encode())


def health(ready: Callable[[], bool], *, otherwise: str) -> dict[bytes, Page]:
    """The pages of health checks: `/-/healthy` says 200 while the process answers, `/-/ready` 200 or 503.

    Args:
        ready: whether it can serve now.
        otherwise: says why not.
    """

    async def say_healthy(_accept: Accept) -> Answer:
        return text(HTTPStatus.OK, "healthy")

    async def say_ready(_accept: Accept) -> Answer:
        return text(HTTPStatus.OK, "ready") if ready() else text(HTTPStatus.SERVICE_UNAVAILABLE, otherwise)

    return {b"/-/healthy": Page(say_healthy, any_host=True), b"/-/ready": Page(say_ready, any_host=True)}
