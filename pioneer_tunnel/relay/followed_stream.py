"""A visitor's connection as a stream that gives only what may be forwarded: `framing` with a socket and a clock.

Theory of operation. `pump` carries bytes between this and the gateway's stream, and needs not know that anything is
followed. What it reads here is what the follower lets pass; what it writes here goes to the visitor, looked at only
while an Upgrade is not answered.

A request that is refused may be another tenant's: a proxy in front that keeps connections shares them. So from its
head on the gateway has no more to say here, or it could answer in the other one's name. When it has spoken since the
last request was forwarded, and nothing of that is under way, whoever sends one request after another has its answer:
the relay says its word at once (`_dismiss`), and the gateway's stream is reset. If something is under way, both are
reset.

Whoever has sent requests ahead, the last of which the gateway has not begun to answer, is no such proxy; and what the
relay has to say must not land in the middle of an answer. So reading ends, which `pump` passes on to the gateway: no
more requests. What the gateway still says goes through, and when it ends its side, `send_eof` says the relay's word
and closes. The same goes for a refusal in the middle of a request's body, which is the gateway's own to answer. If the
gateway breaks off meanwhile, the visitor is reset, as ever; if it does not end in time, the connection is reset without
a word. A request that has to start afresh ends the stream to the gateway in the same way, but leaves the visitor's open
(`afresh`), for a new one.

Neighbours: `ingress` makes one for each stream to a gateway; `framing` decides; `pump` reads and writes.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import suppress
from typing import Final, NoReturn, final

import trio

from ..endings import close_after_answer, send_eof
from ..streams import send_pieces
from .framing import Piece, RequestFollower
from .head import BadRequest, RequestHead, error_response
from .turns import Turn

__all__ = ["FollowedStream"]

LAST_ANSWERS_TIMEOUT: Final = 30.0
"""Seconds that the gateway has to answer what came before a request that is not passed on to it."""

DISMISSAL_TIMEOUT: Final = 5.0
"""Seconds that the relay's own word may take."""

_READ_SIZE: Final = 64 * 1024


def _response(refusal: BadRequest) -> bytes:
    return error_response(refusal.status, refusal.reason, omit_body=refusal.omit_body)


@final
class FollowedStream(trio.abc.HalfCloseableStream):
    """The visitor's side of a pump.

    Args:
        stream: the visitor's connection.
        follower: has been fed all that was read of it.
        turn: asked for before something is followed.
        head_timeout: the seconds that a later head may take, from its first byte on.

    Attributes:
        scope: to pump in; it ends when the gateway takes too long to end.
    """

    def __init__(self, stream: trio.abc.Stream, follower: RequestFollower, turn: Turn, *, head_timeout: float) -> None:
        self.transport_stream: Final = stream
        self.scope: Final = trio.CancelScope()
        self._follower: Final = follower
        self._turn: Final = turn
        self._head_timeout: Final = head_timeout
        self._head_deadline = math.inf
        self._ready: Final[deque[Piece]] = deque()
        self._answered: Final = trio.Event()
        self._end_sent = False
        self._spoke_after = 0  # so many requests the gateway has spoken last
        self._speaks = False  # right now

    @property
    def afresh(self) -> tuple[RequestHead, bytes] | None:
        """The request that needs another stream to the gateway, if the visitor can still be answered."""
        return None if self._end_sent else self._follower.afresh

    async def receive_some(self, max_bytes: int | None = None) -> Piece:  # type: ignore[override]  # a view is no copy
        follower = self._follower
        size = _READ_SIZE if max_bytes is None else max_bytes
        if self._ready:
            await trio.lowlevel.checkpoint()
        while not self._ready:
            if follower.is_over:
                if follower.refused_at_head and self._spoke_after == follower.heads:
                    await self._dismiss()
                self.scope.deadline = trio.current_time() + LAST_ANSWERS_TIMEOUT
                return b""
            if follower.holds:
                # No deadline: the gateway has as much time for this answer as for any.
                await self._answered.wait()
                if follower.awaits_answer:
                    return b""  # it has ended instead
                await self._follow(b"")
            elif follower.has_more:
                await trio.lowlevel.checkpoint()
                await self._follow(b"")
            else:
                data = await self._receive(min(size, follower.appetite))
                await self._follow(data)
                if self._ready:
                    self._head_deadline = math.inf  # a head that had begun is whole
                elif not (data or follower.is_over):
                    return b""
        piece = self._ready.popleft()
        if len(piece) > size:
            view = memoryview(piece)
            self._ready.appendleft(view[size:])
            piece = view[:size]
        return piece

    async def _follow(self, data: bytes | bytearray) -> None:
        await self._turn.wait()
        self._ready.extend(self._follower.feed(data))
        self._turn.spend(self._follower.work)

    async def _receive(self, size: int) -> bytes | bytearray:
        """What comes next; b"" when nothing more does, which the follower knows then."""
        try:
            data = await self._receive_in_time(size)
        except trio.ClosedResourceError:
            if self._end_sent:
                return b""  # over TLS both directions end at once, and `send_eof` has ended one
            raise
        if not data:
            self._follower.end()
        return data

    async def _receive_in_time(self, size: int) -> bytes | bytearray:
        if not self._follower.head_begun:
            # No deadline: a visitor may be silent between requests, and within a body, as long as its gateway bears it.
            return await self.transport_stream.receive_some(size)
        self._head_deadline = min(self._head_deadline, trio.current_time() + self._head_timeout)
        with trio.move_on_at(self._head_deadline):
            return await self.transport_stream.receive_some(size)
        self._follower.give_up(self._head_timeout)
        return b""

    async def _dismiss(self) -> NoReturn:
        """Say the relay's word in place of the gateway's, and let that break off."""
        refusal = self._follower.refusal
        assert refusal is not None
        if not (self._speaks or self._end_sent):
            self._end_sent = True
            with trio.move_on_after(DISMISSAL_TIMEOUT), suppress(trio.ClosedResourceError):
                await self.transport_stream.send_all(_response(refusal))
                await close_after_answer(self.transport_stream)
        raise trio.BrokenResourceError("the request after the last one is not this gateway's")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._follower.awaits_answer and self._follower.answer(data):
            self._answered.set()
        if self._end_sent:
            raise trio.ClosedResourceError("the gateway has no more to say here")
        self._spoke_after, self._speaks = self._follower.heads, True
        await send_pieces(self.transport_stream, [bytes(data)])
        self._speaks = False

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """The gateway says no more, so it is the relay's turn, if it has something to say."""
        self._answered.set()
        refusal = self._follower.refusal
        if refusal is not None and not self._end_sent:
            self._end_sent = True
            await self.transport_stream.send_all(_response(refusal))
            await close_after_answer(self.transport_stream)
        elif self.afresh is None:
            self._end_sent = True
            await send_eof(self.transport_stream)
        else:
            await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self._ready.clear()
        if self.afresh is None:
            await self.transport_stream.aclose()
        else:
            await trio.lowlevel.checkpoint()
