"""A yamux session without I/O.

Theory of operation. The `driver` calls three methods:

    session.receive_data(data, now)       process bytes from the peer
    session.events()                      the events for streams that have happened since the last call
    session.data_to_send(max_bytes)       frames to send, in the order that `outbox` decides

`send`, `send_fin`, `read`, `reset` and `close` take the stream object, so the hot path needs no lookup by id.
`stream_state` knows which halves of a stream are open and what its queues hold. `peer_ids` knows which ids are new.
Time is an argument. No method blocks, so a blocked writer never delays the receiver.

What bounds memory:

- A peer cannot send more than its credit (`flow`).
- All streams together hold at most `Limits.unread` unread bytes. Beyond that, the stream that holds most is reset.
- Data that waits to be sent is bounded per stream, session and process (`Stream.room`). Control frames never wait for
  it.
- Streams that the application has not accepted are counted. So are streams of which no event has been fetched yet, even
  when they are already closed.
- Queued replies are counted (`outbox`).
- A closed stream is forgotten. Only for streams that we reset while the peer had credit, the rest of the credit is
  remembered, for at most 1024 streams.

Specification: https://github.com/hashicorp/yamux/blob/master/spec.md. Where it is silent, docs/protocol.md decides.
"""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from typing import Final, final

from .._model.errors import LocalProtocolError, RemoteProtocolError
from .._model.session_limits import Limits
from .._net.delivery import Movement
from .events import (
    Event,
    GoAwayReceived,
    OpenAllowed,
    PongReceived,
    StreamOpened,
    StreamReadable,
    StreamWritable,
)
from .flow import ASK_INTERVAL, SEND_RESERVE, ReceiveWindow, RoundTrips, SendBudget, WindowBudget
from .frames import ACK, FIN, RST, SYN, Buffer, FrameDecoder, FrameType, GoAwayCode, Header
from .outbox import Outbox
from .peer_ids import PeerIds
from .stream_state import State, Step, Stream

__all__ = [
    "ACCEPT_TIMEOUT",
    "ANSWER_TIMEOUT",
    "CLOSE_TIMEOUT",
    "MAX_REMEMBERED_RESETS",
    "MAX_UNACKNOWLEDGED",
    "Role",
    "Session",
]

MAX_UNACKNOWLEDGED: Final = 256
"""Unacknowledged streams that we may have open. hashicorp/yamux resets a stream when 256 others wait to be accepted."""

MAX_REMEMBERED_RESETS: Final = 1024
ACCEPT_TIMEOUT: Final = 30.0
"""Seconds that a stream may wait to be accepted. hashicorp/yamux ends the whole session after 75."""

CLOSE_TIMEOUT: Final = 30.0
"""Seconds that the peer has, after the application closed a stream, to receive what is queued and to end its half."""

ANSWER_TIMEOUT: Final = 10.0
"""Seconds that the peer has to accept a stream that we opened, unless the path is slow: see `Session.reset_overdue`."""

_ANSWER_SPAN: Final = 0.05
"""Seconds after a small message was sent in which the application may wait for a small answer."""

_ANSWER_LOOK: Final = 1.0
"""Seconds between looks at such a stream."""

_LAST_ID: Final = 2**32 - 1

_DATA: Final = FrameType.DATA
_WINDOW_UPDATE: Final = FrameType.WINDOW_UPDATE
_PING: Final = FrameType.PING


class Role(enum.Enum):
    """The end of the session: the client opens streams with odd ids, the server with even ids."""

    CLIENT = 1
    SERVER = 2


