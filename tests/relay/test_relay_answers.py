"""The order of the answers on a visitor's connection, of gateways and of the relay."""

from __future__ import annotations

import contextlib
import random
from typing import Final

import pytest
import trio
import trio.testing
from rig import eventually, in_background, no_hang, read_all, read_exactly, relay_rig, request
from visits import ANSWER, HEAD, NOBODY, OTHER_HOST, POSTED, UPGRADE, by_hand, statuses, until_end

from pioneer_tunnel.relay.visitors import followed_leg
from pioneer_tunnel.websocket import EngineName

REFUSED: Final = b"GET /no-host HTTP/1.1\r\n\r\n"


async def test_a_refusal_waits_for_the_answers_before_it(autojump_clock: trio.testing.MockClock) -> None:
    """The gateway gets no EOF meanwhile, or a server might stop."""
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + REFUSED)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        assert await read_exactly(gateway, len(NOBODY + HEAD)) == NOBODY + HEAD
        for byte in ANSWER[:4]:
            await gateway.send_all(bytes([byte]))
            with trio.move_on_after(followed_leg.LAST_ANSWERS_TIMEOUT - 1):
                raise AssertionError(f"the gateway was told {await gateway.receive_some()!r}")
        await gateway.send_all(ANSWER[4:])
        assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 400 ")
        assert await read_all(gateway) == b""


BODY: Final = b"line\n" * 80


