"""Where each of a visitor's requests ends, so that no later one goes to a tunnel that it does not name. No I/O.

A visitor's connection may carry requests for several tenants: a proxy in front of the relay keeps connections and
sends any request on them. `RequestFollower` follows the requests of one stream to a gateway through everything that the
visitor says, and decides which bytes may be forwarded: slices of what came, in the order in which it came, never
changed. Its maker has read the first head, has found a gateway for it, and forwards it. Then:

    feed      what the visitor says; returns what may be forwarded now. Of many small items only a part is looked at:
              while `has_more`, `feed(b"")` goes on, and takes nothing new
    end       the visitor has ended

It keeps to these rules:

    1. A head is forwarded when it is complete and valid and names the host of the first; the same parsed host that
       chose the gateway (`RequestHead.host`). What `head` refuses, it refuses here as well.
    2. The end of a body is found by `bodies`. The line of a chunk, its end and each trailer are forwarded when they are
       complete and valid; anything else is a 400.
    3. What is refused is forwarded to its last good byte, and from then on nothing is.
    4. A request with Upgrade may be the last that is HTTP. What comes after it is held until its response is there:
       after a 101 the rest, both ways, is another protocol; after any other response requests go on being followed.
    5. A valid head for another host, or with Upgrade, needs a stream of its own (`next_request`), which may start when
       everything before it is answered. So does any head after a response that only the gateway's end ends. The answer
       to an Upgrade is the first on its stream: nothing in an earlier response can pass for a 101.
    6. `Connection: close` and HTTP/1.0 change nothing. Whether a gateway reads on after such a request is its own
       business; if it does, it reads no request that was not followed.

The verdict depends on the bytes alone, not on the pieces in which they come. What is kept is one head, one line, what
is held for a response, and the next request: one piece each at the most, beyond their bounds.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable, Mapping
from typing import Final, TypeAlias, final

from .._model.errors import LocalProtocolError
from .bodies import MAX_WORK, BodyReader, Data
from .head import BadRequest, HeadReader, RequestHead, wants_upgrade
from .responses import ResponseFollower, ResponsePhase

__all__ = ["Phase", "Piece", "RequestFollower"]

Piece: TypeAlias = bytes | bytearray | memoryview

_HEAD_COST: Final = 16  # in units of `Turn.spend`
_SMALL: Final = 16 * 1024
_HEAD_END: Final = b"\r\n\r\n"


class Phase(enum.Enum):
    """What the next byte of the visitor belongs to."""

    HEAD = "a head, or nothing yet"
    BODY = "a body"
    HELD = "what the response to an Upgrade decides"
    OPAQUE = "another protocol than HTTP"
    NEXT = "a request that needs a stream of its own"
    REFUSED = "nothing that is forwarded"


class _Found(enum.Enum):
    """What can be found, or decided."""

    BODY = "a head with a body"
    NEXT = "a later head that needs a stream of its own"
    END = "the end of a request"
    END_PENDING = "the end of one whose Upgrade has no response"
    END_SWITCHED = "the end of one whose response is a 101"


_ENDS: Final = {_Found.END: Phase.HEAD, _Found.END_PENDING: Phase.HELD, _Found.END_SWITCHED: Phase.OPAQUE}
# A refusal may follow on any phase, and nothing follows on it.
_TRANSITIONS: Final[Mapping[Phase, Mapping[_Found, Phase]]] = {
    Phase.HEAD: {_Found.BODY: Phase.BODY, _Found.NEXT: Phase.NEXT, **_ENDS},
    Phase.BODY: _ENDS,
    Phase.HELD: _ENDS,
    Phase.OPAQUE: {},
    Phase.NEXT: {},
    Phase.REFUSED: {},
}


@final
class RequestFollower:
    """Follows the requests of one visitor's connection. See the module.

    Args:
        head: the first; its maker forwards it.
        responses: follows what the gateway sends; it is told of each head that may be forwarded, and knows what
            became of an Upgrade.

    Attributes:
        phase: what the next byte belongs to.
        refusal: what to answer when everything before it is answered, once the phase is `REFUSED`.
        next_request: what to start a stream of its own with, once the phase is `NEXT`: the head, and all bytes from
            there.
        work: what the last call of `feed` has cost, in units of `Turn.spend`.
    """

    def __init__(self, head: RequestHead, responses: ResponseFollower) -> None:
        self.phase = Phase.HEAD
        self.refusal: BadRequest | None = None
        self.next_request: tuple[RequestHead, bytes] | None = None
        self._host: Final = head.host
        self._responses: Final = responses
        self._heads = HeadReader()
        self._of_head = 0  # bytes of the next head that are with its reader
        self._body: Final = BodyReader()
        self._omit_body = False  # in the response to the request whose body is read
        self._kept = b""  # what came in earlier pieces of the head or line that is whole now
        self._held = b""
        self._rest: tuple[Data, int] | None = None  # what was not looked at yet begins there
        self.work = 0
        self._readers: Final[Mapping[Phase, Callable[[Data, int], int | None]]] = {
            Phase.HEAD: self._read_head,
            Phase.BODY: self._read_body,
        }
        self._begin_body(head)

    @property
    def is_over(self) -> bool:
        """True when nothing more will be forwarded, whatever comes."""
        return self.phase is Phase.REFUSED or self.phase is Phase.NEXT

    @property
    def head_begun(self) -> bool:
        """True while a part of a head is there. The empty line that may stand before one is none."""
        return self._of_head > 2 or (self._of_head > 0 and self._heads.received not in {b"\r", b"\r\n"})

    @property
    def holds(self) -> bool:
        """True while it holds bytes for the response to an Upgrade. When that is there, `feed(b"")` returns them."""
        return self.phase is Phase.HELD and bool(self._held)

    @property
    def has_more(self) -> bool:
        """True while there is something left of what it was fed that it has not looked at."""
        return self._rest is not None

    @property
    def read_size(self) -> int:
        """How many bytes to feed at the most, so that no call takes long: they may be many requests, or many chunks."""
        match self.phase:
            case Phase.OPAQUE:
                return sys.maxsize
            case Phase.BODY:
                return self._body.read_size
        return _SMALL

    def feed(self, data: Data) -> list[Piece]:
        """Take what the visitor said next; returns what may be forwarded now.

        That is no copy of `data`, but views of it. A refusal is not raised: see `refusal`.

        Raises:
            LocalProtocolError: it holds bytes until a response comes, has found the next request, or, unless `data` is
                empty, has more to look at.
        """
        waits = self.holds and self._responses.awaits_upgrade
        if waits or self.next_request is not None or (data and self.has_more):
            raise LocalProtocolError("the follower has to get rid of what came before this first")
        if self.phase is Phase.HELD:
            self._end_request()
        start = 0
        if self._rest is not None:
            (data, start), self._rest = self._rest, None
        elif self._held:
            data, self._held = self._held + data, b""
        self._kept = b""
        self.work = 0
        passed = start
        try:
            while passed < len(data) and (read := self._readers.get(self.phase)) is not None:
                if self.work >= MAX_WORK:
                    self._rest = data, passed
                    break
                settled = read(data, passed)
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
        if passed == start:
            return []
        settled_part = data if passed - start == len(data) else memoryview(data)[start:passed]
        return [self._kept, settled_part] if self._kept else [settled_part]

    def end(self) -> None:
        """The visitor says no more. In the middle of a head it is refused; the rest is the gateway's to judge."""
        if self.head_begun and not self.is_over:
            refusal = BadRequest(400, "The request ended before its head did.", omit_body=self._heads.omit_body)
            self._refuse(refusal)

    def give_up(self, seconds: float) -> None:
        """A head that has begun is not whole after `seconds`."""
        reason = f"No whole request head came within {seconds:g} seconds."
        self._refuse(BadRequest(408, reason, omit_body=self._heads.omit_body))

    # What each phase reads: from `start`, up to the position that is returned, which may then be forwarded. None: what
    # there is was kept, and the rest of it has to come first.

    def _read_head(self, data: Data, start: int) -> int | None:
        # The reader keeps what it is given, and there may be many heads in `data`: so not much more than this one.
        end = data.find(_HEAD_END, start)
        before, piece = self._of_head, memoryview(data)[start : len(data) if end < 0 else end + len(_HEAD_END)]
        head = self._heads.feed(piece)
        self.work += 1
        if head is None:  # so `piece` was all there is
            self._of_head += len(piece)
            return None
        self.work += _HEAD_COST + len(head.headers) // 2
        kept = self._heads.received[:before]
        self._heads, self._of_head = HeadReader(), 0
        if head.host != self._host or wants_upgrade(head) is not None or self._responses.is_last:
            self._go(_Found.NEXT)
            self.next_request = head, kept + bytes(memoryview(data)[start:])
            return None
        self._kept += kept
        self._begin_body(head)
        return start + head.length - before

    def _begin_body(self, head: RequestHead) -> None:
        self._responses.expect(head)
        self._omit_body = head.omit_body
        self._body.begin(head.content_length, chunked=head.chunked)
        if self._body.complete:
            self._end_request()
        else:
            self._go(_Found.BODY)

    def _read_body(self, data: Data, start: int) -> int | None:
        self._body.work = self.work
        end = self._body.read(data, start)
        self.work = self._body.work
        self._kept += self._body.take_kept()
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
