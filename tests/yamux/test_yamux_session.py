"""`yamux.session`: what implementations of yamux got wrong, one named test for each, and two sessions at once.

The peer of the first part is made by hand: frames go in as bytes, and what the session wants to send is taken apart.
The last part joins two sessions by queues of bytes that are cut anywhere, and lets Hypothesis drive both.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import attrs
import pytest
from fuzzing import fuzzed, fuzzed_machine
from hypothesis import example, given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from yamux_rig import KIB, Frame, data, parse, ping, update

from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError
from pioneer_tunnel._net.delivery import Movement
from pioneer_tunnel.yamux.events import (
    Event,
    GoAwayReceived,
    OpenAllowed,
    PongReceived,
    StreamOpened,
    StreamReadable,
    StreamWritable,
)
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW, SEND_BOUND
from pioneer_tunnel.yamux.frames import (
    ACK,
    FIN,
    HEADER_SIZE,
    LARGEST_BODY,
    RST,
    SYN,
    Buffer,
    FrameType,
    GoAwayCode,
    encode_header,
)
from pioneer_tunnel.yamux.limits import Limits
from pioneer_tunnel.yamux.outbox import MAX_REPLIES, SHARED_TURN
from pioneer_tunnel.yamux.peer_ids import MAX_REMEMBERED_GAPS, PeerIds
from pioneer_tunnel.yamux.session import (
    ACCEPT_TIMEOUT,
    ANSWER_TIMEOUT,
    CLOSE_TIMEOUT,
    MAX_REMEMBERED_RESETS,
    MAX_UNACKNOWLEDGED,
    Role,
    Session,
)
from pioneer_tunnel.yamux.stream_state import Stream

DATA, WINDOW_UPDATE, PING, GO_AWAY = FrameType
PLENTY: Final = 2**40


def sent(session: Session, max_bytes: int = PLENTY) -> list[Frame]:
    """The frames that the session wants to send next."""
    return parse(session.data_to_send(max_bytes))


def receive(session: Session, *frames: bytes, now: float = 0.0) -> list[Event]:
    session.receive_data(b"".join(frames), now)
    return session.events()


def refuses(session: Session, *frames: bytes) -> bool:
    """Whether `frames` break a rule; then the session says so to the peer, before everything else, and is over."""
    try:
        receive(session, *frames)
    except RemoteProtocolError:
        assert sent(session)[0] == Frame(GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)
        return True
    return False


def accept(session: Session, stream_id: int = 1, now: float = 0.0) -> Stream:
    """A stream that the peer has opened and the application has accepted; the ACK has left."""
    [event] = receive(session, update(stream_id, SYN), now=now)
    assert isinstance(event, StreamOpened)
    session.acknowledge(event.stream)
    assert sent(session) == [Frame(WINDOW_UPDATE, ACK, stream_id, 0)]
    return event.stream


def opened(session: Session, now: float = 0.0) -> Stream:
    """A stream of our own that the peer has accepted."""
    stream = session.open_stream(now)
    assert sent(session) == [Frame(WINDOW_UPDATE, SYN, stream.id, 0)]
    receive(session, update(stream.id, ACK))
    return stream


def may_open(session: Session) -> bool:
    return session.may_open


def read_all(session: Session, stream: Stream, now: float = 0.0) -> bytes:
    pieces = []
    while stream.receive_queue:
        pieces.append(session.read(stream, PLENTY, now))
        assert pieces[-1]
    assert session.read(stream, PLENTY, now) == b""
    return b"".join(pieces)


@pytest.fixture
def server() -> Session:
    return Session(Role.SERVER)


@pytest.fixture
def client() -> Session:
    return Session(Role.CLIENT)


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


def learn_round_trip(session: Session, seconds: float) -> None:
    session.ping(0.0)
    [question] = sent(session)
    assert receive(session, ping(question.length, ACK), now=seconds) == [PongReceived(seconds)]


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


# Openings from the peer


def test_a_syn_may_ride_on_data(server: Session) -> None:
    [opening, readable] = receive(server, data(1, b"hello", SYN))
    assert isinstance(opening, StreamOpened)
    assert readable == StreamReadable(opening.stream)
    assert read_all(server, opening.stream) == b"hello"


def test_a_syn_may_ride_on_a_window_update(server: Session) -> None:
    [opening] = receive(server, update(1, SYN))
    assert isinstance(opening, StreamOpened)
    assert opening.stream.send_window.credit == INITIAL_WINDOW


def test_a_syn_may_bring_credit(server: Session) -> None:
    [opening] = receive(server, update(1, SYN, credit=65536))
    assert isinstance(opening, StreamOpened)
    assert opening.stream.send_window.credit == INITIAL_WINDOW + 65536


def test_a_syn_may_bring_the_end_too(server: Session) -> None:
    opening, *readable = receive(server, data(1, b"hello", SYN | FIN))
    assert isinstance(opening, StreamOpened)
    assert readable[0] == StreamReadable(opening.stream)
    assert read_all(server, opening.stream) == b"hello"
    assert opening.stream.end_received
    server.send(opening.stream, b"and the reply")
    assert [frame.body for frame in sent(server)] == [b"and the reply"]


def test_an_end_may_ride_on_credit(server: Session) -> None:
    stream = accept(server)
    receive(server, update(1, FIN, credit=100))
    assert stream.end_received
    assert stream.send_window.credit == INITIAL_WINDOW + 100


def test_a_syn_may_be_taken_back_at_once(server: Session) -> None:
    opening, *_ = receive(server, update(1, SYN | RST))
    assert isinstance(opening, StreamOpened)
    assert opening.stream.was_reset
    assert server.live_streams == []
    server.acknowledge(opening.stream)
    assert sent(server) == []


def test_of_openings_taken_back_at_once_as_many_come_between_two_looks_as_may_wait() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=3))
    for first in (1, 21):  # the second look is not charged for the first
        events = receive(server, *(update(first + 2 * number, SYN | RST) for number in range(5)))
        assert sum(isinstance(event, StreamOpened) for event in events) == 3


def test_an_acceptance_rides_on_the_first_data(server: Session) -> None:
    [opening] = receive(server, update(1, SYN))
    assert isinstance(opening, StreamOpened)
    server.acknowledge(opening.stream)
    server.acknowledge(opening.stream)
    server.send(opening.stream, b"hello")
    assert sent(server) == [Frame(DATA, ACK, 1, 5, b"hello")]


def test_openings_that_are_not_accepted_are_bounded() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=2))
    events = receive(server, *(update(stream_id, SYN) for stream_id in (1, 3, 5)))
    streams = [event.stream for event in events if isinstance(event, StreamOpened)]
    assert [stream.id for stream in streams] == [1, 3]
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 5, 0)]
    server.acknowledge(streams[0])
    assert sent(server) == [Frame(WINDOW_UPDATE, ACK, 1, 0)]
    [again] = receive(server, update(7, SYN))
    assert isinstance(again, StreamOpened)


def test_by_default_the_256_openings_that_the_reference_counts_on_may_wait(server: Session) -> None:
    events = receive(server, *(update(2 * index + 1, SYN) for index in range(257)))
    assert len(events) == 256
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 513, 0)]


def test_streams_that_are_open_are_bounded() -> None:
    server = Session(Role.SERVER, Limits(streams=2))
    first, second = accept(server, 1), accept(server, 3)
    assert receive(server, update(5, SYN)) == []
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 5, 0)]
    server.reset(first)
    receive(server, update(3, RST))
    assert second.was_reset
    sent(server)
    accept(server, 7)
    accept(server, 9)


def test_what_came_with_a_refused_opening_is_dropped() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=0))
    assert receive(server, data(1, bytes(INITIAL_WINDOW - 5), SYN), data(1, b"12345"), update(1, FIN)) == []
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert server.unread == 0


def test_an_opening_that_nobody_accepts_is_reset_after_30_seconds(server: Session) -> None:
    accept(server, 5, now=100.0)
    receive(server, data(1, b"hello", SYN), now=100.0)
    receive(server, update(3, SYN), now=110.0)
    assert server.reset_overdue(129.9, received(129.9)) == 100.0 + ACCEPT_TIMEOUT == 130.0
    assert sent(server) == []
    assert server.reset_overdue(130.0, received(130.0)) == 140.0
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert server.unread == 0
    assert server.reset_overdue(140.0, received(140.0)) is None
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 3, 0)]
    assert [stream.id for stream in server.live_streams] == [5]


# Openings to the peer


def test_an_opening_rides_on_the_first_data(client: Session) -> None:
    stream = client.open_stream(0.0)
    client.send(stream, b"hello")
    assert sent(client) == [Frame(DATA, SYN, 1, 5, b"hello")]


def test_an_opening_without_data_leaves_by_itself(client: Session) -> None:
    client.open_stream(0.0)
    client.open_stream(0.0)
    assert sent(client) == [Frame(WINDOW_UPDATE, SYN, 1, 0), Frame(WINDOW_UPDATE, SYN, 3, 0)]


def test_an_opening_that_is_taken_back_before_it_left_leaves_no_trace(client: Session) -> None:
    stream = client.open_stream(0.0)
    client.send(stream, b"hello")
    client.reset(stream)
    assert sent(client) == []
    assert client.live_streams == []


def test_an_opener_keeps_at_most_256_unacknowledged(client: Session) -> None:
    streams = [client.open_stream(0.0) for _ in range(256)]
    assert not may_open(client)
    with pytest.raises(LocalProtocolError, match=r"^no stream may be opened now: .* or 256 are not acknowledged$"):
        client.open_stream(0.0)
    sent(client)
    for frame in (update(1, ACK), data(3, b"x", ACK), update(5, RST)):
        assert OpenAllowed() in receive(client, frame)
        assert may_open(client)
        client.open_stream(0.0)
        assert not may_open(client)
    client.reset(streams[3])
    assert OpenAllowed() in client.events()
    assert may_open(client)


def test_what_is_no_acceptance_does_not_count_as_one(client: Session) -> None:
    for _ in range(MAX_UNACKNOWLEDGED):
        client.open_stream(0.0)
    assert OpenAllowed() not in receive(client, data(1, b"x"), update(1, credit=5), update(3, FIN))
    assert not may_open(client)


def test_an_acceptance_counts_once(client: Session) -> None:
    for _ in range(MAX_UNACKNOWLEDGED):
        client.open_stream(0.0)
    receive(client, update(1, ACK), update(1, ACK), update(1, RST))
    client.open_stream(0.0)
    assert not may_open(client)


def test_ids_are_odd_at_the_client_and_even_at_the_server() -> None:
    for role, ids in ((Role.CLIENT, [1, 3, 5]), (Role.SERVER, [2, 4, 6])):
        session = Session(role)
        assert [session.open_stream(0.0).id for _ in range(3)] == ids


@pytest.mark.parametrize(("role", "last"), [(Role.CLIENT, 2**32 - 1), (Role.SERVER, 2**32 - 2)])
def test_when_the_ids_are_used_up_nothing_is_opened_any_more(role: Role, last: int) -> None:
    session = Session(role)
    session._next_id = last
    assert session.open_stream(0.0).id == last
    assert not may_open(session)
    assert session.openings_over


# Ids


@pytest.mark.parametrize(("role", "wrong"), [(Role.SERVER, 2), (Role.CLIENT, 1), (Role.CLIENT, 2**32 - 1)])
def test_a_syn_of_the_wrong_parity_is_refused(role: Role, wrong: int) -> None:
    assert refuses(Session(role), update(wrong, SYN))


@pytest.mark.parametrize("frame", [data(0, b"x"), update(0, SYN), update(0, credit=1)])
def test_stream_0_is_the_session_s(frame: bytes) -> None:
    assert refuses(Session(Role.SERVER), frame)


@pytest.mark.parametrize("how", ["open", "ended", "reset by the peer", "reset by us", "refused"])
def test_a_syn_for_an_id_that_was_used_is_refused(how: str) -> None:
    server = Session(Role.SERVER, Limits(unaccepted=0 if how == "refused" else 256))
    if how == "refused":
        receive(server, update(1, SYN))
    else:
        stream = accept(server)
        if how == "ended":
            receive(server, update(1, FIN))
            server.send_fin(stream)
        elif how == "reset by the peer":
            receive(server, update(1, RST))
        elif how == "reset by us":
            server.reset(stream)
        sent(server)
        assert (how == "open") == bool(server.live_streams)
    assert refuses(server, update(1, SYN))


@pytest.mark.parametrize("frame", [data(3, b"x"), update(3, credit=5), update(3, ACK), update(3, FIN), update(3, RST)])
@pytest.mark.parametrize("role", list(Role))
def test_a_frame_for_a_stream_that_was_never_opened_is_refused(role: Role, frame: bytes) -> None:
    """Stream 3 is the peer's to open at a server, ours at a client; neither has got further than stream 1."""
    session = Session(role)
    if role is Role.CLIENT:
        opened(session)
    else:
        accept(session)
    assert refuses(session, frame)


