"""`yamux.session`: what leaves first, and whom that wakes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st
from yamux_rig import DATA, GO_AWAY, KIB, PING, WINDOW_UPDATE, Frame, data, parse, ping, update
from yamux_session_rig import accept, read_all, receive, refuses, sent

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import StreamOpened, StreamWritable
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND
from pioneer_tunnel.yamux.frames import ACK, HEADER_SIZE, LARGEST_BODY, RST, SYN, GoAwayCode
from pioneer_tunnel.yamux.outbox import MAX_REPLIES, SHARED_TURN
from pioneer_tunnel.yamux.session import Role, Session
from pioneer_tunnel.yamux.stream_state import Stream

# What leaves first


@pytest.mark.parametrize(
    ("cause", "first"),
    [
        (lambda session, _: receive(session, ping(77)), Frame(PING, ACK, 0, 77)),
        (lambda session, _: session.ping(0.0), Frame(PING, SYN, 0, 1)),
        (lambda session, _: session.go_away(), Frame(GO_AWAY, 0, 0, 0)),
        (lambda session, other: session.reset(other), Frame(WINDOW_UPDATE, RST, 3, 0)),
    ],
    ids=["pong", "ping", "go-away", "reset"],
)
def test_replies_go_before_data_that_was_queued_first(
    server: Session, cause: Callable[[Session, Stream], object], first: Frame
) -> None:
    bulk, other = accept(server, 1), accept(server, 3)
    server.send(bulk, bytes(200 * KIB))
    cause(server, other)
    assert sent(server, 1)[0] == first
    assert sent(server, 1)[0].type == DATA


def test_credit_and_openings_go_before_data(server: Session) -> None:
    bulk, other = accept(server, 1), accept(server, 3)
    receive(server, data(3, bytes(INITIAL_WINDOW)))
    server.send(bulk, bytes(200 * KIB))
    read_all(server, other)
    server.open_stream(0.0)
    assert sent(server)[:2] == [Frame(WINDOW_UPDATE, 0, 3, INITIAL_WINDOW), Frame(WINDOW_UPDATE, SYN, 2, 0)]


def test_what_is_framed_early_is_a_turn_at_the_most_and_fits_into_the_latest_batch(server: Session) -> None:
    """It cannot be overtaken, and on a slow path the next answer would wait long behind more than that."""
    stream = accept(server)
    assert not server.send_early(stream, bytes(SHARED_TURN + 1))
    assert server.send_early(stream, bytes(SHARED_TURN))
    assert not server.send_early(stream, b"!")
    sent(server, 2 * KIB)  # the writer of a slow path
    assert not server.send_early(stream, bytes(2 * KIB + 1))
    assert server.send_early(stream, bytes(2 * KIB))
    sent(server)
    assert server.send_early(stream, bytes(SHARED_TURN))


def test_queued_replies_are_bounded(server: Session) -> None:
    """A peer that asks and asks and does not read our answers cannot make us keep them all."""
    receive(server, *(ping(opaque) for opaque in range(MAX_REPLIES)))
    with pytest.raises(RemoteProtocolError):
        receive(server, ping(0))
    assert sent(server) == [Frame(GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)]


def test_replies_and_credit_leave_in_batches_too(server: Session) -> None:
    streams = [accept(server, 2 * index + 1) for index in range(100)]
    for stream in streams:
        receive(server, data(stream.id, bytes(INITIAL_WINDOW)))
        read_all(server, stream)
    receive(server, *(ping(opaque) for opaque in range(100)))
    batches = [len(sent(server, 10 * HEADER_SIZE)) for _ in range(20)]
    assert batches == [10] * 20
    assert sent(server) == []


def test_replies_that_were_taken_do_not_count(server: Session) -> None:
    for _ in range(3):
        receive(server, *(ping(opaque) for opaque in range(MAX_REPLIES)))
        assert len(sent(server)) == MAX_REPLIES


def test_openings_that_have_to_be_refused_are_replies_too() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=0))
    ids = range(1, 2 * MAX_REPLIES, 2)
    receive(server, *(update(stream_id, SYN) for stream_id in ids))
    assert refuses(server, update(ids[-1] + 2, SYN))


def test_an_application_that_resets_everything_it_accepts_does_not_unbound_replies(server: Session) -> None:
    def open_and_reset() -> None:
        for stream_id in range(1, 4 * MAX_REPLIES, 2):
            for event in receive(server, update(stream_id, SYN)):
                if isinstance(event, StreamOpened):
                    server.reset(event.stream)

    with pytest.raises(RemoteProtocolError):
        open_and_reset()


def test_our_own_resets_are_never_refused(server: Session) -> None:
    """The bound is on what the peer asks; an application that resets a stream must not get the peer's error."""
    streams = [accept(server, 2 * index + 1) for index in range(10)]
    receive(server, *(ping(opaque) for opaque in range(MAX_REPLIES)))
    for stream in streams:
        server.reset(stream)
    server.ping(0.0)
    server.go_away()
    assert len(sent(server)) == MAX_REPLIES + 12


