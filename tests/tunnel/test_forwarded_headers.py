"""`forward` with `forwarded_headers` or `host_header`: over a relay, with real sockets."""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from rig import (
    HOST,
    RelayRig,
    carried,
    connect,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    read_until,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.tls.certificate import Certificate
from pioneer_tunnel.transports.services import Services
from pioneer_tunnel.tunnel.accepting import accept_visitors
from pioneer_tunnel.tunnel.forward import forward
from pioneer_tunnel.tunnel.visitor_tls import with_certificate

FORGED: Final = ("X-Forwarded-For: 127.0.0.1", "x_forwarded_proto: https", "Connection: X-Forwarded-For")
HEAD_END: Final = b"\r\n\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
WEBSOCKET: Final = ("Upgrade: websocket", "Connection: Upgrade")
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


def expected(*lines: str, host: str = HOST) -> bytes:
    return request(
        *lines,
        "X-Forwarded-For: 127.0.0.1",
        "X-Real-IP: 127.0.0.1",
        "X-Forwarded-Proto: http",
        f"X-Forwarded-Host: {host}",
        f"Forwarded: for=127.0.0.1;host={host};proto=http",
        host=host,
    )


@asynccontextmanager
async def forwarding(
    bound: bool = True, **options: Any
) -> AsyncIterator[tuple[RelayRig, trio.SocketStream, trio.SocketListener]]:
    """A visitor of a tunnel that forwards to a listener. If it is not `bound`, the relay follows its requests, too."""
    entry = tunnel_entry(**({"bind_addr": "127.0.0.1:0"} if bound else {}))
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    local = Address("127.0.0.1", listener.socket.getsockname()[1])
    options = options or {"forwarded_headers": "set"}
    with no_hang():
        async with listener, relay_rig(tunnels=[entry]) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
            await tunnel.wait_connected()
            handler = functools.partial(forward, local=local, **options)
            nursery.start_soon(accept_visitors, tunnel, handler, nursery)
            async with await connect(rig.addresses.tunnels["office"]) if bound else await rig.visit() as visitor:
                yield rig, visitor, listener
            nursery.cancel_scope.cancel()


async def test_the_first_and_later_requests_are_changed() -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(request(*FORGED))
        async with await listener.accept() as server:
            for _ in range(3):
                assert await read_until(server, HEAD_END) == expected()
                await server.send_all(OK)
                assert await read_exactly(visitor, len(OK)) == OK
                await visitor.send_all(request(*FORGED))


async def test_the_host_is_changed_on_request() -> None:
    async with forwarding(host_header="localhost:3000") as (_, visitor, listener):
        await visitor.send_all(request(FORGED[0]))
        async with await listener.accept() as server:
            assert await read_until(server, HEAD_END) == request(FORGED[0], host="localhost:3000")


async def test_large_bodies_and_half_closes_pass_both_ways() -> None:
    body = bytes(range(256)) * 20_000
    async with forwarding() as (_, visitor, listener):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                await visitor.send_all(request(*FORGED, body=body))
                await visitor.send_eof()

            server = await listener.accept()
            head = await read_until(server, HEAD_END)
            assert head == expected(f"Content-Length: {len(body)}")
            assert await read_exactly(server, len(body)) == body
            assert await server.receive_some(1) == b""
        answer = b"HTTP/1.1 200 OK\r\n\r\n" + body
        assert await carried(server, visitor, answer) == answer
        await server.aclose()


async def test_small_chunks_and_many_requests_pass() -> None:
    """More work than is done at once."""
    body = b"1\r\na\r\n" * 5000 + b"0\r\n\r\n"
    async with forwarding() as (_, visitor, listener), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def send() -> None:
            await visitor.send_all(request("Transfer-Encoding: chunked") + body + request() * 200)

        async with await listener.accept() as server:
            wanted = expected("Transfer-Encoding: chunked") + body + expected() * 200
            assert await read_exactly(server, len(wanted)) == wanted
            await server.send_all(OK * 201)
            assert await read_exactly(visitor, len(OK) * 201) == OK * 201


@pytest.mark.parametrize("bound", [True, False])
async def test_a_websocket_opens_and_its_bytes_pass_unchanged(bound: bool) -> None:
    forged = request(*FORGED)
    async with forwarding(bound) as (_, visitor, listener):
        await visitor.send_all(request(*WEBSOCKET, *FORGED[:2]) + forged)
        async with await listener.accept() as server:
            assert await read_until(server, HEAD_END) == expected(*WEBSOCKET)
            await server.send_all(SWITCHING + b"from the server")
            assert await read_exactly(visitor, len(SWITCHING) + 15) == SWITCHING + b"from the server"
            assert await read_exactly(server, len(forged)) == forged
            assert await carried(visitor, server, bytes(3_000_000)) == bytes(3_000_000)
            assert await carried(server, visitor, bytes(3_000_000)) == bytes(3_000_000)


async def test_a_server_that_refuses_the_websocket_gets_changed_requests() -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(request(*WEBSOCKET) + request(*FORGED))
        async with await listener.accept() as server:
            assert await read_until(server, HEAD_END) == expected(*WEBSOCKET)
            await server.send_all(OK)
            assert await read_until(server, HEAD_END) == expected()


@pytest.mark.parametrize("malformed", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"GET /\r\n"])
async def test_what_cannot_be_followed_is_answered_here(malformed: bytes) -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(malformed)
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 400 Bad Request\r\n")
        async with await listener.accept() as server:
            assert await read_all(server) == b""