@fuzzed()
@given(st.permutations(range(30)), st.sampled_from(list(Role)))
@example(list(reversed(range(30))), Role.SERVER)
@example(list(reversed(range(30))), Role.CLIENT)
def test_syns_of_an_opener_that_works_in_parallel_may_come_in_any_order(order: list[int], role: Role) -> None:
    session = Session(role)
    first = 1 if role is Role.SERVER else 2
    for index in order:
        [event] = receive(session, update(first + 2 * index, SYN))
        assert isinstance(event, StreamOpened)
        assert event.stream.id == first + 2 * index
    assert refuses(session, update(first + 2 * order[0], SYN))


def test_an_id_that_was_left_out_is_still_unknown_until_its_syn_comes(server: Session) -> None:
    accept(server, 5)
    assert refuses(server, data(3, b"x"))


def test_only_so_many_gaps_between_ids_are_remembered() -> None:
    ids = PeerIds(1)
    for index in range(MAX_REMEMBERED_GAPS + 1):
        ids.open(4 * index + 3)
    ids.open(5)  # the second gap is still known, the first is not
    with pytest.raises(RemoteProtocolError, match="stream 1, an id that was used before"):
        ids.open(1)


def test_a_syn_that_jumps_far_costs_no_more_than_its_neighbour() -> None:
    """Found by an attack: each of 15,000 SYNs with a gap before it was made to cost a thousand insertions."""
    ids = PeerIds(1)
    for stream_id in range(1, 2**32, 2**18):
        ids.open(stream_id)
        assert len(ids._firsts) <= MAX_REMEMBERED_GAPS
    assert not ids.were_opened(2**32 - 2**18 + 3)


