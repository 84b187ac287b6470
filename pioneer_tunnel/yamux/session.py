"""A yamux session without I/O: bytes in, events out; orders in, bytes out.

Theory of operation. Like other sans-I/O protocols, a session is driven by whoever owns the connection:

    session.receive_data(data, now)       what came from the peer
    session.events()                      what that means for streams, each thing once
    session.data_to_send(max_bytes)       frames to put on the wire, in the order that `outbox` decides

Streams are objects, so that the hot path looks nothing up: `send`, `send_fin`, `read`, `reset`, `close` take one.
Which halves of a stream are open, and what waits in it, is `stream_state`'s; which ids are new is `peer_ids`'. Time
comes in as an argument. Nothing here waits, so nothing here can be waited for: a writer that is stuck keeps nobody
from receiving.

What bounds memory: a peer sends no more than the credit it has (`flow`); all streams together hold no more than
`Limits.unread` bytes that the application has not read, or the greediest is reset; data that waits to be sent is
bounded per stream, session and process (`Stream.room`), and control frames never wait for it; openings that nobody
accepted are counted, and so are those that nobody has heard of yet, also when they are gone again; replies are counted
(`outbox`); of streams that are gone only those are remembered that were reset while the peer had credit, and at most
1024 of them.

Source: https://github.com/hashicorp/yamux/blob/master/spec.md. Where it is silent, we do as docs/protocol.md says.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from typing import Any, Final, final

import attrs

from .._model.errors import LocalProtocolError, RemoteProtocolError
from .events import (
    Event,
    GoAwayReceived,
    OpenAllowed,
    PongReceived,
    StreamOpened,
    StreamReadable,
    StreamWritable,
)
from .flow import ReceiveWindow, SendBudget, WindowBudget
from .frames import ACK, FIN, RST, SYN, Buffer, FrameDecoder, FrameType, GoAwayCode, Header
from .outbox import Outbox
from .peer_ids import PeerIds
from .stream_state import State, Step, Stream

__all__ = [
    "ACCEPT_TIMEOUT",
    "CLOSE_TIMEOUT",
    "MAX_REMEMBERED_RESETS",
    "MAX_UNACKNOWLEDGED",
    "Limits",
    "Role",
    "Session",
]

MAX_UNACKNOWLEDGED: Final = 256
"""The reference resets what is opened beyond 256 streams that it has not accepted yet."""

MAX_REMEMBERED_RESETS: Final = 1024
ACCEPT_TIMEOUT: Final = 30.0
"""Seconds that a stream may wait to be accepted. The reference gives up the whole session after 75."""

CLOSE_TIMEOUT: Final = 30.0
"""Seconds that the peer has to take what is queued, and to end its half, once the application closed a stream."""

_LAST_ID: Final = 2**32 - 1

_DATA: Final = FrameType.DATA
_WINDOW_UPDATE: Final = FrameType.WINDOW_UPDATE
_PING: Final = FrameType.PING


class Role(enum.Enum):
    """Which end of the session this is: the client opens streams with odd ids, the server with even ones."""

    CLIENT = 1
    SERVER = 2


def _limit(default: int) -> Any:
    def check(_instance: object, field: attrs.Attribute[int], value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{field.name} is {value!r}; allowed is a whole number of 0 or more")

    return attrs.field(default=default, validator=check)


@final
@attrs.frozen(kw_only=True)
class Limits:
    """What one session may cost, in bytes unless said otherwise.

    Attributes:
        stream_window: the largest receive window of one stream (default 16 MiB).
        window_growth: what all receive windows may grow by together beyond 256 KiB each (default 32 MiB).
        unread: what all streams together may hold that the application has not read (default 64 MiB).
        unsent: what all streams together may hold that waits to be sent, or was read last and may wait to be sent on
            (default 16 MiB). A stream holds at most 64 KiB to send without credit and 256 KiB with credit, and 256 KiB
            of what was read; 4 KiB of each also when others have used all of it up.
        streams: streams that the peer may have open at a time, a number (default 4096).
        unaccepted: of these, how many the application may not have accepted yet, a number (default 256). As many may
            come between two calls of `Session.events`. With 0 every stream that the peer opens is reset.

    Raises:
        ValueError: a limit is not a whole number of 0 or more.
    """

    stream_window: int = _limit(16 * 1024 * 1024)
    window_growth: int = _limit(32 * 1024 * 1024)
    unread: int = _limit(64 * 1024 * 1024)
    unsent: int = _limit(16 * 1024 * 1024)
    streams: int = _limit(4096)
    unaccepted: int = _limit(256)


@final
class Session:
    """One end of a yamux session. See the module's theory of operation.

    Args:
        role: which end this is.
        limits: what the session may cost.
        process_sending: what all sessions of the process may hold for sending; None for no limit beside the session's.

    Every method may raise `LocalProtocolError` when it is called where it makes no sense.
    """

    def __init__(self, role: Role, limits: Limits | None = None, *, process_sending: SendBudget | None = None) -> None:
        self.limits: Final = limits or Limits()
        self.sending: Final = SendBudget(self.limits.unsent, process_sending)
        self.round_trip: float | None = None
        """The shortest round trip that a ping has measured lately, in seconds."""
        self.unread = 0
        """Bytes that all streams together hold and the application has not read."""
        self.going_away = False
        self.peer_going_away = False
        self._decoder = FrameDecoder()
        self._outbox = Outbox()
        self._events: list[Event] = []
        self._budget = WindowBudget(self.limits.window_growth)
        self._streams: dict[int, Stream] = {}
        self._holding: set[Stream] = set()
        self._receiving: Stream | None = None
        self._receiving_fin = False
        self._next_id = 1 if role is Role.CLIENT else 2
        self._peer_ids = PeerIds(0 if role is Role.CLIENT else 1)
        self._peer_streams = 0
        self._unaccepted: OrderedDict[int, Stream] = OrderedDict()
        self._untold = 0
        self._unacknowledged = 0
        self._late_credit: OrderedDict[int, int] = OrderedDict()
        self._pings: OrderedDict[int, float] = OrderedDict()
        self._next_ping = 0

    # What comes from the peer

    def receive_data(self, data: Buffer, now: float) -> None:
        """Take in what arrived at the time `now`, in seconds; `events` then tells what it means.

        Raises:
            RemoteProtocolError: the peer broke a rule. The session is over; a go-away with code 1 is ready to be sent.
        """
        try:
            for item in self._decoder.receive_data(data):
                if type(item) is bytes:
                    self._receive_body(item)
                else:
                    assert isinstance(item, Header)
                    self._receive_header(item, now)
        except RemoteProtocolError:
            self.going_away = True
            self._outbox = Outbox()
            self._outbox.put_first(FrameType.GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)
            raise

    def events(self) -> list[Event]:
        """What has happened since the last call, in order."""
        events, self._events = self._events, []
        self._untold = 0
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
            stream.advance(Step.RECEIVE_DATA)
            stream.receive_window.receive(length)
            self._receiving, self._receiving_fin = stream, bool(flags & FIN)
        if flags & RST:
            self._receive_reset(stream)
        elif flags & FIN and not (frame_type == _DATA and length):
            self._receive_fin(stream)

    def _receive_body(self, piece: bytes) -> None:
        """A piece of the body of the DATA frame whose header came last."""
        stream = self._receiving
        complete = not self._decoder.body_left
        if complete:
            self._receiving = None
        if stream is None or stream.was_reset:
            return  # late: its stream is gone, the bytes were counted against the credit that it had
        if stream.closing_since is not None:
            self._refuse_input(stream)
        else:
            if not stream.receive_queue:
                self._events.append(StreamReadable(stream))
                self._holding.add(stream)
            stream.store(piece)
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
            or self._untold >= self.limits.unaccepted
            or self._peer_streams >= self.limits.streams
        ):
            self._outbox.put_first(_WINDOW_UPDATE, RST, stream_id, 0)
            self._remember_reset(stream_id, window.credit)
            return
        stream = Stream(stream_id, opened_here=False, receive_window=window, send_budget=self.sending, now=now)
        self._streams[stream_id] = stream
        self._peer_streams += 1
        self._unaccepted[stream_id] = stream
        self._untold += 1
        self._events.append(StreamOpened(stream))

    def _receive_late(self, header: Header) -> None:
        """A frame for a stream that is not there: dropped when the stream is gone, refused when it never was."""
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
        # What had come before can still be read: the answer to a request that was not read to its end, most often.
        self._drop(stream, keep_unread=True)

    def _receive_ping(self, flags: int, opaque: int, now: float) -> None:
        if flags & SYN:
            self._outbox.require_room()
            self._outbox.put_first(FrameType.PING, ACK, 0, opaque)
            return
        sent = self._pings.pop(opaque, None)
        if sent is not None:
            measured = max(now - sent, 0.0)
            # The shortest of late, rising slowly so that a path that grew longer is believed after a while. A round
            # trip that is long because our own bytes queue on the path would make windows grow for nothing.
            known = self.round_trip
            self.round_trip = measured if known is None or measured < known else known + (measured - known) / 8
            self._events.append(PongReceived(measured))

    # What goes to the peer

    def data_to_send(self, max_bytes: int) -> list[Buffer]:
        """Frames for the wire, about `max_bytes` of them (at most one frame more); empty when there is nothing.

        What was taken has to be sent, all of it and in this order.
        """
        out, senders = self._outbox.take(max_bytes)
        for stream in senders:
            if stream.writer_waits and stream.may_return():
                self._events.append(StreamWritable(stream))
            if stream.refusing and stream.flushed:
                self.reset(stream)
            self._forget_if_done(stream)
        return out

    @property
    def has_work(self) -> bool:
        """True when `data_to_send` or `events` is worth a call."""
        return bool(self._outbox or self._events)

    def open_stream(self, now: float) -> Stream:
        """Open a stream. Its SYN rides on its first data when that is sent before the writer comes by.

        Raises:
            LocalProtocolError: `may_open` is False.
        """
        if not self.may_open:
            raise LocalProtocolError("no stream may be opened now: the session ends, or 256 are not acknowledged")
        window = ReceiveWindow(self._budget, self.limits.stream_window, now)
        stream = Stream(self._next_id, opened_here=True, receive_window=window, send_budget=self.sending, now=now)
        self._next_id += 2
        self._streams[stream.id] = stream
        self._unacknowledged += 1
        self._outbox.put_control(stream)
        return stream

    @property
    def may_open(self) -> bool:
        """False while 256 streams wait for the peer's acknowledgement, and once openings are over."""
        return self._unacknowledged < MAX_UNACKNOWLEDGED and not self.openings_over

    @property
    def openings_over(self) -> bool:
        """True once no stream will ever be opened here again: either end goes away, or the ids are used up."""
        return self.going_away or self.peer_going_away or self._next_id > _LAST_ID

    def acknowledge(self, stream: Stream) -> None:
        """The application has accepted a stream that the peer opened. Once is enough; later calls change nothing."""
        if self._unaccepted.pop(stream.id, None) is not None:
            stream.acknowledged = stream.ack_due = True
            self._outbox.put_control(stream)

    def send(self, stream: Stream, data: bytes) -> None:
        """Queue `data`. It is not copied, and leaves as the peer's credit and the other streams allow.

        `stream.room` and `stream.may_return` tell how much should wait. To keep to them is the caller's part.

        Raises:
            LocalProtocolError: `stream.may_send` is False.
        """
        if not stream.may_send:
            raise LocalProtocolError(f"{stream!r} takes no more data")
        if data:
            # A view, so that cutting a large piece into frames does not copy what is left of it.
            stream.enqueue(data)
            self._outbox.put_ready(stream)

    def send_fin(self, stream: Stream) -> None:
        """Order the FIN, after all data that is queued. Ordering it again changes nothing."""
        if stream.may_send:
            stream.advance(Step.SEND_FIN)
            stream.fin_due = True
            self._outbox.put_ready(stream)

    def read(self, stream: Stream, max_bytes: int, now: float) -> bytes:
        """Take at most `max_bytes` of what has arrived, fewer when memory is short, and give the peer credit for them.

        They count as waiting to be sent on until the next call, or until the stream is closed or reset.

        Returns b"" when nothing is there: `stream.ended` tells whether anything may still come.
        """
        stream.lend(0)
        data = stream.take(min(max_bytes, self.sending.ahead))
        if not data:
            return b""
        stream.lend(len(data))
        if not stream.receive_queue:
            self._holding.discard(stream)
        self.unread -= len(data)
        self._grant(stream, len(data), now)
        return data

    def reset(self, stream: Stream) -> None:
        """Abandon both directions at once: what is queued and what is unread is dropped. Again changes nothing."""
        if stream.state is State.CLOSED and stream.flushed:
            self._drop_unread(stream)
            return
        late_credit = stream.receive_window.credit if stream.may_receive else None
        peer_knows_it = not stream.syn_due
        self._drop(stream, keep_unread=False)
        if peer_knows_it:
            self._outbox.put_first(_WINDOW_UPDATE, RST, stream.id, 0)
            if late_credit is not None:
                self._remember_reset(stream.id, late_credit)

    def close(self, stream: Stream, now: float) -> None:
        """The application is done with `stream`: order the FIN, and take nothing more from the peer.

        As in TCP, a peer whose data nobody will read is told so by a reset; it follows our data and FIN, and to a
        peer that has seen the FIN it takes nothing away. A peer that says nothing may keep its half open for 30
        seconds (`reset_overdue`).
        """
        self.send_fin(stream)
        stream.closing_since = now
        if self._drop_unread(stream) and stream.may_receive:
            self._refuse_input(stream)

    def _refuse_input(self, stream: Stream) -> None:
        stream.refusing = True
        if stream.flushed:
            self.reset(stream)

    def ping(self, now: float) -> None:
        """Ask for a pong; `PongReceived` brings the round trip. At most 16 questions are kept in mind."""
        self._next_ping = (self._next_ping + 1) & 0xFFFFFFFF
        self._pings[self._next_ping] = now
        if len(self._pings) > 16:
            self._pings.popitem(last=False)
        self._outbox.put_first(FrameType.PING, SYN, 0, self._next_ping)

    def go_away(self, code: GoAwayCode = GoAwayCode.NORMAL) -> None:
        """Tell the peer that this end takes no further streams, and why."""
        if not self.going_away:
            self.going_away = True
            self._outbox.put_first(FrameType.GO_AWAY, 0, 0, code)

    @property
    def live_streams(self) -> list[Stream]:
        """The streams that frames may still come or go for."""
        return [*self._streams.values()]

    def reset_overdue(self, now: float) -> float | None:
        """Reset what nobody has accepted, and what was closed but has not ended, for 30 seconds.

        Returns when the next stream will be overdue, if any is on its way there.
        """
        deadlines: list[float] = []
        for stream in self.live_streams:
            if stream.id in self._unaccepted:
                deadline = stream.opened_at + ACCEPT_TIMEOUT
            elif stream.closing_since is not None:
                deadline = stream.closing_since + CLOSE_TIMEOUT
            else:
                continue
            if deadline <= now:
                self.reset(stream)
            else:
                deadlines.append(deadline)
        return min(deadlines, default=None)

    # What both directions share

    def _grant(self, stream: Stream, amount: int, now: float) -> None:
        credit = stream.receive_window.read(amount, now, self.round_trip)
        if credit:
            stream.grant_due += credit
            self._outbox.put_control(stream)

    def _drop(self, stream: Stream, *, keep_unread: bool) -> None:
        """A reset, by whichever end: nothing of `stream` is sent any more."""
        if stream.state is not State.CLOSED:
            stream.advance(Step.RESET)
        stream.was_reset = True
        stream.send_queue.clear()
        stream.dequeued(stream.queued)
        stream.grant_due = 0
        stream.fin_due = stream.syn_due = stream.ack_due = False
        stream.receive_window.close()
        if not keep_unread:
            self._drop_unread(stream)
        self._forget_if_done(stream)
        self._events += (StreamReadable(stream), StreamWritable(stream))

    def _drop_unread(self, stream: Stream) -> int:
        """Let go of what the application will not read; returns how many bytes that was."""
        stream.lend(0)
        dropped = sum(map(len, stream.receive_queue))
        stream.receive_queue.clear()
        self._holding.discard(stream)
        self.unread -= dropped
        return dropped

    def _reset_greediest(self) -> None:
        receiving, to_come = self._receiving, self._decoder.body_left

        def held(stream: Stream) -> int:
            announced = stream.receive_window.unread
            return announced - to_come if stream is receiving else announced

        greediest = max(self._holding, key=held)
        greediest.end_received = False
        self.reset(greediest)
        if not greediest.was_reset:  # it had ended both ways
            greediest.was_reset = True
            self._events.append(StreamReadable(greediest))

    def _forget_if_done(self, stream: Stream) -> None:
        if stream.state is not State.CLOSED or not stream.flushed:
            return
        if self._streams.pop(stream.id, None) is None:
            return
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
