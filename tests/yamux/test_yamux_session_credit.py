"""`yamux.session`: credit, how windows grow, what is held in memory, and what is read."""

from __future__ import annotations

import random
import sys
import time
from typing import Any

import attrs
import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st
from yamux_rig import DATA, KIB, WINDOW_UPDATE, Frame, data, update
from yamux_session_rig import PLENTY, accept, learn_round_trip, read_all, receive, refuses, sent

from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import StreamOpened, StreamReadable
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import FIN, RST, SYN, encode_header
from pioneer_tunnel.yamux.session import Role, Session
from pioneer_tunnel.yamux.stream_state import Stream

# Credit


def test_data_over_the_window_is_refused_from_its_header_alone(server: Session) -> None:
    accept(server)
    assert refuses(server, encode_header(DATA, 0, 1, INITIAL_WINDOW + 1))


def test_data_over_what_is_left_of_the_window_is_refused_from_its_header_alone(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, bytes(INITIAL_WINDOW - 10)), data(1, bytes(10)))
    assert stream.receive_window.credit == 0
    assert refuses(server, encode_header(DATA, 0, 1, 1))


def test_a_syn_over_the_window_is_refused_from_its_header_alone(server: Session) -> None:
    assert refuses(server, encode_header(DATA, SYN, 1, INITIAL_WINDOW + 1))
    assert server.events() == []


def test_a_syn_that_is_refused_anyway_may_not_go_over_the_window_either() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=0))
    assert refuses(server, encode_header(DATA, SYN, 1, INITIAL_WINDOW + 1))


@pytest.mark.parametrize("read_before", [0, 2])
def test_unread_data_outlives_the_buffer_it_came_in(server: Session, read_before: int) -> None:
    stream = accept(server)
    buffer = bytearray(encode_header(DATA, 0, 1, 10) + b"hello")
    server.receive_data(buffer, 0.0)
    body = server.read(stream, read_before, 0.0) if read_before else b""
    server.keep_unread()
    buffer[:5] = b"world"
    server.receive_data(memoryview(buffer)[:5], 0.0)
    server.keep_unread()
    buffer[:] = bytes(len(buffer))
    assert body + read_all(server, stream) == b"helloworld"


def test_a_small_message_that_is_sent_makes_large_windows_small_for_a_moment() -> None:
    """The application may wait for its answer, which comes behind the bulk data that the windows let in."""
    server = Session(Role.SERVER)
    learn_round_trip(server, 0.0001)
    bulk, other = accept(server, 1), accept(server, 3)
    bulk.receive_window.size = bulk.receive_window.credit = 4 * INITIAL_WINDOW
    assert server.send_early(other, b"request")
    sent(server)
    for now, credit in ((1.0, INITIAL_WINDOW), (1.1, 4 * INITIAL_WINDOW)):
        receive(server, data(1, bytes(bulk.receive_window.credit)), now=now)
        read_all(server, bulk, now)
        assert bulk.receive_window.credit == credit


def test_a_small_piece_does_not_keep_the_large_chunk_it_came_in(server: Session) -> None:
    """Many of them would take far more memory than they count for."""
    small, large = accept(server, 1), accept(server, 3)
    server.receive_data(encode_header(DATA, 0, 1, 2 * KIB) + bytes(2 * KIB) + encode_header(DATA, 0, 3, 9 * KIB), 0.0)
    server.receive_data(bytes(9 * KIB), 0.0)
    server.keep_unread()
    assert [type(piece) for piece in small.receive_queue + large.receive_queue] == [memoryview, memoryview]
    receive(server, data(1, bytes(KIB)) + data(3, bytes(9 * KIB)))
    server.keep_unread()
    assert [type(piece) for piece in small.receive_queue] == [memoryview, bytes]


def test_the_time_of_a_small_piece_does_not_grow_with_what_is_unread(server: Session) -> None:
    """A peer could use up all the time of a relay, with few bytes, when a large window is full of small pieces."""

    def seconds_for(stream_id: int) -> float:
        began = time.process_time()
        for _ in range(100):
            receive(server, data(stream_id, b"x"))
            server.keep_unread()
        return time.process_time() - began

    full, empty = accept(server, 1), accept(server, 3)
    full.receive_window.size = full.receive_window.credit = 64 * INITIAL_WINDOW
    for _ in range(100):
        receive(server, *[data(1, bytes(KIB)), data(1, b"x")] * 100)
    server.keep_unread()
    assert len(full.receive_queue) == 20_000
    assert not empty.receive_queue
    assert seconds_for(1) < 50 * seconds_for(3)  # some hundred times as much, if it looked at all of them


