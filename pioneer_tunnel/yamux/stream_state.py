"""The state of one stream in the protocol: which halves are open, its queues, and which frames it still has to send.

`_TRANSITIONS` is the state machine. A step that it does not allow is a protocol error, ours or the peer's.
"""

from __future__ import annotations

import enum
from typing import Any, Final, final

from .._model.counters import UNCOUNTED, Amount, StreamCounter
from .._model.errors import LocalProtocolError, RemoteProtocolError
from .flow import SEND_AHEAD, SEND_BOUND, ReceiveWindow, SendBudget, SendWindow
from .frames import LARGEST_BODY, SYN, Buffer

__all__ = ["State", "Step", "Stream"]

_SMALL: Final = 1024


class State(enum.Enum):
    """Which halves of a stream are open."""

    __hash__ = object.__hash__  # that of `Enum` is a Python function

    OPEN = enum.auto()
    LOCAL_ENDED = enum.auto()
    REMOTE_ENDED = enum.auto()
    CLOSED = enum.auto()


class Step(enum.Enum):
    """What can happen to a stream. The value names it in an error."""

    __hash__ = object.__hash__  # as above

    SEND_FIN = "FIN"
    RECEIVE_DATA = "DATA"
    RECEIVE_FIN = "FIN, seen"
    RESET = "RST"


_TRANSITIONS: Final[dict[State, dict[Step, State]]] = {
    State.OPEN: {
        Step.SEND_FIN: State.LOCAL_ENDED,
        Step.RECEIVE_DATA: State.OPEN,
        Step.RECEIVE_FIN: State.REMOTE_ENDED,
        Step.RESET: State.CLOSED,
    },
    State.LOCAL_ENDED: {
        Step.RECEIVE_DATA: State.LOCAL_ENDED,
        Step.RECEIVE_FIN: State.CLOSED,
        Step.RESET: State.CLOSED,
    },
    State.REMOTE_ENDED: {
        Step.SEND_FIN: State.CLOSED,
        Step.RESET: State.CLOSED,
    },
    State.CLOSED: {},
}


