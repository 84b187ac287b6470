"""`visitors/arriving.py`: the first request head of a connection, read without a task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Final

import attrs
import pytest
import trio
import trio.testing
from rig import eventually, living_tasks, no_hang, nothing_left_behind, read_all, request, tcp_pair

from pioneer_tunnel._http.head import RequestHead
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.leg import Leg
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.exchange.carrier import Carrier
from pioneer_tunnel.relay import RelayLimits
from pioneer_tunnel.relay.admission import Admission
from pioneer_tunnel.relay.connection import Connection, log_unforeseen
from pioneer_tunnel.relay.visitors.arriving import Arriving

pytestmark = pytest.mark.skipif(not CAN_WATCH, reason="this system has no event loop for it")

HEAD: Final = request()


@attrs.define
class Rig:
    visitor: trio.SocketStream
    connection: Connection
    admission: Admission
    tasks: int
    heads: list[tuple[RequestHead, bytes]] = attrs.field(factory=list)
    legs: list[Leg] = attrs.field(factory=list)
    tls: list[bytes] = attrs.field(factory=list)
    arriving: Arriving | None = None

    @property
    def counted(self) -> int:
        return self.admission._connections

    def passes(self, connection: Connection, received: bytes) -> bool:
        return False

    def on_head(self, connection: Connection, leg: Leg, head: RequestHead, received: bytes) -> None:
        assert connection is self.connection
        self.heads.append((head, received))
        self.legs.append(leg)


@asynccontextmanager
async def arriving() -> AsyncIterator[Rig]:
    with nothing_left_behind(), no_hang():
        near, far = await tcp_pair()
        admission = Admission(RelayLimits())
        async with near, trio.open_nursery() as nursery:
            carrier = Carrier(log_unforeseen)
            await nursery.start(carrier.run)
            connection = Connection(TcpStream(far.socket), None, None, nursery, copy_context())
            connection.arrival = admission.arrive(None, trio.current_time(), connection.evict)
            rig = Rig(near, connection, admission, living_tasks())
            leg = connection.stream.leg()
            assert leg is not None
            rig.arriving = Arriving(
                connection, leg, carrier, on_head=rig.on_head, in_task=rig.tls.append, passes=rig.passes
            )
            rig.arriving.begin()
            assert living_tasks() == rig.tasks
            yield rig
            nursery.cancel_scope.cancel()
        if not (rig.legs or rig.tls):  # otherwise it belongs to the test
            assert not rig.counted
        connection.close()
        assert not rig.counted


async def test_a_head_in_pieces_is_handed_on_with_what_came_after_it() -> None:
    async with arriving() as rig:
        for piece in (HEAD[:1], HEAD[1:20], HEAD[20:] + b"more"):
            await rig.visitor.send_all(piece)
            await trio.sleep(0.01)
        await eventually(lambda: rig.heads)
        ((head, received),) = rig.heads
        assert received == HEAD + b"more"
        assert head.length == len(HEAD)
        assert living_tasks() == rig.tasks
        await rig.visitor.send_all(b"later")
        await trio.sleep(0.01)
        assert rig.arriving is not None
        rig.arriving._on_readable()  # the event loop had it in its queue
        await eventually(lambda: rig.legs[0].receive(100) == b"later")
        rig.legs[0].detach()


@pytest.mark.parametrize(
    ("said", "status", "why"), [(b"", b"408", b"nothing came"), (HEAD[:20], b"408", b"no whole request head")]
)
async def test_a_slow_visitor_is_told(
    said: bytes, status: bytes, why: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with arriving() as rig:
        await rig.visitor.send_all(said)
        answer = await read_all(rig.visitor)
        assert answer.split()[1] == status
        assert why in answer
        await rig.visitor.aclose()
        await eventually(lambda: not rig.counted)


@pytest.mark.parametrize("said", [HEAD[:20], b"\0\0\r\n\r\n"])
async def test_a_head_that_is_cut_or_malformed_is_a_400(said: bytes) -> None:
    async with arriving() as rig:
        await rig.visitor.send_all(said)
        await rig.visitor.send_eof()
        assert (await read_all(rig.visitor)).startswith(b"HTTP/1.1 400 ")
        await eventually(lambda: not rig.counted)


async def test_who_leaves_without_a_word_gets_an_end() -> None:
    async with arriving() as rig:
        await rig.visitor.send_eof()
        assert await read_all(rig.visitor) == b""
        await eventually(lambda: not rig.counted)


async def test_what_begins_with_tls_is_for_somebody_else() -> None:
    async with arriving() as rig:
        await rig.visitor.send_all(b"\x16\x03\x01\x00")
        await eventually(lambda: rig.tls)
        assert rig.tls == [b"\x16\x03\x01\x00"]
        await rig.visitor.send_all(b"rest")
        assert await rig.connection.stream.receive_some() == b"rest"


async def test_an_evicted_one_is_reset_and_counted_no_more() -> None:
    async with arriving() as rig:
        await rig.visitor.send_all(HEAD[:20])
        await trio.sleep(0.01)
        rig.connection.evict()
        assert not rig.counted
        with pytest.raises(trio.BrokenResourceError):
            await rig.visitor.receive_some()


async def test_one_that_was_never_served_is_reset_at_the_end() -> None:
    async with arriving() as rig:
        visitor = rig.visitor
        await visitor.send_all(HEAD[:20])
    assert visitor.socket.fileno() == -1
