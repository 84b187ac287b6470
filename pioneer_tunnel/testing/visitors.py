"""Visitors as data: when they connect, what they send, how they leave.

heard = await play_visitor(relay, Visitor(2.0, sends=(1, 4096)))
assert heard.data == visitor.data     # of a gateway that echoes
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, final

import attrs
import trio

from .memory_relay import MemoryRelay
from .memory_stream import MemoryStream
from .printable import Printable

__all__ = ["Heard", "Leave", "Visitor", "play_visitor"]

_PATTERN: Final = bytes(range(251))
"""Its length is prime, so that lost or repeated blocks show."""


@final
class Leave(enum.StrEnum):
    """How a visitor leaves."""

    END = "end"
    """Send EOF, and read until the gateway's EOF."""
    CLOSE = "close"
    """Close the connection without reading the rest."""
    RESET = "reset"
    """Reset the connection."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


def _amounts(amounts: Iterable[int]) -> tuple[int, ...]:
    return tuple(amounts)


@final
@attrs.frozen(repr=False)
class Visitor(Printable):
    """One visitor.

    Attributes:
        after: seconds until it connects (default 0).
        sends: the size of each chunk that it sends, in bytes (default: none).
        pause: seconds between chunks (default 0).
        leave: how it leaves after the last chunk (default `Leave.END`).
    """

    after: float = 0.0
    sends: tuple[int, ...] = attrs.field(default=(), converter=_amounts, kw_only=True)
    pause: float = attrs.field(default=0.0, kw_only=True)
    leave: Leave = attrs.field(default=Leave.END, converter=Leave, kw_only=True)

    @property
    def data(self) -> bytes:
        """All bytes that it sends."""
        total = sum(self.sends)
        return (_PATTERN * (total // len(_PATTERN) + 1))[:total]

    @property
    def chunks(self) -> list[bytes]:
        """`data` in the chunks of `sends`."""
        data, chunks, position = self.data, [], 0
        for amount in self.sends:
            chunks.append(data[position : position + amount])
            position += amount
        return chunks


@final
@attrs.frozen
class Heard:
    """What a visitor received.

    Attributes:
        data: the bytes that the gateway sent.
        broken: True if the connection broke or was refused; False after EOF, or if the visitor left first.
    """

    data: bytes
    broken: bool


async def play_visitor(relay: MemoryRelay, visitor: Visitor, *, tunnel: str = "office") -> Heard:
    """Act as `visitor`, and return what it received. There is no deadline: the caller sets one.

    Args:
        relay: the relay to connect to.
        visitor: what it does.
        tunnel: the tunnel that it visits (default `"office"`).

    Raises:
        KeyError: the relay has no such tunnel.
    """
    await trio.sleep(visitor.after)
    try:
        stream = await relay.visit(tunnel)
    except ConnectionRefusedError:
        return Heard(b"", broken=True)
    received = bytearray()
    broken = False
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(_send, stream, visitor, nursery.cancel_scope)
        try:
            async for data in stream:
                received += data
        except trio.BrokenResourceError:
            broken = True
            nursery.cancel_scope.cancel()
        except trio.ClosedResourceError:
            pass  # the visitor has reset the stream
    return Heard(bytes(received), broken)


async def _send(stream: MemoryStream, visitor: Visitor, reading: trio.CancelScope) -> None:
    # The reading task reports the break, after all bytes that came before it.
    with suppress(trio.BrokenResourceError):
        for number, chunk in enumerate(visitor.chunks):
            if number:
                await trio.sleep(visitor.pause)
            await stream.send_all(chunk)
        match visitor.leave:
            case Leave.END:
                await stream.send_eof()
            case Leave.CLOSE:
                reading.cancel()
            case Leave.RESET:
                stream.reset()
