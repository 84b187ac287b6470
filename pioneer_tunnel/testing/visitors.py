"""Visitors as data: when they come, what they send, how they leave; and one who does so.

    heard = await play_visitor(relay, Visitor(2.0, sends=(1, 4096)))
    assert heard.data == visitor.data     # of a gateway that echoes

Neighbours: `MemoryRelay.visit` is their door; `strategies.visitor_traffic` makes them up.
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
"""A prime number of bytes, so that what is lost, or comes twice, shows."""


@final
class Leave(enum.StrEnum):
    """How a visitor leaves."""

    END = "end"
    """Ends what it sends, and hears the gateway out."""
    CLOSE = "close"
    """Closes the connection, whatever is still to come."""
    RESET = "reset"
    """Breaks it off."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


def _amounts(amounts: Iterable[int]) -> tuple[int, ...]:
    return tuple(amounts)


@final
@attrs.frozen(repr=False)
class Visitor(Printable):
    """One visitor.

    Attributes:
        after: seconds until it comes.
        sends: how many bytes it sends at a time.
        pause: seconds between them.
        leave: how it leaves, when it has sent all.
    """

    after: float = 0.0
    sends: tuple[int, ...] = attrs.field(default=(), converter=_amounts, kw_only=True)
    pause: float = attrs.field(default=0.0, kw_only=True)
    leave: Leave = attrs.field(default=Leave.END, converter=Leave, kw_only=True)

    @property
    def data(self) -> bytes:
        """All that it sends."""
        total = sum(self.sends)
        return (_PATTERN * (total // len(_PATTERN) + 1))[:total]

    @property
    def chunks(self) -> list[bytes]:
        """The same, as it sends it."""
        data, chunks, position = self.data, [], 0
        for amount in self.sends:
            chunks.append(data[position : position + amount])
            position += amount
        return chunks


@final
@attrs.frozen
class Heard:
    """What a visitor got of its visit.

    Attributes:
        data: what the gateway sent.
        broken: True when the connection broke, or there was none; False when it ended, or the visitor left first.
    """

    data: bytes
    broken: bool


async def play_visitor(relay: MemoryRelay, visitor: Visitor, *, tunnel: str = "office") -> Heard:
    """Wait until the visitor comes, and be it until it has left. There is no deadline: the caller sets one."""
    await trio.sleep(visitor.after)
    try:
        stream = await relay.visit(tunnel)
    except ConnectionRefusedError:
        return Heard(b"", broken=True)
    received = bytearray()
    broken = False
    async with stream, trio.open_nursery() as nursery:
        nursery.start_soon(_say, stream, visitor, nursery.cancel_scope)
        try:
            async for data in stream:
                received += data
        except trio.BrokenResourceError:
            broken = True
            nursery.cancel_scope.cancel()
        except trio.ClosedResourceError:
            pass  # it has left
    return Heard(bytes(received), broken)


async def _say(stream: MemoryStream, visitor: Visitor, hearing: trio.CancelScope) -> None:
    # The ear hears that the connection is broken, after all that came before.
    with suppress(trio.BrokenResourceError):
        for number, chunk in enumerate(visitor.chunks):
            if number:
                await trio.sleep(visitor.pause)
            await stream.send_all(chunk)
        match visitor.leave:
            case Leave.END:
                await stream.send_eof()
            case Leave.CLOSE:
                hearing.cancel()
            case Leave.RESET:
                stream.reset()
