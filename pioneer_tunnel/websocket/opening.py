"""The opening of a WebSocket: its parameters, and how it is refused. No I/O."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, final

import attrs

from .._model.addresses import RelayAddress
from .._net.tls.alerts import is_tls
from .frame_meter import Allowance

__all__ = ["MAX_ANSWER", "Opening", "WebSocketRefused", "refusal_in"]

MAX_ANSWER: Final = 16 * 1024
"""Bytes of the server's response that are kept to say what is wrong with it."""

_HTTP: Final = b"HTTP/1."
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]")


@final
@attrs.frozen(kw_only=True)
class Opening:
    """The parameters of a WebSocket's opening.

    Attributes:
        subprotocol: the only one that a client offers, and the only one that a server accepts.
        address: the address that the client dials, for the `Host` header and the path; None on the server.
        agent: the client's `User-Agent`.
        headers: further headers of the client.
        allowance: what the peer may send before `WebSocket.trust` is called; None for no limit.
    """

    subprotocol: str
    address: RelayAddress | None = None
    agent: str = ""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    allowance: Allowance | None = None


class WebSocketRefused(Exception):
    """The opening failed: the peer's HTTP message does not open a WebSocket.

    Attributes:
        status: the HTTP status; None when it is not known, or what came was not HTTP.
        location: the `Location` header, as it was sent.
        retry_after: the `Retry-After` header, as it was sent.
        date: the `Date` header, as it was sent.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        location: str | None = None,
        retry_after: str | None = None,
        date: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.location = location
        self.retry_after = retry_after
        self.date = date


def refusal_in(answer: bytes) -> WebSocketRefused | None:
    """What is wrong with a server's response, of which `answer` has arrived; None while it may still be right.

    Needed because the engines wait for the end of a response, and the body of a web page may never end.
    """
    if not answer.startswith(_HTTP[: len(answer)]):
        return WebSocketRefused("did not receive a valid HTTP response" + (", but TLS" if is_tls(answer) else ""))
    status = _STATUS_LINE.match(answer)
    if status is None or status[1] == b"101" or b"\r\n\r\n" not in answer:
        return None
    return WebSocketRefused(
        f"HTTP status {status[1].decode()}",
        status=int(status[1]),
        location=_header(answer, b"location"),
        retry_after=_header(answer, b"retry-after"),
        date=_header(answer, b"date"),
    )


def _header(answer: bytes, name: bytes) -> str | None:
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r\n]*)", answer.partition(b"\r\n\r\n")[0], re.IGNORECASE)
    return found[1].decode("latin-1").strip() if found else None