# Frames that come late


@pytest.mark.parametrize("already", [0, 100, INITIAL_WINDOW])
def test_late_data_of_a_reset_stream_is_dropped_as_far_as_its_credit_went(server: Session, already: int) -> None:
    stream = accept(server)
    receive(server, data(1, bytes(already)))
    server.reset(stream)
    server.events()
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    left = INITIAL_WINDOW - already
    assert receive(server, data(1, bytes(left // 2)), data(1, bytes(left - left // 2)), update(1, credit=7)) == []
    assert server.unread == 0
    assert refuses(server, encode_header(DATA, 0, 1, 1))


@pytest.mark.parametrize("flags", [FIN, RST, FIN | RST])
def test_late_data_over_the_credit_is_refused_also_when_it_is_the_last(server: Session, flags: int) -> None:
    server.reset(accept(server))
    assert refuses(server, encode_header(DATA, flags, 1, INITIAL_WINDOW + 1))


def test_a_body_of_which_the_stream_is_reset_half_way_is_dropped_to_its_end(server: Session) -> None:
    stream = accept(server)
    whole = data(1, bytes(1000))
    receive(server, whole[:500])
    server.reset(stream)
    server.events()
    assert receive(server, whole[500:], data(1, bytes(INITIAL_WINDOW - 1000), FIN)) == []
    assert server.unread == 0


@pytest.mark.parametrize("frame", [update(1, FIN), update(1, RST), update(1, credit=9), data(1, b"x")])
def test_late_frames_of_a_stream_that_is_over_are_dropped(client: Session, frame: bytes) -> None:
    stream = opened(client)
    client.send_fin(stream)
    sent(client)
    receive(client, update(1, FIN))
    assert client.live_streams == []
    assert receive(client, frame) == []
    assert sent(client) == []


def test_late_data_of_a_refused_opening_is_bounded_by_its_credit_too() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=0))
    receive(server, update(1, SYN))
    assert not refuses(server, data(1, bytes(INITIAL_WINDOW)))
    assert refuses(server, encode_header(DATA, 0, 1, 1))


def test_after_the_last_late_frame_nothing_is_remembered(server: Session) -> None:
    for stream_id, last in ((1, update(1, FIN)), (3, data(3, b"x", FIN)), (5, update(5, RST))):
        server.reset(accept(server, stream_id))
        sent(server)
        receive(server, last)
    ended = accept(server, 7)
    receive(server, update(7, FIN))
    server.reset(ended)
    assert not server._late_credit


def test_only_so_many_reset_streams_are_remembered() -> None:
    server = Session(Role.SERVER, Limits(unaccepted=0))
    ids = [2 * index + 1 for index in range(2 * MAX_REMEMBERED_RESETS)]
    receive(server, *(update(stream_id, SYN) for stream_id in ids))
    assert len(server._late_credit) == MAX_REMEMBERED_RESETS == 1024
    assert receive(server, data(ids[0], b"x"), data(ids[-1], b"x")) == []
    # Of the oldest it is forgotten what credit they had; of the newest it is not.
    assert not refuses(server, encode_header(DATA, 0, ids[MAX_REMEMBERED_RESETS - 1], INITIAL_WINDOW + 1))
    receive(server, bytes(INITIAL_WINDOW + 1))
    assert refuses(server, encode_header(DATA, 0, ids[MAX_REMEMBERED_RESETS], INITIAL_WINDOW + 1))


# The end, and resets


def test_a_reset_after_the_end_takes_nothing_away(server: Session) -> None:
    """After its FIN the peer's data is complete; a RST then says that it takes no more of ours."""
    stream = accept(server)
    receive(server, data(1, b"all of it"), update(1, FIN), update(1, RST))
    assert stream.was_reset
    assert not stream.may_send
    assert read_all(server, stream) == b"all of it"
    assert stream.end_received


def test_a_reset_without_an_end_breaks(server: Session) -> None:
    stream = accept(server)
    server.send(stream, b"unsent")
    events = receive(server, data(1, b"a part"), update(1, RST))
    assert StreamReadable(stream) in events
    assert StreamWritable(stream) in events
    assert stream.was_reset
    assert not stream.end_received
    assert server.read(stream, PLENTY, 0.0) == b"a part"  # the answer to a request that was refused half-read
    assert server.read(stream, PLENTY, 0.0) == b""
    assert server.unread == 0
    assert sent(server) == []


def test_what_a_reset_left_unread_is_let_go_of_by_a_reset_of_ours(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, b"a part"), update(1, RST))
    assert server.unread == len(b"a part")
    server.reset(stream)
    assert server.unread == 0
    assert not server._with_unread
    assert sent(server) == []


