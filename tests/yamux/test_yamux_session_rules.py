"""`yamux.session`: pings, go-aways, and what is said of a broken rule."""

from __future__ import annotations

import random

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st
from yamux_rig import DATA, GO_AWAY, KIB, PING, WINDOW_UPDATE, Frame, data, ping, update
from yamux_session_rig import PLENTY, accept, learn_round_trip, may_open, read_all, receive, refuses, sent

from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError
from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import GoAwayReceived, PongReceived, StreamOpened
from pioneer_tunnel.yamux.frames import ACK, RST, SYN, GoAwayCode, encode_header
from pioneer_tunnel.yamux.session import Role, Session

# Pings and go-aways


def test_a_ping_is_answered_with_its_value(server: Session) -> None:
    assert receive(server, ping(0xDEADBEEF)) == []
    assert sent(server) == [Frame(PING, ACK, 0, 0xDEADBEEF)]


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
