"""Two tenants behind one relay: no bytes of one tenant's visitor reach the other's gateway."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, final

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
from visits import ANSWER, HEAD, OTHER_HOST, SWITCH, UPGRADE, by_hand, statuses, until_end

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel.relay.visitors import followed_leg
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

HOME_KEY: Final = RelayKey("ptk1_the-key-of-another-tunnel-0123456")
BLIND_KEY: Final = RelayKey("ptk1_the-key-of-a-blind-tunnel-0123456")
BLIND_HOST: Final = "blind.test"
HOME: Final = {"id": "home", "url": f"http://{OTHER_HOST}", "key": str(HOME_KEY.identity().public_key)}

BLIND: Final = {
    "id": "blind",
    "url": f"https://{BLIND_HOST}",
    "key": str(BLIND_KEY.identity().public_key),
    "tls": "passthrough",
}
HOMES_ANSWER: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhome"


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
