"""A visitor's connection as a leg that yields only what may be forwarded: the HTTP followers, with deadlines.

The exchange moves bytes between this leg and the gateway's. `receive` returns what the `RequestFollower` lets pass.
`send` sends the visitor what the `ResponseFollower` knows to answer a request. Anything else from the gateway resets
both connections.

The request side ends when the visitor sends a request that needs a stream of its own, or one that is refused. From then
on the visitor is not read, and the gateway goes on:

    each request has its whole response     `HandedOver`: the gateway's stream is closed, and the visitor's
                                            connection stays open for the next stream or the relay's error
    a response has no length                it ends with the gateway's stream, and so does the visitor's connection; an
                                            error after it would look like a part of it
    the gateway ends before that            both connections are reset
    it sends nothing for 30 seconds         both connections are reset
    the visitor breaks its connection       both connections are reset

Meanwhile the gateway gets no EOF: many servers take a half-closed connection for a visitor that has left, and stop. The
exception is a response that cannot be followed, which may be complete: without an EOF its server would keep the
connection.

After the keep-alive timeout an idle connection is handed over as well, to be closed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection, Hashable, Sequence
from typing import Final, final

import trio

from ..._http.head import BadRequest, RequestHead
from ..._http.requests import LEAST_READ, Phase, Piece, RequestFollower, host_of
from ..._http.responses import ResponseFollower, ResponseObserver, ResponsePhase
from ..._model.callbacks import nothing
from ..._net.fastpath.event_loop import Reactor
from ..._net.fastpath.timers import Timer
from ..._net.leg import Bytes, Leg
from ...exchange.exchange import HandedOver
from .turns import Turn

__all__ = ["FollowedLeg"]

LAST_ANSWERS_TIMEOUT: Final = 30.0
"""Seconds that a gateway may send nothing while the visitor waits for responses and is not read."""

MAX_OUTSTANDING: Final = 1024
"""Requests without a response. At this number the visitor is not read."""

FREE_WORK: Final = 32
"""Work on a piece of a response that needs no turn. Most responses need no more."""

_WITHOUT_END: Final = frozenset({ResponsePhase.UNKNOWN, ResponsePhase.SWITCHED})


@final
class FollowedLeg(Leg):
    """The visitor's side of an exchange.

    Args:
        leg: the visitor's connection.
        head: of the first request. The caller forwards it, and then what `take_ready` returns.
        received: the bytes that were read after the head.
        turn: asked for before work on much data.
        head_timeout: seconds for a later head, from its first byte.
        keep_alive_timeout: seconds that the connection may be idle between requests.
        stream_of, removes: see `RequestFollower`.
        observer: is told of requests and responses; None for nobody.

    Attributes:
        handed_over: True when the exchange has left the connection open.
    """

    __slots__ = (
        "_answer_turn",
        "_awaits_gateway",
        "_awaits_visitor",
        "_clock",
        "_deadline",
        "_end_sent",
        "_failure",
        "_finishing",
        "_follower",
        "_gateway_ended",
        "_granted",
        "_head_deadline",
        "_head_timeout",
        "_keep_alive_timeout",
        "_last_activity",
        "_leg",
        "_ready",
        "_responses",
        "_silence",
        "_turn",
        "_unfollowed",
        "_unpassed",
        "_visitor_ended",
        "handed_over",
    )

    def __init__(
        self,
        leg: Leg,
        head: RequestHead,
        received: bytes,
        turn: Turn,
        *,
        head_timeout: float,
        keep_alive_timeout: float = math.inf,
        stream_of: Callable[[RequestHead], Hashable] = host_of,
        removes: Collection[bytes] = (),
        observer: ResponseObserver | None = None,
    ) -> None:
        super().__init__()
        self.handed_over: bool = False
        self._leg: Final = leg
        self._responses: Final = ResponseFollower(observer)
        self._follower: Final = RequestFollower(head, self._responses, stream_of, removes)
        self._head_timeout: Final = head_timeout
        self._keep_alive_timeout = keep_alive_timeout
        reactor = Reactor.current()
        # From the visitor
        self._ready = self._follower.feed(received)
        self._turn: Final = turn
        self._granted = False
        self._unfollowed: bytes | None = leg.prefix or None  # was received, and waits for a turn
        self._visitor_ended = False
        self._awaits_visitor = False
        self._awaits_gateway = False
        self._finishing = False
        self._failure = ""
        self._head_deadline = math.inf
        self._last_activity = math.inf  # when a byte last passed, either way
        self._clock: Final = reactor.turn
        # Of the visitor's next byte. It may come too early, since most deadlines are put off many times.
        self._deadline: Final = reactor.timer(self._on_deadline)
        self._silence: Timer | None = None  # of the gateway's next byte, while that has a deadline
        # To the visitor
        self._answer_turn: Turn | None = None  # made for the first answer that takes much work
        self._unpassed: tuple[bytes, int] | None = None  # was sent, and waits for a turn
        self._gateway_ended = False
        self._end_sent = False

    @property
    def next_request(self) -> tuple[RequestHead, bytes] | None:
        """After the handover: the request that needs another stream, and all bytes from there."""
        return self._follower.next_request

    @property
    def refused_request(self) -> BadRequest | None:
        """After the handover: the error to answer."""
        return self._follower.refusal

    def end_when_idle(self) -> None:
        """Hand the connection over, to be closed, as soon as it is idle between requests."""
        self._keep_alive_timeout = 0.0
        self._limit_wait()

    def take_ready(self) -> list[Piece]:
        """Take what may be forwarded of the bytes that were received so far."""
        ready, self._ready = self._ready, []
        return ready

    @property
    def tasks(self) -> Sequence[Callable[[], Awaitable[None]]]:
        return self._leg.tasks

    def attach(self) -> None:
        self._leg.on_readable, self._leg.on_writable = self.on_readable, self._on_leg_writable
        self._leg.attach()

    def detach(self) -> None:
        self._forget()
        self._leg.detach()

    def close(self) -> bool:
        self._forget()
        return self._leg.close()

    def _forget(self) -> None:
        self._deadline.close()
        self._end_silence()
        self._turn.leave()
        if self._answer_turn is not None:
            self._answer_turn.leave()
        self._leg.on_readable = self._leg.on_writable = nothing

    @property
    def broken(self) -> bool:
        return bool(self._failure) or self._leg.broken

    # From the visitor

    def receive(self, max_bytes: int) -> Piece | None:
        """Take what may be forwarded next; b"" at the visitor's EOF.

        Raises:
            HandedOver: nothing more may be forwarded, and each request has its whole response.
            trio.BrokenResourceError: the visitor's connection broke, or one side was silent for too long.
        """
        if self._failure:
            raise trio.BrokenResourceError(self._failure)
        follower = self._follower
        while not self._ready:
            reads = follower.reads
            # Otherwise neither of the two is the case.
            if not reads or self._awaits_gateway or self._responses.outstanding >= MAX_OUTSTANDING:
                if follower.is_over:
                    return self._finish()
                if self._must_await_gateway():
                    self._raise_if_left()
                    return b"" if self._gateway_ended else None
            data = self._unfollowed
            if data is None:
                data = self._receive(max_bytes) if reads or not (follower.holds or follower.has_more) else b""
                if data is None:
                    return None
            if not (self._granted or self._turn.ask(self._on_granted)):
                self._unfollowed = data
                return None
            self._follow(data)
            if self._visitor_ended and not (self._ready or follower.is_over):
                return b""
        piece = self._ready[0]
        if len(piece) > max_bytes:
            view = memoryview(piece)
            self._ready[0] = view[max_bytes:]
            return view[:max_bytes]
        del self._ready[0]
        return piece

    @property
    def held(self) -> int:
        return self._leg.held

    @property
    def drained(self) -> bool:
        return self._awaits_visitor and not self._ready

    def _must_await_gateway(self) -> bool:
        held_back = self._follower.phase is Phase.HELD and self._follower.holds and self._responses.awaits_upgrade
        self._awaits_gateway = held_back or self._responses.outstanding >= MAX_OUTSTANDING
        if not self._awaits_gateway:
            self._end_silence()
        elif not self._follower.holds and self._silence is None:
            self._limit_silence()  # the response to an Upgrade has no deadline, like any response
        return self._awaits_gateway

    def _follow(self, data: bytes) -> None:
        self._granted, self._unfollowed = False, None
        follower = self._follower
        pieces = follower.feed(data)
        self._turn.spend(follower.work)
        awaits_response = self._responses.outstanding > 0
        if pieces:
            self._ready = pieces
            self._head_deadline = math.inf  # a head that had begun is whole
            if not awaits_response:  # which is activity when it comes
                self._note_activity()
        if self._leg.drained and follower.reads:
            self._awaits_visitor = True
            if not awaits_response or follower.head_begun:
                self._limit_wait()

    def _receive(self, max_bytes: int) -> bytes | None:
        """Receive from the visitor; b"" at its EOF, of which the follower is notified."""
        try:
            data = self._leg.receive(max_bytes if max_bytes <= LEAST_READ else min(max_bytes, self._follower.read_size))
        except trio.ClosedResourceError:
            if not self._end_sent:
                raise
            data = b""  # `send_eof` has ended TLS, which ends both directions
        if data is None:
            self._awaits_visitor = True
            self._limit_wait()
            return None
        self._awaits_visitor = False
        if not data:
            self._visitor_ended = True
            self._follower.end()
        return bytes(data)

    def _on_granted(self) -> None:
        self._granted = True
        self.on_readable()

    def _note_activity(self) -> None:
        """A byte passes now."""
        now = self._clock.started
        self._last_activity = self._clock.now() if now is None else now

    def _limit_wait(self) -> None:
        """Set the deadline, unless there is an earlier one."""
        due = self._due()
        if due < self._deadline.deadline:
            self._deadline.move(due)

    def _due(self) -> float:
        """The time at which the next byte from the visitor is due."""
        if not self._awaits_visitor:
            return math.inf
        if self._follower.head_begun:
            if self._head_deadline == math.inf:
                self._head_deadline = self._clock.now() + self._head_timeout
            return self._head_deadline
        if self._responses.idle and self._follower.phase is Phase.HEAD and self.sent:
            return self._last_activity + self._keep_alive_timeout
        # No deadline in a body or during a response: that is for the gateway to decide.
        return math.inf

    def _on_deadline(self) -> None:
        due = self._due()
        if due > trio.current_time():
            self._deadline.move(due)
            return
        if self._follower.head_begun:
            self._follower.give_up(self._head_timeout)
        elif self._end_sent:
            self._failure = "the gateway has ended, and the visitor stays"
        else:
            self._follower.stop()
        self.on_readable()

    def _finish(self) -> bytes | None:
        """Hand over when each request has its response. Returns b"" if nothing can be sent after the responses."""
        if self._responses.idle and not self._end_sent:
            if self.sent:
                self.handed_over = True
                raise HandedOver
            return None  # the visitor still reads the last response
        self._raise_if_left()
        if self._silence is None:
            self._limit_silence()
        over = self._responses.idle or self._gateway_ended or self._responses.phase in _WITHOUT_END
        self._finishing = self._awaits_gateway = not over
        return b"" if over else None

    def _raise_if_left(self) -> None:
        """To be called before the gateway is awaited: meanwhile the visitor is not read, and so could not say it."""
        if self._leg.broken:
            raise trio.BrokenResourceError("the visitor has left before it was answered")

    def _limit_silence(self) -> None:
        if self._silence is None:
            self._silence = Reactor.current().timer(self._on_silence)
        self._silence.move(trio.current_time() + LAST_ANSWERS_TIMEOUT)

    def _end_silence(self) -> None:
        if self._silence is not None:
            self._silence.close()
            self._silence = None

    def _on_silence(self) -> None:
        self._failure = "the gateway sent nothing of a response for too long"
        self.on_readable()

    # To the visitor

    def send(self, data: Bytes) -> bool:
        """Send the visitor the part of `data` that answers its requests.

        Raises:
            trio.ClosedResourceError: some of `data` answers no request, or `send_eof` was called.
        """
        if self._end_sent:
            raise trio.ClosedResourceError("the gateway has no more to say here")
        data = bytes(data)
        return self._pass_on(data, self._responses.feed(data, max_work=FREE_WORK))

    def _pass_on(self, data: bytes, passed: int, *, granted: bool = False) -> bool:
        """Send what of `data` answers a request: its first `passed` bytes, and more after work that needs a turn.

        Returns as `send`.
        """
        responses = self._responses
        while passed < len(data) and not responses.idle:
            turn = self._answer_turn = self._answer_turn or self._turn.another()
            if not (granted or turn.ask(self._on_answer_granted)):
                self._unpassed = data, passed
                return False
            granted = False
            passed = responses.feed(data, passed)
            turn.spend(responses.work)
        self._unpassed = None
        piece = data if passed == len(data) else memoryview(data)[:passed]
        sent = self._leg.send(piece) if passed else self._leg.sent
        self._note_activity()
        if self._last_activity + self._keep_alive_timeout < self._deadline.deadline:
            self._limit_wait()
        if self._silence is not None:
            self._limit_silence()
        if self._awaits_gateway:
            self.on_readable()
        if passed < len(data):
            raise trio.ClosedResourceError("the gateway sends what answers no request")
        return sent

    def _on_answer_granted(self) -> None:
        assert self._unpassed is not None
        data, passed = self._unpassed
        try:
            self._pass_on(data, passed, granted=True)
        except Exception as error:  # noqa: BLE001  # the exchange raises it
            self.refusal = error
        self.on_writable()

    def _on_leg_writable(self) -> None:
        self.refusal = self.refusal or self._leg.refusal
        if self._leg.sent:
            self._note_activity()
        self._limit_wait()
        self.on_writable()
        if self._follower.is_over:
            self.on_readable()  # the visitor has the last response

    @property
    def room(self) -> int:
        return self._leg.room if self._unpassed is None else 0

    @property
    def sent(self) -> bool:
        return self._unpassed is None and self._leg.sent

    def send_eof(self) -> None:
        """The gateway sent EOF: end the visitor's connection, unless it is about to be handed over.

        Raises:
            trio.ClosedResourceError: the request side has ended, and a response is not complete.
        """
        self._gateway_ended = True
        if self._follower.is_over and not self._responses.is_last:
            if not self._responses.idle:
                raise trio.ClosedResourceError("the gateway has ended before its response did")
        else:
            self._end_sent = True
            self._leg.send_eof()
        if self._awaits_gateway:
            self.on_readable()
