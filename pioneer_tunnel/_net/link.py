"""A link: the reliable, ordered stream of bytes that yamux runs over.

The mux never learns what carries its bytes. Today that is one WebSocket (`websocket.link`), or any Trio stream
(`StreamLink`); a link that survives the loss of its connection goes in the same place.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Final, TypeAlias, final

import trio

from .adopted import watch

__all__ = ["Bytes", "Link", "StreamLink"]

Bytes: TypeAlias = bytes | bytearray | memoryview

READ_SIZE: Final = 256 * 1024


class Link(trio.abc.AsyncResource):
    """What yamux asks of whatever carries it. One task sends, one task receives."""

    @property
    @abstractmethod
    def last_received(self) -> float:
        """`trio.current_time()` of the last byte that came from the other end, whatever it belonged to."""

    @property
    @abstractmethod
    def sending_since(self) -> float | None:
        """When the `send` that is under way last made progress; None while there is none."""

    @abstractmethod
    async def send(self, chunks: Sequence[Bytes]) -> None:
        """Send all of `chunks`, in order.

        Raises:
            trio.BrokenResourceError: the link is gone. Cancelled half way, it may have sent a part and is good for
                nothing but `aclose`.
        """

    @abstractmethod
    async def receive(self) -> Sequence[Bytes]:
        """Wait for bytes and return what has come, in order; empty at the end.

        Raises:
            trio.BrokenResourceError: the link is gone without having ended; the message tells how.
        """

    def blame(self) -> None:
        """The other end broke a rule: let `aclose` say so, where it has a way to."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close: say goodbye if the link has a way to, then let go of the connection. Cancelled, let go at once."""


@final
class StreamLink(Link):
    """A link over a Trio stream, with nothing in between."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream: Final = watch(stream)

    @property
    def last_received(self) -> float:
        return self._stream.last_received

    @property
    def sending_since(self) -> float | None:
        return self._stream.sending_since

    async def send(self, chunks: Sequence[Bytes]) -> None:
        await self._stream.send_all(b"".join(chunks))

    async def receive(self) -> Sequence[Bytes]:
        data = await self._stream.receive_some(READ_SIZE)
        return [data] if data else []

    async def aclose(self) -> None:
        await self._stream.aclose()
