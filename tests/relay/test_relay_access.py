"""Access rules at a relay: nothing of a request reaches the gateway before it is let through."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from access_rig import OPEN, TOKEN, basic, htpasswd_file, tokens_file
from rig import (
    HOST,
    RelayRig,
    connect,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    read_until,
    relay_rig,
    request,
    tunnel_entry,
)

from pioneer_tunnel import InvalidSettingsError, StorageError
from pioneer_tunnel._net.tls.client_hello import Alert
from pioneer_tunnel.access.attempts import MOST_ATTEMPTS
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.transports.tunnel_stream import TunnelStream

HEAD_END = b"\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
WEBSOCKET = ("Upgrade: websocket", "Connection: Upgrade")


def at(path: str, *lines: str, method: str = "GET") -> bytes:
    return request(*lines).replace(b"GET / ", f"{method} {path} ".encode(), 1)


@asynccontextmanager
async def guarded(access: dict[str, Any], **changes: Any) -> AsyncIterator[tuple[RelayRig, bytearray]]:
    """A relay whose tunnel has access rules, and all bytes that its gateway gets. The gateway answers each head."""
    got = bytearray()

    async def answer(stream: TunnelStream) -> None:
        async with stream:
            async for data in stream:
                got.extend(data)
                await stream.send_all((SWITCHING if b"websocket" in data else OK) * data.count(HEAD_END))

    entry = tunnel_entry(access=access, **changes.pop("entry", {}))
    with no_hang(), nothing_left_behind():
        async with relay_rig(tunnels=[entry], **changes) as rig, rig.tunnel() as tunnel:
            await tunnel.wait_connected()
            async with in_background(lambda: trio.serve_listeners(answer, [tunnel])):
                yield rig, got


async def status(rig: RelayRig, sent: bytes) -> int:
    """The status of the answer, after which the connection is closed unless it is 200."""
    async with await rig.visit() as visitor:
        await visitor.send_all(sent)
        answer = await read_until(visitor, HEAD_END)
        return int(answer.split(b" ")[1])


async def test_without_a_password_nothing_reaches_the_gateway(tmp_path: Path) -> None:
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path)), "open_paths": [OPEN]}) as (rig, got):
        for lines in (
            [],
            [basic("wrong")],
            [basic("right", "bob")],
            WEBSOCKET,
            ["Expect: 100-continue", "Content-Length: 5"],
        ):
            assert await status(rig, request(*lines)) == 401
        assert await status(rig, request(basic(), basic())) == 400
        assert await status(rig, request(basic(), "authorization: x")) == 400
        assert await status(rig, request("Authorization: Basic", " YTpi")) == 400
        for target in ("/healthz/..", "//healthz", "/%68ealthz", "/healthz;/../x", f"http://{HOST}/healthz"):
            assert await status(rig, at(target)) == 401
        assert await status(rig, at(OPEN, "X-Original-URL: /admin")) == 401
        assert await status(rig, at(OPEN, "Upgrade: h2c", "Connection: Upgrade", "HTTP2-Settings: x")) == 401
        assert await status(rig, at(OPEN, method="POST")) == 401
        assert not got
        assert await status(rig, at(OPEN + "?a=b")) == 200
        assert await status(rig, request(basic())) == 200
        assert got == at(OPEN + "?a=b") + request()


async def test_each_request_of_a_connection_is_checked(tmp_path: Path) -> None:
    async with (
        guarded({"basic_auth": str(htpasswd_file(tmp_path)), "open_paths": [OPEN]}) as (rig, got),
        await rig.visit() as visitor,
    ):
        for sent in (at(OPEN), request(basic(), "X-A: b"), at(OPEN), request(basic())):
            await visitor.send_all(sent)
            assert await read_exactly(visitor, len(OK)) == OK
        assert got == at(OPEN) + request("X-A: b") + at(OPEN) + request()
        await visitor.send_all(request())
        assert b" 401 " in await read_all(visitor)
        assert got == at(OPEN) + request("X-A: b") + at(OPEN) + request()


@pytest.mark.parametrize("pieces", [1, 7, 10_000])
async def test_pipelined_requests_are_answered_in_order_and_checked(tmp_path: Path, pieces: int) -> None:
    """The second hides in what a lax reader could take for the body of the first."""
    sent = request(basic(), "Content-Length: 3") + b"abc" + request(basic(), "Connection: authorization") + request()
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path))}) as (rig, got), await rig.visit() as visitor:
        await visitor.send_all(request(basic()))
        assert await read_exactly(visitor, len(OK)) == OK
        got.clear()
        for start in range(0, len(sent), pieces):
            await visitor.send_all(sent[start : start + pieces])
        answers = await read_all(visitor)
        assert answers.startswith(OK * 2 + b"HTTP/1.1 401 ")
        assert got == request("Content-Length: 3") + b"abc" + request("Connection: authorization")


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 3", "Transfer-Encoding: chunked"),
        ("Content-Length: 3", "Content-Length: 40"),
        ("Transfer-Encoding: xchunked",),
        ("Transfer-Encoding : chunked",),
    ],
)
async def test_a_hidden_request_behind_an_allowed_one_is_not_let_through(
    tmp_path: Path, lines: tuple[str, ...]
) -> None:
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path)), "open_paths": [OPEN]}) as (rig, got):
        async with await rig.visit() as visitor:
            await visitor.send_all(at(OPEN) + at(OPEN, *lines) + b"0\r\n\r\n" + at("/admin"))
            answer = await read_all(visitor)
        assert answer.startswith(OK + b"HTTP/1.1 400 ")
        assert got == at(OPEN)


async def test_a_trailer_is_no_second_authorization(tmp_path: Path) -> None:
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path))}) as (rig, got), await rig.visit() as visitor:
        head = request(basic(), "Transfer-Encoding: chunked")
        await visitor.send_all(head + b"0\r\nAuthorization: Basic YTpi\r\n\r\n")
        await read_all(visitor)
        assert b"uthorization" not in got


async def test_a_websocket_needs_the_password_once(tmp_path: Path) -> None:
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path))}) as (rig, got), await rig.visit() as visitor:
        await visitor.send_all(request(basic(), *WEBSOCKET))
        assert await read_exactly(visitor, len(SWITCHING)) == SWITCHING
        await visitor.send_all(b"frames")
        await visitor.send_eof()
        assert await read_all(visitor) == b""
        assert got == request(*WEBSOCKET) + b"frames"


async def test_tokens_and_preflights(tmp_path: Path) -> None:
    preflight = at("/x", "Origin: https://a.test", "Access-Control-Request-Method: PUT", method="OPTIONS")
    access = {"bearer_tokens": str(tokens_file(tmp_path))}
    async with guarded(access) as (rig, got):
        assert await status(rig, preflight) == 401
        assert not got
        assert await status(rig, request(f"Authorization: Bearer {TOKEN}")) == 200
    async with guarded(access | {"preflights": "pass"}) as (rig, got):
        assert await status(rig, preflight) == 200
        assert await status(rig, preflight.replace(b"OPTIONS", b"DELETE")) == 401
        assert got == preflight


async def test_an_answer_to_head_has_no_body(tmp_path: Path) -> None:
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path))}) as (rig, _), await rig.visit() as visitor:
        await visitor.send_all(at("/", method="HEAD"))
        answer = await read_all(visitor)
        assert answer.endswith(HEAD_END)
        assert b'WWW-Authenticate: Basic realm="restricted"' in answer


async def test_attempts_are_limited_for_addresses_that_are_not_exempt(tmp_path: Path) -> None:
    limits = {"connects_per_second_per_address": 0, "exempt": ["192.0.2.1"]}
    async with guarded({"basic_auth": str(htpasswd_file(tmp_path))}, limits=limits) as (rig, got):
        for number in range(MOST_ATTEMPTS):
            assert await status(rig, request(basic(str(number)))) == 401
        assert await status(rig, request(basic())) == 429
        assert not got


@pytest.mark.parametrize(
    ("access", "expected"), [({"deny": ["127.0.0.0/8", "::1"]}, 403), ({"allow": ["127.0.0.1", "::1"]}, 200)]
)
async def test_networks_of_http_visitors(access: dict[str, Any], expected: int) -> None:
    async with guarded(access) as (rig, got):
        assert await status(rig, request()) == expected
        assert bool(got) is (expected == 200)


async def test_visitors_of_a_trusted_proxy_are_checked_by_their_own_address() -> None:
    changes = {"trust_forwarded_from": ["127.0.0.1", "::1"]}
    async with guarded({"allow": ["192.0.2.0/24"]}, **changes) as (rig, got), await rig.visit() as proxy:
        await proxy.send_all(request("X-Forwarded-For: 192.0.2.7"))
        assert await read_exactly(proxy, len(OK)) == OK
        got.clear()
        await proxy.send_all(request("X-Forwarded-For: 192.0.2.7, 198.51.100.1"))
        assert b" 403 " in await read_all(proxy)
        assert not got


async def test_a_visitor_of_a_port_is_reset() -> None:
    entry = {"bind_addr": "127.0.0.1:0"}
    async with guarded({"deny": ["127.0.0.1"]}, entry=entry) as (rig, got):
        async with await connect(rig.addresses.tunnels["office"]) as visitor:
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some(1)
        assert not got


async def test_a_visitor_whose_tls_passes_through_gets_an_alert() -> None:
    entry = {"tls": "passthrough", "url": f"https://{HOST}"}
    hello = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), hello, server_hostname=HOST).do_handshake()
    async with guarded({"deny": ["127.0.0.1", "::1"]}, entry=entry) as (rig, got), await rig.visit() as visitor:
        await visitor.send_all(hello.read())
        assert await read_all(visitor) == Alert.ACCESS_DENIED.record
        assert not got


async def test_a_reload_changes_the_rules_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    async with guarded({"deny": ["127.0.0.1", "::1"]}) as (rig, _):
        await rig.apply(tunnels=[tunnel_entry(access={"basic_auth": str(htpasswd_file(tmp_path))})])
        assert await status(rig, request()) == 401
        config = rig.config
        (tmp_path / "bad").touch(0o600)
        for name, error in (("missing", StorageError), ("bad", InvalidSettingsError)):
            with pytest.raises(error):
                await rig.apply(tunnels=[tunnel_entry(access={"basic_auth": str(tmp_path / name)})])
            with pytest.raises(error):
                Relay(rig.config)
        rig.config = config
        assert await status(rig, request(basic())) == 200
