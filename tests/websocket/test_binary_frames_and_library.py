"""`binary_frames`, with the library for the rest, compared with the library alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

import attrs
import pytest
from fuzzing import fuzzed
from hostile import BINARY, CONTINUATION, PING, PONG, RSV1, TEXT
from hypothesis import example, given, strategies as st
from websockets.frames import Frame as LibraryFrame
from websockets.protocol import CLIENT, SERVER, Protocol
from websockets.speedups import apply_mask
from yamux_rig import cut

from pioneer_tunnel._net.link import Bytes
from pioneer_tunnel.websocket.binary_frames import BinaryFrames, encode
from pioneer_tunnel.websocket.frame_meter import FRAMES_PER_TURN
from pioneer_tunnel.websocket.messages import MAX_BINARY

Event: TypeAlias = bytes | tuple[int, bool, bytes]
"""Bytes of binary messages; or the opcode, the FIN bit and the payload of another frame."""


@attrs.frozen
class Frame:
    """A frame as it is sent; `size_bits` may be more than its size needs."""

    opcode: int
    payload: bytes = b""
    fin: bool = True
    bits: int = 0
    size_bits: int = 7
    key: bytes = b"\x01\x80\xff\x5a"
    wrong_side: bool = False

    def encode(self, *, masked: bool) -> bytes:
        size, masked = len(self.payload), masked is not self.wrong_side
        second = size
        extended = b""
        if size > 0xFFFF or self.size_bits == 64:
            second, extended = 127, size.to_bytes(8)
        elif size > 125 or self.size_bits == 16:
            second, extended = 126, size.to_bytes(2)
        header = bytes([self.fin << 7 | self.bits | self.opcode, masked << 7 | second]) + extended
        if not masked:
            return header + self.payload
        mask = self.key * (size // 4 + 1)
        return header + self.key + bytes(one ^ other for one, other in zip(self.payload, mask, strict=False))


def wire(frames: Iterable[Frame], *, masked: bool) -> bytes:
    return b"".join(frame.encode(masked=masked) for frame in frames)


# What an end makes of the bytes


class Heard:
    """The events of one end, and the code with which it closes; neighbouring bytes of binary messages are one event."""

    def __init__(self, *, masked: bool) -> None:
        self.events: list[Event] = []
        self.code: int | None = None
        self._library = Protocol(SERVER if masked else CLIENT, max_size=MAX_BINARY)
        self._in_binary = False

    def feed(self, data: Bytes) -> None:
        self._library.receive_data(bytes(data))
        for frame in self._library.events_received():
            assert isinstance(frame, LibraryFrame)
            if frame.opcode in {BINARY, TEXT}:
                self._in_binary = frame.opcode == BINARY
            if frame.opcode == BINARY or (frame.opcode == CONTINUATION and self._in_binary):
                self.take(bytes(frame.data))
            else:
                self.events.append((int(frame.opcode), frame.fin, bytes(frame.data)))
        if self.code is None and self._library.parser_exc is not None:
            sent = self._library.close_sent
            assert sent is not None
            self.code = sent.code

    def take(self, payload: bytes) -> None:
        if self.events and isinstance(self.events[-1], bytes):
            self.events[-1] += payload
        elif payload:
            self.events.append(payload)


def by_the_library(data: bytes, *, masked: bool) -> Heard:
    heard = Heard(masked=masked)
    heard.feed(data)
    return heard


def by_both(reads: Iterable[bytes], *, masked: bool) -> Heard:
    """As an engine does it."""
    heard, frames = Heard(masked=masked), BinaryFrames(apply_mask if masked else None)
    for read in reads:
        rest = memoryview(read)
        while rest and heard.code is None:
            used, pieces = frames.split(rest)
            assert used, "it gets on"
            rest = rest[used:]
            for ours, piece in pieces:
                if ours:
                    heard.take(bytes(piece))
                else:
                    heard.feed(piece)
            if frames.failure is not None:
                heard.code = frames.failure[0]
                break
    return heard


# Conversations


PAYLOADS: Final = st.one_of(
    st.binary(max_size=20), st.sampled_from([125, 126, 127, 300, 0xFFFF, 0x10000]).map(lambda size: b"\xa5" * size)
)
DETAILS: Final = {"size_bits": st.sampled_from([7, 16, 64]), "key": st.binary(min_size=4, max_size=4)}
CONTROLS: Final = st.lists(
    st.builds(Frame, st.sampled_from([PING, PONG]), st.binary(max_size=20), key=DETAILS["key"]), max_size=2
)


@st.composite
def messages(draw: st.DrawFn) -> list[Frame]:
    """One message in some frames, with control frames before each of them."""
    frames: list[Frame] = []
    payloads = draw(st.lists(PAYLOADS, min_size=1, max_size=4))
    opcode = draw(st.sampled_from([BINARY, BINARY, TEXT]))
    for number, payload in enumerate(payloads, 1):
        frames += draw(CONTROLS)
        fin = number == len(payloads)
        frames.append(draw(st.builds(Frame, st.just(opcode), st.just(payload), st.just(fin), **DETAILS)))
        opcode = CONTINUATION
    return frames


def conversations() -> st.SearchStrategy[list[Frame]]:
    return st.lists(messages(), max_size=8).map(lambda each: [frame for message in each for frame in message])


CUTS: Final = st.lists(st.integers(0, 2**17), max_size=12)


@fuzzed(200)
@given(conversations(), CUTS, st.booleans())
def test_a_conversation_is_heard_as_the_library_hears_it(frames: list[Frame], cuts: list[int], masked: bool) -> None:
    data = wire(frames, masked=masked)
    heard, expected = by_both(cut(data, cuts), masked=masked), by_the_library(data, masked=masked)
    assert expected.code is None
    assert heard.code is None
    assert heard.events == expected.events


@pytest.mark.parametrize("masked", [True, False])
def test_it_may_be_cut_at_every_place(masked: bool) -> None:
    frames = [
        Frame(BINARY, b"one"),
        Frame(BINARY, b"begin", fin=False),
        Frame(PING, b"ping"),
        Frame(CONTINUATION, b"", fin=False, size_bits=16),
        Frame(CONTINUATION, b"the end", size_bits=64),
        Frame(TEXT, b"te", fin=False),
        Frame(PONG),
        Frame(CONTINUATION, b"xt"),
        Frame(BINARY, b"last"),
    ]
    data = wire(frames, masked=masked)
    expected: list[Event] = [
        b"onebegin",
        (PING, True, b"ping"),
        b"the end",
        (TEXT, False, b"te"),
        (PONG, True, b""),
        (CONTINUATION, True, b"xt"),
        b"last",
    ]
    assert by_the_library(data, masked=masked).events == expected
    for place in range(len(data) + 1):
        assert by_both([data[:place], data[place:]], masked=masked).events == expected
    assert by_both([data[place : place + 1] for place in range(len(data))], masked=masked).events == expected


ANY_FRAME: Final = st.builds(
    Frame,
    st.sampled_from([CONTINUATION, TEXT, BINARY, BINARY, 3, 7, PING, PONG, 11]),
    st.one_of(st.binary(max_size=10), st.just(bytes(126))),
    st.booleans(),
    bits=st.sampled_from([0, 0, 0, 0, RSV1, 0x20, 0x10]),
    wrong_side=st.sampled_from([False] * 6 + [True]),
)


@fuzzed(400)
@given(st.lists(ANY_FRAME, max_size=6), CUTS, st.booleans())
@example([Frame(TEXT, b"te", fin=False), Frame(BINARY, b"inside")], [], False)
@example([Frame(BINARY, b"begun", fin=False), Frame(TEXT, b"inside")], [], False)
@example([Frame(BINARY, b"begun", fin=False), Frame(BINARY, b"inside")], [], False)
@example([Frame(BINARY, b"begun", fin=False), Frame(CONTINUATION, b"x", bits=RSV1)], [], True)
@example([Frame(BINARY, b"x", bits=RSV1)], [], True)
@example([Frame(BINARY, b"x", wrong_side=True)], [], True)
@example([Frame(BINARY, b"x", wrong_side=True)], [], False)
@example([Frame(CONTINUATION, b"of nothing")], [], False)
def test_a_violation_ends_it_as_in_the_library(frames: list[Frame], cuts: list[int], masked: bool) -> None:
    data = wire(frames, masked=masked)
    heard, expected = by_both(cut(data, cuts), masked=masked), by_the_library(data, masked=masked)
    assert heard.code == expected.code
    if heard.code is None:
        assert heard.events == expected.events


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("parts", [[MAX_BINARY], [MAX_BINARY - 1, 1], [1, 0, MAX_BINARY - 1]])
@pytest.mark.parametrize("excess", [0, 1])
def test_a_message_has_at_most_1_mib(parts: list[int], excess: int, masked: bool) -> None:
    sizes = [*parts[:-1], parts[-1] + excess]
    frames = [
        Frame(BINARY if number == 0 else CONTINUATION, bytes(size), fin=number == len(sizes) - 1, key=bytes(4))
        for number, size in enumerate(sizes)
    ]
    small = Frame(BINARY, b"next")  # what came before does not count
    data = wire([small, *frames, small], masked=masked)
    heard, expected = by_both([data], masked=masked), by_the_library(data, masked=masked)
    assert heard.code == expected.code == (1009 if excess else None)
    assert excess or heard.events == expected.events


def test_the_size_is_known_by_the_header() -> None:
    """Nothing of a message that is too long is waited for."""
    header = Frame(BINARY, bytes(MAX_BINARY + 1)).encode(masked=False)[:10]
    frames = BinaryFrames(None)
    frames.split(memoryview(header))
    assert frames.failure == (1009, f"a message of more than {MAX_BINARY} bytes")


def test_so_many_frames_begin_in_a_turn() -> None:
    frames = BinaryFrames(None)
    one = Frame(BINARY, b"x").encode(masked=False)
    data = memoryview(one * (FRAMES_PER_TURN + 3))
    used, pieces = frames.split(data)
    assert (used, len(pieces)) == (FRAMES_PER_TURN * len(one), FRAMES_PER_TURN)
    used, pieces = frames.split(data[used:])
    assert (used, len(pieces)) == (3 * len(one), 3)


def test_a_payload_that_is_not_masked_is_not_copied() -> None:
    data = bytearray(Frame(BINARY, b"payload").encode(masked=False))
    _, [(ours, piece)] = BinaryFrames(None).split(memoryview(data))
    assert ours
    data[-1:] = b"!"
    assert bytes(piece) == b"payloa!"


@fuzzed(200)
@given(st.lists(PAYLOADS, min_size=1, max_size=4), CUTS, st.booleans())
def test_what_is_encoded_is_one_message_for_both(chunks: list[bytes], cuts: list[int], mask: bool) -> None:
    payload = b"".join(chunks)
    data = b"".join(encode(chunks, len(payload), apply_mask if mask else None))
    expected = [payload] if payload else []
    assert by_both(cut(data, cuts), masked=mask).events == expected
    alone = by_the_library(data + Frame(PING).encode(masked=mask), masked=mask)
    assert alone.events == [*expected, (PING, True, b"")], "the frame ends where it should"


def test_each_message_has_a_mask_of_its_own() -> None:
    """RFC 6455, 5.3: a fresh one for each frame."""
    masks = {bytes(encode([b"x"], 1, apply_mask)[0][-4:]) for _ in range(8)}
    assert len(masks) == 8
