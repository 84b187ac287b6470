"""The WebSocket engines compared: what one takes, the other takes."""

from __future__ import annotations

from contextlib import suppress

import hostile
import pytest
import trio
import trio.testing
from fuzzing import fuzzed
from hostile import BINARY, CLOSE, CONTINUATION, PING, PONG, RSV1, TEXT
from hypothesis import example, given, strategies as st
from rig import no_hang, read_all
from websocket_rig import frame, raw_client
from yamux_rig import cut

from pioneer_tunnel.websocket import ENGINES, EngineName, WebSocketClosed

payloads = st.binary(max_size=8) | st.sampled_from([b"caf\xc3", b"\xa9", b"\xff", bytes(130), b"x" * 70_000])
frames = st.builds(
    hostile.frame,
    st.sampled_from([CONTINUATION, TEXT, BINARY, BINARY, PING, PONG, CLOSE, 3, 11]),
    payloads,
    fin=st.booleans(),
    masked=st.sampled_from([True] * 9 + [False]),
    bits=st.sampled_from([0] * 9 + [RSV1, 0x20]),
)


def what_comes_out(engine: EngineName, data: bytes, places: list[int]) -> tuple[list[str], bytes, bool]:
    """The texts, the bytes, and whether it went wrong, of what follows an opening, cut at `places`."""
    texts: list[str] = []
    received = bytearray()

    async def run() -> bool:
        async with raw_client(engine) as (client, server), trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    for piece in cut(data, places):
                        await client.send_all(piece)
                        await trio.testing.wait_all_tasks_blocked()
                    # A text first: a close within a message is an error to one of them, and none to the other.
                    await client.send_all(frame(TEXT, b"over") + frame(CLOSE, (1000).to_bytes(2, "big")))
                    assert isinstance(client, trio.abc.HalfCloseableStream)
                    await client.send_eof()
                    await read_all(client)
                await client.aclose()

            try:
                with no_hang():
                    while True:
                        for message in await server.receive():
                            if isinstance(message, str):
                                texts.append(message)
                            else:
                                received.extend(message)
            except WebSocketClosed as closed:
                return closed.code != 1000
            except trio.BrokenResourceError:
                return True
            finally:
                nursery.cancel_scope.cancel()

    wrong = trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    return texts, bytes(received), wrong


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs the extra 'speed'")
@fuzzed(30)
@given(st.lists(frames | st.binary(max_size=6), max_size=8).map(b"".join), st.lists(st.integers(0, 300), max_size=4))
@example(frame(TEXT, b"caf\xc3", fin=False) + frame(PING) + frame(CONTINUATION, b"\xa9"), [3])
@example(frame(BINARY, b"ab", fin=False) + frame(TEXT, b"within"), [])
@example(frame(BINARY, b"x", bits=RSV1), [1])
def test_both_engines_take_the_same(data: bytes, places: list[int]) -> None:
    """A message that one takes and the other refuses could mean two things to two ends."""
    texts, received, wrong = what_comes_out("websockets", data, places)
    other_texts, other_received, other_wrong = what_comes_out("trio-websocket", data, places)
    assert (texts, wrong) == (other_texts, other_wrong)
    # What has come of a binary message that never ends is handed on by one of them.
    assert received.startswith(other_received)
    assert wrong or received == other_received
