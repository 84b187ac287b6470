"""Where each of a visitor's requests ends, so that none reaches a tunnel that it does not name. No I/O.

A visitor's connection may carry requests for several tenants: a proxy in front of the relay keeps connections and sends
any request on them. `RequestFollower` follows the requests of one stream to a gateway, and decides which bytes may be
forwarded: slices of what came, in order and unchanged. The caller has read the first head, has found its gateway, and
forwards it. Then:

    feed      takes bytes from the visitor; returns what may be forwarded now. It limits the work of one call: while
              `has_more`, call `feed(b"")` to go on, and feed nothing new
    end       the visitor sent EOF

Rules:

    1. A head is forwarded when it is complete, valid, and names the host of the first head. It is the same parsed host
       that chose the gateway (`RequestHead.host`). What `head` refuses is refused here as well.
    2. `bodies` finds the end of a body. A chunk's size line, a chunk's line end and each trailer are forwarded when
       they are complete and valid; anything else is a 400.
    3. Of what is refused, the bytes before the error are forwarded, and nothing after it.
    4. After a request with Upgrade the connection may no longer be HTTP. So the bytes after it are held until its
       response is known: after a 101 all bytes pass, in both directions; after any other response requests are
       followed as before.
    5. A valid head for another host, or with Upgrade, needs a stream of its own (`next_request`), which may start when
       every request before it has its response. So does any head after a response that ends with the gateway's stream.
       The response to an Upgrade is therefore the first on its stream: no part of an earlier response can look like a
       101.
    6. `Connection: close` and HTTP/1.0 change nothing. If a gateway reads on after such a request, it reads only
       requests that were followed.

The result does not depend on the pieces in which the bytes come. Memory is bounded: one head, one line, the held bytes
and the next request, each with at most one piece beyond its bound.

With `removes`, the lines of some headers are left out of later heads: those with which access rules are satisfied.

Most requests are plain (`plain`). One with the same Host header as the first is forwarded without being parsed, where
only the host decides about its stream, and no observer wants to know more of it.

`RequestReader` has what does not depend on rules 1 and 5. `rewriting` has another class of it, which changes heads.
"""

from __future__ import annotations

import enum
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Final, TypeAlias, final

from .._model.errors import LocalProtocolError
from .bodies import MAX_WORK, BodyReader, Data
from .head import MAX_LINE, BadRequest, HeadReader, RequestHead
from .plain import PLAIN_REQUEST
from .removing import without_headers
from .responses import ResponseFollower, ResponsePhase

__all__ = ["LEAST_READ", "Phase", "Piece", "RequestFollower", "RequestReader", "host_of"]

Piece: TypeAlias = bytes | bytearray | memoryview

_HEAD_COST: Final = 16  # in units of `Turn.spend`
_PLAIN_COST: Final = 8
LEAST_READ: Final = 16 * 1024
"""Bytes that may be fed at once in any phase."""
_HEAD_END: Final = b"\r\n\r\n"


class Phase(enum.Enum):
    """What the next byte from the visitor belongs to."""

    __hash__ = object.__hash__  # that of `Enum` is a Python function

    HEAD = "a head, or nothing yet"
    BODY = "a body"
    HELD = "unknown until the response to an Upgrade"
    OPAQUE = "another protocol than HTTP"
    NEXT = "a request that needs a stream of its own"
    REFUSED = "nothing that is forwarded"
    STOPPED = "a connection that is closed next"


class _Found(enum.Enum):
    """Events of the state machine."""

    __hash__ = object.__hash__  # as above

    BODY = "a head with a body"
    NEXT = "a later head that needs a stream of its own"
    END = "the end of a request"
    END_PENDING = "the end of a request with Upgrade that has no response yet"
    END_SWITCHED = "the end of a request whose response is a 101"


