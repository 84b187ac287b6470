"""The queue of frames to send, and their order.

    0. frames made early  see `frame_early`
    1. urgent frames      pings, pongs, go-aways, resets: they never wait behind data, and their number is bounded
    2. stream control     SYN, ACK, credit: at most one frame for each stream waits
    3. data               streams take turns; while others wait, a turn is 16 KiB, or a quarter of a batch, or what the
                          writer says; otherwise it is a batch

A stream that had nothing to send goes before the others for one turn, so a small answer does not wait behind bulk data.
It may do so again when each of the others has had a turn. (Routers schedule packets in this way, see RFC 8290, 4.2.)

Frames are made only when the writer asks for them, so their order is decided as late as possible: a pong leaves before
data that was queued earlier.

A FIN is a frame of its own. The specification allows it on a DATA frame, but some receivers process the flags before
the body and end the stream too early: hashicorp/yamux then loses the body sometimes, js-libp2p-yamux whenever its own
half is closed.
"""

from __future__ import annotations

from collections import deque
from typing import Final, final

from .._model.errors import RemoteProtocolError
from .frames import FIN, HEADER_SIZE, LARGEST_BODY, Buffer, FrameType, encode_header
from .pacing import TURNS_OF_BATCH
from .stream_state import Stream

__all__ = ["Outbox"]

SHARED_TURN: Final = 16 * 1024
LEAST_TURN: Final = 2 * 1024
"""A batch may become so much larger than it should be, rather than end with a tiny frame."""

_DATA: Final = FrameType.DATA

MAX_REPLIES: Final = 16 * 1024
"""More than the streams that a peer may have open, so that we may reset all of them at once."""


