"""A visitor's stream as a leg whose requests reach the local server with changed heads.

The exchange moves bytes between this leg and the local server. `receive` returns what `RequestRewriter` makes of the
visitor's bytes. `send` passes the server's bytes on unchanged; they are followed, since only they say whether a
connection has become a WebSocket. Then the bytes pass in both directions.

A request that cannot be followed is not passed on. When every request before it has its whole response, the leg raises
`HandedOver`, and the caller answers with `refusal`. The same happens with a request that has to be checked first, and
that the caller may bring to another connection. Where no answer can follow, since the response before it ends with
the stream, the exchange ends as the server ends it.

There are no deadlines: the server has its own, as for any connection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

import trio

from .._http.forwarded import HeaderRules
from .._http.head import BadRequest, RequestHead
from .._http.requests import Phase, Piece
from .._http.responses import ResponseFollower, ResponseObserver, ResponsePhase
from .._http.rewriting import RequestRewriter
from .._net.fastpath.event_loop import Reactor
from .._net.leg import Bytes, Leg
from ..exchange.exchange import HandedOver
from .leg_around import LegAround

__all__ = ["RewritingLeg"]

MAX_OUTSTANDING: Final = 1024
"""Requests without a response. At this number the visitor is not read."""

_BATCH: Final = 16 * 1024
"""Bytes that a batch of work counts as, when others have their turn after it."""

_WITHOUT_END: Final = frozenset({ResponsePhase.UNKNOWN, ResponsePhase.SWITCHED})


@final
class RewritingLeg(LegAround):
    """The visitor's side of an exchange with a local server.

    Args:
        leg: the visitor's stream.
        rules: the changes.
        received: bytes that were read from the visitor before.
        allows: see `RequestRewriter`.
        observer: gets the requests and responses; None for none.

    Attributes:
        handed_over: True when the exchange has left the visitor's stream open, for the answer to `refused_request` or
            for `next_request`.
    """

    def __init__(
        self,
        leg: Leg,
        rules: HeaderRules,
        *,
        received: bytes = b"",
        allows: Callable[[RequestHead], bool] | None = None,
        observer: ResponseObserver | None = None,
    ) -> None:
        super().__init__(leg)
        self.handed_over: bool = False
        self._responses: Final = ResponseFollower(observer)
        self._requests: Final = (
            RequestRewriter(rules, self._responses)
            if allows is None
            else RequestRewriter(rules, self._responses, allows)
        )
        self._reactor: Final = Reactor.current()
        self._unread, leg.prefix = received + leg.prefix, b""
        self._ready: list[Piece] = []
        self._had_its_batch = False
        self._visitor_ended = False
        self._awaits_server = False
        self._server_ended = False
        self._end_sent = False

    @property
    def refused_request(self) -> BadRequest | None:
        """After the handover: the error to answer."""
        return self._requests.refusal

    @property
    def next_request(self) -> tuple[RequestHead, bytes] | None:
        """After the handover: the request that has to be checked, and all bytes from there."""
        return self._requests.next_request

    @property
    def _goes_on(self) -> bool:
        """Whether the visitor's stream is needed after the responses: for an answer, or for another request."""
        return self._requests.refusal is not None or self._requests.next_request is not None

    # From the visitor

    def receive(self, max_bytes: int) -> Bytes | None:
        """Take what the server gets next; b"" at the visitor's EOF.

        Raises:
            HandedOver: there is a refusal, and each request before it has its whole response.
            trio.BrokenResourceError: the visitor's connection is broken.
            trio.ClosedResourceError: the stream was closed.
        """
        requests = self._requests
        if requests.phase is Phase.OPAQUE and not self._ready:
            return self._leg.receive(max_bytes)
        while not self._ready:
            if requests.is_over:
                return self._finish()
            if self._must_await_server():
                if self._leg.broken:
                    raise trio.BrokenResourceError("the visitor's connection is broken")
                return b"" if self._server_ended else None
            if requests.has_more and not self._had_its_batch:
                self._reactor.queue(self._go_on)
                return None
            self._had_its_batch = False
            if self._visitor_ended and not requests.has_more:
                return b""
            data = self._next_data(max_bytes)
            if data is None:
                return None
            self._ready = requests.feed(bytes(data))
        piece = self._ready[0]
        if len(piece) > max_bytes:
            view = memoryview(piece)
            self._ready[0] = view[max_bytes:]
            return view[:max_bytes]
        del self._ready[0]
        return piece

    def _next_data(self, max_bytes: int) -> Bytes | None:
        """What to feed next: b"" to go on with what was fed before, and at EOF, of which the rewriter is notified."""
        requests = self._requests
        if requests.holds or requests.has_more:
            return b""
        if self._unread:
            data, self._unread = self._unread, b""
            return data
        received = self._leg.receive(min(max_bytes, requests.read_size))
        if received is not None and not received:
            self._visitor_ended = True
            requests.end()
        return received

    def _must_await_server(self) -> bool:
        held_back = self._requests.holds and self._responses.awaits_upgrade
        self._awaits_server = held_back or self._responses.outstanding >= MAX_OUTSTANDING
        return self._awaits_server

    def _go_on(self) -> int:
        self._had_its_batch = True
        self.on_readable()
        return _BATCH

    def _finish(self) -> bytes | None:
        """Nothing more is passed on: hand over for an answer, wait until that is possible, or end."""
        responses = self._responses
        answers = responses.idle and self._goes_on and not self._end_sent
        if answers and self._leg.sent:
            self.handed_over = True
            raise HandedOver
        over = responses.idle or self._server_ended or responses.phase in _WITHOUT_END
        self._awaits_server = answers or not over
        if not self._awaits_server:
            return b""
        if self._leg.broken:
            raise trio.BrokenResourceError("the visitor's connection is broken")
        return None

    @property
    def drained(self) -> bool:
        return self._requests.phase is Phase.OPAQUE and not self._ready and self._leg.drained

    moves_bulk = True

    def move_bulk(self, sink: Leg) -> int:
        return self._leg.move_bulk(sink) if self._requests.phase is Phase.OPAQUE and not self._ready else 0

    # To the visitor

    def send(self, data: Bytes) -> bool:
        responses = self._responses
        if responses.phase not in _WITHOUT_END:
            data = bytes(data)
            passed = 0
            while passed < len(data) and not responses.idle:
                passed = responses.feed(data, passed)
            if passed < len(data):
                responses.stop()  # it answers no request, so what follows cannot be told from a response
        sent = self._leg.send(data)
        self._look_at_responses()
        return sent

    def _look_at_responses(self) -> None:
        if self._awaits_server:
            self.on_readable()

    def _on_leg_writable(self) -> None:
        super()._on_leg_writable()
        self._look_at_responses()

    def send_eof(self) -> None:
        self._server_ended = True
        if not (self._goes_on and self._responses.idle):
            self._end_sent = True
            self._leg.send_eof()
        self._look_at_responses()
