"""A `yamux.session` whose peer is made by hand: frames go in as bytes, and what it wants to send is taken apart."""

from __future__ import annotations

import math
from typing import Final

import pytest
from yamux_rig import GO_AWAY, WINDOW_UPDATE, Frame, parse, ping, update

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._net.delivery import Movement
from pioneer_tunnel.yamux.events import Event, PongReceived, StreamOpened
from pioneer_tunnel.yamux.frames import ACK, SYN, GoAwayCode
from pioneer_tunnel.yamux.session import Role, Session
from pioneer_tunnel.yamux.stream_state import Stream

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


def learn_round_trip(session: Session, seconds: float) -> None:
    session.ping(0.0)
    [question] = sent(session)
    assert receive(session, ping(question.length, ACK), now=seconds) == [PongReceived(seconds)]


def received(at: float, *, taken: float = -math.inf, delivered_until: float = math.inf) -> Movement:
    """A link on which data last arrived `at` that time."""
    movement = Movement()
    movement.received_at, movement.taken_at, movement.delivered_until = at, taken, delivered_until
    return movement


def answer_ping(session: Session, asked_at: float, seconds: float) -> None:
    """Ping at `asked_at`, and answer after `seconds`."""
    session.ping(asked_at)
    [question] = sent(session)
    receive(session, ping(question.length, ACK), now=asked_at + seconds)
