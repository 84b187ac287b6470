"""A conversation between a visitor and a gateway, in which both ends check what they receive.

The bytes follow from the conversation's number, the direction and the position, so the receiver knows what to expect.
EOF is correct only after all bytes, and only if the sender has ended. A conversation that stops earlier must break.

    a prefix, then an error       correct: the receiver knows that something is missing
    all bytes, then EOF           correct
    a prefix, then EOF            a fault: a part looks complete
    other bytes                   a fault
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from random import Random
from typing import Final, Protocol, final

import attrs
import trio

from pioneer_tunnel.testing.printable import Printable
from pioneer_tunnel.testing.visitors import Leave

__all__ = ["HEADER_SIZE", "Conversation", "End", "Outcome", "Speech", "Talk", "number_in"]

HEADER_SIZE: Final = 8
"""Bytes at the start of a conversation, with its number, so that the gateway knows which one it is."""

SLOW_READ: Final = 16 * 1024
"""Bytes that a slow reader takes at a time, once a second."""

_BLOCK: Final = Random(0).randbytes(65_521)  # a pattern; its length is a prime, so that no two places fit


class Spoken(Protocol):
    """The stream of either end: a visitor's, a tunnel's, or one of the local gateway."""

    async def send_all(self, data: bytes) -> None: ...
    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray: ...
    async def send_eof(self) -> None: ...
    async def aclose(self) -> None: ...
    def reset(self) -> None: ...


@final
@attrs.frozen(repr=False)
class Speech(Printable):
    """What one end does.

    Attributes:
        pieces: number of chunks to send.
        size: bytes of a chunk.
        pause: seconds between chunks.
        leave: how it leaves after the last chunk.
        slow: whether it reads only 16 KiB a second.
        last: whether it starts to send only after the other's EOF.
    """

    pieces: int = 1
    size: int = 1
    pause: float = attrs.field(default=0.0, kw_only=True)
    leave: Leave = attrs.field(default=Leave.END, converter=Leave, kw_only=True)
    slow: bool = attrs.field(default=False, kw_only=True)
    last: bool = attrs.field(default=False, kw_only=True)

    @property
    def seconds(self) -> float:
        """How long it takes without faults."""
        return self.pause * max(self.pieces - 1, 0)


@final
@attrs.frozen(repr=False)
class Talk(Printable):
    """A conversation as data.

    Attributes:
        at: when the visitor connects.
        visitor: what the visitor does.
        gateway: what the gateway does.
    """

    at: float
    visitor: Speech = Speech()
    gateway: Speech = Speech()

    @property
    def completes(self) -> bool:
        """Whether it completes without faults: neither end leaves early, or reads so slowly that it may break."""
        ends = (self.visitor, self.gateway)
        return all(end.leave is Leave.END and not end.slow for end in ends)

    @property
    def seconds(self) -> float:
        """How long it takes without faults."""
        return self.visitor.seconds + self.gateway.seconds


@final
class Outcome(enum.StrEnum):
    """How a conversation ended for one end."""

    WHOLE = "whole"
    """It has received all bytes and EOF."""
    BROKEN = "broken"
    """It got an error."""
    LEFT = "left"
    """It left before the end."""


@final
class End:
    """One end of a conversation, and its state.

    Attributes:
        name: for messages.
        speech: what it does.
        offered: bytes of which `send_all` has begun.
        said: bytes of which `send_all` has ended.
        ended: whether it has sent EOF, or is about to.
        heard: bytes that it has received.
        outcome: None while the conversation goes on.
        over: set when it no longer uses its stream.
    """

    def __init__(self, name: str, speech: Speech, salt: int) -> None:
        self.name: Final = name
        self.speech: Final = speech
        self.offered = 0
        self.said = 0
        self.ended = False
        self.heard = 0
        self.outcome: Outcome | None = None
        self.over: Final = trio.Event()
        self._salt: Final = salt

    def words(self, start: int, amount: int) -> bytes:
        """The bytes that it sends from position `start` on."""
        place = (start + self._salt) % len(_BLOCK)
        return (_BLOCK[place:] + _BLOCK * (amount // len(_BLOCK) + 1))[:amount]


@final
class Conversation:
    """See the module.

    Args:
        number: its number; no other conversation has it.
        talk: the conversation as data.
        complain: called with the text of each fault.
        hurry: once set, neither end pauses any more.

    Attributes:
        visitor: the visitor's end.
        gateway: the gateway's end; None until a gateway has read the number.
    """

    def __init__(self, number: int, talk: Talk, *, complain: Callable[[str], None], hurry: trio.Event) -> None:
        self.number: Final = number
        self.talk: Final = talk
        self.visitor: Final = End("the visitor", talk.visitor, number * 7919)
        self.gateway: End | None = None
        self._complain: Final = complain
        self._hurry: Final = hurry

    @property
    def whole(self) -> bool:
        """Whether both ends have received everything."""
        return self.gateway is not None and self.visitor.outcome is self.gateway.outcome is Outcome.WHOLE

    async def visit(self, stream: Spoken) -> None:
        """Be the visitor until it has left. There is no deadline: a break must be reported to both ends."""
        header = self.number.to_bytes(HEADER_SIZE, "big")
        await self._take_part(stream, self.visitor, header)

    async def answer(self, stream: Spoken) -> None:
        """Be the gateway, after `number_in` has read the number."""
        if self.gateway is not None:
            self._complain(f"{self}: it came to a gateway twice")
            return
        self.gateway = End("the gateway", self.talk.gateway, self.number * 7919 + 4999)
        await self._take_part(stream, self.gateway, b"")

    def __str__(self) -> str:
        return f"conversation {self.number}, {self.talk!r}"

    async def _take_part(self, stream: Spoken, end: End, header: bytes) -> None:
        try:
            async with trio.open_nursery() as nursery:
                heard_out = trio.Event()
                nursery.start_soon(self._speak, stream, end, header, heard_out)
                end.outcome = await self._listen(stream, end)
                heard_out.set()
                if end.outcome is not Outcome.WHOLE:
                    nursery.cancel_scope.cancel()
            await stream.aclose()
        finally:
            end.outcome = end.outcome or Outcome.LEFT
            end.over.set()

    async def _speak(self, stream: Spoken, end: End, header: bytes, heard_out: trio.Event) -> None:
        speech = end.speech
        try:
            if header:
                await stream.send_all(header)
            if speech.last:
                await heard_out.wait()  # no deadline: a break cancels this
            for piece in range(speech.pieces):
                if piece:
                    with trio.move_on_after(speech.pause):
                        await self._hurry.wait()
                end.offered += speech.size
                await stream.send_all(end.words(end.said, speech.size))
                end.said = end.offered
            match speech.leave:
                case Leave.END:
                    end.ended = True
                    await stream.send_eof()
                case Leave.CLOSE:
                    end.ended = True
                    await stream.aclose()
                case Leave.RESET:
                    stream.reset()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # `_listen` gets the error, after all bytes before it

    async def _listen(self, stream: Spoken, end: End) -> Outcome:
        limit = SLOW_READ if end.speech.slow else None
        while True:
            try:
                data = await stream.receive_some(limit)
            except trio.BrokenResourceError:
                return Outcome.BROKEN
            except trio.ClosedResourceError:
                return Outcome.LEFT
            speaker = self._other(end)
            if not data:
                if speaker is None or not speaker.ended or end.heard != speaker.said:
                    self._complain(f"{self}: {end.name} was told of an end after {end.heard} bytes, {_told(speaker)}")
                return Outcome.WHOLE
            if speaker is None or end.heard + len(data) > speaker.offered:
                self._complain(f"{self}: {end.name} has heard more than was said, {_told(speaker)}")
                return Outcome.BROKEN
            if bytes(data) != speaker.words(end.heard, len(data)):
                self._complain(f"{self}: {end.name} has heard other bytes than were said, after {end.heard} good ones")
                return Outcome.BROKEN
            end.heard += len(data)
            if end.speech.slow and not self._hurry.is_set():
                await trio.sleep(1.0)

    def _other(self, end: End) -> End | None:
        return self.gateway if end is self.visitor else self.visitor


async def number_in(stream: Spoken) -> int | None:
    """Read the number of a conversation; None if the stream breaks or ends before it.

    No deadline: the visitor, who sends it, has one.
    """
    header = bytearray()
    while len(header) < HEADER_SIZE:
        try:
            data = await stream.receive_some(HEADER_SIZE - len(header))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return None
        if not data:
            return None
        header += data
    return int.from_bytes(header, "big")


def _told(speaker: End | None) -> str:
    if speaker is None:
        return "and no gateway has spoken"
    if speaker.ended:
        return f"of the {speaker.said} that {speaker.name} had to say"
    return f"while {speaker.name} had begun to say {speaker.offered}, and was not at its end"
