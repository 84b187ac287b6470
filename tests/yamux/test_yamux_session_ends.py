"""`yamux.session`: how streams end, and frames that come after their end."""

from __future__ import annotations

import pytest
from yamux_rig import DATA, WINDOW_UPDATE, Frame, data, update
from yamux_session_rig import PLENTY, accept, opened, read_all, receive, received, refuses, sent

from pioneer_tunnel._model.errors import LocalProtocolError
from pioneer_tunnel._model.session_limits import Limits
from pioneer_tunnel.yamux.events import StreamReadable, StreamWritable
from pioneer_tunnel.yamux.flow import INITIAL_WINDOW
from pioneer_tunnel.yamux.frames import FIN, RST, SYN, encode_header
from pioneer_tunnel.yamux.session import CLOSE_TIMEOUT, MAX_REMEMBERED_RESETS, Role, Session

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
    assert not server._forgotten_unread
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
