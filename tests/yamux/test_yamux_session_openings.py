"""`yamux.session`: streams that either side opens, and their ids."""

from __future__ import annotations

import pytest
from fuzzing import fuzzed
from hypothesis import example, given, strategies as st
from yamux_rig import DATA, PING, WINDOW_UPDATE, Frame, data, ping, update
from yamux_session_rig import accept, answer_ping, may_open, opened, read_all, receive, received, refuses, sent

from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError
from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import OpenAllowed, StreamOpened, StreamReadable
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import ACK, FIN, RST, SYN
from pioneer_tunnel.yamux.peer_ids import MAX_REMEMBERED_GAPS, PeerIds
from pioneer_tunnel.yamux.session import ACCEPT_TIMEOUT, ANSWER_TIMEOUT, MAX_UNACKNOWLEDGED, Role, Session
from pioneer_tunnel.yamux.stream_state import Stream

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


# Openings that the peer does not accept


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
