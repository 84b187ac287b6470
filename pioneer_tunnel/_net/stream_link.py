"""A link over one byte stream, with nothing in between: for ends that need no WebSocket on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, final

import trio

from .adopted import Watched
from .link import Bytes
from .streams import ByteStream, Nowait
from .watched_link import WatchedLink

__all__ = ["StreamLink"]

_READ_SIZE: Final = 128 * 1024


@final
class StreamLink(WatchedLink):
    """A `Link` whose bytes are those of a stream.

    Args:
        stream: closed when the link is closed.
        watched: the same stream, or the one below its TLS. It records when bytes move.
    """

    def __init__(self, stream: ByteStream, watched: Watched) -> None:
        super().__init__(watched)
        self._stream: Final = stream
        self._buffer: Final = memoryview(bytearray(_READ_SIZE))
        self._nowait: Nowait | None = None  # what reads and writes without waiting
        self._rest: Sequence[Bytes] = ()  # `send_nowait` has not sent it

    def watch(self, on_readable: Callable[[], object]) -> bool:
        self._nowait = self._stream.watch(on_readable)
        return self._nowait is not None

    def unwatch(self) -> None:
        if self._nowait is not None:
            self._nowait.unwatch()

    def receive_nowait(self) -> Sequence[Bytes] | None:
        assert self._nowait is not None
        amount = self._nowait.receive_into_nowait(self._buffer)
        if amount == 0:
            raise trio.BrokenResourceError("the other end closed the connection")
        return None if amount is None else (self._buffer[:amount],)  # yamux processes it before it receives again

    async def receive(self) -> Sequence[Bytes]:
        amount = await self._stream.receive_into(self._buffer)
        return (self._buffer[:amount],) if amount else ()

    def send_nowait(self, chunks: Sequence[Bytes]) -> bool | None:
        if self._nowait is None:
            return None
        self._rest = self._nowait.send_nowait([*self._rest, *chunks])
        return not self._rest

    async def send(self, chunks: Sequence[Bytes]) -> None:
        pieces, self._rest = [*self._rest, *chunks], ()
        if pieces:
            await self._stream.send_pieces(pieces)

    async def aclose(self) -> None:
        await self._stream.aclose()