def test_what_has_ended_is_over_when_it_was_read(server: Session) -> None:
    stream = accept(server)
    assert not stream.ended
    receive(server, data(1, b"all of it", FIN))
    assert [server.read(stream, size, 0.0) for size in (3, 100)] == [b"all", b" of it"]
    assert stream.ended


def test_an_end_is_not_answered_with_credit(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, bytes(INITIAL_WINDOW)))
    server.read(stream, INITIAL_WINDOW // 2, 0.0)
    receive(server, update(1, FIN))
    read_all(server, stream)
    assert sent(server) == []


def test_data_after_the_end_is_refused(server: Session) -> None:
    accept(server)
    receive(server, update(1, FIN))
    assert refuses(server, data(1, b"x"))


def test_a_second_end_is_refused(server: Session) -> None:
    accept(server)
    receive(server, data(1, b"x", FIN))
    assert refuses(server, update(1, FIN))


def test_a_fin_follows_the_data_in_a_frame_of_its_own(server: Session) -> None:
    """Receivers that look at the flags first end a stream too early when the FIN rides on the data."""
    stream = accept(server)
    server.send(stream, b"all of it")
    server.send_fin(stream)
    assert sent(server) == [Frame(DATA, 0, 1, 9, b"all of it"), Frame(WINDOW_UPDATE, FIN, 1, 0)]
    assert stream.flushed


def test_a_fin_waits_for_data_that_waits_for_credit(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(INITIAL_WINDOW + 1))
    server.send_fin(stream)
    server.send_fin(stream)
    assert {frame.flags for frame in sent(server)} == {0}
    receive(server, update(1, credit=1))
    assert sent(server) == [Frame(DATA, 0, 1, 1, b"\0"), Frame(WINDOW_UPDATE, FIN, 1, 0)]
    assert sent(server) == []


def test_opening_and_end_may_leave_together(client: Session) -> None:
    client.send_fin(client.open_stream(0.0))
    assert sent(client) == [Frame(WINDOW_UPDATE, SYN | FIN, 1, 0)]


def test_nothing_is_sent_after_a_fin(server: Session) -> None:
    stream = accept(server)
    server.send_fin(stream)
    with pytest.raises(LocalProtocolError, match="<yamux stream 1, local_ended> takes no more data"):
        server.send(stream, b"x")


def test_a_reset_drops_what_was_queued_and_leaves_once(server: Session) -> None:
    stream = accept(server)
    server.send(stream, b"unsent")
    server.send_fin(stream)
    server.reset(stream)
    server.reset(stream)
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert server.live_streams == []


def test_a_reset_takes_the_place_of_an_end_that_has_not_left(server: Session) -> None:
    stream = accept(server)
    receive(server, update(1, FIN))
    server.send_fin(stream)
    server.reset(stream)
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]