def test_a_whole_window_may_come_as_one_body(server: Session) -> None:
    body = random.Random(0).randbytes(INITIAL_WINDOW)
    [opening, readable] = receive(server, data(1, body, SYN))
    assert isinstance(opening, StreamOpened)
    assert readable == StreamReadable(opening.stream)
    assert read_all(server, opening.stream) == body


def test_credit_is_given_when_the_application_has_read(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, bytes(INITIAL_WINDOW)))
    assert sent(server) == []
    server.read(stream, INITIAL_WINDOW // 2 - 1, 0.0)
    assert sent(server) == []
    server.read(stream, 1, 0.0)
    assert sent(server) == [Frame(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW // 2)]
    read_all(server, stream)
    assert sent(server) == [Frame(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW // 2)]


def test_credit_of_several_reads_leaves_in_one_frame(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, bytes(INITIAL_WINDOW)))
    for _ in range(2):
        server.read(stream, INITIAL_WINDOW // 2, 0.0)
    assert sent(server) == [Frame(WINDOW_UPDATE, 0, 1, INITIAL_WINDOW)]


def test_nothing_more_is_sent_than_the_peer_granted(server: Session) -> None:
    stream = accept(server)
    body = random.Random(0).randbytes(2 * INITIAL_WINDOW)
    server.send(stream, body)
    first = sent(server)
    assert b"".join(frame.body for frame in first) == body[:INITIAL_WINDOW]
    assert sent(server) == []
    receive(server, update(1, credit=1000))
    assert sent(server) == [Frame(DATA, 0, 1, 1000, body[INITIAL_WINDOW : INITIAL_WINDOW + 1000])]


def test_credit_that_overflows_32_bits_is_refused(server: Session) -> None:
    accept(server)
    assert not refuses(server, update(1, credit=2**32 - 1 - INITIAL_WINDOW))
    assert refuses(server, update(1, credit=1))


def grow(session: Session, stream: Stream, since: int = 0) -> None:
    """Use the whole window 20 times, each time within a round trip of a second, since that second."""
    for seconds in range(since, since + 20):
        receive(session, encode_header(DATA, 0, stream.id, stream.receive_window.credit))
        receive(session, bytes(stream.receive_window.unread))
        read_all(session, stream, float(seconds))
    sent(session)


def test_window_growth_is_bounded_for_each_stream() -> None:
    server = Session(Role.SERVER, Limits(stream_window=1024 * KIB))
    stream = accept(server)
    grow(server, stream)
    assert stream.receive_window.size == INITIAL_WINDOW  # the round trip is not known yet
    learn_round_trip(server, 1.0)
    grow(server, stream, since=20)
    assert stream.receive_window.size == 1024 * KIB


def test_window_growth_is_bounded_for_the_session_and_paid_back() -> None:
    server = Session(Role.SERVER, Limits(window_growth=700 * KIB))
    learn_round_trip(server, 1.0)
    streams = [accept(server, stream_id) for stream_id in (1, 3, 5)]
    for stream in streams:
        grow(server, stream)
    growth = [stream.receive_window.size - INITIAL_WINDOW for stream in streams]
    assert growth == [700 * KIB, 0, 0]
    receive(server, update(1, FIN))
    grow(server, streams[1], since=20)
    server.reset(streams[1])
    grow(server, streams[2], since=20)
    assert streams[2].receive_window.size == INITIAL_WINDOW + 700 * KIB


def test_the_peer_is_told_of_growth(server: Session) -> None:
    learn_round_trip(server, 1.0)
    stream = accept(server)
    for now, credit in ((0.0, INITIAL_WINDOW), (1.0, 2 * INITIAL_WINDOW)):
        receive(server, data(1, bytes(INITIAL_WINDOW)))
        read_all(server, stream, now)
        assert Frame(WINDOW_UPDATE, 0, 1, credit) in sent(server)


# What is held in memory


def test_what_a_session_may_cost_by_default() -> None:
    assert Limits() == Limits(
        stream_window=16 * 1024 * KIB,
        window_growth=32 * 1024 * KIB,
        unread=64 * 1024 * KIB,
        streams=4096,
        unaccepted=256,
    )


def test_the_greediest_is_reset_when_all_streams_hold_too_much() -> None:
    server = Session(Role.SERVER, Limits(unread=300 * KIB))
    modest, greedy, late = (accept(server, stream_id) for stream_id in (1, 3, 5))
    receive(server, data(1, bytes(100 * KIB)), data(3, bytes(150 * KIB)))
    receive(server, data(5, bytes(50 * KIB)))  # exactly as much as there may be
    assert sent(server) == []
    events = receive(server, data(5, bytes(1)))
    assert StreamReadable(greedy) in events
    assert greedy.was_reset
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 3, 0)]
    assert server.unread == 150 * KIB + 1
    assert len(read_all(server, modest)) == 100 * KIB
    assert len(read_all(server, late)) == 50 * KIB + 1


def test_the_greediest_is_who_holds_most_not_who_has_announced_most() -> None:
    server = Session(Role.SERVER, Limits(unread=200 * KIB))
    holder, announcer = accept(server, 1), accept(server, 3)
    receive(server, data(1, bytes(199 * KIB)))
    receive(server, encode_header(DATA, 0, 3, INITIAL_WINDOW))
    receive(server, bytes(2 * KIB))
    assert holder.was_reset
    assert not announcer.was_reset
    assert server.unread == 2 * KIB


def test_a_greedy_stream_that_has_ended_is_broken_not_cut_short() -> None:
    server = Session(Role.SERVER, Limits(unread=200 * KIB))
    greedy, other = accept(server, 1), accept(server, 3)
    receive(server, data(1, bytes(199 * KIB), FIN))
    server.send_fin(greedy)
    sent(server)
    receive(server, data(3, bytes(2 * KIB)))
    assert server.read(greedy, PLENTY, 0.0) == b""
    assert greedy.was_reset
    assert not greedy.end_received
    assert len(read_all(server, other)) == 2 * KIB


@pytest.mark.parametrize("size", [1, 2, 100])
def test_small_frames_do_not_cost_many_times_their_bytes(server: Session, size: int) -> None:
    stream = accept(server)
    count = 64 * KIB // size
    receive(server, *(data(1, index.to_bytes(4, "big")[-size:].ljust(size)) for index in range(count)))
    held = sum(map(sys.getsizeof, stream.receive_queue)) + sys.getsizeof(stream.receive_queue)
    assert held < 2 * 64 * KIB
    expected = b"".join(index.to_bytes(4, "big")[-size:].ljust(size) for index in range(count))
    assert read_all(server, stream) == expected


def test_small_sends_do_not_cost_many_times_their_bytes(server: Session) -> None:
    stream = accept(server)
    for index in range(64 * KIB):
        server.send(stream, bytes([index % 251]))
    held = sum(map(sys.getsizeof, stream.send_queue)) + sys.getsizeof(stream.send_queue)
    assert held < 2 * 64 * KIB
    expected = bytes(index % 251 for index in range(64 * KIB))
    assert b"".join(frame.body for frame in sent(server)) == expected


# Reading


@fuzzed()
@given(
    st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    st.lists(st.integers(1, 7000), min_size=1, max_size=10),
)
def test_what_is_read_is_what_was_received_in_pieces_of_at_most_the_size_asked_for(
    arriving: list[int], asked_for: list[int]
) -> None:
    server = Session(Role.SERVER)
    stream = accept(server)
    bodies = [random.Random(index).randbytes(size) for index, size in enumerate(arriving)]
    receive(server, *(data(1, body) for body in bodies))
    pieces: list[bytes] = []
    while True:
        size = asked_for[len(pieces) % len(asked_for)]
        piece = server.read(stream, size, 0.0)
        if not piece:
            break
        assert type(piece) is bytes
        assert len(piece) <= size
        pieces.append(piece)
    assert b"".join(pieces) == b"".join(bodies)
    assert server.unread == 0


def test_header_and_body_may_come_apart(server: Session) -> None:
    """The reference sends them as two writes, so they come as two messages."""
    stream = accept(server)
    assert receive(server, encode_header(DATA, FIN, 1, 5)) == []
    assert receive(server, b"he") == [StreamReadable(stream)]
    assert not stream.end_received
    assert receive(server, b"llo") == [StreamReadable(stream)]
    assert read_all(server, stream) == b"hello"
    assert stream.ended


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Limits)])
@pytest.mark.parametrize("value", [-1, 1.5, "4096", None, True])
def test_a_limit_that_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; allowed is a whole number of 0 or more"):
        Limits(**{name: value})
