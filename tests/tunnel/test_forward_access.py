"""`forward` with access rules: nothing of a request reaches the local server before it is let through."""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from access_rig import OPEN, TOKEN, basic, htpasswd_file, tokens_file
from rig import (
    HOST,
    KEY,
    RelayRig,
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

from pioneer_tunnel import (
    Access,
    Address,
    Certificate,
    InvalidSettingsError,
    RemoteAccess,
    RemoteAccessConfig,
    Services,
    SettingsFile,
    SettingsUpdate,
    forward,
)
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel.access.attempts import MOST_ATTEMPTS
from pioneer_tunnel.gateway.keystore import MemoryKeystore
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.accepting import accept_visitors
from pioneer_tunnel.tunnel.visitor_tls import with_certificate

HEAD_END = b"\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
SWITCHING = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
WEBSOCKET = ("Upgrade: websocket", "Connection: Upgrade")
HERE = ["127.0.0.0/8", "::1"]


class Server:
    """A local server that answers each head, and keeps what it got, by connection."""

    def __init__(self) -> None:
        self.got: list[bytearray] = []

    async def serve(self, stream: trio.SocketStream) -> None:
        mine = bytearray()
        self.got.append(mine)
        async with stream:
            async for data in stream:
                mine += data
                await stream.send_all((SWITCHING if b"websocket" in data else OK) * data.count(HEAD_END))


@asynccontextmanager
async def forwarding(
    access: Access | dict[str, Access | None] | None,
    *,
    bound: bool = True,
    certificate: Certificate | None = None,
    **options: Any,
) -> AsyncIterator[tuple[RelayRig, Server]]:
    """A tunnel that forwards to a server. If it is `bound`, the relay passes bytes of any protocol."""
    server = Server()
    way = {"bind_addr": "127.0.0.1:0"} if bound else {}
    entry = tunnel_entry(**({"tls": "passthrough", "url": f"https://{HOST}"} if certificate else way))
    with no_hang(), nothing_left_behind():
        async with relay_rig(tunnels=[entry]) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
            (listener,) = await nursery.start(functools.partial(trio.serve_tcp, server.serve, 0, host="127.0.0.1"))
            local = Address("127.0.0.1", listener.socket.getsockname()[1])
            await tunnel.wait_connected()
            handler = functools.partial(forward, access=access, **({"local": local} | options))
            nursery.start_soon(accept_visitors, tunnel, with_certificate(handler, certificate), nursery)
            yield rig, server
            nursery.cancel_scope.cancel()


async def visit(rig: RelayRig) -> trio.SocketStream:
    bound = rig.addresses.tunnels.get("office")
    return await rig.visit() if bound is None else await connect(bound)


async def status(rig: RelayRig, sent: bytes) -> int:
    async with await visit(rig) as visitor:
        await visitor.send_all(sent)
        return int((await read_until(visitor, HEAD_END)).split(b" ")[1])


@pytest.mark.parametrize("bound", [True, False])
async def test_without_a_password_nothing_reaches_the_server(tmp_path: Path, bound: bool) -> None:
    async with forwarding(Access(basic_auth=htpasswd_file(tmp_path), open_paths=[OPEN]), bound=bound) as (rig, server):
        for lines in ([], [basic("wrong")], WEBSOCKET, ["Expect: 100-continue", "Content-Length: 5"]):
            assert await status(rig, request(*lines)) == 401
        assert await status(rig, request(basic(), basic())) == 400
        assert await status(rig, request(basic()).replace(b"GET /", b"GET  /")) == 400
        assert await status(rig, request().replace(b"GET /", b"GET /healthz/..")) == 401
        assert not server.got
        assert await status(rig, request().replace(b"GET /", b"GET /healthz")) == 200
        assert await status(rig, request(basic(), "X-A: b")) == 200
        assert server.got == [request().replace(b"GET /", b"GET /healthz"), request("X-A: b")]


@pytest.mark.parametrize("pieces", [1, 10_000])
async def test_each_pipelined_request_is_checked(tmp_path: Path, pieces: int) -> None:
    sent = (
        request(basic(), "Content-Length: 3") + b"abc" + request(basic()) + request(basic(), "X-A: b") + request() + OK
    )
    async with forwarding(Access(basic_auth=htpasswd_file(tmp_path))) as (rig, server), await visit(rig) as visitor:
        for start in range(0, len(sent), pieces):
            await visitor.send_all(sent[start : start + pieces])
        assert (await read_all(visitor)).startswith(OK * 3 + b"HTTP/1.1 401 ")
        assert server.got == [request("Content-Length: 3") + b"abc" + request() + request("X-A: b")]


async def test_a_request_with_another_password_is_checked_on_the_same_connection(tmp_path: Path) -> None:
    file = htpasswd_file(tmp_path, ann="right", bob="other")
    async with forwarding(Access(basic_auth=file)) as (rig, server), await visit(rig) as visitor:
        for sent in (basic(), basic("other", "bob"), basic()):
            await visitor.send_all(request(sent))
            assert await read_exactly(visitor, len(OK)) == OK
        assert server.got == [request(), request() * 2]
        await visitor.send_all(request(basic("other")))
        assert b" 401 " in await read_all(visitor)


async def test_requests_whose_tls_ends_here_are_checked_too(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert(HOST).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "office.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    certificate = Certificate(tmp_path / "office.pem", tmp_path / "office.pem")
    access = Access(basic_auth=htpasswd_file(tmp_path, ann="right", bob="other"))
    async with forwarding(access, certificate=certificate) as (rig, server):
        visitor = trio.SSLStream(await rig.visit(), context, server_hostname=HOST, https_compatible=True)
        async with visitor:
            await visitor.send_all(request(basic()) + request(basic("other", "bob")) + request(basic("other")))
            answers = await read_all(visitor)
            assert answers.startswith(OK * 2 + b"HTTP/1.1 401 ")
        assert server.got == [request(), request()]


async def test_a_websocket_and_other_upgrades(tmp_path: Path) -> None:
    async with forwarding(Access(basic_auth=htpasswd_file(tmp_path))) as (rig, server):
        async with await visit(rig) as visitor:
            await visitor.send_all(request(basic(), *WEBSOCKET))
            assert await read_exactly(visitor, len(SWITCHING)) == SWITCHING
            await visitor.send_all(b"frames")
            await visitor.send_eof()
            assert await read_all(visitor) == b""
        assert await status(rig, request(basic(), "Upgrade: h2c", "Connection: Upgrade")) == 200
        assert server.got == [request(*WEBSOCKET) + b"frames", request()]


async def test_tokens_with_forwarded_headers(tmp_path: Path) -> None:
    access = Access(bearer_tokens=tokens_file(tmp_path))
    async with forwarding(access, forwarded_headers="set") as (rig, server):
        assert await status(rig, request(f"Authorization: Bearer {TOKEN}", "X-Forwarded-For: 192.0.2.7")) == 200
        (got,) = server.got
        assert b"X-Forwarded-For: 127.0.0.1\r\n" in got
        assert b"192.0.2.7" not in got
        assert b"uthorization" not in got


async def test_attempts_are_limited(tmp_path: Path) -> None:
    async with forwarding(Access(basic_auth=htpasswd_file(tmp_path))) as (rig, server):
        for number in range(MOST_ATTEMPTS):
            assert await status(rig, request(basic(str(number)))) == 401
        assert await status(rig, request(basic())) == 429
        assert not server.got


async def test_networks() -> None:
    async with forwarding(Access(deny=HERE)) as (rig, server):
        async with await visit(rig) as visitor:
            with pytest.raises(trio.BrokenResourceError):
                await visitor.receive_some(1)
        assert not server.got
    async with forwarding(Access(deny=HERE), host_header="localhost") as (rig, server):
        assert await status(rig, request()) == 403
        assert not server.got
    async with forwarding(Access(allow=HERE)) as (rig, server), await visit(rig) as visitor:
        await visitor.send_all(b"anything\r\n\r\n")
        assert await read_exactly(visitor, len(OK)) == OK


async def test_rules_of_services(tmp_path: Path) -> None:
    """The stream has no service here, so it is of the first one."""
    secret = Access(basic_auth=htpasswd_file(tmp_path))
    async with forwarding({"*": secret}) as (rig, server):
        assert await status(rig, request()) == 401
    async with forwarding({"": None, "*": secret}) as (rig, server):
        assert await status(rig, request()) == 200
    async with forwarding({"web": None}) as (rig, server), await visit(rig) as visitor:
        with pytest.raises(trio.BrokenResourceError):
            await visitor.receive_some(1)
    assert not server.got


async def test_a_service_that_is_not_http_cannot_have_passwords(tmp_path: Path) -> None:
    secret = Access(basic_auth=htpasswd_file(tmp_path))
    options = {"local": Services({"ssh": "127.0.0.1:1"}), "raw_services": ["ssh"]}
    failed: list[ValueError] = []

    async def handle(stream: TunnelStream) -> None:
        try:
            await forward(stream, access=secret, **options)  # type: ignore[arg-type]
        except ValueError as error:
            failed.append(error)
            stream.reset()

    entry = tunnel_entry(bind_addr="127.0.0.1:0")
    with no_hang():
        async with relay_rig(tunnels=[entry]) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
            await tunnel.wait_connected()
            nursery.start_soon(accept_visitors, tunnel, handle, nursery)
            async with await visit(rig) as visitor:
                with pytest.raises(trio.BrokenResourceError):
                    await visitor.receive_some(1)
            assert "is not HTTP" in str(failed[0])
            nursery.cancel_scope.cancel()


async def gateway_status(folder: Path, handler: Any = None, **changes: Any) -> tuple[State, ErrorKind | None, str]:
    config = RemoteAccessConfig(relay_addr=f"ws://{HOST}", base_dir=folder, **changes)
    remote = RemoteAccess(
        config, settings=SettingsFile(folder / "settings.toml"), keystore=MemoryKeystore(), handler=handler
    )
    with no_hang():
        await remote.apply(SettingsUpdate(enabled=True, key=KEY))
        async with trio.open_nursery() as nursery:
            await nursery.start(remote.run)
            await remote.settled()
            found = remote.status
            nursery.cancel_scope.cancel()
    return found.state, found.error_kind, found.message or ""


async def test_a_gateway_whose_rules_cannot_be_used_does_not_start(tmp_path: Path) -> None:
    state, kind, message = await gateway_status(tmp_path, access={"basic_auth": "missing"})
    assert (state, kind) == (State.FAILED, ErrorKind.IO)
    assert "missing does not exist" in message

    async def handler(stream: TunnelStream) -> None:
        raise AssertionError

    state, kind, message = await gateway_status(tmp_path, handler, access={"deny": ["192.0.2.7"]})
    assert (state, kind) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
    assert "access rules are for visitors that are forwarded" in message
    with pytest.raises(InvalidSettingsError):
        Access(deny=["x"])
