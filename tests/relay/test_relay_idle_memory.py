"""What a visitor takes of the relay's memory while it says nothing: most visitors do, most of the time."""

from __future__ import annotations

import sys
import tracemalloc
from contextlib import AsyncExitStack
from typing import Final

import pytest
from rig import RelayRig, no_hang, read_exactly, relay_rig, request

import pioneer_tunnel
from pioneer_tunnel import Tunnel

VISITORS: Final = 50
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"
OURS: Final = [tracemalloc.Filter(True, f"{folder}/*") for folder in pioneer_tunnel.__path__]


async def _stay(stack: AsyncExitStack, rig: RelayRig, tunnel: Tunnel, head: bytes) -> None:
    """A visitor comes, has an answer, and says nothing more."""
    visitor = await stack.enter_async_context(await rig.visit())
    await visitor.send_all(head)
    stream = await stack.enter_async_context(await tunnel.accept())
    assert await read_exactly(stream, len(head)) == head
    await stream.send_all(ANSWER)
    assert await read_exactly(visitor, len(ANSWER)) == ANSWER


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a visitor has tasks")
async def test_a_visitor_takes_little_and_nothing_of_its_request_is_kept() -> None:
    """Found by measuring: the bytes and the headers of its first request were kept for as long as a visitor stayed."""
    head = request(f"Cookie: {'c' * 8000}", "Accept: text/html")
    async with relay_rig() as rig, rig.tunnel() as tunnel, AsyncExitStack() as stack:
        await tunnel.wait_connected()
        for _ in range(5):
            await _stay(stack, rig, tunnel, head)
        tracemalloc.start()
        try:
            before = tracemalloc.take_snapshot().filter_traces(OURS)
            with no_hang():
                for _ in range(VISITORS):
                    await _stay(stack, rig, tunnel, head)
            after = tracemalloc.take_snapshot().filter_traces(OURS)
        finally:
            tracemalloc.stop()
        grown = sum(change.size_diff for change in after.compare_to(before, "filename"))
        assert grown / VISITORS < 10_000  # it was 25,600, and is 7,000, the gateway's end included
