"""Two tenants behind one relay: no bytes of one tenant's visitor reach the other's gateway."""

from __future__ import annotations

import contextlib
import itertools
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeAlias, final

import h11
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
    until_it_raises,
)

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.adopted import adopt
from pioneer_tunnel._net.streams import ByteStream
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LiveSession, LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.limits import RelayLimits
from pioneer_tunnel.relay.visitors import followed_leg
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.websocket import EngineName

HOME_KEY: Final = RelayKey("ptk1_the-key-of-another-tunnel-0123456")
BLIND_KEY: Final = RelayKey("ptk1_the-key-of-a-blind-tunnel-0123456")
OTHER_HOST: Final = "home.test"
BLIND_HOST: Final = "blind.test"
HOME: Final = {"id": "home", "url": f"http://{OTHER_HOST}", "key": str(HOME_KEY.identity().public_key)}
BLIND: Final = {
    "id": "blind",
    "url": f"https://{BLIND_HOST}",
    "key": str(BLIND_KEY.identity().public_key),
    "tls": "passthrough",
}
ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HOMES_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhome"
SWITCH: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
NOBODY: Final = ProxyHeader(visitor=None, local=None, tls=False).encode()
UPGRADE: Final = ("Upgrade: websocket", "Connection: Upgrade")

MemoryStream: TypeAlias = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


