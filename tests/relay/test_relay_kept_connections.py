"""Visitors' connections that are kept between requests, or upgraded."""

from __future__ import annotations

import contextlib
from typing import Final

import pytest
import trio
import trio.testing
from rig import eventually, in_background, no_hang, read_all, read_exactly, relay_rig, request, tunnel_entry
from visits import (
    ANSWER,
    HEAD,
    OTHER_HOST,
    POSTED,
    SWITCH,
    UPGRADE,
    FakeSession,
    by_hand,
    statuses,
    until_end,
    visit_of,
)

from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.limits import RelayLimits
from pioneer_tunnel.relay.visitors.ingress import Ingress

# Upgrade


async def test_after_a_101_anything_passes_both_ways() -> None:
    asked = request(*UPGRADE)
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(asked + b"\x81\x05early")
        stream = await tunnel.accept()
        assert await read_exactly(stream, len(asked)) == asked
        with trio.move_on_after(0.05):
            raise AssertionError(f"held bytes came before the answer: {await stream.receive_some()!r}")
        for part in (b"HTTP/1.1 100 Continue\r\n", b"\r\nHTTP/1.1 1", SWITCH[10:] + b"\x82\x03yes"):
            await stream.send_all(part)
        with no_hang():
            assert await read_exactly(stream, 7) == b"\x81\x05early"
            told = b"HTTP/1.1 100 Continue\r\n\r\n" + SWITCH + b"\x82\x03yes"
            assert await read_exactly(visitor, len(told)) == told
            await visitor.send_all(request(host=OTHER_HOST))
            await visitor.send_eof()
            assert await read_all(stream) == request(host=OTHER_HOST)


async def test_what_is_held_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    """The reader stops, so a visitor that says more has to wait."""
    directory = LocalDirectory()
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    await directory.enter("office", FakeSession(ingress))
    visitor, stream = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, visit_of(stream))
        await visitor.send_all(request(*UPGRADE))
        with trio.move_on_after(60) as patience:
            await visitor.send_all(bytes(64 * 1024))
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", SWITCH])
async def test_a_visitor_that_resets_before_an_upgrade_is_answered_ends_its_stream(answer: bytes) -> None:
    """The visitor is not read then, so nothing else said that it has left: the stream stayed for ever."""
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor = await rig.visit()
        await visitor.send_all(request(*UPGRADE) + b"held")
        stream = await tunnel.accept()
        assert await read_exactly(stream, len(request(*UPGRADE))) == request(*UPGRADE)
        await abandon(visitor)
        with no_hang():
            if answer:
                with contextlib.suppress(trio.BrokenResourceError):
                    await stream.send_all(answer)
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()


