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
MESSAGE_SIZE: Final = 64 * 1024 - 244
"""Bytes of the largest binary messages that we send: 64 KiB with headers, for receivers and proxies with small buffers.

A frame of yamux that is made for one message (`LARGEST_FRAME`) is as large. So it leaves no room for another header."""


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
    """Divide `chunks` into messages of at most `MESSAGE_SIZE`, with their sizes. Only a chunk that is larger is cut."""
    total = sum(map(len, chunks))
    if total <= MESSAGE_SIZE:
        return [(chunks, total)] if total else []
    messages: list[tuple[Sequence[Bytes], int]] = []
    message: list[Bytes] = []
    left = MESSAGE_SIZE
    for chunk in chunks:
        size = len(chunk)
        if left < size <= MESSAGE_SIZE:
            messages.append((message, MESSAGE_SIZE - left))
            message, left = [], MESSAGE_SIZE
        rest = chunk
        while size > left:
            rest = memoryview(rest)
            message.append(rest[:left])
            messages.append((message, MESSAGE_SIZE))
            rest, size = rest[left:], size - left
            message, left = [], MESSAGE_SIZE
        message.append(rest)
        left -= size
    messages.append((message, MESSAGE_SIZE - left))
    return messages
