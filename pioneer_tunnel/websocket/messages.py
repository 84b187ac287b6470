"""The messages of a WebSocket: their limits, and the error for its end. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypeAlias

import trio

from .._net.link import Bytes

__all__ = ["MAX_BINARY", "MAX_TEXT", "MESSAGE_SIZE", "Message", "WebSocketClosed", "messages_of"]

Message: TypeAlias = Bytes | str

MAX_BINARY: Final = 1024 * 1024
MAX_TEXT: Final = 16 * 1024
MESSAGE_SIZE: Final = 64 * 1024
"""Bytes of the binary messages that we send, for receivers and proxies with small buffers."""


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
