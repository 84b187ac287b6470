"""Two tenants behind one relay: what a visitor of one says never reaches the other's gateway, whatever it says."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeAlias, final

import pytest
import trio
import trio.testing
from rig import (
    KEY,
    RelayRig,
    eventually,
    in_background,
    no_hang,
    read_all,
    read_exactly,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel.identity import RelayKey
from pioneer_tunnel.proxy_protocol import ProxyHeader
from pioneer_tunnel.relay import followed_stream
from pioneer_tunnel.relay.config import TunnelEntry
from pioneer_tunnel.relay.ingress import IngressDoor, Visit
from pioneer_tunnel.relay.registry import LiveSession, LocalDirectory, LocalRegistry
from pioneer_tunnel.tunnel_stream import TunnelStream
from pioneer_tunnel.websocket import EngineName

HOME_KEY: Final = RelayKey("ptk1_the-key-of-another-tunnel-0123456")
OTHER_HOST: Final = "home.test"
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
SWITCH: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
NOBODY: Final = ProxyHeader(visitor=None, local=None, tls=False).encode()
UPGRADE: Final = ("Upgrade: websocket", "Connection: Upgrade")

MemoryStream: TypeAlias = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


@final
class Gateway:
    """Keeps what each stream said, and answers each head that it saw, or as `answer` says."""

    def __init__(self) -> None:
        self.said: list[bytearray] = []

    async def serve(self, stream: TunnelStream) -> None:
        said = bytearray()
        self.said.append(said)
        answered = 0
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                async for data in stream:
                    said += data
                    while answered < said.count(b"\r\n\r\n"):
                        answered += 1
                        await stream.send_all(ANSWER)


@asynccontextmanager
async def two_tenants() -> AsyncIterator[tuple[RelayRig, Gateway, Gateway]]:
    """A relay, the gateway of `office.test`, and that of `home.test`."""
    tunnels = [
        tunnel_entry(),
        {"id": "home", "url": f"http://{OTHER_HOST}", "key": str(HOME_KEY.identity().public_key)},
    ]
    office, home = Gateway(), Gateway()
    async with relay_rig(tunnels=tunnels) as rig, rig.tunnel(key=KEY) as first, rig.tunnel(key=HOME_KEY) as second:
        with no_hang():
            await first.wait_connected()
            await second.wait_connected()
        async with in_background(
            partial(trio.serve_listeners, office.serve, [first]), partial(trio.serve_listeners, home.serve, [second])
        ):
            yield rig, office, home


async def said_to(rig: RelayRig, data: bytes, way: str) -> bytes:
    """Everything that a visitor is told who says `data`."""
    pieces = [data[at : at + 1] for at in range(len(data))] if way == "byte by byte" else [data]
    async with await rig.visit() as visitor, trio.open_nursery() as nursery:
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        @nursery.start_soon
        async def say() -> None:
            with contextlib.suppress(trio.BrokenResourceError):  # it was told enough
                for piece in pieces:
                    await visitor.send_all(piece)
                await visitor.send_eof()

        with no_hang():
            told = await read_all(visitor)
        nursery.cancel_scope.cancel()
    return told


def statuses(told: bytes) -> list[int]:
    return [int(part[:3]) for part in told.split(b"HTTP/1.1 ")[1:]]


HEAD: Final = request()
ATTACKS: Final[dict[str, tuple[bytes, int]]] = {
    "two Hosts": (request(f"Host: {OTHER_HOST}"), 400),
    "two Hosts, the other one first": (request("Host: office.test", host=OTHER_HOST), 400),
    "a folded header": (b"GET / HTTP/1.1\r\nHost: office.test\r\n home.test\r\n\r\n", 400),
    "a folded Host": (b"GET / HTTP/1.1\r\nX: y\r\n Host: home.test\r\n\r\n", 400),
    "an absolute target": (HEAD.replace(b"GET /", b"GET http://home.test/"), 400),
    "an absolute target, the Host the other's": (
        request(host=OTHER_HOST).replace(b"GET /", b"GET http://office.test/"),
        400,
    ),
    "user information in the target": (HEAD.replace(b"GET /", b"GET http://office.test@home.test/"), 400),
    "a target that does not end in the host": (HEAD.replace(b"GET /", b"GET http://office.test\\@home.test/"), 400),
    "CONNECT": (HEAD.replace(b"GET /", b"CONNECT home.test:80"), 400),
    "a bare LF": (b"GET / HTTP/1.1\nHost: home.test\n\n", 400),
    "a Host after a bare LF": (b"GET / HTTP/1.1\r\nX: y\nHost: home.test\r\n\r\n", 400),
    "a Host after a bare CR": (b"GET / HTTP/1.1\r\nX: y\rHost: home.test\r\n\r\n", 400),
    "a NUL in the Host": (b"GET / HTTP/1.1\r\nHost: office.test\0.home.test\r\n\r\n", 400),
    "white space before a colon": (b"GET / HTTP/1.1\r\nHost : home.test\r\n\r\n", 400),
    "two hosts in one": (request(host="office.test, home.test"), 400),
    "user information": (request(host="office.test@home.test"), 400),
    "two framings": (request("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
    "two lengths": (request("Content-Length: 5", "Content-Length: 50"), 400),
    "a signed length": (request("Content-Length: +5"), 400),
    "a coding that is not last": (request("Transfer-Encoding: chunked, identity"), 400),
    "a hidden coding": (request("Transfer-Encoding: \x0bchunked"), 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "64 KiB of head": (b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 66, 431),
    "a long line": (b"GET / HTTP/1.1\r\nX: " + b"x" * 17_000, 431),
    "200 headers": (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200, 431),
}
LATER: Final[dict[str, tuple[bytes, int]]] = {
    "another tenant's": (request(host=OTHER_HOST), 421),
    "nobody's": (request(host="nobody.test"), 421),
    "another tenant's, with Upgrade": (request(*UPGRADE, host=OTHER_HOST), 421),
    "a head that does not end": (b"GET / HTTP/1.1\r\nHost: home.te", 400),
    "TLS, which as the first is answered in TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
    "a WebSocket frame": (b"\x81\x85\x00\x00\x00\x00hello", 400),
}


@pytest.mark.parametrize("way", ["whole", "byte by byte", "with a tail"])
async def test_each_attack_is_answered_and_reaches_nobody(way: str) -> None:
    """The same heads, as the first request of a connection and as the second."""
    async with two_tenants() as (rig, office, home):
        tail = request(host=OTHER_HOST) if way == "with a tail" else b""
        for name, (attack, status) in ATTACKS.items():
            # Of the very long ones, most in one piece: single bytes take single system calls.
            attack_way = "whole" if len(attack) > 1000 else way
            told = await said_to(rig, attack + tail, attack_way)
            assert (statuses(told), office.said, home.said) == ([status], [], []), name
        for name, (attack, status) in (ATTACKS | LATER).items():
            attack_way = "whole" if len(attack) > 1000 else way
            if name == "a head that does not end":
                told = await said_to(rig, HEAD + attack, way)
            else:
                told = await said_to(rig, HEAD + attack + tail, attack_way)
            assert statuses(told) == [200, status], name
            assert told.startswith(ANSWER + b"HTTP/1.1 %d" % status), name
            assert [bytes(said) for said in office.said] == [HEAD], name
            assert home.said == [], name
            office.said.clear()


@pytest.mark.parametrize("first", [b"GET", b"HEAD"])
@pytest.mark.parametrize("wrong", ["/ HTTP/1.1\r\n\r\n", "/ HTTP/1.1\r\nHost: office.te", "/x"])
async def test_a_later_head_request_that_is_refused_gets_no_body(first: bytes, wrong: str) -> None:
    async with two_tenants() as (rig, _, _):
        told = await said_to(rig, HEAD.replace(b"GET", first) + b"HEAD " + wrong.encode(), "whole")
    _, _, refused = told.rpartition(b"HTTP/1.1 400 ")
    assert b"\r\nContent-Length: " in refused
    assert refused.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "body",
    [
        b"5 \r\n",
        b"5;\r\n",
        b"5\n",
        b"+5\r\n",
        b"3\r\nabcd\r\n",
        b"0\r\nHost: home.test\r\n\r\n",
        b"0\r\n folded\r\n\r\n",
    ],
)
async def test_a_body_with_malformed_chunks_is_answered_after_what_the_gateway_says(body: bytes) -> None:
    head = request("Transfer-Encoding: chunked")
    async with two_tenants() as (rig, office, home):
        told = await said_to(rig, head + b"2\r\nok\r\n" + body + request(host=OTHER_HOST), "whole")
        assert statuses(told) == [200, 400]
        ((said),) = office.said
        assert (head + b"2\r\nok\r\n" + body).startswith(bytes(said))
        assert home.said == []


async def test_what_is_smuggled_in_a_body_is_a_body() -> None:
    async with two_tenants() as (rig, office, home):
        smuggled = request(body=request(host=OTHER_HOST))
        assert set(statuses(await said_to(rig, smuggled + HEAD, "whole"))) == {200}
        assert [bytes(said) for said in office.said] == [smuggled + HEAD]
        assert home.said == []


async def test_a_kept_connection_waits_between_requests_and_goes_on() -> None:
    async with two_tenants() as (rig, office, _), await rig.visit() as visitor:
        for number in range(3):
            await visitor.send_all(request(f"X-Number: {number}"))
            assert await read_exactly(visitor, len(ANSWER)) == ANSWER
            await trio.sleep(0.01)
        assert len(office.said) == 1


# The order of answers


@final
class FakeSession(LiveSession):
    """A gateway whose streams the test holds the other ends of."""

    instance = "by hand"
    key_id = "its only key"
    since = 0.0

    def __init__(self) -> None:
        self.gone = False
        self.streams: list[MemoryStream] = []

    async def open_stream(self) -> trio.abc.HalfCloseableStream:
        if self.gone:
            raise trio.BrokenResourceError
        ours, theirs = trio.testing.memory_stream_pair()
        self.streams.append(theirs)
        return ours

    async def answers(self, within: float) -> bool:
        raise AssertionError

    def replace(self, by: str) -> None:
        raise AssertionError

    def retire(self, by: str) -> None:
        raise AssertionError

    def abandon(self) -> None:
        raise AssertionError


@asynccontextmanager
async def by_hand() -> AsyncIterator[tuple[trio.abc.HalfCloseableStream, FakeSession]]:
    """A visitor who has connected, and a gateway for it, on streams in memory."""
    session, directory = FakeSession(), LocalDirectory()
    await directory.enter("office", session)
    door = IngressDoor(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        yield visitor, session


async def until_end(stream: trio.abc.ReceiveStream) -> bytes:
    """What comes up to the end, without the PROXY header."""
    said = await read_all(stream)
    assert said.startswith(NOBODY)
    return said[len(NOBODY) :]


async def test_a_refusal_waits_for_the_answers_before_it(autojump_clock: trio.testing.MockClock) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + request(host=OTHER_HOST))
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        assert await until_end(gateway) == HEAD, "and then an end: no more requests"
        await gateway.send_all(ANSWER[:10])
        await trio.sleep(followed_stream.LAST_ANSWERS_TIMEOUT - 1)
        await gateway.send_all(ANSWER[10:])
        assert await read_exactly(visitor, len(ANSWER)) == ANSWER
        await gateway.aclose()
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 421 ")


POSTED: Final = b"POST / HTTP/1.1\r\nHost: office.test\r\nContent-Length: 4\r\n\r\n"


@pytest.mark.parametrize("refused", [request(host=OTHER_HOST), b"GET /no-host HTTP/1.1\r\n\r\n"], ids=["421", "400"])
@pytest.mark.parametrize(("first", "rest"), [(HEAD, b""), (POSTED, b"body")], ids=["a request", "an early answer"])
async def test_a_gateway_does_not_answer_in_the_name_of_another_tenant(
    first: bytes, rest: bytes, refused: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """Found by an attack: behind a proxy that keeps connections, the end of requests told the gateway when."""
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
        assert told.startswith((b"HTTP/1.1 421 ", b"HTTP/1.1 400 "))
        assert b"phish" not in told


async def test_a_gateway_that_does_not_end_is_not_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """And the visitor is told nothing that could be taken for the rest of an answer."""
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + request(host=OTHER_HOST))
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        await gateway.send_all(ANSWER[:10])
        started = trio.current_time()
        told = await read_all(visitor)
        assert trio.current_time() - started == pytest.approx(followed_stream.LAST_ANSWERS_TIMEOUT, abs=0.1)
        assert told == ANSWER[:10]


async def test_a_gateway_that_breaks_off_meanwhile_resets_the_visitor() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(HEAD + request(host=OTHER_HOST))
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
        await trio.sleep(3600)  # between requests there is no hurry
        started = trio.current_time()

        async def trickle() -> None:
            for byte in HEAD[:15]:
                await visitor.send_all(bytes([byte]))
                await trio.sleep(0.9)

        async with in_background(trickle):
            assert await until_end(gateway) == HEAD
        assert trio.current_time() - started == pytest.approx(10)
        await gateway.aclose()
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 408 ")


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
    session, directory = FakeSession(), LocalDirectory()
    await directory.enter("office", session)
    door = IngressDoor(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    visitor, stream = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(door.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(request(*UPGRADE))
        with trio.move_on_after(60) as patience:
            await visitor.send_all(bytes(64 * 1024))
        assert patience.cancelled_caught
        nursery.cancel_scope.cancel()


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


async def test_an_upgrade_on_a_kept_connection_gets_a_stream_of_its_own() -> None:
    """Proxies in front do that. An earlier answer that holds what looks like a 101 switches nothing."""
    asked = request(*UPGRADE)
    async with relay_rig() as rig, rig.tunnel() as tunnel, await rig.visit() as visitor:
        await tunnel.wait_connected()
        await visitor.send_all(HEAD + asked + b"held")
        with no_hang():
            first = await tunnel.accept()
            assert await read_all(first) == HEAD
            await first.send_all(SWITCH)
            await first.aclose()
            second = await tunnel.accept()
            assert second.visitor == first.visitor
            assert await read_exactly(second, len(asked)) == asked
            assert await read_exactly(visitor, len(SWITCH)) == SWITCH
            with trio.move_on_after(0.05):
                raise AssertionError(f"held bytes came before the answer: {await second.receive_some()!r}")
            await second.send_all(SWITCH)
            assert await read_exactly(second, 4) == b"held"
            await visitor.send_all(b"more")
            await visitor.send_eof()
            assert await read_all(second) == b"more"
            await second.aclose()
            assert await read_all(visitor) == SWITCH


async def test_a_gateway_that_is_gone_when_an_upgrade_wants_a_stream_is_503(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with by_hand() as (visitor, session):
        await visitor.send_all(HEAD + request(*UPGRADE))
        await eventually(lambda: bool(session.streams))
        (gateway,) = session.streams
        assert await until_end(gateway) == HEAD
        session.gone = True
        await gateway.send_all(ANSWER)
        await gateway.aclose()
        assert statuses(await read_all(visitor)) == [200, 503]