_ENDS: Final = {_Found.END: Phase.HEAD, _Found.END_PENDING: Phase.HELD, _Found.END_SWITCHED: Phase.OPAQUE}
# A refusal can happen in any phase, and is final.
_TRANSITIONS: Final[Mapping[Phase, Mapping[_Found, Phase]]] = {
    Phase.HEAD: {_Found.BODY: Phase.BODY, _Found.NEXT: Phase.NEXT, **_ENDS},
    Phase.BODY: _ENDS,
    Phase.HELD: _ENDS,
    Phase.OPAQUE: {},
    Phase.NEXT: {},
    Phase.REFUSED: {},
    Phase.STOPPED: {},
}


_READ: Final = frozenset({Phase.HEAD, Phase.BODY})
"""The phases in which the visitor's bytes belong to requests."""
_FOLLOWED: Final = frozenset({ResponsePhase.HEAD, ResponsePhase.BODY})
"""The phases after which another response may come."""


class RequestReader(ABC):
    """Finds where the requests of one stream end. A subclass decides about each head.

    Args:
        responses: follows the responses. This class calls its `expect` for each head that may be forwarded, and asks
            it about Upgrades.
        body: reads the bodies.

    Attributes:
        phase: what the next byte belongs to.
        refusal: in phase `REFUSED`, the error to answer when every request before it has its response.
        next_request: in phase `NEXT`, the head of the request that needs another stream, and all bytes from there.
        work: the cost of the last `feed`, in units of `Turn.spend`.
    """

    __slots__ = (
        "_body",
        "_forwarded",
        "_heads",
        "_held",
        "_of_head",
        "_omit_body",
        "_pieces",
        "_plain_host",
        "_responses",
        "_rest",
        "next_request",
        "phase",
        "refusal",
        "work",
    )

    def __init__(self, responses: ResponseFollower, body: BodyReader) -> None:
        self.phase = Phase.HEAD
        self.refusal: BadRequest | None = None
        self.next_request: tuple[RequestHead, bytes] | None = None
        self._responses: Final = responses
        # A plain request with this Host header is forwarded. None if more of a head matters.
        self._plain_host: bytes | None = None
        self._heads: HeadReader | None = None  # of the next head, when a part of it has come
        self._of_head = 0  # bytes that it has
        self._body: Final = body
        self._omit_body = False  # of the request whose body is read
        self._pieces: list[Piece] = []  # what may be forwarded now
        self._forwarded = 0  # the position in the fed data up to which `_pieces` has it
        self._held = b""
        self._rest: tuple[Data, int] | None = None  # data that was not processed yet, and where that begins
        self.work = 0

    @property
    def is_over(self) -> bool:
        """True when nothing more will be forwarded."""
        return self.phase is Phase.NEXT or self.phase is Phase.REFUSED or self.phase is Phase.STOPPED

    @property
    def head_begun(self) -> bool:
        """True while a part of a head has come. The empty line before a head does not count."""
        if self._heads is None:
            return False
        return self._of_head > 2 or self._heads.received not in {b"\r", b"\r\n"}

    @property
    def _omits_body_of_head(self) -> bool:
        """Whether the head of which a part has come begins with the method HEAD."""
        return self._heads is not None and self._heads.omit_body

    @property
    def holds(self) -> bool:
        """True while bytes wait for the response to an Upgrade. After that response, `feed(b"")` returns them."""
        return self.phase is Phase.HELD and bool(self._held)

    @property
    def has_more(self) -> bool:
        """True while there are bytes that were fed and not processed."""
        return self._rest is not None

    @property
    def reads(self) -> bool:
        """True when the visitor's next bytes are to be fed as they come: nothing waits, and they belong to requests."""
        return self.phase in _READ and self._rest is None

    @property
    def read_size(self) -> int:
        """The most bytes to feed at once. The bound keeps calls short, since they may be many requests or chunks."""
        match self.phase:
            case Phase.OPAQUE:
                return sys.maxsize
            case Phase.BODY:
                return self._body.read_size
        return LEAST_READ

    def feed(self, data: Data) -> list[Piece]:
        """Take the visitor's next bytes. Returns what may be forwarded now, as views of `data` where possible.

        A refusal is not raised, see `refusal`.

        Raises:
            LocalProtocolError: bytes are held for a response, the next request was found, or `data` is not empty while
                `has_more`.
        """
        waits = self._held and self._responses.awaits_upgrade
        if waits or self.next_request is not None or (data and self._rest is not None):
            raise LocalProtocolError("the follower has to get rid of what came before this first")
        if self.phase is Phase.HELD:
            self._end_request()
        start = 0
        if self._rest is not None:
            (data, start), self._rest = self._rest, None
        elif self._held:
            data, self._held = self._held + data, b""
        self._forwarded = start
        self.work = 0
        passed = start
        try:
            while passed < len(data) and (read := _READERS.get(self.phase)) is not None:
                if self.work >= MAX_WORK:
                    self._rest = data, passed
                    break
                settled = read(self, data, passed)
                if settled is None:
                    break
                passed = settled
        except BadRequest as refusal:
            if self.phase is not Phase.HEAD:
                refusal.omit_body = self._omit_body
            self._refuse(refusal)
        if self.phase is Phase.OPAQUE:
            passed = len(data)
        elif self.phase is Phase.HELD:
            self._held = bytes(memoryview(data)[passed:])
        self._forward(data, passed)
        pieces, self._pieces = self._pieces, []
        return pieces

    def _forward(self, data: Data, end: int) -> None:
        """Let `data` up to `end` pass, as far as it has not passed yet."""
        start, self._forwarded = self._forwarded, end
        if start < end:
            self._pieces.append(data if end - start == len(data) else memoryview(data)[start:end])

    def end(self) -> None:
        """The visitor sent EOF. Within a head that is refused; elsewhere the gateway decides."""
        if self.head_begun and not self.is_over:
            refusal = BadRequest(400, "The request ended before its head did.", omit_body=self._omits_body_of_head)
            self._refuse(refusal)

    def give_up(self, seconds: float) -> None:
        """Refuse a head that is not complete after `seconds`."""
        reason = f"No whole request head came within {seconds:g} seconds."
        self._refuse(BadRequest(408, reason, omit_body=self._omits_body_of_head))

    def stop(self) -> None:
        """Forward nothing more: the connection was idle for too long. `refusal` stays None."""
        self.phase = Phase.STOPPED

    # The readers of the phases. Each returns the position up to which `data` may be forwarded, or None if the item is
    # incomplete and was kept.

    def _read_head(self, data: Data, start: int) -> int | None:
        if self._plain_host is not None and not self._of_head and self._responses.phase in _FOLLOWED:
            plain = PLAIN_REQUEST.match(data, start, start + MAX_LINE)
            if plain is not None and plain[1] == self._plain_host:
                return self._pass_plain(plain, data)
        # Feed one head only: the reader keeps what it gets, and `data` may have many heads.
        end = data.find(_HEAD_END, start)
        before, piece = self._of_head, memoryview(data)[start : len(data) if end < 0 else end + len(_HEAD_END)]
        heads = self._heads or HeadReader()
        head = heads.feed(piece)
        self.work += 1
        if head is None:  # then `piece` was the rest of `data`
            self._heads, self._of_head = heads, before + len(piece)
            return None
        self.work += _HEAD_COST + len(head.headers) // 2
        received = heads.received
        self._heads, self._of_head = None, 0
        end = start + head.length - before
        if not self._take_head(head, received, data, start, end):
            return None
        return end

    def _pass_plain(self, plain: re.Match[bytes], data: Data) -> int:
        """Forward the head of a plain request; and its body, if all of it has come. The general way does the same."""
        self.work += _PLAIN_COST
        self._responses.expect_plain()
        length, end = int(plain[2] or 0), plain.end()
        if end + length <= len(data):
            return end + length
        self._omit_body = False
        self._body.begin(length, chunked=False)
        self._go(_Found.BODY)
        return end

    @abstractmethod
    def _take_head(self, head: RequestHead, received: bytes, data: Data, start: int, end: int) -> bool:
        """Forward a head and begin its body, or do neither.

        Args:
            head: of the next request.
            received: its bytes, and maybe more.
            data: what was fed.
            start: where `data` has the head, or the rest of it that had not come in earlier pieces.
            end: the position after it.

        Returns:
            True if the head was forwarded.
        """

    def _demand_stream(self, head: RequestHead, received: bytes, data: Data, start: int, end: int) -> None:
        """The request needs a stream of its own. The arguments are those of `_take_head`."""
        self._go(_Found.NEXT)
        self.next_request = head, received[: head.length - (end - start)] + bytes(memoryview(data)[start:])

    def _begin_body(self, head: RequestHead) -> None:
        self._responses.expect(head)
        self._omit_body = head.omit_body
        if head.content_length or head.chunked:
            self._body.begin(head.content_length, chunked=head.chunked)
            self._go(_Found.BODY)
        else:
            self._end_request()

    def _read_body(self, data: Data, start: int) -> int | None:
        self._body.work = self.work
        end = self._body.read(data, start)
        self.work = self._body.work
        if kept := self._body.take_kept():
            self._pieces.append(kept)
        if self._body.complete:
            self._end_request()
        return end

    def _end_request(self) -> None:
        if self._responses.awaits_upgrade:
            self._go(_Found.END_PENDING)
        elif self._responses.phase is ResponsePhase.SWITCHED:
            self._go(_Found.END_SWITCHED)
        else:
            self._go(_Found.END)

    def _go(self, found: _Found) -> None:
        self.phase = _TRANSITIONS[self.phase][found]

    def _refuse(self, refusal: BadRequest) -> None:
        self.refusal = refusal
        self.phase = Phase.REFUSED
        self._held = b""


