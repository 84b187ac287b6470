"""A yamux link over any Trio stream, for tests of yamux without a WebSocket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, final

import trio

from pioneer_tunnel._net.adopted import watch
from pioneer_tunnel._net.delivery import Delivery
from pioneer_tunnel._net.link import Bytes, Link

READ_SIZE: Final = 256 * 1024


@final
class StreamLink(Link):
    """A link over a Trio stream, with nothing in between."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream: Final = watch(stream)
        self._buffer: Final = memoryview(bytearray(READ_SIZE))

    @property
    def last_received(self) -> float:
        return self._stream.last_received

    @property
    def sending_since(self) -> float | None:
        return self._stream.sending_since

    def delivery(self) -> Delivery | None:
        return self._stream.delivery()

    def outlast(self, seconds: float) -> None:
        self._stream.outlast(seconds)

    @property
    def window_left(self) -> int:
        return self._stream.window_left

    def expect_bulk(self) -> None:
        self._stream.expect_bulk()

    def limit_unsent(self, limit: int) -> None:
        self._stream.limit_unsent(limit)

    async def wait_room(self) -> None:
        await self._stream.wait_room()

    async def send(self, chunks: Sequence[Bytes]) -> None:
        await self._stream.send_all(b"".join(chunks))

    async def receive(self) -> Sequence[Bytes]:
        # Into one buffer, as real links: what is not read must be copied out of it.
        amount = await self._stream.receive_into(self._buffer)
        return [self._buffer[:amount]] if amount else []

    async def aclose(self) -> None:
        await self._stream.aclose()