@final
class Outbox:
    """Frames that wait for the writer."""

    __slots__ = ("_control", "_early", "_fresh", "_most_early", "_replies", "_round")

    def __init__(self) -> None:
        self._early = bytearray()
        # Like a batch, these cannot be overtaken. So they are no more than the latest batch could have, or a turn.
        self._most_early = SHARED_TURN
        self._replies: deque[bytes] = deque()
        self._control: deque[Stream] = deque()
        self._fresh: deque[Stream] = deque()
        self._round: deque[Stream] = deque()

    def __bool__(self) -> bool:
        return bool(self._replies or self._early or self._control or self._fresh or self._round)

    @property
    def has_traffic(self) -> bool:
        """Whether frames of streams are queued, other than replies."""
        return bool(self._early or self._control or self._fresh or self._round)

    def frame_early(self, stream: Stream, frame_type: FrameType, flags: int = 0, body: Buffer = b"") -> bool:
        """Make a frame now, if nothing waits that has to be sent before it. False otherwise.

        This costs less time than the queues. It is for what is sent at once, at the end of the turn. A SYN or an ACK of
        the stream is sent with it.
        """
        early, control, size = self._early, self._control, len(body)
        if self._replies or self._fresh or self._round or len(early) + size > self._most_early:
            return False
        if control:
            if len(control) > 1 or control[0] is not stream or stream.grant_due:
                return False
            control.clear()
            stream.control_queued = False
        flags |= stream.opening_due
        stream.opening_due = 0
        # All are one piece: each costs time below.
        early += encode_header(frame_type, flags, stream.id, size)
        early += body
        return True

    def put_first(self, frame_type: FrameType, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame that is sent before stream control and data."""
        self._replies.append(encode_header(frame_type, flags, stream_id, length))

    def require_room(self) -> None:
        """Check that there is room for an answer. Called before a frame is processed that needs one, now or later.

        Raises:
            RemoteProtocolError: too many answers are queued: the peer causes them faster than it reads them.
        """
        if len(self._replies) >= MAX_REPLIES:
            raise RemoteProtocolError(f"{MAX_REPLIES} replies wait for a peer that does not read them")

    def put_control(self, stream: Stream) -> None:
        """Queue a WINDOW_UPDATE for the SYN, ACK or credit that `stream` has to send."""
        if not stream.control_queued:
            stream.control_queued = True
            self._control.append(stream)

    def put_ready(self, stream: Stream) -> None:
        """Queue `stream` for a turn, if it can send data or its FIN."""
        if not stream.ready_queued and stream.has_something_to_send:
            stream.ready_queued = True
            self._fresh.append(stream)

    def take(self, max_bytes: int, turn: int = 0) -> tuple[list[Buffer], list[Stream], int]:
        """Take frames: about `max_bytes`, at most one frame more.

        Args:
            turn: bytes that a stream may send at once though others wait, if that is more than usual.

        Returns:
            The frames in pieces, the streams that had a turn, and the size of the frames.
        """
        early, senders = self._early, list[Stream]()
        size, out = len(early), list[Buffer]()
        self._most_early = min(max_bytes, SHARED_TURN)
        if size:
            self._early = bytearray()
            out.append(early)
            if not (self._replies or self._control or self._fresh or self._round):
                return out, senders, size
        while self._replies and size < max_bytes:
            out.append(self._replies.popleft())
            size += HEADER_SIZE
        while self._control and size < max_bytes:
            stream = self._control.popleft()
            stream.control_queued = False
            # A SYN or an ACK is sent with data, when the stream is queued for a turn.
            if stream.grant_due or (stream.owes_control_frame and not stream.has_something_to_send):
                credit, stream.grant_due = stream.grant_due, 0
                flags, stream.opening_due = stream.opening_due, 0
                out.append(encode_header(FrameType.WINDOW_UPDATE, flags, stream.id, credit))
                size += HEADER_SIZE
        fresh, others = self._fresh, self._round
        if not (fresh or others):
            return out, senders, size
        shared_turn = max(min(max(max_bytes // TURNS_OF_BATCH, SHARED_TURN), LARGEST_BODY), turn)
        enough = max_bytes - _least_frame(max_bytes)
        while (fresh or others) and size < (enough if senders else max_bytes):
            is_fresh = bool(fresh)
            stream = fresh.popleft() if is_fresh else others.popleft()
            if stream.has_something_to_send:
                room = min(max_bytes, max(max_bytes - size, LEAST_TURN))
                size += _take_turn(stream, min(room, shared_turn) if fresh or others else room, out)
                senders.append(stream)
            if stream.has_something_to_send or (is_fresh and others):
                others.append(stream)  # perhaps with nothing to send, so that it is not fresh before its turn
            else:
                stream.ready_queued = False
        return out, senders, size


def _least_frame(turn: int) -> int:
    """Bytes that are worth a frame beside a turn or a batch of `turn`."""
    return min(LEAST_TURN, turn // 16)


def _take_turn(stream: Stream, turn: int, out: list[Buffer]) -> int:
    """Append a DATA frame, limited by `turn` and the credit, and the FIN if nothing is left. Returns the size."""
    flags, stream.opening_due = stream.opening_due, 0
    size = 0
    amount = min(stream.queued, stream.send_window.credit)
    if amount > turn + _least_frame(turn):
        amount = turn
    if amount:
        stream.send_window.spend(amount)
        stream.dequeued(amount)
        out.append(encode_header(FrameType.DATA, flags, stream.id, amount))
        size = HEADER_SIZE + amount
        flags = 0
        chunks, left, whole = stream.send_queue, amount, 0
        for chunk in chunks:
            if len(chunk) > left:
                if left:
                    out.append(chunk[:left])
                    chunks[whole] = chunk[left:]
                break
            out.append(chunk)
            left -= len(chunk)
            whole += 1
        del chunks[:whole]
    if stream.fin_due and not stream.queued:
        stream.fin_due = False
        credit, stream.grant_due = stream.grant_due, 0
        out.append(encode_header(FrameType.WINDOW_UPDATE, flags | FIN, stream.id, credit))
        size += HEADER_SIZE
    return size