@final
class Stream:
    """One stream. `Session` and `Outbox` change it; its owner sets `writer_waits`, and says what it holds and counts.

    Attributes:
        id: odd if the client opened it.
        opened_here: whether this end opened it.
        state: which halves are open. `LOCAL_ENDED` means that a FIN was queued; it may still wait behind data.
        may_send: True until a FIN is queued or the stream is reset.
        may_receive: True while the peer may still send.
        was_reset: whether either end reset it.
        timed_out: whether this end reset it because the peer did not accept it in time.
        end_received: the peer's FIN has arrived. So what the peer sent is complete, even if a reset follows.
        closing_since: when the application closed it, or when the peer last granted credit after that; None before.
        acknowledged: whether the end that did not open it has accepted it.
        refusing: the peer sent data that the application, which closed the stream, will not read. A reset follows when
            our FIN has been sent.
        opening_due: the flag, SYN or ACK, that the next frame of it has; 0 when it was sent.
        queued: bytes that wait for the writer.
        lent: bytes of the last read. The application may hold them until it reads again or closes.
        writer_waits: whether the owner wants a `StreamWritable`.
        counter: has counted it as open; None if none has.
        received_amount, sent_amount: count the bytes that are read and sent.
        owner: what the driver calls back for this stream; the session does not use it.
    """

    __slots__ = (
        "acknowledged",
        "closing_since",
        "control_queued",
        "counter",
        "end_received",
        "fin_due",
        "grant_due",
        "id",
        "lent",
        "may_receive",
        "may_send",
        "opened_at",
        "opened_here",
        "opening_due",
        "owner",
        "queued",
        "ready_queued",
        "refusing",
        "receive_queue",
        "received_amount",
        "receive_window",
        "send_budget",
        "send_queue",
        "send_window",
        "sent_amount",
        "state",
        "timed_out",
        "was_reset",
        "writer_waits",
    )

    def __init__(
        self, stream_id: int, *, opened_here: bool, receive_window: ReceiveWindow, send_budget: SendBudget, now: float
    ) -> None:
        self.id: Final = stream_id
        self.opened_here: Final = opened_here
        self.opened_at: Final = now
        self.state: State = State.OPEN
        self.may_send: bool = True
        self.may_receive: bool = True
        self.was_reset: bool = False
        self.timed_out: bool = False
        self.acknowledged: bool = False
        self.end_received: bool = False
        self.closing_since: float | None = None
        self.refusing: bool = False
        self.opening_due: int = SYN if opened_here else 0
        self.fin_due: bool = False
        self.grant_due: int = 0
        self.send_window: Final = SendWindow()
        self.send_budget: Final = send_budget
        self.receive_window: Final = receive_window
        # No deques: an empty one takes 0.7 KiB, and most streams are idle.
        self.send_queue: Final[list[bytes | memoryview]] = []
        self.receive_queue: Final[list[bytes | memoryview]] = []
        self.queued: int = 0
        self.lent: int = 0
        self.control_queued: bool = False
        self.ready_queued: bool = False
        self.writer_waits: bool = False
        self.counter: StreamCounter | None = None
        self.received_amount: Amount = UNCOUNTED
        self.sent_amount: Amount = UNCOUNTED
        self.owner: Any = None

    @property
    def ended(self) -> bool:
        """True when the peer sends nothing more and everything has been read."""
        return not self.may_receive and not self.receive_queue

    @property
    def flushed(self) -> bool:
        """True when nothing of this stream waits for the writer, its FIN included."""
        return not self.queued and not self.fin_due

    @property
    def room(self) -> int:
        """Bytes that a sender may queue now.

        It is 0 until the queue is at most half full, so that a sender gets room in portions that are worth a read; and
        these fill frames, since the rest of one would cost as much as a whole one.
        """
        # Data for which there is credit leaves as fast as the link takes it, and large batches cost less time.
        bound = self.send_budget.bound
        if bound == SEND_BOUND:
            credit = self.send_window.credit
            if credit > bound:
                bound = min(SEND_AHEAD, credit)
        if self.queued > bound // 2:
            return 0
        room = bound - self.queued
        return room if room <= LARGEST_BODY else room - room % LARGEST_BODY

    def may_return(self) -> bool:
        """True when so little is queued that a send may return."""
        return self.queued <= self.send_budget.bound

    @property
    def has_something_to_send(self) -> bool:
        """True when this stream can send a DATA frame or its FIN now."""
        if self.queued:
            return self.send_window.credit > 0
        return self.fin_due

    @property
    def owes_control_frame(self) -> bool:
        """True when a SYN, an ACK or credit was not yet sent."""
        return self.opening_due > 0 or self.grant_due > 0

    def count_as(self, counter: StreamCounter) -> None:
        """Count it, and the bytes that are read and sent from now on. The peer of this end has the visitor."""
        counter.begin()
        self.counter = counter
        self.received_amount, self.sent_amount = counter.from_visitors, counter.to_visitors

    def count_end(self) -> None:
        """Count it as open no more. Bytes that are still to be read count."""
        if self.counter is not None:
            self.counter.end()
            self.counter = None

    def advance(self, step: Step) -> None:
        """Change the state as the table says.

        Raises:
            LocalProtocolError: the state does not allow `SEND_FIN`.
            RemoteProtocolError: the state does not allow another step.
        """
        state = _TRANSITIONS[self.state].get(step)
        if state is None:
            error = LocalProtocolError if step is Step.SEND_FIN else RemoteProtocolError
            raise error(f"{step.value} on {self!r}")
        self.state = state
        self.may_send = state is State.OPEN or state is State.REMOTE_ENDED
        self.may_receive = state is State.OPEN or state is State.LOCAL_ENDED

    def enqueue(self, data: Buffer) -> None:
        """Append `data` to the send queue. Data of 1 KiB or more is not copied, also when it is cut into frames."""
        _append(self.send_queue, bytes(data) if len(data) < _SMALL else memoryview(data))
        self._set_queued(self.queued + len(data))

    def dequeued(self, amount: int) -> None:
        """Count `amount` bytes less in the send queue: they were sent or dropped."""
        self._set_queued(self.queued - amount)

    def _set_queued(self, queued: int) -> None:
        # A single send may be larger than SEND_AHEAD. What is beyond is the application's memory until the send
        # returns.
        before = self.queued
        if queued != before:
            self.queued = queued
            self.send_budget.take(min(queued, SEND_AHEAD) - min(before, SEND_AHEAD))

    def compact(self) -> None:
        """Copy what is left of a large send, so that the rest of its memory is freed."""
        first = self.send_queue[0] if self.send_queue else b""
        if isinstance(first, memoryview) and isinstance(first.obj, bytes) and len(first.obj) > SEND_AHEAD:
            self.send_queue[0] = bytes(first)

    def store(self, piece: bytes | memoryview) -> None:
        """Append `piece` to the receive queue."""
        _append(self.receive_queue, piece)

    def own_unread(self, pieces: int) -> None:
        """Copy what is in the last `pieces` of the receive queue and in memory that may change, or mostly of others.

        Those before were copied already. To look at all of a long queue for each piece would take a time that its peer
        can choose.
        """
        queue = self.receive_queue
        queue[-pieces:] = [piece if _owns(piece) else bytes(piece) for piece in queue[-pieces:]]

    def lend(self, amount: int) -> None:
        """Count the `amount` bytes of the latest read as held by the application, in place of the read before."""
        if amount != self.lent:
            self.send_budget.take(amount - self.lent)
            self.lent = amount

    def take(self, max_bytes: int) -> bytes:
        """Take at most `max_bytes` from the receive queue; b"" when it is empty."""
        queue = self.receive_queue
        if not queue:
            return b""
        first = queue[0]
        if len(first) > max_bytes:
            # The rest stays as a view, so that small reads of a large piece do not copy the rest each time.
            queue[0] = memoryview(first)[max_bytes:]
            return bytes(first[:max_bytes])
        if len(queue) == 1:
            queue.clear()
            return first if type(first) is bytes else bytes(first)
        count, size = 0, 0
        for piece in queue:
            if size + len(piece) > max_bytes:
                break
            size += len(piece)
            count += 1
        data = b"".join(queue[:count])
        del queue[:count]
        return data

    def __repr__(self) -> str:
        return f"<yamux stream {self.id}, {self.state.name.lower()}{', reset' if self.was_reset else ''}>"


def _owns(piece: bytes | memoryview) -> bool:
    return isinstance(piece, bytes) or (isinstance(piece.obj, bytes) and len(piece.obj) <= 2 * len(piece))


def _append(queue: list[bytes | memoryview], data: bytes | memoryview) -> None:
    """Append `data` to `queue`. Small pieces are joined: as objects, they would cost many times their size."""
    if queue and len(data) < _SMALL and len(queue[-1]) < _SMALL:
        queue[-1] = b"".join((queue[-1], data))
    else:
        queue.append(data)