def test_turns_are_16_kib_while_others_wait(server: Session) -> None:
    streams = [accept(server, stream_id) for stream_id in (1, 3, 5)]
    for stream in streams:
        server.send(stream, bytes(100 * KIB))
    frames: list[Frame] = []
    while more := sent(server, 48 * KIB + 3 * HEADER_SIZE):
        frames += more
    shared, lone = frames[:18], frames[18:]
    assert [frame.stream_id for frame in shared] == [1, 3, 5] * 6
    assert {frame.length for frame in shared} == {SHARED_TURN} == {16 * KIB}
    assert sum(frame.length for frame in frames) == 300 * KIB
    assert len(lone) == 3


def test_turns_are_a_quarter_of_a_large_batch(server: Session) -> None:
    """On a fast path, large frames cost less time and delay nothing."""
    streams = [accept(server, stream_id) for stream_id in (1, 3, 5)]
    for stream in streams:
        server.send(stream, bytes(200 * KIB))
    assert [frame.length for frame in sent(server, 128 * KIB)][:3] == [32 * KIB] * 3
    assert [frame.length for frame in sent(server, 1024 * KIB)][:3] == [LARGEST_BODY] * 3


def test_a_turn_is_a_batch_while_nobody_waits(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(200 * KIB))
    server.send_fin(stream)
    assert [frame.length for frame in sent(server, 150 * KIB)] == [150 * KIB]
    assert [frame.length for frame in sent(server, 150 * KIB)] == [50 * KIB, 0]


def test_the_writer_may_ask_for_larger_turns(server: Session) -> None:
    for stream in [accept(server, stream_id) for stream_id in (1, 3)]:
        server.send(stream, bytes(250 * KIB))
    frames = parse(server.data_to_send(201 * KIB, 100 * KIB))
    assert [(frame.stream_id, frame.length) for frame in frames[:2]] == [(1, 100 * KIB), (3, 100 * KIB)]


def test_no_frame_is_tiny_because_a_turn_or_a_batch_ends(server: Session) -> None:
    for stream in [accept(server, stream_id) for stream_id in (1, 3, 5)]:
        server.send(stream, bytes(SHARED_TURN + 500))
    assert [frame.length for frame in sent(server, 2 * SHARED_TURN + 2 * KIB)] == [SHARED_TURN + 500] * 2
    assert [frame.length for frame in sent(server, 2 * SHARED_TURN)] == [SHARED_TURN + 500]


def test_a_small_stream_does_not_wait_for_the_turns_of_large_ones(server: Session) -> None:
    bulk = [accept(server, stream_id) for stream_id in (1, 3, 5)]
    small = accept(server, 7)
    for stream in bulk:
        server.send(stream, bytes(250 * KIB))
        sent(server, 1)
    server.send(small, b"quick")
    assert sent(server, 5) == [Frame(DATA, 0, 7, 5, b"quick")]


def test_a_stream_goes_first_once_in_each_round_of_the_others(server: Session) -> None:
    """Else many words on one stream, or on few, would keep the large streams from ever having a turn."""
    bulk = [accept(server, stream_id) for stream_id in (1, 3)]
    small = accept(server, 5)
    for stream in bulk:
        server.send(stream, bytes(250 * KIB))
        sent(server, 1)
    order: list[int] = []
    for _ in range(9):
        server.send(small, b"word")
        [frame] = sent(server, 1)
        order.append(frame.stream_id)
    assert order == [5, 1, 3] * 3


