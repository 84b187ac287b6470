"""What a WebSocket is to the rest of the house: whole messages, sent by one task and received by one.

Neighbours: the engines implement `WebSocket`; `link` carries yamux over it; the handshake speaks text over it.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, TypeAlias, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .frame_meter import Allowance, FrameMeter

__all__ = [
    "MAX_BINARY",
    "MAX_TEXT",
    "Message",
    "Opening",
    "WebSocket",
    "WebSocketClosed",
    "WebSocketRefused",
    "refusal_in",
]

Message: TypeAlias = bytes | bytearray | str

MAX_BINARY: Final = 1024 * 1024
MAX_TEXT: Final = 16 * 1024
READ_SIZE: Final = 256 * 1024
FIRST_READ: Final = 4 * 1024
"""Bytes of the first reads, and of all reads from an end that is not trusted yet."""
MAX_ANSWER: Final = 16 * 1024
"""Bytes of the answer to an opening that are looked at, to tell what it was if not a WebSocket."""
MAX_QUEUED_PONGS: Final = 256
MAX_FRAGMENTS: Final = 256
"""Pieces of one text. Empty ones cost their sender next to nothing."""

_HTTP: Final = b"HTTP/1."
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([0-9]{3})[ \r\n]")


@final
@attrs.frozen(kw_only=True)
class Opening:
    """What both sides of a WebSocket have to agree on.

    Attributes:
        subprotocol: the only one that is offered, and the only one that is taken.
        address: where the client dials; for the `Host` header and the path.
        agent: the client's `User-Agent`.
        allowance: what the other end may send until `WebSocket.trust`; None for no limit.
    """

    subprotocol: str
    address: RelayAddress | None = None
    agent: str = ""
    allowance: Allowance | None = None


class WebSocketClosed(trio.BrokenResourceError):
    """The other end closed the WebSocket with a close frame, or this end did because a rule was broken.

    Attributes:
        code: the close code; 1005 when the frame had none.
        reason: what the close frame said, as it was sent: somebody else's text.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the WebSocket was closed with code {code}{f' ({reason})' if reason else ''}")
        self.code = code
        self.reason = reason


class WebSocketRefused(Exception):
    """The opening did not end in a WebSocket.

    Attributes:
        status: the HTTP status; None when what came was not HTTP.
        location: where a redirect wanted to go.
        retry_after: the `Retry-After` header.
    """

    def __init__(
        self, message: str, *, status: int | None = None, location: str | None = None, retry_after: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.location = location
        self.retry_after = retry_after


def refusal_in(answer: bytes) -> WebSocketRefused | None:
    """What is wrong with the `answer` to an opening, as far as it has come; None while it may still be right.

    The engines want to see the end of an answer first, and a web page may have none.
    """
    if not answer.startswith(_HTTP[: len(answer)]):
        return WebSocketRefused("did not receive a valid HTTP response")
    status = _STATUS_LINE.match(answer)
    if status is None or status[1] == b"101" or b"\r\n\r\n" not in answer:
        return None
    return WebSocketRefused(
        f"HTTP status {status[1].decode()}",
        status=int(status[1]),
        location=_header(answer, b"location"),
        retry_after=_header(answer, b"retry-after"),
    )


def _header(answer: bytes, name: bytes) -> str | None:
    found = re.search(rb"\r\n" + name + rb":[ \t]*([^\r\n]*)", answer.partition(b"\r\n\r\n")[0], re.IGNORECASE)
    return found[1].decode("latin-1").strip() if found else None


class WebSocket(trio.abc.AsyncResource):
    """An open WebSocket. One task sends and one receives; pings are answered without either.

    Attributes:
        subprotocol: the one that was agreed on.
        meter: counts what the other end sends.
    """

    subprotocol: str | None
    meter: FrameMeter

    def trust(self) -> None:
        """Lift the opening's allowance: the other end has proved itself."""
        self.meter.trusted = True

    @abstractmethod
    async def send(self, messages: Sequence[bytes | str]) -> None:
        """Send each message, in order, in as few writes as the engine can.

        Raises:
            trio.BrokenResourceError: the WebSocket is closed or broken. Cancelled half way, it is good for nothing
                but `aclose`.
        """

    @abstractmethod
    async def receive(self) -> list[Message]:
        """Wait for messages and return those that have come, at least one. A binary message may come in pieces.

        Raises:
            WebSocketClosed: the WebSocket was closed. Also when the other end broke a rule of RFC 6455 or sent more
                than 1 MiB of binary or 16 KiB of text; it has been told by the code. (Of a frame that is malformed,
                the engine over trio-websocket does not tell it: it sees the connection end.)
            trio.BrokenResourceError: the connection ended without a close frame, or the other end, not trusted yet,
                sent more than its allowance.
        """

    @abstractmethod
    async def close(self, code: int, reason: str = "") -> None:
        """Send a close frame, if none was sent, and wait for the answer and the end of the connection.

        The caller sets the deadline. Never raises for a connection that is gone already.
        """

    async def aclose(self) -> None:
        """Close with code 1000 and let go of the stream; cancelled, let go of it at once."""
        await self.close(1000)
