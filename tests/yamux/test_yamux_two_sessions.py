"""Two `yamux.session`s, joined by queues of bytes that are cut anywhere; Hypothesis drives both."""

from __future__ import annotations

import random
from collections import deque
from typing import Final

from fuzzing import fuzzed_machine
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from yamux_rig import DATA, KIB, WINDOW_UPDATE, Frame, parse
from yamux_session_rig import PLENTY, received

from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import OpenAllowed, StreamOpened, StreamReadable, StreamWritable
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND
from pioneer_tunnel.yamux.frames import HEADER_SIZE, LARGEST_BODY, Buffer, FrameType
from pioneer_tunnel.yamux.session import CLOSE_TIMEOUT, Role, Session
from pioneer_tunnel.yamux.stream_state import Stream


class Wire:
    """One direction between two sessions: bytes on their way, and the headers among them."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.headers: deque[tuple[int, Frame]] = deque()
        self.delivered = 0

    def put(self, chunks: list[Buffer]) -> None:
        position = self.delivered + len(self.bytes)
        for frame in parse(chunks):
            position += HEADER_SIZE
            self.headers.append((position, frame))
            position += len(frame.body)
        self.bytes += b"".join(chunks)

    def take(self, amount: int) -> bytes:
        taken = bytes(self.bytes[:amount])
        del self.bytes[:amount]
        self.delivered += len(taken)
        while self.headers and self.headers[0][0] <= self.delivered:
            self.headers.popleft()
        return taken

    def under_way(self, frame_type: FrameType, stream_id: int) -> int:
        """The sum of the lengths of such frames whose header has not arrived."""
        frames = [frame for _, frame in self.headers]
        return sum(frame.length for frame in frames if (frame.type, frame.stream_id) == (frame_type, stream_id))


class Half:
    """What the model knows of one stream at one end."""

    def __init__(self, stream: Stream) -> None:
        self.stream: Final = stream
        self.sent = 0
        self.received = 0
        self.given_up = False
        """The application closed it, or reset it, and reads no more."""
        self.reader_waits = False


class End:
    """One session and the application above it."""

    def __init__(self, session: Session) -> None:
        self.session: Final = session
        self.inbound: Final = Wire()
        self.halves: Final[dict[int, Half]] = {}
        self.may_open_seen = True

    def add(self, stream: Stream) -> None:
        assert stream.id not in self.halves
        self.halves[stream.id] = Half(stream)


LENGTH: Final = 1 << 20
CONTENT: Final = random.Random(0).randbytes(LENGTH + 1000)

LIMITS: Final = Limits(
    stream_window=2 * INITIAL_WINDOW, window_growth=300 * KIB, unread=400 * KIB, streams=5, unaccepted=3
)
ends = st.sampled_from([0, 1])
which = st.integers(0, 5)
sizes = st.sampled_from([1, 1000, 20 * KIB, 64 * KIB, 300 * KIB, 300 * KIB])


class TwoSessions(RuleBasedStateMachine):
    """A client and a server; applications, wires and the clock do what they like, and these things always hold.

    What is received is a prefix of what was sent. Credit is conserved between the ends. Nobody holds more than its
    bounds allow. Whoever waits is told. And when both applications are done with a stream, neither table has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.ends = End(Session(Role.CLIENT, LIMITS)), End(Session(Role.SERVER, LIMITS))
        for end in (0, 1):
            self.ends[end].session.ping(self.now)
            self.open(end)
            self.open(end)
        self.now = 0.5  # a long round trip, so that windows grow
        self.exchange(PLENTY)
        self.accept(0)
        self.accept(1)
        self.exchange(PLENTY)
        assert all(there.session.round_trips.shortest == 0.5 for there in self.ends)

    def pick(self, end: int, number: int) -> Half | None:
        halves = [half for half in self.ends[end].halves.values() if not half.given_up]
        return halves[number % len(halves)] if halves else None

    # The applications

    @rule(end=ends)
    def open(self, end: int) -> None:
        session = self.ends[end].session
        if session.may_open and len(session.live_streams) < 7:
            self.ends[end].add(session.open_stream(self.now))

    @rule(end=ends)
    def accept(self, end: int) -> None:
        for half in self.ends[end].halves.values():
            if not half.given_up:
                self.ends[end].session.acknowledge(half.stream)

    @rule(end=ends, number=which, size=sizes)
    def send(self, end: int, number: int, size: int) -> None:
        half = self.pick(end, number)
        if half and half.stream.may_send and half.sent + size <= LENGTH:
            start = self.start_of(half.stream, by=end) + half.sent
            self.ends[end].session.send(half.stream, CONTENT[start : start + size])
            half.sent += size
            half.stream.writer_waits = half.stream.queued > SEND_BOUND

    @rule(end=ends, number=which, size=sizes)
    def read(self, end: int, number: int, size: int) -> None:
        if half := self.pick(end, number):
            self.read_from(end, half, size)

    @rule(end=ends)
    def read_everything(self, end: int) -> None:
        for half in self.ends[end].halves.values():
            while half.stream.receive_queue and not half.given_up:
                self.read_from(end, half, 64 * KIB)

    @rule(end=ends, number=which, how=st.sampled_from(["fin", "fin", "fin", "close", "close", "reset"]))
    def finish(self, end: int, number: int, how: str) -> None:
        half, session = self.pick(end, number), self.ends[end].session
        if half is None:
            return
        if how == "fin":
            session.send_fin(half.stream)
            return
        half.given_up = True
        if how == "close":
            session.close(half.stream, self.now)
        else:
            session.reset(half.stream)

    # The wires and the clock

    @rule(end=ends, max_bytes=st.sampled_from([1, 20 * KIB, 256 * KIB]))
    def write(self, end: int, max_bytes: int) -> None:
        chunks = self.ends[end].session.data_to_send(max_bytes)
        assert sum(map(len, chunks)) <= max_bytes + LARGEST_BODY + 2 * HEADER_SIZE
        self.ends[1 - end].inbound.put(chunks)
        self.notice(end)

    @rule(end=ends, amount=st.sampled_from([1, 5, 12, 100, 30 * KIB, 256 * KIB]))
    def deliver(self, end: int, amount: int) -> None:
        there = self.ends[end]
        there.session.receive_data(there.inbound.take(amount), self.now)
        self.notice(end)

    @rule(amount=st.sampled_from([999, 100 * KIB, PLENTY]))
    def exchange(self, amount: int) -> None:
        """Both ends write what they have, and of what is under way, nearly everything arrives."""
        for end in (0, 1):
            self.write(end, PLENTY)
        for end in (0, 1):
            under_way = len(self.ends[end].inbound.bytes)
            self.deliver(end, min(amount, under_way) if amount == PLENTY else max(under_way - amount, 1))

    @rule(seconds=st.sampled_from([0.001, 0.2, 1.0, 16.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for end in (0, 1):
            self.ends[end].session.reset_overdue(self.now, received(self.now))
            self.notice(end)

    # What always holds

    def start_of(self, stream: Stream, *, by: int) -> int:
        """Where in `CONTENT` what `by` sends on this stream begins: each direction of each stream has its own."""
        return (stream.id * 2 + by) % 1000

    def read_from(self, end: int, half: Half, size: int) -> None:
        piece = self.ends[end].session.read(half.stream, size, self.now)
        start = self.start_of(half.stream, by=1 - end) + half.received
        assert piece == CONTENT[start : start + len(piece)]
        assert len(piece) <= size
        half.received += len(piece)
        half.reader_waits = not piece and not half.stream.ended and not half.stream.was_reset

    def notice(self, end: int) -> None:
        """Take the events, and see that nobody was forgotten who waits for one."""
        there = self.ends[end]
        for event in there.session.events():
            if isinstance(event, StreamOpened):
                there.add(event.stream)
            elif isinstance(event, StreamReadable) and event.stream.id in there.halves:
                there.halves[event.stream.id].reader_waits = False
            elif isinstance(event, StreamWritable):
                event.stream.writer_waits = False
            elif isinstance(event, OpenAllowed):
                there.may_open_seen = True
        for half in there.halves.values():
            stream = half.stream
            assert not (half.reader_waits and (stream.receive_queue or stream.ended or stream.was_reset)), stream
            assert not (stream.writer_waits and (stream.queued <= SEND_BOUND or stream.was_reset)), stream

    @invariant()
    def memory_is_bounded(self) -> None:
        for there in self.ends:
            session, growth = there.session, 0
            held = {half.stream: sum(map(len, half.stream.receive_queue)) for half in there.halves.values()}
            assert session.unread == sum(held.values()) <= LIMITS.unread
            unread = {stream for stream, amount in held.items() if amount}
            assert session._forgotten_unread == unread - {*session.live_streams}
            for stream in session.live_streams:
                window = stream.receive_window
                assert held.get(stream, 0) <= LIMITS.stream_window
                if stream.may_receive:
                    growth += window.size - INITIAL_WINDOW
                    assert held.get(stream, 0) <= window.size <= LIMITS.stream_window
                    assert min(window.credit, window.unread, window.owed) >= 0
            assert session._budget.left + growth == LIMITS.window_growth
            theirs = [stream for stream in session.live_streams if not stream.opened_here]
            assert len(theirs) <= LIMITS.streams
            assert sum(not stream.acknowledged for stream in theirs) <= LIMITS.unaccepted

    @invariant()
    def credit_is_conserved(self) -> None:
        """What the sender may send, what is on its way, and credit on its way back: that is the receiver's account."""
        for end in (0, 1):
            here, there = self.ends[end], self.ends[1 - end]
            for stream_id in here.halves.keys() & there.halves.keys():
                sender, receiver = here.halves[stream_id].stream, there.halves[stream_id].stream
                if sender.was_reset or receiver.was_reset or not receiver.may_receive:
                    continue
                if not sender.may_send and sender.flushed:
                    continue  # it may have forgotten the stream, and needs no more credit
                data_under_way = there.inbound.under_way(DATA, stream_id)
                credit_under_way = here.inbound.under_way(WINDOW_UPDATE, stream_id) + receiver.grant_due
                assert sender.send_window.credit + data_under_way + credit_under_way == receiver.receive_window.credit

    # The end

    def teardown(self) -> None:
        for end in (0, 1):
            self.read_everything(end)
        self.drain()
        self.everything_arrived()
        for there in self.ends:
            for half in there.halves.values():
                if not half.given_up:
                    there.session.close(half.stream, self.now)
                    half.given_up = True
        self.drain()
        # Where both closed while more was queued than the other end had granted, each waits for the other.
        self.wait(CLOSE_TIMEOUT)
        self.drain()
        for there in self.ends:
            session = there.session
            assert session.live_streams == []
            assert session.unread == session._peer_streams == session._unacknowledged == 0
            assert not session._unaccepted
            assert not session._forgotten_unread
            assert session._budget.left == LIMITS.window_growth
            assert not session.has_work

    def drain(self) -> None:
        """Both applications read what they can, until nothing moves any more."""
        while any(there.session.has_work or there.inbound.bytes for there in self.ends):
            self.exchange(PLENTY)
            for end in (0, 1):
                self.read_everything(end)
            self.memory_is_bounded()
            self.credit_is_conserved()

    def everything_arrived(self) -> None:
        """Nothing is under way: where nobody reset or gave up, all is there, and both ends agree on what is over."""
        client, server = (there.halves for there in self.ends)
        for stream_id in client.keys() & server.keys():
            halves = client[stream_id], server[stream_id]
            for half, other in (halves, halves[::-1]):
                assert half.received <= other.sent
                if half.stream.was_reset or other.stream.was_reset or half.given_up:
                    continue
                assert half.received == other.sent - other.stream.queued
                assert half.stream.end_received == (not other.stream.may_send and other.stream.flushed)
                # With everything read, nothing can be left over for want of credit.
                assert other.stream.flushed


TestTwoSessions = fuzzed_machine(TwoSessions.TestCase, 200, stateful_step_count=80)
