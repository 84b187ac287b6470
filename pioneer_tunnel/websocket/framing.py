"""What the connection needs of the library that frames its messages. No I/O.

The link's bytes bypass the library, see `binary_frames`. It has everything else: text, control frames, every frame that
breaks RFC 6455, and all that comes before the peer is trusted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from .._model.text import clean_message
from .._net.link import Bytes
from .messages import MAX_BINARY, MAX_TEXT, Message, WebSocketClosed

__all__ = ["Framing"]

_MAX_FRAGMENTS: Final = 256
"""Fragments of one text message. Empty fragments are bounded by nothing else."""

_MAX_QUEUED_REPLIES: Final = 256


class Framing(ABC):
    """One end of a WebSocket, by a library without I/O.

    Args:
        is_client: whether this end is the client, which masks its frames.

    Attributes:
        is_open: whether frames can be sent.
        closed: how the WebSocket was closed, as its user gets it; None while it is not.
        received: the messages that have come. The user takes them.
        writes: the bytes to send. The user takes them.
    """

    def __init__(self, *, is_client: bool) -> None:
        self.is_client: Final = is_client
        self.is_open: bool = False
        self.closed: WebSocketClosed | None = None
        self.received: list[Message] = []
        self.writes: list[Bytes] = []
        self._text: list[bytes] = []
        self._size = 0  # of the current message so far
        self._fragments = 0

    @property
    def inside_message(self) -> bool:
        """Whether more frames of a message have to come. To be asked between frames."""
        return self._fragments > 0

    @staticmethod
    @abstractmethod
    def apply_mask(data: Bytes, key: bytes, /) -> Bytes:
        """`data` masked, or unmasked, with a key of four bytes (RFC 6455, 5.3)."""

    @abstractmethod
    def send_text(self, text: str) -> None:
        """Queue a text message. Only while it is open."""

    @abstractmethod
    def close(self, code: int, reason: str) -> None:
        """Queue a close frame. Only while it is open."""

    def fail(self, code: int, reason: str) -> None:
        """Close because the peer violated the protocol, or a limit of ours."""
        if self.closed is None:
            self.closed = WebSocketClosed(code, clean_message(reason))
            if self.is_open:
                self.close(code, reason)

    def receive(self, data: Bytes) -> None:
        """Parse a copy of `data`, and queue replies. What comes after the end is dropped."""
        if self.closed is None:
            self._parse(data)
            if len(self.writes) > _MAX_QUEUED_REPLIES:
                self.fail(1008, "too many pings")

    def receive_eof(self) -> None:
        """The connection has ended."""
        self.is_open = False

    @abstractmethod
    def _parse(self, data: Bytes) -> None:
        """Give `data` to the library and take what it makes of it."""

    def _take(self, payload: Bytes, *, is_text: bool, ends_frame: bool, ends_message: bool) -> None:
        """Take a piece of a message."""
        if self.closed is not None:
            return
        self._size += len(payload)
        self._fragments += ends_frame
        if self._size > (limit := MAX_TEXT if is_text else MAX_BINARY):
            self.fail(1009, f"{'text' if is_text else 'a message'} of more than {limit} bytes")
        elif not is_text:
            self.received.append(payload)
        else:
            self._take_text(bytes(payload), is_whole=ends_message)
        if ends_message:
            self._size = self._fragments = 0

    def _take_text(self, piece: bytes, *, is_whole: bool) -> None:
        self._text.append(piece)
        if self._fragments > _MAX_FRAGMENTS:
            self.fail(1009, f"text in more than {_MAX_FRAGMENTS} pieces")
        elif is_whole:
            text, self._text = b"".join(self._text), []
            try:
                self.received.append(text.decode())
            except UnicodeDecodeError:
                self.fail(1007, "text that is not UTF-8")
