"""A stream with bytes put back in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import trio

from .adopted import adopt
from .leg import Leg
from .streams import Bytes, DelegatingStream, Nowait

__all__ = ["PrefixedStream"]


@final
class PrefixedStream(DelegatingStream):
    """A stream whose first bytes were read already: `receive_some` returns them first, then the rest.

    Args:
        stream: any Trio stream, closed with this.
        prefix: what was read from it.
    """

    def __init__(self, stream: trio.abc.Stream, prefix: bytes) -> None:
        super().__init__(adopt(stream))
        self._prefix = prefix

    @property
    def prefixed(self) -> bool:
        """True while some of the prefix has not been received."""
        return bool(self._prefix)

    def leg(self) -> Leg | None:
        leg = self.transport_stream.leg()
        if leg is not None:
            leg.prefix, self._prefix = self._prefix, b""
        return leg

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._prefix:
            return await self.transport_stream.receive_some(max_bytes)
        if max_bytes is not None and max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint()
        amount = len(self._prefix) if max_bytes is None else max_bytes
        data, self._prefix = self._prefix[:amount], self._prefix[amount:]
        return data

    async def receive_into(self, buffer: memoryview) -> int:
        if self._prefix:
            return await super().receive_into(buffer)
        return await self.transport_stream.receive_into(buffer)

    async def send_pieces(self, pieces: Sequence[Bytes]) -> None:
        await self.transport_stream.send_pieces(pieces)

    def watch(self, on_readable: Callable[[], object]) -> Nowait | None:
        return None if self._prefix else self.transport_stream.watch(on_readable)

    async def aclose(self) -> None:
        self._prefix = b""
        await super().aclose()

    async def abort(self) -> None:
        self._prefix = b""
        await super().abort()
