"""`yamux.frames`: bytes become headers and pieces of bodies, the same however the bytes were cut, and never junk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import pytest
from fuzzing import fuzzed
from hypothesis import example, given, strategies as st
from yamux_rig import cut, inside_a_frame, one_by_one

from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel.yamux.frames import (
    ACK,
    FIN,
    HEADER_SIZE,
    RST,
    SYN,
    FrameDecoder,
    FrameType,
    Header,
    encode_header,
)
from pioneer_tunnel.yamux.session import Role, Session

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors" / "yamux.json").read_text())
BAD_FRAMES = [vector for vector in VECTORS if vector.get("error") == "frame"]
BAD_IN_A_SESSION = [vector for vector in VECTORS if vector.get("error") == "session"]
GOOD = [vector for vector in VECTORS if "error" not in vector]

DATA, WINDOW_UPDATE, PING, GO_AWAY = FrameType

Frame: TypeAlias = tuple[Header, bytes]

# What each good vector says, by hand: frames of (type, flags, stream id, length, body).
MEANING: Final[dict[str, Frame]] = {
    "open stream 1 by window update": (Header(WINDOW_UPDATE, SYN, 1, 0), b""),
    "open stream 1 by window update that grants 65536 more": (Header(WINDOW_UPDATE, SYN, 1, 65536), b""),
    "accept stream 1": (Header(WINDOW_UPDATE, ACK, 1, 0), b""),
    "open stream 1 with data": (Header(DATA, SYN, 1, 5), b"hello"),
    "open, send and half close in one frame": (Header(DATA, SYN | FIN, 1, 5), b"hello"),
    "accept and half close in one frame": (Header(WINDOW_UPDATE, ACK | FIN, 1, 0), b""),
    "data": (Header(DATA, 0, 1, 3), b"abc"),
    "grant 262144": (Header(WINDOW_UPDATE, 0, 1, 262144), b""),
    "half close": (Header(DATA, FIN, 1, 0), b""),
    "half close by window update": (Header(WINDOW_UPDATE, FIN, 1, 0), b""),
    "reset": (Header(WINDOW_UPDATE, RST, 1, 0), b""),
    "ping": (Header(PING, SYN, 0, 0xDEADBEEF), b""),
    "pong": (Header(PING, ACK, 0, 0xDEADBEEF), b""),
    "go away, normal": (Header(GO_AWAY, 0, 0, 0), b""),
    "go away, protocol error": (Header(GO_AWAY, 0, 0, 1), b""),
    "go away, internal error": (Header(GO_AWAY, 0, 0, 2), b""),
    "go away, a code of the future": (Header(GO_AWAY, 0, 0, 99), b""),
    "data for a stream that was reset: dropped, no error": (Header(DATA, 0, 1, 1), b"\0"),
}


class Decoded(NamedTuple):
    """What a decoder made of some bytes. Bodies are joined, so that it does not matter in which pieces they came."""

    frames: list[Frame]
    mid_frame: bool
    error: str | None


def decode(chunks: Iterable[bytes]) -> Decoded:
    decoder = FrameDecoder()
    frames: list[Frame] = []
    try:
        for chunk in chunks:
            for item in decoder.receive_data(chunk):
                if isinstance(item, Header):
                    frames.append((item, b""))
                else:
                    header, body = frames[-1]
                    frames[-1] = header, body + item
    except RemoteProtocolError as error:
        return Decoded(frames, mid_frame=False, error=str(error))
    return Decoded(frames, inside_a_frame(decoder), None)


def encode(frames: Iterable[Frame]) -> bytes:
    return b"".join(encode_header(*header) + body for header, body in frames)


def cut_nowhere(data: bytes) -> list[bytes]:
    return [data]


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


# The same examples in every run, and no deadline: the machine may be shared.
ids = st.integers(0, 2**32 - 1)
data_frames = st.builds(
    lambda flags, stream_id, body: (Header(DATA, flags, stream_id, len(body)), body),
    st.integers(0, 2**16 - 1),
    ids,
    st.binary(max_size=40),
)
window_updates = st.builds(
    lambda flags, stream_id, credit: (Header(WINDOW_UPDATE, flags, stream_id, credit), b""),
    st.integers(0, 2**16 - 1),
    ids,
    ids,
)
session_frames = st.builds(
    lambda frame_type, flags, length: (Header(frame_type, flags, 0, length), b""),
    st.sampled_from([PING, GO_AWAY]),
    st.integers(0, 2**16 - 1),
    ids,
)
frame_lists: st.SearchStrategy[list[Frame]] = st.lists(data_frames | window_updates | session_frames, max_size=12)
places = st.lists(st.integers(0, 10_000), max_size=20)


# The vectors


def test_every_good_vector_has_a_meaning_here() -> None:
    assert {vector["name"] for vector in GOOD} == MEANING.keys()
    assert BAD_FRAMES
    assert BAD_IN_A_SESSION


@named(GOOD)
def test_good_vector(vector: dict[str, Any]) -> None:
    data, frame = bytes.fromhex(vector["hex"]), MEANING[vector["name"]]
    assert encode([frame]) == data
    tail = encode([(Header(PING, SYN, 0, 7), b"")])
    assert decode([data]) == decode(one_by_one(data)) == Decoded([frame], mid_frame=False, error=None)
    assert decode([data + tail[:5]]) == decode(one_by_one(data + tail[:5])) == Decoded([frame], True, None)
    assert decode([data + tail]).frames == [frame, (Header(PING, SYN, 0, 7), b"")]
    for kind in (bytearray, memoryview):
        assert list(FrameDecoder().receive_data(kind(data))) == list(FrameDecoder().receive_data(data))


@named(BAD_FRAMES)
def test_a_bad_frame_is_refused_as_soon_as_its_header_is_complete(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    good = encode([MEANING["data"]])
    for chunks in ([data], one_by_one(data), [data + b"tail"]):
        assert decode(chunks).error is not None
    behind_a_good_one = decode([good + data])
    assert behind_a_good_one.frames == [MEANING["data"]]
    assert behind_a_good_one.error is not None
    assert decode([data[: HEADER_SIZE - 1]]).error is None


# The vectors in a session: what a frame means depends on what was before it


def session_for(vector: dict[str, Any]) -> Session:
    """A session in the state that the vector asks for; without a word from it, stream 1 is open unless it opens it."""
    header = next(iter(FrameDecoder().receive_data(bytes.fromhex(vector["hex"]))))
    assert isinstance(header, Header)
    given_state = vector.get("given", "")
    if header.stream_id == 0 or header.flags & SYN:
        session = Session(Role.SERVER)
        if given_state.startswith("stream 1 is open"):
            session.receive_data(encode_header(WINDOW_UPDATE, SYN, 1, 0), 0.0)
    else:
        session = Session(Role.CLIENT)
        stream = session.open_stream(0.0)
        session.data_to_send(65536)
        if given_state == "stream 1 was reset by us":
            session.reset(stream)
    session.events()
    return session


def feed(session: Session, chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        session.receive_data(chunk, 0.0)


@named(GOOD)
@pytest.mark.parametrize("pieces", [cut_nowhere, one_by_one], ids=["whole", "byte by byte"])
def test_good_vector_in_a_session(vector: dict[str, Any], pieces: Callable[[bytes], list[bytes]]) -> None:
    feed(session_for(vector), pieces(bytes.fromhex(vector["hex"])))


@named(BAD_IN_A_SESSION)
@pytest.mark.parametrize("pieces", [cut_nowhere, one_by_one], ids=["whole", "byte by byte"])
def test_bad_vector_in_a_session(vector: dict[str, Any], pieces: Callable[[bytes], list[bytes]]) -> None:
    session = session_for(vector)
    with pytest.raises(RemoteProtocolError):
        feed(session, pieces(bytes.fromhex(vector["hex"])))
    assert b"".join(session.data_to_send(65536)) == encode_header(GO_AWAY, 0, 0, 1)


@named(BAD_IN_A_SESSION)
def test_bad_vector_in_a_session_is_refused_from_its_headers_alone(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    with pytest.raises(RemoteProtocolError):
        feed(session_for(vector), [data[: len(data) // HEADER_SIZE * HEADER_SIZE]])


def test_data_for_a_stream_that_was_reset_is_dropped() -> None:
    [vector] = [vector for vector in VECTORS if vector.get("given") == "stream 1 was reset by us"]
    session = session_for(vector)
    feed(session, [bytes.fromhex(vector["hex"])])
    assert session.events() == []
    assert session.unread == 0


# Whatever the chunks


@fuzzed()
@given(frame_lists, places)
def test_what_is_encoded_is_decoded_wherever_the_bytes_were_cut(frames: list[Frame], cuts: list[int]) -> None:
    data = encode(frames)
    assert decode(cut(data, cuts)) == decode([data]) == Decoded(frames, mid_frame=False, error=None)


@fuzzed()
@given(frame_lists, places, st.integers(1, HEADER_SIZE - 1))
def test_an_unfinished_header_is_waited_for(frames: list[Frame], cuts: list[int], length: int) -> None:
    data = encode(frames) + encode_header(WINDOW_UPDATE, 0, 1, 1)[:length]
    assert decode(cut(data, cuts)) == Decoded(frames, mid_frame=True, error=None)


@fuzzed()
@given(frame_lists, st.binary(max_size=60), places)
@example([], bytes([0, 2, 0, 1, 0, 0, 0, 7, 0, 0, 0, 1]), [11])
@example([], bytes([0, 0, 0, 0, 0, 0, 0, 1, 255, 255, 255, 255, 1]), [12])
def test_junk_means_the_same_however_it_is_cut(frames: list[Frame], junk: bytes, cuts: list[int]) -> None:
    data = encode(frames) + junk
    whole = decode([data])
    assert decode(cut(data, cuts)) == decode(one_by_one(data)) == whole
    assert whole.frames[: len(frames)] == frames


# What it costs


def test_a_body_is_handed_on_as_it_comes() -> None:
    decoder = FrameDecoder()
    assert list(decoder.receive_data(encode_header(DATA, 0, 1, 2**32 - 1))) == [Header(DATA, 0, 1, 2**32 - 1)]
    for count in (1, 2):
        [piece] = decoder.receive_data(bytes(1000))
        assert bytes(piece) == bytes(1000)
        assert decoder.body_left == 2**32 - 1 - count * 1000
        assert inside_a_frame(decoder)


def test_what_follows_a_header_is_looked_at_only_on_request() -> None:
    data = encode_header(DATA, 0, 1, 5) + b"hello" + bytes.fromhex(BAD_FRAMES[0]["hex"])
    items = iter(FrameDecoder().receive_data(data))
    assert next(items) == Header(DATA, 0, 1, 5)
    assert bytes(next(items)) == b"hello"
    with pytest.raises(RemoteProtocolError):
        next(items)


def test_pieces_are_views_of_what_came() -> None:
    chunk = encode_header(DATA, 0, 1, 5) + b"hello"
    for more in (b"", encode_header(DATA, 0, 1, 0)):
        _, piece, *_ = FrameDecoder().receive_data(bytearray(chunk + more))
        assert isinstance(piece, memoryview)
        assert bytes(piece) == b"hello"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bytes([1]) + bytes(11), "version 1"),
        (bytes([0, 4]) + bytes(10), "type 4"),
        (encode_header(PING, SYN, 3, 1), "PING on stream 3"),
        (encode_header(GO_AWAY, 0, 3, 1), "GO_AWAY on stream 3"),
    ],
)
def test_errors_name_what_is_wrong(data: bytes, words: str) -> None:
    error = decode([data]).error
    assert error is not None
    assert words in error