def test_a_reset_after_both_ends_says_nothing(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, b"unread", FIN))
    server.send_fin(stream)
    sent(server)
    server.reset(stream)
    assert sent(server) == []
    assert server.unread == 0


# Closing: the application is done with both directions


def test_closing_sends_what_is_queued_and_the_end(server: Session) -> None:
    stream = accept(server)
    server.send(stream, b"all of it")
    server.close(stream, 0.0)
    assert [(frame.body, frame.flags) for frame in sent(server)] == [(b"all of it", 0), (b"", FIN)]
    assert sent(server) == []
    receive(server, update(1, FIN))
    assert server.live_streams == []


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_peer_whose_data_nobody_reads_is_told_after_our_end(server: Session, when: str) -> None:
    stream = accept(server)
    server.send(stream, b"all of it")
    if when == "before":
        receive(server, data(1, b"unread"))
    server.close(stream, 0.0)
    if when == "after":
        receive(server, data(1, b"unread"))
    assert [(frame.body, frame.flags) for frame in sent(server)] == [(b"all of it", 0), (b"", FIN)]
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert server.unread == 0
    assert server.live_streams == []


def test_a_peer_that_ended_in_time_is_not_reset(server: Session) -> None:
    stream = accept(server)
    receive(server, data(1, b"unread"), update(1, FIN))
    server.close(stream, 0.0)
    assert sent(server) == [Frame(WINDOW_UPDATE, FIN, 1, 0)]
    assert sent(server) == []
    assert server.unread == 0