@final
class Gateway:
    """Records the bytes of each stream, and answers each request after its head, as h11 reads it."""

    def __init__(self, answer: bytes = ANSWER) -> None:
        self.said: list[bytearray] = []
        self._answer: Final = answer

    async def serve(self, stream: TunnelStream) -> None:
        said = bytearray()
        self.said.append(said)
        requests = h11.Connection(h11.SERVER)
        with contextlib.suppress(trio.BrokenResourceError):
            async with stream:
                async for data in stream:
                    said += data
                    requests.receive_data(bytes(data))
                    while (event := requests.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                        if isinstance(event, h11.Request):
                            await stream.send_all(self._answer)
                            requests.send(h11.Response(status_code=200, headers=[("Content-Length", "0")]))
                            requests.send(h11.EndOfMessage())
                        if requests.their_state is h11.DONE:
                            requests.start_next_cycle()


@asynccontextmanager
async def two_tenants() -> AsyncIterator[tuple[RelayRig, Gateway, Gateway]]:
    """A relay, the gateway of `office.test`, and that of `home.test`."""
    office, home = Gateway(), Gateway(HOMES_ANSWER)
    async with (
        relay_rig(tunnels=[tunnel_entry(), HOME, BLIND]) as rig,
        rig.tunnel(key=KEY) as first,
        rig.tunnel(key=HOME_KEY) as second,
    ):
        with no_hang():
            await first.wait_connected()
            await second.wait_connected()
        async with in_background(
            partial(trio.serve_listeners, office.serve, [first]), partial(trio.serve_listeners, home.serve, [second])
        ):
            yield rig, office, home


async def said_to(rig: RelayRig, data: bytes, way: str) -> bytes:
    """Everything that a visitor gets that sends `data`."""
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
    "nobody's": (request(host="nobody.test"), 404),
    "nobody's, with Upgrade": (request(*UPGRADE, host="nobody.test"), 404),
    "one whose TLS the relay does not end": (request(host=BLIND_HOST), 421),
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


# One connection, several tenants


def requests_for(host: str) -> list[bytes]:
    chunked = request("Transfer-Encoding: chunked", host=host) + b"2;a\r\nok\r\n0\r\nX: y\r\n\r\n"
    return [
        request(host=host),
        request(host=host.upper() + ".:80", body=b"body"),
        chunked,
        request(*UPGRADE, host=host),
    ]


async def test_each_request_on_a_connection_gets_to_its_own_tenant() -> None:
    """As a proxy with kept connections sends them: one after the other, for any host."""
    asked = [*itertools.chain(*zip(requests_for("office.test"), requests_for(OTHER_HOST), strict=True))] * 8
    async with two_tenants() as (rig, office, home), await rig.visit() as visitor:
        with no_hang():
            for number, data in enumerate(asked):
                await visitor.send_all(data)
                answer = HOMES_ANSWER if number % 2 else ANSWER
                assert await read_exactly(visitor, len(answer)) == answer
    assert [bytes(said) for said in office.said] == asked[::2]
    assert [bytes(said) for said in home.said] == asked[1::2]


async def test_requests_that_were_sent_ahead_are_answered_in_their_order() -> None:
    async with two_tenants() as (rig, office, home):
        asked = [HEAD, HEAD, request(host=OTHER_HOST), *requests_for("office.test")[1:3], request(host=OTHER_HOST)]
        told = await said_to(rig, b"".join(asked), "whole")
    assert told == ANSWER * 2 + HOMES_ANSWER + ANSWER * 2 + HOMES_ANSWER
    assert [bytes(said) for said in office.said] == [HEAD * 2, b"".join(asked[3:5])]
    assert [bytes(said) for said in home.said] == [request(host=OTHER_HOST)] * 2


async def test_a_tenants_stream_ends_when_the_connection_goes_on_to_another() -> None:
    """With EOF, not a reset: the handler sees a visitor that has left."""
    async with (
        relay_rig(tunnels=[tunnel_entry(), HOME]) as rig,
        rig.tunnel() as office,
        rig.tunnel(key=HOME_KEY) as home,
    ):
        await office.wait_connected()
        await home.wait_connected()
        async with await rig.visit() as visitor:
            with no_hang():
                await visitor.send_all(HEAD)
                first = await office.accept()
                assert await read_exactly(first, len(HEAD)) == HEAD
                await first.send_all(ANSWER)
                await visitor.send_all(request(host=OTHER_HOST))
                second = await home.accept()
                assert second.visitor == first.visitor
                assert await first.receive_some() == b""
                await first.aclose()
                await second.send_all(HOMES_ANSWER)
                told = ANSWER + HOMES_ANSWER
                assert await read_exactly(visitor, len(told)) == told
                await visitor.send_eof()
                assert await read_all(second) == request(host=OTHER_HOST)
                await second.aclose()
                assert await read_all(visitor) == b""


@pytest.mark.parametrize("together", [True, False])
async def test_what_a_gateway_says_unasked_answers_nobody(together: bool) -> None:
    """Behind a proxy that keeps connections, it would look like the response to another host's request."""
    phish = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nphish"
    async with relay_rig(tunnels=[tunnel_entry(), HOME]) as rig, rig.tunnel() as office, await rig.visit() as visitor:
        await office.wait_connected()
        await visitor.send_all(HEAD)
        with no_hang():
            gateway = await office.accept()
            await read_exactly(gateway, len(HEAD))
            if together:
                await gateway.send_all(ANSWER + phish)
                assert await read_exactly(visitor, len(ANSWER)) == ANSWER
            else:
                await gateway.send_all(ANSWER)
                assert await read_exactly(visitor, len(ANSWER)) == ANSWER
                await gateway.send_all(phish)
            with pytest.raises(trio.BrokenResourceError):
                assert await read_all(visitor) == b"something"
            with pytest.raises(trio.BrokenResourceError):
                await until_it_raises(lambda: gateway.send_all(b"more"))


async def test_a_gateway_that_speaks_as_the_connection_goes_on_reaches_nobody() -> None:
    """The next request has come already, and waits for the response before it."""
    phish = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nphish"
    home = Gateway(HOMES_ANSWER)
    async with (
        relay_rig(tunnels=[tunnel_entry(), HOME]) as rig,
        rig.tunnel() as office,
        rig.tunnel(key=HOME_KEY) as other,
        in_background(partial(trio.serve_listeners, home.serve, [other])),
    ):
        await office.wait_connected()
        await other.wait_connected()
        for size in (len(phish), 1):
            async with await rig.visit() as visitor:
                await visitor.send_all(HEAD + request(host=OTHER_HOST))
                with no_hang():
                    gateway = await office.accept()
                    await read_exactly(gateway, len(HEAD))
                    await gateway.send_all(ANSWER + phish[:size])
                    told = bytearray()
                    with contextlib.suppress(trio.BrokenResourceError):
                        while data := await visitor.receive_some():
                            told += data
                            await visitor.send_eof()
                    gateway.reset()
                assert (ANSWER + HOMES_ANSWER).startswith(told)


AMBIGUOUS: Final = {
    "both framings": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nContent-Length: 40\r\n\r\n",
    "an interim response with a length": b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n",
    "a 101 that was not asked for": SWITCH,
    "a 204 with a length": b"HTTP/1.1 204 No Content\r\nContent-Length: 40\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n",
    "no response": b"hello",
}


@pytest.mark.parametrize("response", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
async def test_after_a_response_of_uncertain_end_no_other_request_is_served(
    response: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    """It passes unchanged up to the gateway's EOF, which ends the connection."""
    rest = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    for asked in (HEAD, request(host=OTHER_HOST), request(*UPGRADE), b"nonsense\r\n"):
        async with by_hand() as (visitor, session):
            await visitor.send_all(HEAD)
            await eventually(lambda: bool(session.streams))
            (gateway,) = session.streams
            await gateway.send_all(response)
            assert await read_exactly(visitor, len(response)) == response
            await visitor.send_all(asked)
            await trio.sleep(followed_leg.LAST_ANSWERS_TIMEOUT - 1)
            await gateway.send_all(rest)
            await trio.sleep(followed_leg.LAST_ANSWERS_TIMEOUT - 1)
            await gateway.send_eof()
            assert await read_all(visitor) == rest
            assert await until_end(gateway) == HEAD
            assert len(session.streams) == 1


# The order of answers

POSTED: Final = b"POST / HTTP/1.1\r\nHost: office.test\r\nContent-Length: 4\r\n\r\n"
REFUSED: Final = b"GET /no-host HTTP/1.1\r\n\r\n"


@final
class FakeSession(LiveSession):
    """A session whose streams end in the test."""

    id = ""
    instance = "by hand"
    key_id = "its only key"
    since = 0.0

    def __init__(self, ingress: Ingress) -> None:
        self.ingress: Final = ingress
        self.gone = False
        self.streams: list[MemoryStream] = []

    async def open_stream(self) -> ByteStream:
        if self.gone:
            raise trio.BrokenResourceError
        ours, theirs = trio.testing.memory_stream_pair()
        self.streams.append(theirs)
        return adopt(ours)

    async def answers(self, within: float) -> bool:
        raise AssertionError

    def replace(self, by: str) -> None:
        raise AssertionError

    def retire(self, by: str) -> None:
        raise AssertionError

    def abandon(self) -> None:
        raise AssertionError


def visit_of(stream: trio.abc.Stream) -> Visit:
    return Visit(stream=stream, visitor=None, local=None, tls=False)


@asynccontextmanager
async def by_hand(**limits: Any) -> AsyncIterator[tuple[trio.abc.HalfCloseableStream, FakeSession]]:
    """A visitor who has connected, and a gateway for it, on streams in memory."""
    directory = LocalDirectory()
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory, limits=RelayLimits(**limits))
    session = FakeSession(ingress)
    await directory.enter("office", session)
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, visit_of(stream))
        yield visitor, session


async def until_end(stream: trio.abc.ReceiveStream) -> bytes:
    """All bytes up to EOF, without the PROXY header."""
    said = await read_all(stream)
    assert said.startswith(NOBODY)
    return said[len(NOBODY) :]


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