def test_a_stream_that_goes_first_has_one_turn_first(server: Session) -> None:
    bulk, other = accept(server, 1), accept(server, 3)
    server.send(bulk, bytes(250 * KIB))
    sent(server, 1)
    server.send(other, bytes(250 * KIB))
    assert [frame.stream_id for frame in sent(server, 4 * SHARED_TURN)] == [3, 1, 3, 1]


def test_an_ack_is_sent_also_while_its_stream_waits_for_the_round_to_pass_it(server: Session) -> None:
    bulk = accept(server, 1)
    server.send(bulk, bytes(250 * KIB))
    sent(server, 1)
    [event] = receive(server, update(3, SYN))
    assert isinstance(event, StreamOpened)
    server.send(event.stream, b"word")
    assert sent(server, 4) == [Frame(DATA, 0, 3, 4, b"word")]
    server.acknowledge(event.stream)
    assert sent(server, 1) == [Frame(WINDOW_UPDATE, ACK, 3, 0)]


def test_on_a_path_that_takes_small_batches_a_lone_stream_takes_small_turns_too(server: Session) -> None:
    """What is in a batch cannot be overtaken, so a frame must not make the batch larger than the writer asked for."""
    stream = accept(server)
    server.send(stream, bytes(200 * KIB))
    assert [frame.length for frame in sent(server, SHARED_TURN)] == [SHARED_TURN]


@fuzzed()
@given(st.lists(st.integers(0, 40 * KIB), min_size=1, max_size=6), st.integers(1, 100 * KIB))
def test_what_is_taken_is_at_most_one_frame_more_than_asked_for(sizes: list[int], max_bytes: int) -> None:
    server = Session(Role.SERVER)
    for index, size in enumerate(sizes):
        [event] = receive(server, update(2 * index + 1, SYN))
        assert isinstance(event, StreamOpened)
        stream = event.stream
        server.send(stream, bytes(size))
        server.send_fin(stream)
    bodies: dict[int, int] = {}
    while chunks := server.data_to_send(max_bytes):
        assert sum(map(len, chunks)) < max_bytes + LARGEST_BODY + 2 * HEADER_SIZE
        for frame in parse(chunks):
            bodies[frame.stream_id] = bodies.get(frame.stream_id, 0) + frame.length
    assert bodies == {2 * index + 1: size for index, size in enumerate(sizes)}


# Waking whoever waits


def test_what_is_left_of_a_large_send_is_kept_alone(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(INITIAL_WINDOW + 1000))
    sent(server)
    stream.compact()
    assert list(stream.send_queue) == [bytes(1000)]
    assert isinstance(stream.send_queue[0], bytes)
    stream.compact()
    receive(server, update(1, credit=1000))
    assert [frame.length for frame in sent(server)] == [1000]
    stream.compact()
    assert server.sending.held == 0


def test_a_writer_that_waits_is_told_when_little_is_left(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(INITIAL_WINDOW + SEND_BOUND + 1))
    stream.writer_waits = True
    sent(server)
    assert server.events() == []
    receive(server, update(1, credit=1))
    sent(server)
    assert server.events() == [StreamWritable(stream)]


def has_work(session: Session) -> bool:
    return session.has_work


def test_there_is_work_while_events_or_frames_wait(server: Session) -> None:
    assert not has_work(server)
    server.receive_data(update(1, SYN), 0.0)
    assert has_work(server)
    server.events()
    assert not has_work(server)
    server.ping(0.0)
    assert has_work(server)
    sent(server)
    assert not has_work(server)


def test_whoever_waits_to_send_is_woken_once_for_a_batch(server: Session) -> None:
    one, other = accept(server, 1), accept(server, 3)
    for stream in (one, other):
        server.send(stream, bytes(3 * SHARED_TURN))
        stream.writer_waits = True
    sent(server, 6 * SHARED_TURN + KIB)
    assert server.events() == [StreamWritable(one), StreamWritable(other)]


def test_events_come_once(server: Session) -> None:
    assert receive(server, data(1, b"x", SYN)) != []
    assert server.events() == []