def test_a_closed_stream_is_reset_when_the_peer_takes_nothing_for_30_seconds(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(2 * INITIAL_WINDOW))
    server.close(stream, 100.0)
    sent(server)
    assert server.reset_overdue(100.0, received(100.0)) == 100.0 + CLOSE_TIMEOUT == 130.0
    # Credit is progress: a slow peer is slow, not gone.
    receive(server, update(1, credit=1000), now=120.0)
    sent(server)
    assert server.reset_overdue(149.9, received(149.9)) == 150.0
    assert sent(server) == []
    assert server.reset_overdue(150.0, received(150.0)) is None
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert StreamWritable(stream) in server.events()
    assert stream.flushed


def test_a_closed_stream_is_reset_when_the_peer_does_not_end_its_half_in_30_seconds(server: Session) -> None:
    stream = accept(server)
    server.close(stream, 100.0)
    assert sent(server) == [Frame(WINDOW_UPDATE, FIN, 1, 0)]
    assert server.reset_overdue(129.9, received(129.9)) == 130.0
    assert sent(server) == []
    assert server.reset_overdue(130.0, received(130.0)) is None
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 1, 0)]
    assert server.live_streams == []


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


def test_a_turn_is_a_message_while_nobody_waits(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(200 * KIB))
    server.send_fin(stream)
    frames = sent(server)
    assert [frame.length for frame in frames[:3]] == [LARGEST_BODY] * 3
    assert LARGEST_BODY + 2 * HEADER_SIZE <= 64 * KIB


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


# Openings that the peer does not accept


def received(at: float, *, taken: float = -math.inf, delivered_until: float = math.inf) -> Movement:
    """A link on which data last arrived `at` that time."""
    movement = Movement()
    movement.received_at, movement.taken_at, movement.delivered_until = at, taken, delivered_until
    return movement


def overdue_opening() -> tuple[Session, Stream]:
    """A stream that was opened at the time 0, and whose SYN was sent."""
    client = Session(Role.CLIENT)
    stream = client.open_stream(0.0)
    client.send(stream, b"hello")
    assert sent(client) == [Frame(DATA, SYN, 1, 5, b"hello")]
    return client, stream


def test_an_opening_is_given_up_after_10_seconds_in_which_nothing_moved() -> None:
    client, stream = overdue_opening()
    assert client.reset_overdue(9.9, received(0.0)) == ANSWER_TIMEOUT == 10.0
    assert client.reset_overdue(10.0, received(0.0)) is None
    assert stream.was_reset
    assert stream.timed_out
    assert sent(client) == [Frame(WINDOW_UPDATE, RST, 1, 0)]


def test_an_opening_waits_while_bytes_move() -> None:
    """The path may be slow: the acceptance, and the answer to a ping, may be behind other bytes."""
    client, stream = overdue_opening()
    for now in range(10, 100):
        assert client.reset_overdue(float(now), received(now - 9.0)) == now + 1.0
    assert [frame.type for frame in sent(client)] == [PING]
    assert client.reset_overdue(200.0, received(190.1)) is not None
    assert client.reset_overdue(200.1, received(190.1)) is None
    assert stream.timed_out


def test_an_opening_waits_while_the_peer_takes_what_is_before_it() -> None:
    client, stream = overdue_opening()
    assert client.reset_overdue(50.0, received(0.0, taken=49.0, delivered_until=0.5)) == 51.0
    assert not stream.timed_out


def test_an_opening_that_was_delivered_does_not_wait_because_of_other_bytes_that_are() -> None:
    """A path that drops large packets: small ones arrive, and no answer comes behind a large one."""
    client, stream = overdue_opening()
    assert client.reset_overdue(10.0, received(0.0, taken=10.0, delivered_until=9.0)) is None
    assert stream.timed_out


