"""One stream as the protocol sees it: which halves are open, what waits in either direction, what is still to be said.

Each stream goes through one table, `_TRANSITIONS`; what the table does not have is an error, ours or the peer's.

Neighbours: `session` decides what happens to a stream; `outbox` takes what it has to send.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Any, Final, final

from .._model.errors import LocalProtocolError, RemoteProtocolError
from .flow import SEND_AHEAD, ReceiveWindow, SendBudget, SendWindow

__all__ = ["State", "Step", "Stream"]

_SMALL: Final = 1024


class State(enum.Enum):
    """Which halves of a stream are still open."""

    OPEN = enum.auto()
    LOCAL_ENDED = enum.auto()
    REMOTE_ENDED = enum.auto()
    CLOSED = enum.auto()


class Step(enum.Enum):
    """What can happen to a stream."""

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
    """One stream as the protocol sees it. Its methods are `Session`'s; read it, do not write to it.

    Attributes:
        id: odd if the client opened it.
        opened_here: whether this end opened it.
        state: which halves are open. `LOCAL_ENDED` means that a FIN was ordered; it may still wait behind data.
        was_reset: by either end.
        end_received: the peer's FIN has arrived, so what it sent is complete, whatever comes later.
        closing_since: when the application was done with it and wanted to read no more; None before.
        acknowledged: the end that did not open it has accepted it.
        refusing: data came after that; a reset follows as soon as our FIN has left.
        queued: bytes that wait for the writer.
        lent: bytes of the last read, which the application may still hold until it reads again or closes.
        writer_waits: set by the driver that wants a `StreamWritable`.
        owner: the driver's own object for this stream; the session does not look at it.
    """

    __slots__ = (
        "ack_due",
        "acknowledged",
        "closing_since",
        "control_queued",
        "end_received",
        "fin_due",
        "grant_due",
        "id",
        "lent",
        "opened_at",
        "opened_here",
        "owner",
        "queued",
        "ready_queued",
        "refusing",
        "receive_queue",
        "receive_window",
        "send_budget",
        "send_queue",
        "send_window",
        "state",
        "syn_due",
        "was_reset",
        "writer_waits",
    )

    def __init__(
        self, stream_id: int, *, opened_here: bool, receive_window: ReceiveWindow, send_budget: SendBudget, now: float
    ) -> None:
        self.id: Final = stream_id
        self.opened_here: Final = opened_here
        self.opened_at: Final = now
        self.state = State.OPEN
        self.was_reset = False
        self.acknowledged = False
        self.end_received = False
        self.closing_since: float | None = None
        self.refusing = False
        self.syn_due = opened_here
        self.ack_due = False
        self.fin_due = False
        self.grant_due = 0
        self.send_window: Final = SendWindow()
        self.send_budget: Final = send_budget
        self.receive_window: Final = receive_window
        self.send_queue: Final[deque[bytes | memoryview]] = deque()
        self.receive_queue: Final[deque[bytes | memoryview]] = deque()
        self.queued = self.lent = 0
        self.control_queued = False
        self.ready_queued = False
        self.writer_waits = False
        self.owner: Any = None

    @property
    def may_send(self) -> bool:
        """True until a FIN was ordered or the stream was reset."""
        return self.state is State.OPEN or self.state is State.REMOTE_ENDED

    @property
    def may_receive(self) -> bool:
        """True while the peer may still send."""
        return self.state is State.OPEN or self.state is State.LOCAL_ENDED

    @property
    def ended(self) -> bool:
        """True when everything that will ever arrive has been read."""
        return not self.may_receive and not self.receive_queue

    @property
    def flushed(self) -> bool:
        """True when nothing of this stream waits for the writer, its FIN included."""
        return not self.queued and not self.fin_due

    @property
    def room(self) -> int:
        """Bytes that fit the send budget now.

        It is 0 until what waits is at most half of what may wait, so that room comes in portions that are worth a read.
        """
        # What there is credit for leaves as fast as the link takes it, and large batches cost less time.
        bound = max(self.send_budget.bound, min(self.send_window.credit, self.send_budget.ahead))
        return bound - self.queued if self.queued <= bound // 2 else 0

    def may_return(self) -> bool:
        """True when so little waits that a send need not wait any longer."""
        return self.queued <= self.send_budget.bound

    @property
    def has_something_to_send(self) -> bool:
        """True when a turn would put a frame on the wire."""
        if self.queued:
            return self.send_window.credit > 0
        return self.fin_due

    @property
    def owes_control_frame(self) -> bool:
        """True when SYN, ACK or credit have not left with data meanwhile."""
        return self.syn_due or self.ack_due or self.grant_due > 0

    def advance(self, step: Step) -> None:
        """Go on by the table.

        Raises:
            LocalProtocolError, RemoteProtocolError: the table does not have that; whose step it was decides which.
        """
        state = _TRANSITIONS[self.state].get(step)
        if state is None:
            error = LocalProtocolError if step is Step.SEND_FIN else RemoteProtocolError
            raise error(f"{step.value} on {self!r}")
        self.state = state

    def enqueue(self, data: bytes) -> None:
        """Put `data` behind what waits for the writer. Large data is not copied, now or later."""
        _append(self.send_queue, data if len(data) < _SMALL else memoryview(data))
        self._set_queued(self.queued + len(data))

    def dequeued(self, amount: int) -> None:
        """So much of what waited has left, or never will."""
        self._set_queued(self.queued - amount)

    def _set_queued(self, queued: int) -> None:
        # What a single send brings beyond the bound is the application's own memory, until it returns.
        self.send_budget.take(min(queued, SEND_AHEAD) - min(self.queued, SEND_AHEAD))
        self.queued = queued

    def compact(self) -> None:
        """Keep no more of a large send than what waits of it."""
        first = self.send_queue[0] if self.send_queue else b""
        if isinstance(first, memoryview) and isinstance(first.obj, bytes) and len(first.obj) > SEND_AHEAD:
            self.send_queue[0] = bytes(first)

    def store(self, piece: bytes) -> None:
        """Put `piece` behind what waits to be read."""
        _append(self.receive_queue, piece)

    def lend(self, amount: int) -> None:
        """The application holds `amount` bytes of what it has read, and no more of what it had read before."""
        self.send_budget.take(amount - self.lent)
        self.lent = amount

    def take(self, max_bytes: int) -> bytes:
        """Take out at most `max_bytes` of what waits to be read; b"" when nothing does."""
        queue = self.receive_queue
        if not queue:
            return b""
        first = queue.popleft()
        if len(first) > max_bytes:
            # The rest stays a view, so that many small reads of a large piece do not copy it again each time.
            queue.appendleft(memoryview(first)[max_bytes:])
            return bytes(first[:max_bytes])
        pieces, size = [first], len(first)
        while queue and size + len(queue[0]) <= max_bytes:
            pieces.append(queue.popleft())
            size += len(pieces[-1])
        return b"".join(pieces) if len(pieces) > 1 else bytes(first)

    def __repr__(self) -> str:
        return f"<yamux stream {self.id}, {self.state.name.lower()}{', reset' if self.was_reset else ''}>"


def _append(queue: deque[bytes | memoryview], data: bytes | memoryview) -> None:
    """Put `data` at the end of `queue`. Small pieces are joined: each of its own would cost many times its bytes."""
    if queue and len(data) < _SMALL and len(queue[-1]) < _SMALL:
        queue[-1] = b"".join((queue[-1], data))
    else:
        queue.append(data)
