"""The interface of a WebSocket, which both engines implement, and what they share."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._net.link import Bytes
from .._net.tls.alerts import is_tls
from .frame_meter import Allowance, FrameMeter

__all__ = [
    "MAX_BINARY",
    "MAX_TEXT",
    "Message",
    "Opening",
    "WebSocket",
    "WebSocketClosed",
    "WebSocketRefused",
    "messages_of",
    "refusal_in",
]

Message: TypeAlias = Bytes | str

MAX_BINARY: Final = 1024 * 1024
MAX_TEXT: Final = 16 * 1024
MESSAGE_SIZE: Final = 64 * 1024
"""Bytes of the binary messages that we send, for receivers and proxies with small buffers."""
READ_SIZE: Final = 256 * 1024
FIRST_READ: Final = 4 * 1024
"""Bytes of the first reads, and of all reads from a peer that is not trusted yet."""
MAX_ANSWER: Final = 16 * 1024
"""Bytes of the server's response that are kept to say what is wrong with it."""
MAX_QUEUED_PONGS: Final = 256
MAX_FRAGMENTS: Final = 256
"""Fragments of one text message. Empty fragments are bounded by nothing else."""

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


class WebSocketClosed(trio.BrokenResourceError):
    """The peer closed the WebSocket with a close frame, or we did because the peer violated the protocol.

    Attributes:
        code: the close code; 1005 when the frame had none.
        reason: the close frame's text, made printable. It comes from the peer.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"the WebSocket was closed with code {code}{f' ({reason})' if reason else ''}")
        self.code = code
        self.reason = reason


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


def messages_of(chunks: Sequence[Bytes]) -> list[tuple[Sequence[Bytes], int]]:
    """Divide `chunks` into messages of at most 64 KiB, with their sizes. Only a chunk that is larger is cut."""
    total = sum(map(len, chunks))
    if total <= MESSAGE_SIZE:
        return [(chunks, total)] if total else []
    messages: list[tuple[Sequence[Bytes], int]] = []
    message: list[Bytes] = []
    size = 0
    for chunk in chunks:
        if size + len(chunk) > MESSAGE_SIZE and message:
            messages.append((message, size))
            message, size = [], 0
        if len(chunk) > MESSAGE_SIZE:
            view = memoryview(chunk)
            for start in range(0, len(view), MESSAGE_SIZE):
                piece = view[start : start + MESSAGE_SIZE]
                messages.append(([piece], len(piece)))
        else:
            message.append(chunk)
            size += len(chunk)
    if message:
        messages.append((message, size))
    return messages


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


class WebSocket(trio.abc.AsyncResource):
    """An open WebSocket. One task may send and one may receive. Pings are answered without either.

    Attributes:
        subprotocol: the one that both ends agreed on; None when there is none.
        date: the `Date` header of the server's response, as it was sent; None on the server, and when there is none.
        meter: counts what the peer sends.
    """

    subprotocol: str | None
    date: str | None = None
    meter: FrameMeter

    def trust(self) -> None:
        """Remove the limit of `Opening.allowance`: the peer has authenticated."""
        self.meter.trusted = True

    @abstractmethod
    async def send(self, messages: Sequence[bytes | str]) -> None:
        """Send each message, in order, in as few writes as the engine can.

        Raises:
            trio.BrokenResourceError: the WebSocket is closed or broken.

        If cancelled, it may have sent a part of a frame. After that, only `aclose` is allowed.
        """

    @abstractmethod
    def offer_text(self, text: str) -> bool:
        """Queue a text message, to be sent soon. Does not wait.

        False, and it is not sent, if others still wait or the WebSocket is closed.
        """

    def watch(self, on_readable: Callable[[], object]) -> bool:  # noqa: ARG002  # the default
        """See `Link.watch`. To be called when the opening is over."""
        return False

    def unwatch(self) -> None:  # the default
        """See `Link.unwatch`."""

    def receive_nowait(self) -> list[Message] | None:
        """Like `receive`, but it never waits: None when nothing has come. After `watch` only.

        Empty when what came is no message, or not a whole one, or when others should have their turn: call again.
        """
        raise NotImplementedError

    async def send_binary(self, chunks: Sequence[Bytes]) -> None:
        """Send `chunks`, in order, in binary messages of at most 64 KiB. With no chunks, send what still waits.

        Raises:
            As `send`.
        """
        await self.send([b"".join(message) for message, _ in messages_of(chunks)])

    def send_binary_nowait(self, chunks: Sequence[Bytes]) -> bool | None:  # noqa: ARG002  # the default
        """Like `send_binary`, as far as that is possible without waiting.

        Returns:
            False if a rest waits: then call `send_binary` next, which sends it first. None if this engine cannot do
            that, and has taken nothing.

        Raises:
            As `send`.
        """
        return None

    @abstractmethod
    async def receive(self) -> list[Message]:
        """Wait for messages and return those that have arrived, at least one.

        A binary message may come in pieces. A piece that is a view is valid until the next call.

        Raises:
            WebSocketClosed: the WebSocket was closed. We close it when the peer violates RFC 6455, or sends more than
                1 MiB of binary or 16 KiB of text in one message. The close code says which. (When a frame is
                malformed, the engine over trio-websocket sends no close frame and only ends the connection.)
            trio.BrokenResourceError: the connection ended without a close frame; or the peer, not trusted yet, sent
                more than its allowance.
        """

    @abstractmethod
    async def close(self, code: int, reason: str = "") -> None:
        """Send a close frame, if none was sent, wait for the peer's, and close the stream.

        The caller sets the deadline. A connection that is already gone is no error. If cancelled, the stream is closed
        at once.
        """

    async def aclose(self) -> None:
        """Close with code 1000. See `close`."""
        await self.close(1000)