def test_an_opening_is_given_up_when_the_peer_answers_pings_and_does_not_accept_it() -> None:
    client, stream = overdue_opening()
    answer_ping(client, 9.0, 0.5)  # this one may have overtaken the SYN
    assert client.reset_overdue(10.0, received(10.0)) == 11.0
    [question] = sent(client)
    receive(client, ping(question.length, ACK), now=10.5)
    assert client.reset_overdue(11.0, received(11.0)) is None
    assert stream.timed_out


def test_an_opening_that_is_accepted_in_time_stays() -> None:
    client, stream = overdue_opening()
    assert client.reset_overdue(10.0, received(10.0)) == 11.0
    receive(client, update(1, ACK), now=10.5)
    assert client.reset_overdue(60.0, received(10.5)) is None
    assert not stream.was_reset


def test_an_opening_that_was_not_sent_yet_is_not_the_peers_fault() -> None:
    client = Session(Role.CLIENT)
    stream = client.open_stream(0.0)
    assert client.reset_overdue(60.0, received(59.0)) == 61.0
    assert not stream.was_reset


# Pings and go-aways


def test_a_ping_is_answered_with_its_value(server: Session) -> None:
    assert receive(server, ping(0xDEADBEEF)) == []
    assert sent(server) == [Frame(PING, ACK, 0, 0xDEADBEEF)]


def answer_ping(session: Session, asked_at: float, seconds: float) -> None:
    """Ping at `asked_at`, and answer after `seconds`."""
    session.ping(asked_at)
    [question] = sent(session)
    receive(session, ping(question.length, ACK), now=asked_at + seconds)


def test_while_data_comes_the_round_trip_is_measured_four_times_a_second() -> None:
    server = Session(Role.SERVER, Limits(window_growth=0))
    learn_round_trip(server, 0.1)
    stream, pings = accept(server), 0
    for tick in range(1, 101):
        receive(server, data(1, bytes(128 * KIB)))
        server.read(stream, 256 * KIB, tick / 20)
        for frame in sent(server):
            if frame.type == PING:
                pings += 1
                assert receive(server, ping(frame.length, ACK), now=tick / 20) == []  # the driver did not ask for it
    assert 20 <= pings <= 24  # the first ones follow each other at once


def test_a_measurement_waits_for_the_one_before(server: Session) -> None:
    """A peer that does not answer gets no pings that pile up."""
    learn_round_trip(server, 0.1)
    stream = accept(server)
    pings = 0
    for tick in range(1, 101):
        receive(server, data(1, bytes(128 * KIB)))
        server.read(stream, 256 * KIB, float(tick))
        pings += sum(frame.type == PING for frame in sent(server))
    assert pings == 1


def test_a_round_trip_lasts_from_the_ping_to_its_pong(server: Session) -> None:
    server.ping(100.0)
    server.ping(101.0)
    first, second = sent(server)
    assert receive(server, ping(first.length, ACK), now=102.5) == [PongReceived(2.5)]
    assert receive(server, ping(second.length, ACK), now=102.5) == [PongReceived(1.5)]
    assert server.round_trips.shortest == 1.5


def test_pongs_that_nobody_asked_for_say_nothing(server: Session) -> None:
    assert receive(server, ping(1, ACK), ping(9, 0)) == []
    server.ping(0.0)
    [question] = sent(server)
    assert len(receive(server, ping(question.length, ACK), ping(question.length, ACK))) == 1


def test_questions_without_an_answer_are_forgotten(server: Session) -> None:
    for _ in range(100):
        server.ping(0.0)
    questions = [frame.length for frame in sent(server)]
    assert receive(server, *(ping(opaque, ACK) for opaque in questions[:-16])) == []
    assert len(receive(server, *(ping(opaque, ACK) for opaque in questions[-16:]))) == 16


def test_a_go_away_refuses_openings_and_nothing_else(server: Session) -> None:
    stream = accept(server)
    server.go_away()
    server.go_away()
    assert sent(server) == [Frame(GO_AWAY, 0, 0, GoAwayCode.NORMAL)]
    assert receive(server, data(3, b"hello", SYN)) == []
    assert sent(server) == [Frame(WINDOW_UPDATE, RST, 3, 0)]
    receive(server, data(1, b"goes on"))
    assert read_all(server, stream) == b"goes on"
    server.send(stream, b"too")
    assert [frame.body for frame in sent(server)] == [b"too"]


