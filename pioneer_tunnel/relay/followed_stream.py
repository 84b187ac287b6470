"""A visitor's connection as a stream that gives only what may be forwarded: `framing` with a socket and a clock.

Theory of operation. `pump` carries bytes between this and the gateway's stream, and needs not know that anything is
followed. What it reads here is what the follower lets pass; what it writes here goes to the visitor, looked at only
while an Upgrade is not answered.

When a request is refused, answers to earlier ones may still be on their way, and what the relay has to say must not
land in the middle of one. So reading ends, which `pump` passes on to the gateway: no more requests. What the gateway
still says goes through, and when it ends its side, `send_eof` says the relay's word and closes. If the gateway breaks
off meanwhile, the visitor is reset, as ever; if it does not end in time, the connection is reset without a word. A
request that has to start afresh ends the stream to the gateway in the same way, but leaves the visitor's open
(`afresh`), for a new one.

Neighbours: `ingress` makes one for each stream to a gateway; `framing` decides; `pump` reads and writes.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, final

import trio

from ..endings import close_after_answer, send_eof
from ..streams import send_pieces
from .framing import Piece, RequestFollower
from .head import RequestHead, error_response

__all__ = ["FollowedStream"]

LAST_ANSWERS_TIMEOUT: Final = 30.0
"""Seconds that the gateway has to answer what came before a request that is not passed on to it."""

_READ_SIZE: Final = 64 * 1024


@final
class FollowedStream(trio.abc.HalfCloseableStream):
    """The visitor's side of a pump.

    Args:
        stream: the visitor's connection.
        follower: has been fed all that was read of it.
        head_timeout: the seconds that a later head may take, from its first byte on.

    Attributes:
        scope: to pump in; it ends when the gateway takes too long to end.
    """

    def __init__(self, stream: trio.abc.Stream, follower: RequestFollower, *, head_timeout: float) -> None:
        self.transport_stream: Final = stream
        self.scope: Final = trio.CancelScope()
        self._follower: Final = follower
        self._head_timeout: Final = head_timeout
        self._head_deadline = math.inf
        self._ready: Final[deque[Piece]] = deque()
        self._answered: Final = trio.Event()
        self._end_sent = False

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
                self.scope.deadline = trio.current_time() + LAST_ANSWERS_TIMEOUT
                return b""
            if follower.holds:
                # No deadline: the gateway has as much time for this answer as for any.
                await self._answered.wait()
                if follower.awaits_answer:
                    return b""  # it has ended instead
                self._ready.extend(follower.feed(b""))
                continue
            data = await self._receive(min(size, follower.appetite))
            self._ready.extend(follower.feed(data))
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

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._follower.awaits_answer and self._follower.answer(data):
            self._answered.set()
        await send_pieces(self.transport_stream, [bytes(data)])

    async def wait_send_all_might_not_block(self) -> None:
        await self.transport_stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """The gateway says no more, so it is the relay's turn, if it has something to say."""
        self._answered.set()
        refusal = self._follower.refusal
        if refusal is not None and not self._end_sent:
            self._end_sent = True
            await self.transport_stream.send_all(error_response(refusal.status, refusal.reason))
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
