"""A visitor's connection as a stream that gives only what may be forwarded: the followers with a socket and a clock.

`pump` copies bytes between this stream and the gateway's. What `pump` reads here is what the `RequestFollower` lets
pass. What `pump` writes here goes to the visitor, as far as the `ResponseFollower` knows a request that it answers.
What the gateway sends beyond that answers nothing: both connections are reset.

The visitor's part ends when it sends what may not be forwarded: a request for a stream of its own, or one that is
refused. From then on nothing is read from the visitor, and the gateway goes on:

    each request has its whole response     `HandedOver`: `pump` closes the gateway's stream and leaves the visitor's
                                            connection open, for the next stream or for the relay's error
    a response lasts until the gateway's    the gateway's end is the visitor's end; no error follows, since the visitor
    end                                     would take it for a part of that response
    the gateway ends before that            both connections are reset
    it sends nothing for 30 seconds         the same

The gateway is not told meanwhile that no more requests come: many servers take a half-closed connection for a visitor
that has left, and break off. The exception is a response that cannot be followed, which may be complete. Then the
server has to be told, or it would keep the connection.

A connection that is kept between requests for longer than the keep-alive timeout is handed over as well, to be closed.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NoReturn, final

import trio

from ..._http.head import BadRequest, RequestHead
from ..._http.requests import Phase, Piece, RequestFollower
from ..._http.responses import ResponseFollower, ResponsePhase
from ..._net.streams import ByteStream, DelegatingStream
from ...exchange.pump import HandedOver
from .turns import Turn

__all__ = ["FollowedStream"]

LAST_ANSWERS_TIMEOUT: Final = 30.0
"""Seconds that a gateway may send nothing while the visitor waits for it and is not read."""

MAX_OUTSTANDING: Final = 1024
"""Requests without a response from which on nothing is read from the visitor."""

FREE_WORK: Final = 32
"""What may be found in the piece of a response without a turn. Most responses have no more than that."""

_READ_SIZE: Final = 64 * 1024
_WITHOUT_END: Final = frozenset({ResponsePhase.UNKNOWN, ResponsePhase.SWITCHED})


@final
class FollowedStream(DelegatingStream):
    """The visitor's side of a pump.

    Args:
        stream: the visitor's connection.
        head: the first head of the stream to the gateway. Its maker forwards it, and then what `take` returns.
        received: what was read after it.
        turn: asked for before much is followed.
        head_timeout: the seconds that a later head may take, from its first byte on.
        keep_alive_timeout: the seconds that the connection may be kept between requests.

    Attributes:
        scope: to pump in; it is cancelled when the gateway is silent for too long.
        handed_over: True once `pump` has left the connection open.
    """

    def __init__(
        self,
        stream: ByteStream,
        head: RequestHead,
        received: bytes,
        turn: Turn,
        *,
        head_timeout: float,
        keep_alive_timeout: float = math.inf,
    ) -> None:
        super().__init__(stream)
        self.scope: Final = trio.CancelScope()
        self.handed_over = False
        self._responses: Final = ResponseFollower()
        self._follower: Final = RequestFollower(head, self._responses)
        self._turn: Final = turn
        self._head_timeout: Final = head_timeout
        self._keep_alive_timeout: Final = keep_alive_timeout
        self._head_deadline = math.inf
        self._last_activity = math.inf  # when a byte last passed, either way
        self._ready: Final[deque[Piece]] = deque(self._follower.feed(received))
        self._reading: trio.CancelScope | None = None
        self._gateway_heard: Final = trio.lowlevel.ParkingLot()
        self._gateway_ended = False
        self._end_sent = False
        self._sending = False
        self._finishing = False

    @property
    def next_request(self) -> tuple[RequestHead, bytes] | None:
        """Once it is handed over: the request that needs another stream, and all bytes from there."""
        return self._follower.next_request

    @property
    def refusal(self) -> BadRequest | None:
        """Once it is handed over: what to tell the visitor."""
        return self._follower.refusal

    @property
    def _idle(self) -> bool:
        """True when the visitor has the whole response to each request."""
        return self._responses.idle and not self._sending

    def take(self) -> list[Piece]:
        """What may be forwarded of what was received."""
        pieces = [*self._ready]
        self._ready.clear()
        return pieces

    async def receive_some(self, max_bytes: int | None = None) -> Piece:  # type: ignore[override]  # a view is no copy
        """What may be forwarded next; b"" after the visitor's end.

        Raises:
            HandedOver: nothing more will be, and each request has its response.
        """
        follower, responses = self._follower, self._responses
        size = _READ_SIZE if max_bytes is None else max_bytes
        if self._ready:
            await trio.lowlevel.checkpoint()
        while not self._ready:
            if follower.is_over:
                return await self._finish()
            if (follower.holds and responses.awaits_upgrade) or responses.outstanding >= MAX_OUTSTANDING:
                if self._gateway_ended:
                    return b""
                # An Upgrade has no deadline: the gateway has as much time for this response as for any.
                if not follower.holds:
                    self._limit_silence()
                await self._gateway_heard.park()
                self.scope.deadline = math.inf
            elif follower.holds or follower.has_more:
                await trio.lowlevel.checkpoint()
                await self._follow(b"")
            else:
                data = await self._receive(min(size, follower.read_size))
                await self._follow(data)
                if not (data or self._ready or follower.is_over):
                    return b""
        piece = self._ready.popleft()
        if len(piece) > size:
            view = memoryview(piece)
            self._ready.appendleft(view[size:])
            piece = view[:size]
        return piece

    async def _follow(self, data: bytes | bytearray) -> None:
        await self._turn.wait()
        pieces = self._follower.feed(data)
        self._turn.spend(self._follower.work)
        if pieces:
            self._ready.extend(pieces)
            self._head_deadline = math.inf  # a head that had begun is whole
            self._last_activity = trio.current_time()

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
        if self._follower.head_begun:
            self._head_deadline = min(self._head_deadline, trio.current_time() + self._head_timeout)
        self._reading = trio.CancelScope(deadline=self._deadline())
        with self._reading:
            return await self.transport_stream.receive_some(size)
        if not self._follower.head_begun:
            if self._end_sent:
                raise trio.BrokenResourceError("the visitor was told an end, and stays")
            self._hand_over()
        self._follower.give_up(self._head_timeout)
        return b""

    def _deadline(self) -> float:
        """When the visitor has to have said something more."""
        if self._follower.head_begun:
            return self._head_deadline
        if self._idle and self._follower.phase is Phase.HEAD:
            return self._last_activity + self._keep_alive_timeout
        # None: a visitor may be silent for as long as its gateway bears it.
        return math.inf

    async def _finish(self) -> bytes:
        """Let the gateway answer what it was asked. Returns b"" when the visitor cannot be told anything after that."""
        self._finishing = True
        try:
            while not (self._idle or self._gateway_ended or self._responses.phase in _WITHOUT_END):
                self._limit_silence()
                await self._gateway_heard.park()
        finally:
            self._finishing = False
        if self._idle and not self._end_sent:
            self._hand_over()
        self._limit_silence()
        return b""

    def _limit_silence(self) -> None:
        self.scope.deadline = trio.current_time() + LAST_ANSWERS_TIMEOUT

    def _hand_over(self) -> NoReturn:
        self.handed_over = True
        self.scope.deadline = math.inf
        raise HandedOver

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send the visitor what answers its requests.

        Raises:
            trio.ClosedResourceError: some of `data` answers none, or the visitor was told an end.
        """
        if self._end_sent:
            raise trio.ClosedResourceError("the gateway has no more to say here")
        data = bytes(data)
        self._sending = True
        passed = self._responses.feed(data, most=FREE_WORK)
        while passed < len(data) and not self._responses.idle:
            await trio.lowlevel.checkpoint()
            await self._turn.wait()
            passed = self._responses.feed(data, passed)
            self._turn.spend(self._responses.work)
        if passed:
            await self.transport_stream.send_pieces([data if passed == len(data) else data[:passed]])
        self._sending = False
        self._last_activity = trio.current_time()
        if self._reading is not None:
            self._reading.deadline = self._deadline()
        if self.scope.deadline < math.inf:
            self._limit_silence()
        self._gateway_heard.unpark_all()
        if passed < len(data):
            raise trio.ClosedResourceError("the gateway sends what answers no request")

    @property
    def can_half_close(self) -> bool:
        return True  # `send_eof` decides what becomes of the connection

    async def send_eof(self) -> None:
        """The gateway says no more: end the visitor's connection, unless it goes on without this gateway.

        Raises:
            trio.ClosedResourceError: the visitor's part has ended, and a response is not complete.
        """
        self._gateway_ended = True
        self._gateway_heard.unpark_all()
        if self._finishing and not self._responses.is_last:
            await trio.lowlevel.checkpoint()
            if not self._responses.idle:
                raise trio.ClosedResourceError("the gateway has ended before its response did")
            return
        self._end_sent = True
        await self.transport_stream.send_eof()

    async def aclose(self) -> None:
        self._ready.clear()
        await self.transport_stream.aclose()