# Not in each reader: there, bound methods would be a reference cycle.
_READERS: Final[Mapping[Phase, Callable[[RequestReader, Data, int], int | None]]] = {
    Phase.HEAD: RequestReader._read_head,
    Phase.BODY: RequestReader._read_body,
}


def host_of(head: RequestHead) -> str:
    """The host that a request names."""
    return head.host


@final
class RequestFollower(RequestReader):
    """Follows the requests of one stream to a gateway, and forwards them as they are. See the module.

    Args:
        head: of the first request. The caller forwards it.
        responses: follows the gateway's responses.
        stream_of: what a later head must have in common with the first one, to use the same stream; by default the
            host.
        removes: names of headers that are left out of later heads, and refused as trailers.
    """

    __slots__ = ("_removes", "_stream", "_stream_of")

    def __init__(
        self,
        head: RequestHead,
        responses: ResponseFollower,
        stream_of: Callable[[RequestHead], Hashable] = host_of,
        removes: Collection[bytes] = (),
    ) -> None:
        super().__init__(responses, BodyReader(removes.__contains__ if removes else None))
        self._removes: Final = removes
        self._stream_of: Final = stream_of
        self._stream: Final = stream_of(head)
        if stream_of is host_of and not (removes or responses.observed):
            self._plain_host = head.host_header
        self._begin_body(head)

    def _take_head(self, head: RequestHead, received: bytes, data: Data, start: int, end: int) -> bool:
        before = head.length - (end - start)
        if self._stream_of(head) != self._stream or head.asks_upgrade or self._responses.is_last:
            self._demand_stream(head, received, data, start, end)
            return False
        if self._removes:
            self._forward(data, start)
            self._pieces.append(without_headers(head, received, self._removes))
            self._forwarded = end
        elif before:
            self._pieces.append(received[:before])
        self._begin_body(head)
        return True
