"""A link over one WebSocket: binary messages carry the link's bytes; text messages go to a callback.

Message boundaries have no meaning. Messages that we send have at most 64 KiB, for receivers and proxies with small
buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

from .._net.adopted import Watched
from .._net.delivery import Delivery
from .._net.link import Bytes, Link
from .connection import Message, WebSocket

__all__ = ["WebSocketLink"]

MESSAGE_SIZE: Final = 64 * 1024


@final
class WebSocketLink(Link):
    """A `Link` whose bytes are binary messages of a WebSocket.

    Args:
        websocket: closed when the link is closed.
        watched: the stream below the WebSocket, which records when bytes move.
        on_text: called with each text message. `receive` raises what it raises.
        early: messages that arrived together with the last one of the handshake, and belong to the link.

    Attributes:
        close_code, close_reason: what `aclose` sends.
    """

    def __init__(
        self,
        websocket: WebSocket,
        watched: Watched,
        on_text: Callable[[str], None],
        early: Sequence[Message] = (),
    ) -> None:
        self._websocket: Final = websocket
        self._watched: Final = watched
        self._on_text: Final = on_text
        self._early = early
        self.close_code: int = 1000
        self.close_reason: str = ""

    @property
    def last_received(self) -> float:
        return self._watched.last_received

    @property
    def sending_since(self) -> float | None:
        return self._watched.sending_since

    def delivery(self) -> Delivery | None:
        return self._watched.delivery()

    def outlast(self, seconds: float) -> None:
        self._watched.outlast(seconds)

    @property
    def window_left(self) -> int:
        return self._watched.window_left

    def expect_bulk(self) -> None:
        self._watched.expect_bulk()

    def limit_unsent(self, limit: int) -> None:
        self._watched.limit_unsent(limit)

    async def wait_room(self) -> None:
        await self._watched.wait_room()

    async def send(self, chunks: Sequence[Bytes]) -> None:
        await self._websocket.send(pack(chunks))

    async def receive(self) -> Sequence[Bytes]:
        received: list[Bytes] = []
        while not received:
            messages, self._early = self._early or await self._websocket.receive(), ()
            for message in messages:
                if isinstance(message, str):
                    self._on_text(message)
                else:
                    received.append(message)
        return received

    def blame(self) -> None:
        self.close_code, self.close_reason = 1002, "a rule of the protocol was broken"

    async def aclose(self) -> None:
        await self._websocket.close(self.close_code, self.close_reason)


def pack(chunks: Sequence[Bytes]) -> list[bytes]:
    """Join `chunks` into messages of at most 64 KiB. Only a chunk that is larger than a message is cut."""
    messages: list[bytes] = []
    parts: list[Bytes] = []
    size = 0
    for chunk in chunks:
        if size + len(chunk) > MESSAGE_SIZE and parts:
            messages.append(b"".join(parts))
            parts, size = [], 0
        if len(chunk) > MESSAGE_SIZE:
            view = memoryview(chunk)
            messages += (bytes(view[start : start + MESSAGE_SIZE]) for start in range(0, len(view), MESSAGE_SIZE))
        else:
            parts.append(chunk)
            size += len(chunk)
    if parts:
        messages.append(b"".join(parts))
    return messages
