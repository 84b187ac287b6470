"""The ASGI scope of a request, without I/O."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, final
from urllib.parse import unquote_to_bytes

import attrs
import h11

from .._model.addresses import Address

__all__ = ["RequestRefused", "Visitor", "check_framing", "has_token", "http_scope", "websocket_scope"]

Scheme: TypeAlias = Literal["http", "https"]

_ASGI_HTTP: Final = {"version": "3.0", "spec_version": "2.3"}
_ASGI_WEBSOCKET: Final = {"version": "3.0", "spec_version": "2.4"}
_WEBSOCKET_SCHEMES: Final[Mapping[Scheme, str]] = {"http": "ws", "https": "wss"}


@final
@attrs.frozen
class Visitor:
    """Where a connection comes from.

    Attributes:
        client: the visitor's address; None if the transport does not report it.
        server: the address that the visitor connected to; None if it is not known.
        scheme: whether the visitor used TLS.
    """

    client: Address | None
    server: Address | None
    scheme: Scheme


class RequestRefused(Exception):
    """A request that gets no further than an answer with this status."""

    def __init__(self, status: int, why: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        super().__init__(why)
        self.status: Final = status
        self.headers: Final = headers or []


def check_framing(request: h11.Request) -> None:
    """Refuse what another server on the way may have read in another way. h11 has refused the rest.

    Raises:
        RequestRefused: the request has two lengths, or a transfer encoding in HTTP/1.0. Or it is of another version, or
            a CONNECT.
    """
    if request.http_version not in (b"1.0", b"1.1"):
        raise RequestRefused(505, "another version of HTTP")
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and b"content-length" in names:
        raise RequestRefused(400, "both Transfer-Encoding and Content-Length")
    if b"transfer-encoding" in names and request.http_version < b"1.1":
        raise RequestRefused(400, "Transfer-Encoding in HTTP/1.0")
    if request.method == b"CONNECT":
        raise RequestRefused(501, "this server is no proxy")


def has_token(request: h11.Request, name: bytes, token: bytes) -> bool:
    """Whether a header that is a list of tokens has this one, in any case."""
    return any(
        token == part.strip().lower() for given, value in request.headers if given == name for part in value.split(b",")
    )


def http_scope(request: h11.Request, visitor: Visitor, state: dict[str, Any]) -> dict[str, Any]:
    """The scope of an HTTP request."""
    extensions: dict[str, Any] = {}
    if has_token(request, b"te", b"trailers"):
        extensions["http.response.trailers"] = {}
    return {
        "type": "http",
        "asgi": _ASGI_HTTP.copy(),
        "method": request.method.decode("ascii").upper(),
        "scheme": visitor.scheme,
        "extensions": extensions,
        **_common(request, visitor, state),
    }


def websocket_scope(request: h11.Request, visitor: Visitor, state: dict[str, Any]) -> dict[str, Any]:
    """The scope of a WebSocket, from the request that opens it."""
    offered = [value for name, value in request.headers if name == b"sec-websocket-protocol"]
    return {
        "type": "websocket",
        "asgi": _ASGI_WEBSOCKET.copy(),
        "scheme": _WEBSOCKET_SCHEMES[visitor.scheme],
        "subprotocols": [part.strip().decode("ascii", "replace") for value in offered for part in value.split(b",")],
        "extensions": {"websocket.http.response": {}},
        **_common(request, visitor, state),
    }


def _common(request: h11.Request, visitor: Visitor, state: dict[str, Any]) -> dict[str, Any]:
    path, _, query = _origin_form(request.target).partition(b"?")
    return {
        "http_version": request.http_version.decode("ascii"),
        "path": unquote_to_bytes(path).decode("utf-8", "replace"),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": [*request.headers],
        "client": _pair(visitor.client),
        "server": _pair(visitor.server),
        "state": state.copy(),
    }


def _origin_form(target: bytes) -> bytes:
    """The path and the query of a request target; that of a proxy has a scheme and a host before them."""
    scheme, separator, rest = target.partition(b"://")
    if target.startswith(b"/") or not separator or scheme.lower() not in (b"http", b"https"):
        return target
    _, slash, path = rest.partition(b"/")
    return slash + path or b"/"


def _pair(address: Address | None) -> list[Any] | None:
    return None if address is None else [address.host, address.port]