@pytest.mark.parametrize("code", [0, 1, 2, 99])
def test_after_the_peer_s_go_away_nothing_is_opened(client: Session, code: int) -> None:
    assert receive(client, encode_header(GO_AWAY, 0, 0, code)) == [GoAwayReceived(code)]
    assert not may_open(client)
    assert client.openings_over
    with pytest.raises(LocalProtocolError):
        client.open_stream(0.0)


def test_a_broken_rule_is_told_also_after_a_go_away(server: Session) -> None:
    server.go_away()
    sent(server)
    assert refuses(server, update(2, SYN))


@pytest.mark.parametrize(
    ("frames", "what"),
    [
        ([update(0, credit=1)], "WINDOW_UPDATE on stream 0, which is the session's"),
        ([data(3, b"x")], "DATA for stream 3, which was never opened"),
        ([update(2, ACK)], "WINDOW_UPDATE for stream 2, which was never opened"),
        ([encode_header(DATA, SYN, 3, 262145)], "SYN with 262145 bytes of DATA, but a credit of 262144"),
        ([update(1, SYN)], "SYN for stream 1, an id that was used before"),
        ([encode_header(DATA, 0, 1, 262145)], "262145 bytes for stream 1, which was reset with 262144 left"),
    ],
)
def test_a_broken_rule_is_named_with_the_stream_and_the_amounts(
    server: Session, frames: list[bytes], what: str
) -> None:
    server.reset(accept(server))
    with pytest.raises(RemoteProtocolError) as caught:
        receive(server, *frames)
    assert str(caught.value) == what


def test_after_a_broken_rule_nothing_is_opened_and_no_second_go_away_is_sent(client: Session) -> None:
    assert refuses(client, update(1, SYN))
    assert client.openings_over
    assert not may_open(client)
    client.go_away()
    assert sent(client) == []


def test_after_a_broken_rule_queued_data_does_not_go_first(server: Session) -> None:
    stream = accept(server)
    server.send(stream, bytes(100 * KIB))
    assert refuses(server, update(2, SYN))


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


def test_events_come_once(server: Session) -> None:
    assert receive(server, data(1, b"x", SYN)) != []
    assert server.events() == []


# Junk


def frames_for(streams: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    flags = st.integers(0, 15) | st.integers(0, 2**16 - 1)
    small = st.binary(max_size=20)
    return st.one_of(
        st.builds(data, streams, small, flags),
        st.builds(update, streams, flags, st.integers(0, 2**20) | st.integers(0, 2**32 - 1)),
        st.builds(encode_header, st.just(DATA), flags, streams, st.integers(0, 2**20)),
        st.builds(ping, st.integers(0, 20), st.integers(0, 3)),
        st.builds(lambda code: encode_header(GO_AWAY, 0, 0, code), st.integers(0, 3)),
        small,
    )


@fuzzed(300)
@given(st.lists(frames_for(st.integers(0, 12)), max_size=30), st.sampled_from(list(Role)), st.randoms())
def test_junk_breaks_a_rule_or_nothing(frames: list[bytes], role: Role, coin: random.Random) -> None:
    """Whatever comes, and whatever the application does meanwhile, only a `RemoteProtocolError` comes out."""
    session = Session(role, Limits(unread=300, unaccepted=3, streams=4))
    streams = [session.open_stream(0.0) for _ in range(2)]

    def act() -> None:
        stream, what = coin.choice(streams), coin.randrange(8)
        if what == 0:
            session.acknowledge(stream)
        elif what == 1:
            session.send_fin(stream)
        elif what == 2:
            session.reset(stream)
        elif what == 3:
            session.close(stream, 0.0)
        elif what < 6:
            session.read(stream, coin.randint(1, 30), 0.0)
        else:
            sent(session, coin.choice([1, PLENTY]))

    try:
        for frame in frames:
            streams += [event.stream for event in receive(session, frame) if isinstance(event, StreamOpened)]
            act()
            assert session.unread == sum(len(piece) for stream in streams for piece in stream.receive_queue) <= 300
    except RemoteProtocolError:
        assert sent(session)[0] == Frame(GO_AWAY, 0, 0, GoAwayCode.PROTOCOL_ERROR)


# Two sessions, joined by queues of bytes that are cut anywhere


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
            assert session._with_unread == {stream for stream, amount in held.items() if amount}
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
            assert not session._with_unread
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


@pytest.mark.parametrize("name", [field.name for field in attrs.fields(Limits)])
@pytest.mark.parametrize("value", [-1, 1.5, "4096", None, True])
def test_a_limit_that_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*; allowed is a whole number of 0 or more"):
        Limits(**{name: value})