@pytest.mark.parametrize("said", [b"\r\n\r\n", b"\n", REFUSED, b"GET / HT", HEAD, request(*UPGRADE)])
async def test_nothing_is_written_into_a_body_that_ends_with_the_connection(
    said: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    response = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + BODY
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        assert await read_exactly(gateway, len(NOBODY + HEAD)) == NOBODY + HEAD
        await gateway.send_all(response[:100])
        assert await read_exactly(visitor, 100) == response[:100]
        await visitor.send_all(said)
        with trio.move_on_after(followed_leg.LAST_ANSWERS_TIMEOUT - 1):
            raise AssertionError(f"the gateway was told {await gateway.receive_some()!r}")
        await gateway.send_all(response[100:])
        await gateway.send_eof()
        assert await read_all(visitor) == response[100:]


@pytest.mark.parametrize("said", [b"\r\n\r\n", REFUSED])
@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n"])
async def test_a_gateway_that_falls_silent_in_such_a_body_resets_the_visitor(
    head: bytes, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The visitor cannot take the truncated response for a complete one."""
    monkeypatch.setattr(followed_leg, "LAST_ANSWERS_TIMEOUT", 0.05)
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(HEAD)
        stream = await tunnel.accept()
        await stream.send_all(head + BODY[:100])
        with no_hang():
            await read_exactly(visitor, len(head) + 100)
            await visitor.send_all(said)
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)


@pytest.mark.parametrize("said", [REFUSED, request(*UPGRADE), request(host=OTHER_HOST)])
@pytest.mark.parametrize("part", [b"", ANSWER[:10], ANSWER[:-1], ANSWER + ANSWER[:-1]])
async def test_a_gateway_that_ends_before_its_response_does_resets_the_visitor(said: bytes, part: bytes) -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(HEAD * 2 + said)
        stream = await tunnel.accept()
        await read_exactly(stream, len(HEAD * 2))
        if part:
            await stream.send_all(part)
        await stream.send_eof()
        with no_hang():
            if part:
                assert await read_exactly(visitor, len(part)) == part
                with pytest.raises(trio.BrokenResourceError):
                    await read_all(visitor)
            else:
                assert statuses(await read_all(visitor)) == [502], "the answer to the first"


async def test_a_response_may_come_before_its_request_is_complete(autojump_clock: trio.testing.MockClock) -> None:
    early = b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"
    async with by_hand() as (visitor, session):
        await visitor.send_all(POSTED + b"bo")
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(early)
        assert await read_exactly(visitor, len(early)) == early
        await visitor.send_all(b"dy" + HEAD)
        said = NOBODY + POSTED + b"body" + HEAD
        assert await read_exactly(gateway, len(said)) == said
        await gateway.send_all(ANSWER)
        assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        await visitor.send_eof()
        await gateway.send_eof()
        assert await read_all(visitor) == b""


async def test_requests_that_are_never_answered_are_bounded(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        said = bytearray()

        async def gateway_reads() -> None:
            while data := await gateway.receive_some():
                said.extend(data)

        async with in_background(gateway_reads):
            for _ in range(10 * followed_leg.MAX_OUTSTANDING):
                await visitor.send_all(HEAD)
            await trio.sleep(1)
            asked = said.count(HEAD)
            assert followed_leg.MAX_OUTSTANDING <= asked < 2 * followed_leg.MAX_OUTSTANDING
            await gateway.send_all(ANSWER * asked)
            await trio.sleep(1)
            assert said.count(HEAD) > asked
            assert (await read_all(visitor)) == ANSWER * asked, "a gateway that answers no more is not waited for"


@pytest.mark.parametrize("refused", [request(host="nobody.test"), REFUSED], ids=["404", "400"])
@pytest.mark.parametrize(("first", "rest"), [(HEAD, b""), (POSTED, b"body")], ids=["a request", "an early answer"])
async def test_a_gateway_does_not_answer_in_the_name_of_another_tenant(
    first: bytes, rest: bytes, refused: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """Found by an attack: behind a proxy that keeps connections, the EOF told the gateway when to send."""
    async with by_hand() as (visitor, session):
        await visitor.send_all(first)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        assert (await gateway.receive_some()).startswith(NOBODY)
        await gateway.send_all(ANSWER)
        assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        await visitor.send_all(rest)
        await trio.testing.wait_all_tasks_blocked()
        await visitor.send_all(refused)

        async def hostile() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while await gateway.receive_some():
                    pass
                await gateway.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nphish")
                await gateway.aclose()

        async with in_background(hostile):
            told = await read_all(visitor)
        assert told.startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))
        assert b"phish" not in told


async def test_a_gateway_that_does_not_end_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """And the visitor gets nothing that could look like the rest of a response."""
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + REFUSED)
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(ANSWER[:10])
        started = trio.current_time()
        told = await read_all(visitor)
        assert trio.current_time() - started == pytest.approx(followed_leg.LAST_ANSWERS_TIMEOUT, abs=0.1)
        assert told == ANSWER[:10]


async def test_a_gateway_that_breaks_off_meanwhile_resets_the_visitor() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(HEAD + REFUSED)
        stream = await tunnel.accept()
        await stream.send_all(b"half of")
        assert await read_exactly(visitor, 7) == b"half of"
        stream.reset()
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)


async def test_a_later_head_has_the_same_deadline_as_the_first(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + b"\r\n")
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(ANSWER)
        await trio.sleep(299)  # between requests there is no hurry
        assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        started = trio.current_time()

        async def trickle() -> None:
            for byte in HEAD[:15]:
                await visitor.send_all(bytes([byte]))
                await trio.sleep(0.9)

        async with in_background(trickle):
            assert (await read_all(visitor)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() - started == pytest.approx(10)
        assert await until_end(gateway) == HEAD


async def test_a_later_head_in_time_passes(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD)
        for _ in range(5):
            await visitor.send_all(HEAD[:5])
            await trio.sleep(9)
            await visitor.send_all(HEAD[5:])
        await visitor.send_eof()
        (gateway,) = session.streams
        assert await until_end(gateway) == HEAD * 6
        await gateway.aclose()


async def test_each_later_head_has_a_deadline_of_its_own(autojump_clock: trio.testing.MockClock) -> None:
    """Also where the next one begins in the piece that ends the one before."""
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + HEAD[:5])
        for _ in range(5):
            await trio.sleep(9)
            await visitor.send_all(HEAD[5:] + HEAD[:5])
        await visitor.send_all(HEAD[5:])
        await visitor.send_eof()
        (gateway,) = session.streams
        assert await until_end(gateway) == HEAD * 7
        await gateway.aclose()


async def test_many_requests_with_bodies_of_either_kind_arrive_byte_for_byte(engine: EngineName) -> None:
    chance, said = random.Random(7), bytearray()
    while len(said) < 3_000_000:
        body = chance.randbytes(chance.choice([0, 10, 5_000, 300_000]))
        if chance.random() < 0.5:
            said += request(body=body)
            continue
        said += request("Transfer-Encoding: chunked")
        while body:
            size = chance.choice([1, 100, 70_000])
            part, body = body[:size], body[size:]
            said += b"%X;x=y\r\n%s\r\n" % (len(part), part)
        said += b"0\r\nX-Trailer: z\r\n\r\n"
    async with relay_rig(engine) as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def say() -> None:
                await visitor.send_all(said)
                await visitor.send_eof()

            with no_hang():
                async with await tunnel.accept() as stream:
                    assert await read_all(stream) == said
