"""`binary_frames`: which frames it takes, whatever the pieces they come in, and what it leaves to the library."""

from __future__ import annotations

import functools

import hostile
import pytest
import trio
from hostile import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT
from hypothesis import given, strategies as st
from rig import no_hang, tcp_pair
from yamux_rig import cut

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel.websocket import MAX_BINARY, Opening, load_engine
from pioneer_tunnel.websocket.binary_frames import BinaryFrames, encode
from pioneer_tunnel.websocket.frame_meter import FRAMES_PER_TURN
from pioneer_tunnel.websocket.wsproto_framing import WsprotoFraming

apply_mask = WsprotoFraming.apply_mask


def split(
    data: list[bytes], *, masked: bool, fails_with: int | None = None, fills: bool = False
) -> tuple[bytes, bytes]:
    """The payload of binary messages in `data`, and what the library gets.

    Args:
        fills: whether each piece but the last fills the buffer that it was read into.
    """
    frames = BinaryFrames(apply_mask if masked else None)
    binary, rest = bytearray(), bytearray()
    begun = b""
    for number, piece in enumerate(data, start=1):
        view, begun = memoryview(begun + piece), b""
        while view:
            used, pieces = frames.split(view, more=fills and number < len(data))
            assert used
            view = view[used:]
            if frames.incomplete:
                view, begun = view[:0], bytes(view)
            for ours, some in pieces:
                (binary if ours else rest).extend(some)
    assert (frames.failure and frames.failure[0]) == fails_with
    return bytes(binary), bytes(rest)


controls = st.tuples(st.sampled_from([PING, PONG]), st.binary(max_size=125))
messages = st.lists(st.binary(max_size=70_000) | st.binary(max_size=200), min_size=1, max_size=4)


@given(
    st.booleans(),
    st.booleans(),
    st.lists(st.tuples(messages, st.lists(controls, max_size=2)), max_size=4),
    st.lists(st.integers(0)),
)
def test_what_comes_out_is_what_went_in(
    masked: bool, fills: bool, sent: list[tuple[list[bytes], list[tuple[int, bytes]]]], places: list[int]
) -> None:
    """Fragments with control frames between them, empty frames, and cuts anywhere."""
    frame = functools.partial(hostile.frame, masked=masked)
    wire, binary, rest = bytearray(), bytearray(), bytearray()
    for fragments, between in sent:
        for number, fragment in enumerate(fragments):
            last = number == len(fragments) - 1
            wire += frame(CONTINUATION if number else BINARY, fragment, fin=last)
            binary += fragment
            for opcode, payload in between:
                wire += frame(opcode, payload)
                rest += frame(opcode, payload)
        if between:
            wire += frame(TEXT, b"text", fin=False) + frame(CONTINUATION, b"more")
            rest += frame(TEXT, b"text", fin=False) + frame(CONTINUATION, b"more")
        wire += b"".join(encode([b"enc", b"oded"], 7, apply_mask if masked else None))
        binary += b"encoded"
    assert split(cut(bytes(wire), places), masked=masked, fills=fills) == (bytes(binary), bytes(rest))


@pytest.mark.parametrize("masked", [True, False])
def test_the_beginning_of_a_message_waits_for_the_rest_if_that_has_come(masked: bool) -> None:
    message = b"".join(encode([b"abcdef"], 6, apply_mask if masked else None)) * 4
    for cut_at in range(len(message) // 4 + 1, len(message)):
        frames = BinaryFrames(apply_mask if masked else None)
        used, pieces = frames.split(memoryview(message)[:cut_at], more=True)
        if frames.incomplete:
            assert {bytes(piece) for _, piece in pieces} == {b"abcdef"}
            again, rest = frames.split(memoryview(message)[used:])
            assert [bytes(piece) for _, piece in pieces + rest] == [b"abcdef"] * 4
            assert (used + again, frames.incomplete) == (len(message), False)
        else:  # not even the header is complete
            assert used == cut_at


@pytest.mark.parametrize("opcode", [TEXT, BINARY, 3, 7])
def test_a_message_inside_a_message_is_against_the_protocol(opcode: int) -> None:
    """What came before it counts, also if it came together with it."""
    wire = hostile.frame(PING) + hostile.frame(BINARY, b"x", fin=False) + hostile.frame(opcode, b"y")
    assert split([wire], masked=False, fails_with=1002) == (b"x", hostile.frame(PING))


def test_a_message_that_is_too_long_is_found_by_its_headers() -> None:
    half = hostile.frame(BINARY, bytes(MAX_BINARY // 2), fin=False)
    over = hostile.frame(CONTINUATION, bytes(MAX_BINARY // 2 + 1))[:10]
    assert split([half + over], masked=False, fails_with=1009) == (bytes(MAX_BINARY // 2), b"")
    assert split([b"\x82\x7f" + (2**64 - 1).to_bytes(8)], masked=False, fails_with=1009) == (b"", b"")


@pytest.mark.parametrize(
    "wrong",
    [
        hostile.frame(BINARY, b"x", masked=True),
        hostile.frame(BINARY, b"x", bits=hostile.RSV1),
        hostile.frame(CONTINUATION, b"x"),
        hostile.frame(3, b"x"),
        hostile.frame(CLOSE, b""),
        hostile.frame(TEXT, b"text", fin=False) + hostile.frame(BINARY, b"inside"),
    ],
    ids=["masked", "reserved bit", "continues nothing", "reserved opcode", "close", "binary inside text"],
)
def test_what_is_wrong_is_for_the_library(wrong: bytes) -> None:
    assert split([wrong], masked=False) == (b"", wrong)


@pytest.mark.skipif(not CAN_WATCH, reason="this system has no epoll")
async def test_a_flood_of_control_frames_leaves_others_their_turn() -> None:
    """A relay stood still for as long as one gateway sent pongs."""
    ours, theirs = await tcp_pair()
    count = 20 * FRAMES_PER_TURN
    opening = Opening(subprotocol="test.v1", address=RelayAddress.parse("ws://relay.test/path"), agent="test/1")
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def flood() -> None:
            async with load_engine("websockets").connect(ours, opening):
                await ours.send_all(hostile.frame(PONG, masked=True) * count)
                await trio.sleep_forever()

        async with load_engine("websockets").accept(theirs, opening) as websocket:
            driver, received = websocket.driver, list[object]()
            with Stay() as stay, no_hang():
                assert driver.watch(lambda: received.append(driver.receive_nowait()))
                nursery.start_soon(stay.wait)
                while len(received) < count / FRAMES_PER_TURN:
                    messages = driver.receive_nowait()
                    if messages is not None:
                        received.append(messages)
                    await trio.lowlevel.checkpoint()
                driver.unwatch()
                stay.end()
        assert not any(received)
        nursery.cancel_scope.cancel()
