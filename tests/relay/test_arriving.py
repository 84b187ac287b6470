"""`visitors/arriving.py`: the first request head of a connection, read without a task."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import copy_context
from typing import Final

import attrs
import pytest
import trio
import trio.testing
from compiled import in_python
from rig import eventually, living_tasks, no_hang, nothing_left_behind, read_all, request, tcp_pair

from pioneer_tunnel._http.head import RequestHead
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH, Reactor
from pioneer_tunnel._net.leg import Leg
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.exchange.carrier import Carrier
from pioneer_tunnel.relay import RelayLimits
from pioneer_tunnel.relay.admission import Admission
from pioneer_tunnel.relay.connection import Connection, log_unforeseen
from pioneer_tunnel.relay.request_head import refuse
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
    in_task: list[bytes] = attrs.field(factory=list)
    passes_from: bytes | None = None
    arriving: Arriving | None = None

    @property
    def counted(self) -> int:
        return self.admission._connections

    def passes(self, connection: Connection, received: bytes) -> bool:
        assert connection is self.connection
        return received == self.passes_from

    def on_head(self, connection: Connection, leg: Leg, head: RequestHead, received: bytes) -> None:
        assert connection is self.connection
        self.heads.append((head, received))
        self.legs.append(leg)


@asynccontextmanager
async def arriving(*, received: bytes = b"", sent: bytes = b"", passes_from: bytes | None = None) -> AsyncIterator[Rig]:
    """One that begins when `received` was read, and `sent` has come.

    Args:
        passes_from: it is passed on if this is what came first.
    """
    with nothing_left_behind(), no_hang():
        near, far = await tcp_pair()
        admission = Admission(RelayLimits())
        async with near, trio.open_nursery() as nursery:
            carrier = Carrier(log_unforeseen)
            await nursery.start(carrier.run)
            connection = Connection(far.socket, None, None, nursery, copy_context())
            connection.begin(TcpStream(far.socket))
            connection.arrival = admission.arrive(None, trio.current_time(), connection.evict)
            await near.send_all(sent)
            await trio.sleep(0.01)
            rig = Rig(near, connection, admission, living_tasks(), passes_from=passes_from)
            leg = connection.stream.leg()
            assert leg is not None
            rig.arriving = Arriving(
                connection,
                leg,
                carrier,
                on_head=rig.on_head,
                in_task=rig.in_task.append,
                passes=rig.passes,
                answer=lambda connection, refusal: refuse(connection.stream, refusal),
            )
            rig.arriving.begin(received)
            assert living_tasks() == rig.tasks
            yield rig
            nursery.cancel_scope.cancel()
        if not (rig.legs or rig.in_task):  # otherwise it belongs to the test
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


async def test_a_head_that_has_come_is_handed_on_at_once() -> None:
    async with arriving(sent=HEAD) as rig:
        assert [received for _, received in rig.heads] == [HEAD]
        rig.legs[0].attach()
        await rig.visitor.send_all(b"later")
        await eventually(lambda: rig.legs[0].receive(100) == b"later")
        rig.legs[0].detach()


async def test_what_was_read_before_comes_first() -> None:
    async with arriving(received=HEAD[:20]) as rig:
        await rig.visitor.send_all(HEAD[20:])
        await eventually(lambda: rig.heads)
        assert rig.heads[0][1] == HEAD
        rig.legs[0].detach()


@pytest.mark.parametrize("when", ["read before", "there", "later"])
async def test_one_that_is_passed_on_is_counted_no_more(when: str) -> None:
    received, sent = HEAD if when == "read before" else b"", HEAD if when == "there" else b""
    async with arriving(received=received, sent=sent, passes_from=HEAD) as rig:
        if when == "later":
            await rig.visitor.send_all(HEAD)
        await eventually(lambda: not rig.counted)
        assert not rig.heads


@in_python
async def test_without_memory_for_an_event_a_task_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Reactor, descriptor: int, on_events: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(Reactor, "watch", refuse)
    async with arriving(sent=HEAD[:20]) as rig:
        assert rig.in_task == [HEAD[:20]]


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
        await eventually(lambda: rig.in_task)
        assert rig.in_task == [b"\x16\x03\x01\x00"]
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
