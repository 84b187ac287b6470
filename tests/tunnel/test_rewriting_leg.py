"""The leg that changes requests: in an exchange, over streams of each kind."""

from __future__ import annotations

from typing import Final, final

import trio
import trio.testing
from compiled import in_python
from hypothesis import given, strategies as st
from rig import carried, no_hang, read_all, read_exactly, read_until, request, tcp_pair

from pioneer_tunnel._http.forwarded import HeaderRules
from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.leg import LARGEST_READ, Bytes, Leg
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel.exchange.pump import pump
from pioneer_tunnel.exchange.task_leg import leg_of
from pioneer_tunnel.testing import virtual_time
from pioneer_tunnel.tunnel.rewriting_leg import MAX_OUTSTANDING, RewritingLeg

RULES: Final = HeaderRules(set_forwarded=True, visitor="203.0.113.9", tls=True)
FORGED: Final = "X-Forwarded-For: 127.0.0.1"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
WEBSOCKET: Final = request("Upgrade: websocket", "Connection: Upgrade")
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
CHUNKED: Final = request("Transfer-Encoding: chunked")


def changed(*lines: str, body: bytes = b"") -> bytes:
    if body:
        lines += (f"Content-Length: {len(body)}",)
    return (
        request(
            *lines,
            "X-Forwarded-For: 203.0.113.9",
            "X-Real-IP: 203.0.113.9",
            "X-Forwarded-Proto: https",
            "X-Forwarded-Host: office.test",
            "Forwarded: for=203.0.113.9;host=office.test;proto=https",
        )
        + body
    )


async def rewrite(visitor: ByteStream, server: ByteStream) -> RewritingLeg:
    """Carry a visitor to a server until both have ended."""
    leg = RewritingLeg(leg_of(visitor), RULES)
    await pump(server, visitor, second_leg=leg)
    return leg


async def test_a_websocket_passes_between_plain_sockets() -> None:
    """After the 101 the kernel moves the bytes from the visitor."""
    bulk = bytes(range(256)) * 40_000
    visitor, ours = await tcp_pair()
    to_server, server = await tcp_pair()
    with no_hang():
        async with visitor, server, trio.open_nursery() as nursery:
            nursery.start_soon(rewrite, adopt(ours), adopt(to_server))
            await visitor.send_all(WEBSOCKET + b"first")
            assert await read_until(server, b"\r\n\r\n") == changed("Upgrade: websocket", "Connection: Upgrade")
            await server.send_all(SWITCHING)
            assert await read_exactly(visitor, len(SWITCHING)) == SWITCHING
            assert await read_exactly(server, 5) == b"first"
            assert await carried(server, visitor, bulk) == bulk
            assert await carried(visitor, server, bulk) == bulk


async def test_few_requests_wait_for_responses() -> None:
    (ours, visitor), (gateway, server) = trio.testing.memory_stream_pair(), trio.testing.memory_stream_pair()
    received = bytearray()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def read() -> None:
            async for data in server:
                received.extend(data)

        nursery.start_soon(rewrite, adopt(ours), adopt(gateway))
        nursery.start_soon(visitor.send_all, request() * MAX_OUTSTANDING * 3)
        await trio.testing.wait_all_tasks_blocked()
        assert MAX_OUTSTANDING <= len(received) // len(changed()) < MAX_OUTSTANDING + 100
        await server.send_all(OK * MAX_OUTSTANDING)
        await trio.testing.wait_all_tasks_blocked()
        assert 2 * MAX_OUTSTANDING <= len(received) // len(changed()) < 2 * MAX_OUTSTANDING + 100
        nursery.cancel_scope.cancel()


@final
class SilentLeg(Leg):
    """Has received something, and receives no more."""

    def __init__(self, received: bytes) -> None:
        super().__init__()
        self.prefix = received

    def attach(self) -> None:
        pass

    def detach(self) -> None:
        pass

    def receive(self, max_bytes: int) -> None:
        return None

    def send(self, data: Bytes) -> bool:
        return True

    def send_eof(self) -> None:
        pass

    room: Final = 1024
    broken: Final = False


@in_python
async def test_much_work_is_done_in_turns() -> None:
    """20,000 chunks at once would hold up the other visitors."""
    chunks = b"1\r\nx\r\n" * 20_000
    leg = RewritingLeg(SilentLeg(CHUNKED + chunks), RULES)
    expected = changed("Transfer-Encoding: chunked") + chunks
    passed = b""
    with Stay() as stay, no_hang():
        for _ in range(10):
            before = len(passed)
            while piece := leg.receive(LARGEST_READ):
                passed += piece
            assert before < len(passed) < before + 5000
            turn = trio.Event()
            leg.on_readable = turn.set
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stay.wait)
                await turn.wait()
                nursery.cancel_scope.cancel()
    assert expected.startswith(passed)


async def send_in_pieces(stream: trio.abc.SendStream, data: bytes, cuts: list[int]) -> None:
    for cut in cuts:
        if data:
            await stream.send_all(data[:cut])
            data = data[cut:]
    if data:
        await stream.send_all(data)


@given(
    bodies=st.lists(st.binary(max_size=50), min_size=1, max_size=6),
    answers=st.lists(st.binary(max_size=50), min_size=6, max_size=6),
    cuts=st.lists(st.integers(1, 300), max_size=20),
    answer_cuts=st.lists(st.integers(1, 100), max_size=20),
    malformed=st.booleans(),
)
@virtual_time
async def test_requests_and_responses_pass_whatever_the_pieces(
    bodies: list[bytes], answers: list[bytes], cuts: list[int], answer_cuts: list[int], malformed: bool
) -> None:
    (ours, visitor), (gateway, server) = trio.testing.memory_stream_pair(), trio.testing.memory_stream_pair()
    said = b"".join(request(FORGED, body=body) for body in bodies)
    expected = b"".join(changed(body=body) for body in bodies)
    responses = b"".join(
        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer)
        for answer, _ in zip(answers, bodies, strict=False)
    )
    legs: list[RewritingLeg] = []

    async def run() -> None:
        legs.append(await rewrite(adopt(ours), adopt(gateway)))

    async def serve() -> None:
        assert await read_exactly(server, len(expected)) == expected
        await send_in_pieces(server, responses, answer_cuts)
        assert await read_all(server) == b""
        await server.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        nursery.start_soon(serve)
        await send_in_pieces(visitor, said + b"GET /\r\n" * malformed, cuts)
        assert await read_exactly(visitor, len(responses)) == responses
        if not malformed:
            await visitor.send_eof()
            assert await read_all(visitor) == b""
    (leg,) = legs
    assert leg.handed_over is malformed
    assert (leg.refused_request is not None) is malformed
