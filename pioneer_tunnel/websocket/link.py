"""A link over one WebSocket: binary messages carry the link's bytes; text messages go to a callback.

Message boundaries have no meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

from .._model.addresses import Address
from .._model.callbacks import nothing
from .._net.adopted import Watched
from .._net.closing import abandon
from .._net.link import Bytes
from .._net.socket_options import source_is_gone
from .._net.watched_link import WatchedLink
from .connection import WebSocket
from .driver import bytes_in
from .messages import Message

__all__ = ["WebSocketLink"]


@final
class WebSocketLink(WatchedLink):
    """A `Link` whose bytes are binary messages of a WebSocket.

    Args:
        websocket: closed when the link is closed.
        watched: the stream below the WebSocket, which records when bytes move.
        on_text: called with each text message. `receive` raises what it raises. It may be set later.
        early: messages that arrived together with the last one of the handshake, and belong to the link.
        peer: the address of the other end; None to ask the socket.

    Attributes:
        close_code, close_reason: what `aclose` sends.
        on_text: see the argument.
        resumes: 0, since it does not outlive its connection.
    """

    resumes: Final = 0

    def __init__(
        self,
        websocket: WebSocket,
        watched: Watched,
        on_text: Callable[[str], object] = nothing,
        early: Sequence[Message] = (),
        *,
        peer: Address | None = None,
    ) -> None:
        super().__init__(watched)
        self._websocket: Final = websocket
        self._driver: Final = websocket.driver
        self.on_text = on_text
        self._early = early
        self._peer: Final = peer
        self.close_code: int = 1000
        self.close_reason: str = ""

    @property
    def address_is_gone(self) -> bool:
        lowest = self._watched.lowest_socket
        return lowest is not None and source_is_gone(lowest.socket)

    @property
    def peer(self) -> Address | None:
        """The address of the other end of the connection; None if it is not known."""
        if self._peer is not None:
            return self._peer
        lowest = self._watched.lowest_socket
        try:
            return None if lowest is None else Address.of_socket(lowest.socket.getpeername())
        except (OSError, ValueError):
            return None  # the connection is broken, or not of TCP

    async def send(self, chunks: Sequence[Bytes]) -> None:
        await self._websocket.send_binary(chunks)

    def send_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        return self._driver.send_nowait(chunks)

    async def receive(self) -> Sequence[Bytes]:
        while True:
            messages, self._early = self._early or await self._websocket.receive(), ()
            if received := bytes_in(messages, self.on_text):
                return received

    def watch(self, on_readable: Callable[[], object]) -> bool:
        return self._driver.watch(on_readable)

    def unwatch(self) -> None:
        self._driver.unwatch()

    def receive_nowait(self) -> Sequence[Bytes] | None:
        driver = self._driver
        messages, self._early = self._early or driver.receive_nowait(), ()
        self.drained = driver.drained
        return None if messages is None else bytes_in(messages, self.on_text)

    async def send_text(self, text: str) -> None:
        """Send a text message. See `WebSocket.send`."""
        await self._websocket.send([text])

    def offer_text(self, text: str) -> bool:
        """See `Driver.offer_text`."""
        return self._driver.offer_text(text)

    async def abandon(self) -> None:
        """Close the connection at once, with a reset. What is queued for a peer that takes nothing would delay that."""
        await abandon(self._watched)

    def blame(self) -> None:
        self.close_code, self.close_reason = 1002, "a rule of the protocol was broken"

    async def aclose(self) -> None:
        await self._websocket.close(self.close_code, self.close_reason)
