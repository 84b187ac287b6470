"""A whole relay on loopback, as visitors see it: raw sockets as visitors and as gateways."""

from __future__ import annotations

import functools
import socket
from typing import Final

import pytest
import trio
import trio.testing
from raw_gateways import Overwhelmed, status_of
from rig import (
    HOST,
    RELAY_NAME,
    ask,
    connect,
    in_background,
    no_hang,
    read_all,
    read_exactly,
    relay_rig,
    request,
    tunnel_entry,
)
from serving_relay import answer_to, serving

from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel.relay import TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.tunnel.tunnel import Tunnel

# What a visitor is told


async def test_an_unknown_host_is_404() -> None:
    async with serving() as (rig, _):
        answer = await answer_to(rig, request(host="nobody.test"))
    assert status_of(answer) == 404
    assert b"nobody" not in answer
    assert b"Connection: close" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: office.test\r\nHost: office.test\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: two words\r\n\r\n",
        b"GET http://home.test/ HTTP/1.1\r\nHost: office.test\r\n\r\n",
        b"GET / HTTP/1.1\nHost: office.test\n\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"GET / HTTP/1.1\r\nHost: office",
    ],
)
async def test_a_request_that_leaves_a_doubt_is_400(head: bytes) -> None:
    async with serving() as (rig, _):
        assert status_of(await answer_to(rig, head)) == 400


async def test_a_head_that_is_too_large_is_431_and_the_visitor_reads_so() -> None:
    """Also when the visitor keeps sending: a reset must not destroy the answer."""
    async with serving() as (rig, _):
        many = b"GET / HTTP/1.1\r\nHost: office.test\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 600 + b"\r\n"
        async with await rig.visit() as visitor, trio.open_nursery() as nursery:
            nursery.start_soon(visitor.send_all, many)
            with no_hang():
                assert status_of(await read_all(visitor)) == 431


async def test_a_visitor_without_a_word_is_told_nothing() -> None:
    async with serving() as (rig, _):
        assert await answer_to(rig, b"") == b""


async def test_a_gateway_that_is_not_connected_is_503() -> None:
    async with relay_rig() as rig:
        assert status_of(await answer_to(rig, request())) == 503


async def test_a_gateway_that_resets_before_it_answers_is_502() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(request())
            (await tunnel.accept()).reset()
            with no_hang():
                assert status_of(await read_all(visitor)) == 502


async def test_a_gateway_that_is_lost_after_it_began_to_answer_is_a_reset() -> None:
    """A part of an answer must never look like the whole of it."""
    async with relay_rig() as rig:
        async with rig.tunnel() as tunnel:
            await tunnel.wait_connected()
            visitor = await rig.visit()
            await visitor.send_all(request())
            stream = await tunnel.accept()
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
            await read_exactly(visitor, 26)
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)
        await visitor.aclose()


async def test_a_relay_that_stops_in_the_middle_of_an_answer_resets_the_visitor() -> None:
    """The visitor used to get a FIN: when cancelled, the pump reset only one of its two streams."""
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(request())
            stream = await tunnel.accept()
            await stream.send_all(b"half of")
            await read_exactly(visitor, 7)
            await rig.stop()
            with no_hang(), pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
        await rig.start()


async def test_a_slow_head_is_408_after_ten_seconds(autojump_clock: trio.testing.MockClock) -> None:
    ingress = Ingress(LocalRegistry([]), LocalDirectory())
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        started = trio.current_time()
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        for byte in b"GET / HTTP":
            await visitor.send_all(bytes([byte]))
            await trio.sleep(0.9)
        assert status_of(await read_all(visitor)) == 408
        assert trio.current_time() - started == pytest.approx(10)


def is_without_body(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    return b"\r\nContent-Length: " in head and bool(end) and body == b""


HEAD: Final = request().replace(b"GET", b"HEAD")


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        (HEAD.replace(b"office", b"nobody"), 404),
        (b"HEAD / HTTP/1.1\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nHost: office", 400),
        (b"\r\nHEAD / HTTP/1.1\r\nX : y", 400),
        (HEAD.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * 20_000), 431),
        (HEAD, 503),
    ],
)
async def test_what_a_head_request_is_told_has_no_body(asked: bytes, status: int) -> None:
    async with relay_rig() as rig:
        answer = await answer_to(rig, asked)
    assert status_of(answer) == status
    assert is_without_body(answer)


async def test_a_gateway_that_resets_before_it_answers_a_head_request_is_a_502_without_body() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        async with await rig.visit() as visitor:
            await visitor.send_all(HEAD)
            (await tunnel.accept()).reset()
            with no_hang():
                answer = await read_all(visitor)
    assert status_of(answer) == 502
    assert is_without_body(answer)


async def test_a_head_request_to_the_gateway_endpoint_is_answered_without_body() -> None:
    async with relay_rig() as rig, await connect(rig.addresses.control) as visitor:
        answer = await ask(visitor, HEAD)
    assert status_of(answer) == 404
    assert is_without_body(answer)


async def test_a_head_request_that_is_slow_is_a_408_without_body(autojump_clock: trio.testing.MockClock) -> None:
    ingress = Ingress(LocalRegistry([]), LocalDirectory())
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(HEAD[:-1])
        answer = await read_all(visitor)
    assert status_of(answer) == 408
    assert is_without_body(answer)