async def test_an_answer_to_an_upgrade_that_cannot_be_sent_ends_the_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Where the event loop cannot watch the visitor, too."""
    async with by_hand() as (visitor, session):
        await visitor.send_all(request(*UPGRADE) + b"held")
        await eventually(lambda: bool(session.streams))
        await visitor.aclose()
        await session.streams[0].send_all(ANSWER[:20])  # the rest is not read any more, and so never known
        with trio.fail_after(1):
            assert await until_end(session.streams[0]) == request(*UPGRADE)


async def test_a_gateway_that_ends_instead_of_answering_an_upgrade_ends_the_visit(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(request(*UPGRADE) + b"held")
        await eventually(lambda: bool(session.streams))
        await session.streams[0].send_all(b"HTTP/1.1 ")
        await session.streams[0].send_eof()
        assert await read_all(visitor) == b"HTTP/1.1 "
        assert await until_end(session.streams[0]) == request(*UPGRADE)


@pytest.mark.parametrize("ahead", [True, False])
async def test_an_upgrade_on_a_kept_connection_gets_a_stream_of_its_own(ahead: bool) -> None:
    """As soon as what came before it is answered; the server may keep its connection for as long as it likes."""
    asked = request(*UPGRADE)
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(HEAD + (asked + b"held") * ahead)
        with no_hang():
            first = await tunnel.accept()
            assert await read_exactly(first, len(HEAD)) == HEAD
            await first.send_all(ANSWER)
            assert await read_exactly(visitor, len(ANSWER)) == ANSWER
            if not ahead:
                await visitor.send_all(asked + b"held")
            second = await tunnel.accept()
            assert second.visitor == first.visitor
            assert await read_exactly(second, len(asked)) == asked
            assert await first.receive_some() == b"", "the stream before has ended"
            await trio.testing.wait_all_tasks_blocked()
            await second.send_all(SWITCH)
            assert await read_exactly(visitor, len(SWITCH)) == SWITCH
            assert await read_exactly(second, 4) == b"held"
            await visitor.send_all(b"more")
            await visitor.send_eof()
            assert await read_all(second) == b"more"
            await second.aclose()
            assert await read_all(visitor) == b""
        await first.aclose()


async def test_each_request_may_ask_for_an_upgrade(autojump_clock: trio.testing.MockClock) -> None:
    """Apache HttpClient does. A server that keeps its connections costs no time: that would be virtual hours here."""
    asked = request("Upgrade: TLS/1.2", "Connection: Upgrade")
    async with by_hand() as (visitor, session):
        for number in range(20):
            await visitor.send_all(asked)
            await eventually(lambda: len(session.streams) > number)  # noqa: B023
            await session.streams[number].send_all(ANSWER)
            assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        assert trio.current_time() < 5
        for gateway in session.streams[:-1]:
            assert await until_end(gateway) == asked
        await visitor.send_eof()
        await session.streams[-1].aclose()


async def test_a_gateway_that_is_gone_when_an_upgrade_wants_a_stream_is_503(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + request(*UPGRADE))
        await eventually(lambda: bool(session.streams))
        session.gone = True
        (gateway,) = session.streams
        await gateway.send_all(ANSWER)
        assert statuses(await read_all(visitor)) == [200, 503]
        assert await until_end(gateway) == HEAD


# Connections that are kept


KEPT: Final = RelayLimits().keep_alive_timeout_ms / 1000


async def test_a_connection_is_kept_for_so_long_between_requests(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (visitor, session):
        for _ in range(3):
            await visitor.send_all(HEAD)
            await eventually(lambda: bool(session.streams))
            (gateway,) = session.streams
            await trio.sleep(5 * KEPT)  # a request is outstanding
            await gateway.send_all(ANSWER[:-1])
            await trio.sleep(5 * KEPT)  # a body is under way
            await gateway.send_all(ANSWER[-1:])
            assert await read_exactly(visitor, len(ANSWER)) == ANSWER
            await trio.sleep(KEPT - 1)
        await visitor.send_all(b"\r\n")  # no request
        assert await until_end(gateway) == HEAD * 3
        assert await read_all(visitor) == b""
        assert trio.current_time() == pytest.approx(33 * KEPT, abs=5)


async def test_a_body_that_is_sent_slowly_is_no_kept_connection(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(POSTED)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(ANSWER)
        for byte in b"body":
            await trio.sleep(5 * KEPT)
            await visitor.send_all(bytes([byte]))
        started = trio.current_time()
        assert await until_end(gateway) == POSTED + b"body"
        assert trio.current_time() - started == pytest.approx(KEPT)
        assert await read_all(visitor) == ANSWER


@pytest.mark.parametrize("response", [SWITCH, b"HTTP/1.1 200 OK\r\n\r\n", b"not HTTP"])
async def test_what_is_not_between_requests_has_no_such_timeout(
    response: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(request(*UPGRADE))
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(response)
        await trio.sleep(10 * KEPT)
        await gateway.send_all(b"late")
        await gateway.send_eof()
        assert await read_all(visitor) == response + b"late"
        await visitor.send_eof()


async def test_the_timeout_is_the_operators_and_none_is_no_timeout(autojump_clock: trio.testing.MockClock) -> None:
    for milliseconds in (2000, 0):
        started = trio.current_time()
        async with by_hand(keep_alive_timeout_ms=milliseconds) as (visitor, session):
            await visitor.send_all(HEAD)
            await eventually(lambda: bool(session.streams))
            await session.streams[0].send_all(ANSWER)
            with trio.move_on_after(100 * KEPT):
                assert await read_all(visitor) == ANSWER
                assert trio.current_time() - started == pytest.approx(2, abs=0.1)
            await visitor.aclose()
            await session.streams[0].aclose()
        assert (trio.current_time() - started > KEPT) is (milliseconds == 0)


async def test_a_visitor_that_stays_after_the_gateways_end_is_closed_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(ANSWER)
        await gateway.send_eof()
        assert await read_all(visitor) == ANSWER
        assert await until_end(gateway) == HEAD
    assert trio.current_time() == pytest.approx(KEPT, abs=3)


async def test_an_apology_is_not_a_kept_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with relay_rig(limits={"keep_alive_timeout_ms": 1}) as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(HEAD)
            (await tunnel.accept()).reset()
            with no_hang():
                assert statuses(await read_exactly(visitor, len(b"HTTP/1.1 502"))) == [502]
                with contextlib.suppress(trio.BrokenResourceError):
                    await read_all(visitor)
            await trio.sleep(0.05)  # it is read on for 2 seconds
    assert "unforeseen" not in caplog.text


async def test_a_kept_connection_that_is_closed_leaves_its_place_to_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with by_hand(streams_per_tunnel=1) as (visitor, session):
        await visitor.send_all(HEAD)
        await eventually(lambda: bool(session.streams))
        await session.streams[0].send_all(ANSWER)
        await trio.sleep(KEPT + 1)
        other, stream = trio.testing.memory_stream_pair()
        async with in_background(lambda: session.ingress.serve(visit_of(stream))):
            await other.send_all(HEAD)
            await eventually(lambda: len(session.streams) == 2)
