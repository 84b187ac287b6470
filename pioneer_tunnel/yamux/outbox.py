"""What leaves next: the order in which a session's frames go out.

    1. replies and pings  pongs, go-aways, resets: they never wait behind data, and there is a bound on them
    2. stream control     openings, acceptances, credit: at most one frame for each stream waits
    3. data               streams take turns; a turn is 16 KiB while others wait, one message or batch while none does

Frames are made only when the writer asks for them, so what leaves is decided as late as it can be, and data that was
queued before a pong still leaves after it.

A FIN leaves in a frame of its own. The specification lets it ride on DATA, but a receiver that looks at the flags
before it has the body then ends the stream too early: the reference loses such a body now and then, js-libp2p-yamux
whenever its own half is closed.

Neighbours: `session` decides what has to be said; the writer of `connection` takes it away.
"""

from __future__ import annotations

from collections import deque
from typing import Final, final

from .._model.errors import RemoteProtocolError
from .frames import ACK, FIN, HEADER_SIZE, SYN, Buffer, FrameType, encode_header
from .stream_state import Stream

__all__ = ["Outbox"]

SHARED_TURN: Final = 16 * 1024
LONE_TURN: Final = 64 * 1024 - 256
"""What fits one message of 64 KiB, with room for its header and for small frames that go along."""

MAX_REPLIES: Final = 16 * 1024
"""More than all streams that a peer may have open, so that resetting them all at once is no offence of the peer's."""


@final
class Outbox:
    """Frames that wait for the writer."""

    __slots__ = ("_control", "_ready", "_replies")

    def __init__(self) -> None:
        self._replies: deque[bytes] = deque()
        self._control: deque[Stream] = deque()
        self._ready: deque[Stream] = deque()

    def __bool__(self) -> bool:
        return bool(self._replies or self._control or self._ready)

    def put_first(self, frame_type: FrameType, flags: int, stream_id: int, length: int) -> None:
        """Queue a frame that goes before everything else."""
        self._replies.append(encode_header(frame_type, flags, stream_id, length))

    def require_room(self) -> None:
        """Asked before a frame is taken in that calls for an answer, at once or later.

        Raises:
            RemoteProtocolError: the peer makes us answer faster than it takes our answers.
        """
        if len(self._replies) >= MAX_REPLIES:
            raise RemoteProtocolError(f"{MAX_REPLIES} replies wait for a peer that does not read them")

    def put_control(self, stream: Stream) -> None:
        """See to it that a WINDOW_UPDATE with what `stream` has to say (SYN, ACK, credit) leaves soon."""
        if not stream.control_queued:
            stream.control_queued = True
            self._control.append(stream)

    def put_ready(self, stream: Stream) -> None:
        """See to it that `stream` gets its turn to send data or its FIN. Needless calls do no harm."""
        if not stream.ready_queued and stream.has_something_to_send:
            stream.ready_queued = True
            self._ready.append(stream)

    def take(self, max_bytes: int) -> tuple[list[Buffer], list[Stream]]:
        """Up to about `max_bytes` (one frame over, at the most) of whole frames, and the streams that sent data."""
        out: list[Buffer] = []
        senders: list[Stream] = []
        size = 0
        while self._replies and size < max_bytes:
            out.append(self._replies.popleft())
            size += HEADER_SIZE
        while self._control and size < max_bytes:
            stream = self._control.popleft()
            stream.control_queued = False
            # An opening or an acceptance rides on data when data is about to leave.
            if stream.grant_due or (stream.owes_control_frame and not stream.ready_queued):
                credit, stream.grant_due = stream.grant_due, 0
                flags = _take_opening_flags(stream)
                out.append(encode_header(FrameType.WINDOW_UPDATE, flags, stream.id, credit))
                size += HEADER_SIZE
        ready, lone_turn = self._ready, min(max(max_bytes, SHARED_TURN), LONE_TURN)
        while ready and size < max_bytes:
            stream = ready.popleft()
            stream.ready_queued = False
            if not stream.has_something_to_send:
                continue  # it was reset since
            turn = SHARED_TURN if ready else lone_turn
            size += _take_turn(stream, turn, out)
            senders.append(stream)
            self.put_ready(stream)
        return out, senders


def _take_opening_flags(stream: Stream) -> int:
    flags = 0
    if stream.syn_due:
        stream.syn_due = False
        flags = SYN
    if stream.ack_due:
        stream.ack_due = False
        flags |= ACK
    return flags


def _take_turn(stream: Stream, turn: int, out: list[Buffer]) -> int:
    """Data of `stream` as far as `turn` and its credit reach, and the FIN when that was the last; returns the size."""
    flags = _take_opening_flags(stream)
    size = 0
    amount = min(turn, stream.queued, stream.send_window.credit)
    if amount:
        stream.send_window.spend(amount)
        stream.dequeued(amount)
        out.append(encode_header(FrameType.DATA, flags, stream.id, amount))
        size = HEADER_SIZE + amount
        flags = 0
        chunks, left = stream.send_queue, amount
        while left:
            chunk = chunks[0]
            if len(chunk) <= left:
                out.append(chunk)
                chunks.popleft()
                left -= len(chunk)
            else:
                out.append(chunk[:left])
                chunks[0] = chunk[left:]
                left = 0
    if stream.fin_due and not stream.queued:
        stream.fin_due = False
        credit, stream.grant_due = stream.grant_due, 0
        out.append(encode_header(FrameType.WINDOW_UPDATE, flags | FIN, stream.id, credit))
        size += HEADER_SIZE
    return size