async def test_a_gateway_that_takes_no_stream_is_504(autojump_clock: trio.testing.MockClock) -> None:
    directory = LocalDirectory()
    await directory.enter("office", Overwhelmed())
    ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), directory)
    visitor, stream = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        assert status_of(await ask(visitor, request())) == 504
        assert trio.current_time() == pytest.approx(10)


async def test_a_refused_visitor_that_neither_reads_nor_ends_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    ingress = Ingress(LocalRegistry([]), LocalDirectory())
    visitor, stream = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ingress.serve, Visit(stream=stream, visitor=None, local=None, tls=False))
        await visitor.send_all(request())
    assert trio.current_time() <= 12


async def test_who_wants_what_there_is_not_still_makes_way_for_others(autojump_clock: trio.testing.MockClock) -> None:
    settled: list[str] = []
    for host in ("nobody.test", HOST):
        ingress = Ingress(LocalRegistry([TunnelEntry(**tunnel_entry())]), LocalDirectory())
        visitor, stream = trio.testing.memory_stream_pair()
        settle = functools.partial(settled.append, host)
        async with trio.open_nursery() as nursery:
            visit = Visit(stream=stream, visitor=None, local=None, tls=False, settle=settle)
            nursery.start_soon(ingress.serve, visit)
            assert status_of(await ask(visitor, request(host=host))) == (404 if host == "nobody.test" else 503)
    assert settled == [HOST]


# Whom a request is for


@pytest.mark.parametrize("host", ["office.test", "OFFICE.test", "office.test.", "office.test:8080", "Office.Test.:1"])
async def test_the_host_is_compared_without_case_port_and_trailing_dot(host: str) -> None:
    async with serving() as (rig, _):
        assert await answer_to(rig, request(host=host)) == request(host=host)


@pytest.mark.parametrize("host", ["office.test.evil", "xoffice.test", "office", "127.0.0.1", RELAY_NAME])
async def test_no_other_host_will_do(host: str) -> None:
    async with serving() as (rig, _):
        assert status_of(await answer_to(rig, request(host=host))) == 404


async def test_every_byte_passes_as_it_came() -> None:
    """The head is not rewritten: odd spacing, case and order stay, and so does what follows."""
    odd = (
        b"gEt /%7Ea?b=%zz HTTP/1.1\r\nX-B:   spaces \t \r\nhOsT: \t Office.TEST:80 \r\nx-b:\r\nA: \xe9\r\n"
        b"Content-Length: 3\r\n\r\nabcPUT /second HTTP/1.1\r\nhost:office.test\r\nContent-Length: 25600\r\n\r\n"
    ) + bytes(range(256)) * 100
    async with serving() as (rig, _):
        assert await answer_to(rig, odd) == odd


async def test_a_head_in_single_bytes_is_the_same_head() -> None:
    async with serving() as (rig, _), await rig.visit() as visitor:
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request():
            await visitor.send_all(bytes([byte]))
            await trio.sleep(0)
        await visitor.send_eof()
        with no_hang():
            assert await read_all(visitor) == request()


async def test_each_host_has_its_own_tunnel() -> None:
    other = RelayKey("ptk1_the-key-of-another-tunnel-0123456")
    tunnels = [
        tunnel_entry(),
        {"id": "home", "url": "https://home.test:8443", "key": str(other.identity().public_key)},
    ]

    async def say(name: bytes, tunnel: Tunnel) -> None:
        while True:
            async with await tunnel.accept() as stream:
                await stream.send_all(name)

    async with (
        relay_rig(tunnels=tunnels) as rig,
        rig.tunnel() as office,
        rig.tunnel(key=other) as home,
        in_background(lambda: say(b"office", office), lambda: say(b"home", home)),
    ):
        await office.wait_connected()
        await home.wait_connected()
        assert home.public_url == "https://home.test:8443"
        for host in ("office", "home", "office", "home"):
            async with await rig.visit() as visitor:
                await visitor.send_all(request(host=f"{host}.test"))
                assert await read_all(visitor) == host.encode()


async def test_a_tunnel_with_an_address_of_its_own_carries_anything() -> None:
    async with serving(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as (rig, _):
        own = rig.addresses.tunnels["office"]
        for said in (b"SSH-2.0-anything\r\n", bytes(range(256)), b""):
            async with await connect(own) as visitor:
                with no_hang():
                    assert await ask(visitor, said) == said
        assert status_of(await answer_to(rig, request())) == 404, "it is not found by its host as well"


async def test_without_its_gateway_such_an_address_resets() -> None:
    async with (
        relay_rig(tunnels=[tunnel_entry(bind_addr="127.0.0.1:0")]) as rig,
        await connect(rig.addresses.tunnels["office"]) as visitor,
    ):
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await ask(visitor, b"anyone?")


async def test_a_visitor_that_resets_resets_the_stream() -> None:
    async with relay_rig() as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        visitor = await rig.visit()
        await visitor.send_all(request())
        stream = await tunnel.accept()
        await read_exactly(stream, len(request()))
        await abandon(visitor)
        with no_hang(), pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