@final
class Session:
    """One end of a yamux session. See the module's theory of operation.

    Args:
        role: which end this is.
        limits: the limits of the session; the default is `Limits()`.
        process_sending: the send budget that all sessions of the process share; None when only the session's counts.

    A method raises `LocalProtocolError` when the state of the session or stream does not allow the call.
    """

    __slots__ = (
        "_answered",
        "_asked",
        "_asked_at",
        "_borrowers",
        "_budget",
        "_decoder",
        "_events",
        "_forgotten_unread",
        "_held",
        "_late_credit",
        "_next_id",
        "_next_ping",
        "_outbox",
        "_peer_ids",
        "_peer_streams",
        "_pinged_at",
        "_pings",
        "_receiving",
        "_receiving_fin",
        "_streams",
        "_unaccepted",
        "_unacknowledged",
        "_unreported",
        "going_away",
        "limits",
        "peer_going_away",
        "round_trips",
        "sending",
        "taken",
        "traffic",
        "unread",
    )

    def __init__(self, role: Role, limits: Limits | None = None, *, process_sending: SendBudget | None = None) -> None:
        self.limits: Final = limits or Limits()
        self.sending: Final = SendBudget(self.limits.unsent, process_sending)
        self.round_trips: Final = RoundTrips()
        self.taken: int = 0
        """Bytes that the last `data_to_send` returned."""
        self.unread: int = 0
        """Received bytes of all streams that the application has not read."""
        self.traffic: int = 0
        """Grows when frames of streams are received or sent, in contrast to pings."""
        self.going_away: bool = False
        self.peer_going_away: bool = False
        self._decoder = FrameDecoder()
        self._outbox = Outbox()
        self._events: list[Event] = []
        self._budget = WindowBudget(self.limits.window_growth)
        self._streams: dict[int, Stream] = {}
        self._forgotten_unread: set[Stream] = set()  # streams that are not in `_streams` any more
        self._borrowers: dict[Stream, int] = {}  # how many pieces came since `keep_unread`
        self._receiving: Stream | None = None
        self._receiving_fin = False
        self._next_id = 1 if role is Role.CLIENT else 2
        self._peer_ids = PeerIds(0 if role is Role.CLIENT else 1)
        self._peer_streams = 0
        self._unaccepted: OrderedDict[int, Stream] = OrderedDict()
        self._held: list[Stream] = []  # with an acknowledgement that is not queued
        self._unreported = 0
        self._unacknowledged = 0
        self._late_credit: OrderedDict[int, int] = OrderedDict()
        self._pings: dict[int, tuple[float, bool]] = {}
        self._next_ping = 0
        self._pinged_at = 0.0
        self._asked = False  # whether a small message was sent since the last look
        self._asked_at = -math.inf
        self._answered = -math.inf  # when the latest ping was sent that the peer has answered

    # What comes from the peer

    def receive_data(self, data: Buffer, now: float) -> None:
        """Process `data`, which arrived at the time `now`, in seconds. `events` returns what happened.

        It must not change before `keep_unread`: what can be read at once is copied only once.

        Raises:
            RemoteProtocolError: the peer violated the protocol. The session is over. The next `data_to_send` returns a
                go-away with code 1.
        """
        try:
            for item in self._decoder.receive_data(data):
                if type(item) is Header:
                    self._receive_header(item, now)
                else:
                    self._receive_body(item)
        except RemoteProtocolError:
            self.going_away = True
            self._outbox = Outbox()
            self._outbox.put_first(FrameType.GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)
            raise

    def keep_unread(self) -> None:
        """Copy what is unread of the data that was received. Its memory may be used again after that."""
        borrowers, self._borrowers = self._borrowers, {}
        for stream, pieces in borrowers.items():
            if stream.receive_queue:
                stream.own_unread(pieces)

    def events(self) -> list[Event]:
        """The events since the last call, in order."""
        events, self._events = self._events, []
        self._unreported = 0
        return events

    def _receive_header(self, header: Header, now: float) -> None:
        frame_type, flags, stream_id, length = header
        if frame_type == _PING:
            self._receive_ping(flags, length, now)
            return
        if frame_type > _PING:
            self.peer_going_away = True
            self._events.append(GoAwayReceived(length))
            return
        if stream_id == 0:
            raise RemoteProtocolError(f"{FrameType(frame_type).name} on stream 0, which is the session's")
        self.traffic += 1
        if flags & SYN:
            self._receive_syn(header, now)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._receive_late(header)
            return
        if flags & ACK and stream.opened_here and not stream.acknowledged:
            stream.acknowledged = True
            self._unacknowledged -= 1
            self._events.append(OpenAllowed())
        if frame_type == _WINDOW_UPDATE:
            if length:
                stream.send_window.grant(length)
                self._outbox.put_ready(stream)
                if stream.closing_since is not None:
                    stream.closing_since = now
        elif length:
            if not stream.may_receive:
                stream.advance(Step.RECEIVE_DATA)  # it raises
            stream.receive_window.receive(length)
            self._receiving, self._receiving_fin = stream, bool(flags & FIN)
        if flags & RST:
            self._receive_reset(stream)
        elif flags & FIN and not (frame_type == _DATA and length):
            self._receive_fin(stream)

    def _receive_body(self, piece: bytes | memoryview) -> None:
        """Process a piece of the body of the current DATA frame."""
        stream = self._receiving
        complete = not self._decoder.body_left
        if complete:
            self._receiving = None
        if stream is None or stream.was_reset:
            return  # the stream is closed; its header was already checked against the credit
        if stream.closing_since is not None:
            self._refuse_input(stream)
        else:
            if stream.receive_queue:
                stream.store(piece)
            else:
                stream.receive_queue.append(piece)
                self._events.append(StreamReadable(stream))
            borrowers = self._borrowers
            borrowers[stream] = borrowers[stream] + 1 if stream in borrowers else 1
            self.unread += len(piece)
            while self.unread > self.limits.unread:
                self._reset_greediest()
        if complete and self._receiving_fin and not stream.was_reset:
            self._receive_fin(stream)

    def _receive_syn(self, header: Header, now: float) -> None:
        stream_id = header.stream_id
        self._outbox.require_room()
        self._peer_ids.open(stream_id)
        window = ReceiveWindow(self._budget, self.limits.stream_window, now)
        if header.type == _DATA and header.length > window.credit:
            raise RemoteProtocolError(f"SYN with {header.length} bytes of DATA, but a credit of {window.credit}")
        if (
            self.going_away
            or len(self._unaccepted) >= self.limits.unaccepted
            or self._unreported >= self.limits.unaccepted
            or self._peer_streams >= self.limits.streams
        ):
            self._outbox.put_first(_WINDOW_UPDATE, RST, stream_id, 0)
            self._remember_reset(stream_id, window.credit)
            return
        stream = Stream(stream_id, opened_here=False, receive_window=window, send_budget=self.sending, now=now)
        self._streams[stream_id] = stream
        self._peer_streams += 1
        self._unaccepted[stream_id] = stream
        self._unreported += 1
        self._events.append(StreamOpened(stream))

    def _receive_late(self, header: Header) -> None:
        """Process a frame for a stream that is not open: drop it if the stream is closed, refuse it if it never was."""
        stream_id = header.stream_id
        ours = stream_id not in self._peer_ids
        if not (stream_id < self._next_id if ours else self._peer_ids.were_opened(stream_id)):
            raise RemoteProtocolError(f"{FrameType(header.type).name} for stream {stream_id}, which was never opened")
        self._receiving = None
        credit = self._late_credit.get(stream_id)
        if credit is None:
            return
        if header.type == _DATA:
            if header.length > credit:
                raise RemoteProtocolError(
                    f"{header.length} bytes for stream {stream_id}, which was reset with {credit} left"
                )
            self._late_credit[stream_id] = credit - header.length
        if header.flags & (FIN | RST):
            del self._late_credit[stream_id]

    def _receive_fin(self, stream: Stream) -> None:
        stream.advance(Step.RECEIVE_FIN)
        stream.end_received = True
        stream.receive_window.close()
        stream.grant_due = 0
        self._events.append(StreamReadable(stream))
        self._forget_if_done(stream)

    def _receive_reset(self, stream: Stream) -> None:
        # Data that arrived before can still be read. Most often it answers a request that the peer did not read to the
        # end.
        self._drop(stream, keep_unread=True)

    def _receive_ping(self, flags: int, opaque: int, now: float) -> None:
        if flags & SYN:
            self._outbox.require_room()
            self._outbox.put_first(FrameType.PING, ACK, 0, opaque)
            return
        sent, is_probe = self._pings.pop(opaque, (None, False))
        if sent is not None:
            measured = max(now - sent, 0.0)
            self.round_trips.add(measured)
            self._answered = max(self._answered, sent)
            if not is_probe:
                self._events.append(PongReceived(measured))

    # What goes to the peer

    def data_to_send(self, max_bytes: int, turn: int = 0) -> list[Buffer]:
        """Take frames to send: about `max_bytes` (at most one frame more); empty when there are none.

        `turn` is that of `Outbox.take`.

        The caller must send all of them, in this order.
        """
        self.traffic += self._outbox.has_traffic
        out, senders, self.taken = self._outbox.take(max_bytes, turn)
        for stream in senders:
            if stream.writer_waits and stream.may_return():
                stream.writer_waits = False
                self._events.append(StreamWritable(stream))
            if stream.refusing and stream.flushed:
                self.reset(stream)
            self._forget_if_done(stream)
        return out

    @property
    def has_work(self) -> bool:
        """True when `data_to_send` or `events` may return something."""
        return bool(self._events or self._outbox)

    def open_stream(self, now: float) -> Stream:
        """Open a stream. Its SYN is sent with its first data, if there is some before the next `data_to_send`.

        Raises:
            LocalProtocolError: `may_open` is False.
        """
        if not self.may_open:
            raise LocalProtocolError("no stream may be opened now: the session ends, or 256 are not acknowledged")
        window = ReceiveWindow(self._budget, self.limits.stream_window, now, opened_here=True)
        stream = Stream(self._next_id, opened_here=True, receive_window=window, send_budget=self.sending, now=now)
        self._next_id += 2
        self._streams[stream.id] = stream
        self._unacknowledged += 1
        self._outbox.put_control(stream)
        return stream

    @property
    def may_open(self) -> bool:
        """False while 256 streams wait for the peer's acknowledgement, and when `openings_over`."""
        return self._unacknowledged < MAX_UNACKNOWLEDGED and not self.openings_over

    @property
    def openings_over(self) -> bool:
        """True when this end can never open a stream again: an end has sent a go-away, or the ids are used up."""
        return self.going_away or self.peer_going_away or self._next_id > _LAST_ID

    def acknowledge(self, stream: Stream, *, hold: bool = False) -> None:
        """Accept a stream that the peer opened. A second call changes nothing.

        Args:
            hold: send that with the first frame of the stream, or after `release_acknowledgements`.
        """
        if self._unaccepted.pop(stream.id, None) is not None:
            stream.acknowledged = True
            stream.opening_due = ACK
            if hold:
                self._held.append(stream)
            else:
                self._outbox.put_control(stream)

    def release_acknowledgements(self) -> None:
        """Queue the acknowledgements that are held and were not sent."""
        held, self._held = self._held, []
        for stream in held:
            if stream.opening_due:
                self._outbox.put_control(stream)

    def send_early(self, stream: Stream, data: Buffer) -> bool:
        """Frame all of `data` now, if the stream's credit allows it and nothing waits. Otherwise False: use `send`.

        For data that is sent at once: the caller calls `data_to_send` before it lets other tasks run.
        """
        size = len(data)
        if size > stream.send_window.credit or not stream.may_send or stream.queued:
            return False
        if not self._outbox.frame_early(stream, _DATA, body=data):
            return False
        stream.send_window.credit -= size
        stream.sent_amount.total += size
        self._asked = True
        return True

    def send_fin_early(self, stream: Stream) -> bool:
        """Frame the FIN now, if nothing waits. Otherwise False: use `send_fin`. See `send_early`."""
        if not stream.may_send or stream.queued or not self._outbox.frame_early(stream, _WINDOW_UPDATE, FIN):
            return False
        stream.advance(Step.SEND_FIN)
        self._forget_if_done(stream)
        return True

    def send(self, stream: Stream, data: Buffer) -> None:
        """Queue `data`. The peer's credit and the other streams decide when it is sent.

        This does not limit the queue: the caller must respect `stream.room` or `stream.may_return`.

        Raises:
            LocalProtocolError: `stream.may_send` is False.
        """
        if not stream.may_send:
            raise LocalProtocolError(f"{stream!r} takes no more data")
        if data:
            stream.enqueue(data)
            stream.sent_amount.total += len(data)
            self._outbox.put_ready(stream)

    def send_fin(self, stream: Stream) -> None:
        """Queue the FIN, after all queued data. A second call changes nothing."""
        if stream.may_send:
            stream.advance(Step.SEND_FIN)
            stream.fin_due = True
            self._outbox.put_ready(stream)

    def read(self, stream: Stream, max_bytes: int, now: float, *, lend: bool = True) -> bytes:
        """Take at most `max_bytes` of the received data, fewer when memory is short, and grant the peer credit for it.

        The returned data counts in `Limits.unsent` until the next call, or until the stream is closed or reset; with
        `lend=False` the caller calls `stream.lend` for what it keeps of it.

        Returns b"" when there is none. `stream.ended` says whether more may come.
        """
        if stream.lent:
            stream.lend(0)
        if not stream.receive_queue:
            return b""
        if stream.receive_window.unread > SEND_RESERVE:
            max_bytes = min(max_bytes, self.sending.ahead)
        data = stream.take(max_bytes)
        size = len(data)
        if lend:
            stream.lend(size)
        if stream.state is State.CLOSED and not stream.receive_queue:
            self._forgotten_unread.discard(stream)
        self.unread -= size
        stream.received_amount.total += size
        if self._asked:
            self._asked, self._asked_at = False, now
        round_trips = self.round_trips
        quick = now < self._asked_at + _ANSWER_SPAN
        credit = stream.receive_window.read(size, now, round_trips.shortest, cut=round_trips.doubted, quick=quick)
        if credit:
            self._grant(stream, credit, now)
        return data

    def reset(self, stream: Stream) -> None:
        """Reset the stream: drop what is queued and what is unread. A second call changes nothing."""
        if stream.state is State.CLOSED and stream.flushed:
            self._drop_unread(stream)
            return
        late_credit = stream.receive_window.credit if stream.may_receive else None
        peer_knows_it = stream.opening_due != SYN
        self._drop(stream, keep_unread=False)
        if peer_knows_it:
            self._outbox.put_first(_WINDOW_UPDATE, RST, stream.id, 0)
            if late_credit is not None:
                self._remember_reset(stream.id, late_credit)

    def close(self, stream: Stream, now: float) -> None:
        """Close the stream for the application: queue the FIN, and accept no more data from the peer.

        As in TCP, unread data, and data that arrives later, is answered by a reset. The reset is sent after our data
        and FIN, so a peer that has received the FIN loses nothing. A silent peer may keep its half open for 30 seconds
        (`reset_overdue`).
        """
        self.send_fin(stream)
        stream.closing_since = now
        if self._drop_unread(stream) and stream.may_receive:
            self._refuse_input(stream)

    def _refuse_input(self, stream: Stream) -> None:
        """Reset a closed stream whose peer still sends, as soon as our data and FIN are sent."""
        stream.refusing = True
        if stream.flushed:
            self.reset(stream)

    def ping(self, now: float) -> None:
        """Queue a ping. `PongReceived` reports its round trip. Only the last 16 pings are remembered."""
        self._ping(now, is_probe=False)

    def forget_pings(self) -> None:
        """Measure nothing with the pings that are not answered: the link was interrupted."""
        self._pings.clear()

    def _ping(self, now: float, *, is_probe: bool) -> None:
        """Queue a ping. A probe only measures: its pong is no event."""
        self._pinged_at = now
        self._next_ping = (self._next_ping + 1) & 0xFFFFFFFF
        self._pings[self._next_ping] = now, is_probe
        if len(self._pings) > 16:
            del self._pings[next(iter(self._pings))]
        self._outbox.put_first(FrameType.PING, SYN, 0, self._next_ping)

    def go_away(self, code: GoAwayCode = GoAwayCode.NORMAL) -> None:
        """Queue a go-away: this end accepts no more streams. A second call changes nothing."""
        if not self.going_away:
            self.going_away = True
            self._outbox.put_first(FrameType.GO_AWAY, 0, 0, code)

    @property
    def streams_open(self) -> int:
        """How many streams are not closed, or have something to send."""
        return len(self._streams)

    @property
    def live_streams(self) -> list[Stream]:
        """The streams that are not closed, or have something to send."""
        return [*self._streams.values()]

    def reset_overdue(self, now: float, movement: Movement, *, since: float = -math.inf) -> float | None:
        """Reset streams that are overdue:

        - those that were not accepted here for 30 seconds, or were closed 30 seconds ago and have not ended
        - those that the peer has not accepted for 10 seconds, if nothing has come from it for 10 seconds, or if it
          answers pings. On a slow path on which bytes move, the opening or the acceptance may be on its way.

        Args:
            now: in seconds.
            movement: when bytes last moved on the link.
            since: when the link was interrupted last. Time before that does not count.

        Returns:
            When to look again; None if no stream waits for anything.
        """
        looks: list[float] = []
        for stream in self.live_streams:
            if stream.id in self._unaccepted:
                deadline = max(stream.opened_at, since) + ACCEPT_TIMEOUT
            elif stream.closing_since is not None:
                deadline = max(stream.closing_since, since) + CLOSE_TIMEOUT
            elif stream.opened_here and not stream.acknowledged:
                deadline = max(stream.opened_at, since) + ANSWER_TIMEOUT
                stream.timed_out = now >= deadline and self._is_refused(stream, now, movement, deadline)
                if not stream.timed_out:
                    # Before the deadline as well: `movement` is as exact as looks are frequent.
                    deadline = min(deadline, now + _ANSWER_LOOK) if now < deadline else now + _ANSWER_LOOK
            else:
                continue
            if deadline <= now:
                self.reset(stream)
            else:
                looks.append(deadline)
        return min(looks, default=None)

    def _is_refused(self, stream: Stream, now: float, movement: Movement, deadline: float) -> bool:
        """Whether there is no hope any more that the peer accepts `stream`, whose time is over. Pings to find out."""
        moved_at = movement.received_at
        if movement.delivered_until < stream.opened_at + _ANSWER_LOOK:  # the SYN may be behind other bytes
            moved_at = max(moved_at, movement.taken_at)
        if now >= moved_at + ANSWER_TIMEOUT:
            return True
        if stream.opening_due:
            return False
        # A ping that is sent now arrives after the SYN.
        if self._pinged_at < deadline:
            self._ping(now, is_probe=True)
        return self._answered >= deadline

    # Both directions

    def _grant(self, stream: Stream, credit: int, now: float) -> None:
        stream.grant_due += credit
        self._outbox.put_control(stream)
        round_trips = self.round_trips
        asks = round_trips.doubted or round_trips.few or now >= self._pinged_at + ASK_INTERVAL
        if asks and not self._pings and round_trips.shortest is not None:
            self._ping(now, is_probe=True)

    def _drop(self, stream: Stream, *, keep_unread: bool) -> None:
        """Close `stream` after a reset by either end. Nothing more of it is sent."""
        if stream.state is not State.CLOSED:
            stream.advance(Step.RESET)
        stream.was_reset = True
        stream.send_queue.clear()
        stream.dequeued(stream.queued)
        stream.grant_due = stream.opening_due = 0
        stream.fin_due = False
        stream.receive_window.close()
        if not keep_unread:
            self._drop_unread(stream)
        self._forget_if_done(stream)
        self._events += (StreamReadable(stream), StreamWritable(stream))

    def _drop_unread(self, stream: Stream) -> int:
        """Drop unread data; returns the number of bytes."""
        stream.lend(0)
        if not stream.receive_queue:
            return 0
        dropped = sum(map(len, stream.receive_queue))
        stream.receive_queue.clear()
        self._forgotten_unread.discard(stream)
        self.unread -= dropped
        return dropped

    def _reset_greediest(self) -> None:
        """Reset the stream that holds most unread data."""
        receiving, to_come = self._receiving, self._decoder.body_left

        def held(stream: Stream) -> int:
            announced = stream.receive_window.unread  # it counts the whole frame, of which `to_come` is still missing
            return announced - to_come if stream is receiving else announced

        streams = (*self._streams.values(), *self._forgotten_unread)
        greediest = max((stream for stream in streams if stream.receive_queue), key=held)
        greediest.end_received = False
        self.reset(greediest)
        if not greediest.was_reset:  # both halves had ended, so `reset` only dropped its data
            greediest.was_reset = True
            self._events.append(StreamReadable(greediest))

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.state is not State.CLOSED or not stream.flushed:
            return
        if self._streams.pop(stream.id, None) is None:
            return
        if stream.receive_queue:
            self._forgotten_unread.add(stream)
        stream.count_end()
        if not stream.opened_here:
            self._peer_streams -= 1
            self._unaccepted.pop(stream.id, None)
        elif not stream.acknowledged:
            self._unacknowledged -= 1
            self._events.append(OpenAllowed())

    def _remember_reset(self, stream_id: int, credit: int) -> None:
        self._late_credit[stream_id] = credit
        if len(self._late_credit) > MAX_REMEMBERED_RESETS:
            self._late_credit.popitem(last=False)