async def test_the_answer_waits_for_the_responses_before_it() -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(request() + b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        async with await listener.accept() as server:
            assert await read_until(server, HEAD_END) == expected()
            await server.send_all(OK[:20])
            assert await read_exactly(visitor, 20) == OK[:20]
            await server.send_all(OK[20:])
            answer = await read_all(visitor)
            assert answer.startswith(OK[20:] + b"HTTP/1.1 400 Bad Request\r\n")
            assert await read_all(server) == b""


async def test_no_answer_is_written_into_a_response_that_ends_with_its_stream() -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(request())
        async with await listener.accept() as server:
            await read_until(server, HEAD_END)
            await server.send_all(b"HTTP/1.1 200 OK\r\n\r\npart")
            await read_until(visitor, b"part")
            await visitor.send_all(b"malformed\r\n\r\n")
            await server.send_all(b" and rest")
            await server.send_eof()
            assert await read_all(visitor) == b" and rest"


async def test_what_a_server_says_unasked_passes() -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(b"\r\n")
        async with await listener.accept() as server:
            await server.send_all(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
            await server.send_eof()
            assert await read_all(visitor) == b"HTTP/1.1 408 Request Timeout\r\n\r\n"


async def test_a_101_before_it_is_asked_for_opens_nothing() -> None:
    async with forwarding() as (_, visitor, listener), await listener.accept() as server:
        await server.send_all(SWITCHING)
        await read_exactly(visitor, len(SWITCHING))
        await visitor.send_all(request(*WEBSOCKET) + request(*FORGED))
        assert await read_all(server) == b""


@pytest.mark.parametrize("visitor_resets", [True, False])
@pytest.mark.parametrize("lines", [(), WEBSOCKET])
async def test_a_reset_on_either_side_is_a_reset_on_the_other(visitor_resets: bool, lines: tuple[str, ...]) -> None:
    async with forwarding() as (_, visitor, listener):
        await visitor.send_all(request(*lines) + b"GET")
        server = await listener.accept()
        assert await read_until(server, HEAD_END) == expected(*lines)
        one, other = (visitor, server) if visitor_resets else (server, visitor)
        await abandon(one)
        with pytest.raises(trio.BrokenResourceError):
            await read_all(other)
        await server.aclose()


async def test_a_visitor_that_ends_within_a_head_is_answered() -> None:
    async with forwarding() as (_, visitor, listener):
        answer = await carried(visitor, visitor, b"GET / HTTP/1.1\r\nHost")
        assert answer.startswith(b"HTTP/1.1 400 ")
        async with await listener.accept() as server:
            assert await read_all(server) == b""


async def test_a_server_that_ends_while_an_upgrade_waits_ends_the_visitor() -> None:
    with nothing_left_behind():
        async with forwarding() as (_, visitor, listener):
            await visitor.send_all(request(*WEBSOCKET) + request())
            async with await listener.accept() as server:
                assert await read_until(server, HEAD_END) == expected(*WEBSOCKET)
                await server.send_eof()
                assert await read_all(visitor) == b""
                assert await read_all(server) == b""


@pytest.mark.parametrize("raw", [(), ("ssh",)])
async def test_a_service_that_is_not_http_gets_the_bytes_unchanged(raw: tuple[str, ...]) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    local = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    services = Services({"web": local, "ssh": local})
    ways = [{"name": "web", "url": f"http://{HOST}"}, {"name": "ssh", "bind_addr": "127.0.0.1:0"}]
    entry = tunnel_entry(url=None, services=ways)
    handler = functools.partial(forward, local=services, forwarded_headers="set", raw_services=raw)
    async with (
        listener,
        relay_rig(tunnels=[entry]) as rig,
        rig.tunnel(services=services) as tunnel,
        trio.open_nursery() as nursery,
    ):
        with no_hang():
            await tunnel.wait_connected()
            nursery.start_soon(accept_visitors, tunnel, handler, nursery)
            async with await rig.visit() as visitor:
                await visitor.send_all(request())
                async with await listener.accept() as server:
                    assert await read_until(server, HEAD_END) == expected()
            async with await connect(rig.addresses.tunnels["office"]) as visitor:
                await visitor.send_all(b"\0SSH\r\n")
                async with await listener.accept() as server:
                    assert await server.receive_some() == (b"\0SSH\r\n" if raw else b"")
        nursery.cancel_scope.cancel()


async def test_where_this_library_ends_tls_the_scheme_is_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "office.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    local = f"127.0.0.1:{listener.socket.getsockname()[1]}"
    handler = with_certificate(
        functools.partial(forward, local=local, forwarded_headers="set"),
        Certificate(tmp_path / "office.pem", tmp_path / "office.pem"),
    )
    async with (
        listener,
        relay_rig(tunnels=[tunnel_entry(url=f"https://{HOST}", tls="passthrough")]) as rig,
        rig.tunnel() as tunnel,
        trio.open_nursery() as nursery,
    ):
        with no_hang():
            await tunnel.wait_connected()
            nursery.start_soon(accept_visitors, tunnel, handler, nursery)
            async with trio.SSLStream(await rig.visit(), context, server_hostname=HOST) as visitor:
                await visitor.send_all(request(*FORGED))
                async with await listener.accept() as server:
                    head = await read_until(server, HEAD_END)
                    assert b"\r\nX-Forwarded-Proto: https\r\n" in head
                    assert head.endswith(b"proto=https\r\n\r\n")
                    await server.send_all(OK)
                    assert await visitor.receive_some() == OK
        nursery.cancel_scope.cancel()


async def ended(server: trio.SocketStream) -> None:
    """Wait until the visitor has left. A server that closes before would end the connection of the proxy."""
    async with server:
        assert await read_all(server) == b""


async def test_behind_a_proxy_of_the_relay_the_server_gets_the_visitor_whom_the_proxy_names() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    local = Address("127.0.0.1", listener.socket.getsockname()[1])
    handler = functools.partial(forward, local=local, forwarded_headers="set")
    named = [f"X-Forwarded-For: 127.0.0.66, 2001:db8::{number}" for number in (1, 2)]
    async with (
        listener,
        relay_rig(trust_forwarded_from=["127.0.0.1"]) as rig,
        rig.tunnel() as tunnel,
        trio.open_nursery() as nursery,
    ):
        with no_hang():
            await tunnel.wait_connected()
            nursery.start_soon(accept_visitors, tunnel, handler, nursery)
            async with await rig.visit() as proxy:
                for number, line in enumerate(named, 1):
                    await proxy.send_all(request(line, "X-Forwarded-Proto: https"))
                    server = await listener.accept()
                    assert (await read_until(server, HEAD_END)).splitlines()[2:] == [
                        b"X-Forwarded-For: 2001:db8::%d" % number,
                        b"X-Real-IP: 2001:db8::%d" % number,
                        b"X-Forwarded-Proto: https",
                        b"X-Forwarded-Host: office.test",
                        b'Forwarded: for="[2001:db8::%d]";host=office.test;proto=https' % number,
                        b"",
                    ]
                    await server.send_all(OK)
                    assert await read_exactly(proxy, len(OK)) == OK
                    nursery.start_soon(ended, server)
        nursery.cancel_scope.cancel()
