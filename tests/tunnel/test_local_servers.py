"""Local servers on Unix sockets, and with TLS: `forward` reaches them, and says what is wrong with them."""

from __future__ import annotations

import functools
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from gateway import Gateway
from rig import carried, eventually, no_hang, nothing_left_behind, read_all, request

from pioneer_tunnel._model.addresses import HttpsAddress
from pioneer_tunnel._model.errors import InvalidSettingsError, LocalGatewayError
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel._net.prefixed_stream import PrefixedStream
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.gateway.settings import SettingsUpdate
from pioneer_tunnel.testing import MemoryStream, open_memory_relay
from pioneer_tunnel.transports.built_in import TRANSPORTS
from pioneer_tunnel.transports.interface import Event, LocalDialFailed, LocalDialOk
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.forward import ProxyProtocol, forward, probe_local
from pioneer_tunnel.tunnel.tunnel import open_tunnel

CA: Final = trustme.CA()
CA_OTHER: Final = trustme.CA()


@asynccontextmanager
async def visiting() -> AsyncIterator[tuple[MemoryStream, TunnelStream]]:
    """A visitor of a tunnel, and its stream at the gateway."""
    with no_hang():
        async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
            await tunnel.wait_connected()
            async with await relay.visit() as visitor:
                await visitor.send_all(b"(")
                stream = await tunnel.accept()
                assert await stream.receive_some(1) == b"("
                yield visitor, stream


async def is_reset(visitor: MemoryStream) -> None:
    with pytest.raises(trio.BrokenResourceError):
        await visitor.receive_some()


async def serve_one(listener: trio.abc.Listener[trio.SocketStream], came: list[bytes]) -> None:
    """Read a request up to EOF, answer with the same, and close."""
    async with await listener.accept() as connection:
        came.append(await read_all(connection))
        await connection.send_all(came[-1])


def unix_listener(path: Path, backlog: int = 1) -> trio.SocketListener:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen(backlog)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock))


@pytest.mark.parametrize("proxy_protocol", [None, "v2"])
async def test_a_unix_socket_is_served(tmp_path: Path, proxy_protocol: ProxyProtocol | None) -> None:
    came: list[bytes] = []
    with nothing_left_behind():
        async with (
            unix_listener(tmp_path / "app") as listener,
            visiting() as (visitor, stream),
            trio.open_nursery() as nursery,
        ):
            sent = (stream.proxy_header.encode() if proxy_protocol else b"") + bytes(300_000)
            nursery.start_soon(serve_one, listener, came)
            nursery.start_soon(
                functools.partial(forward, stream, f"unix:{tmp_path}/app", proxy_protocol=proxy_protocol)
            )
            assert await carried(visitor, visitor, bytes(300_000)) == sent
    assert came == [sent]


async def test_a_unix_socket_with_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """There, connect() gives EAGAIN, which is not "under way": nothing ever reports that it has become writable."""
    came: list[bytes] = []
    async with (
        unix_listener(tmp_path / "app", backlog=0) as listener,
        visiting() as (visitor, stream),
        trio.open_nursery() as nursery,
    ):
        first = await trio.open_unix_socket(tmp_path / "app")  # the backlog is full
        waits = trio.lowlevel.current_statistics().tasks_living
        nursery.start_soon(forward, stream, f"unix:{tmp_path}/app")
        await trio.testing.wait_all_tasks_blocked(0.002)
        assert trio.lowlevel.current_statistics().tasks_living == waits + 1
        await (await listener.accept()).aclose()
        await first.aclose()
        nursery.start_soon(serve_one, listener, came)
        assert await carried(visitor, visitor, b"at last") == b"at last"
    assert came == [b"at last"]


@pytest.mark.parametrize("there", [False, True], ids=["nothing", "a file"])
async def test_a_unix_socket_that_is_not_there_is_named(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "app").write_text("no socket")
    events: list[Event] = []
    async with visiting() as (visitor, stream):
        await forward(stream, f"unix:{tmp_path}/app", report=events.append)
        await is_reset(visitor)
    (event,) = events
    assert isinstance(event, LocalDialFailed)
    assert f"unix:{tmp_path}/app" in event.message


@asynccontextmanager
async def tls_server(name: str = "localhost") -> AsyncIterator[tuple[int, list[bytes]]]:
    """Its port, and what came: a PROXY header, if there was one, and then what was inside TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(name).configure_cert(context)
    came: list[bytes] = []
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def serve() -> None:
        with suppress(trio.BrokenResourceError):
            async with await listener.accept() as connection:
                start = await connection.receive_some()
                if start.startswith(b"\r\n"):
                    parsed = ProxyHeader.parse(start)
                    assert parsed is not None
                    came.append(start[: parsed[1]])
                    start = start[parsed[1] :]
                tls = TlsStream(PrefixedStream(connection, start), context, server_side=True)
                await tls.do_handshake()
                came.append(await read_all(tls))
                await tls.send_all(came[-1])
                await tls.aclose()

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield listener.socket.getsockname()[1], came
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("proxy_protocol", [None, "v2"])
async def test_a_server_with_tls_is_served(tmp_path: Path, proxy_protocol: ProxyProtocol | None) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with tls_server() as (port, came), visiting() as (visitor, stream), trio.open_nursery() as nursery:
        local = HttpsAddress("localhost", port, ca_file=tmp_path / "ca.pem")
        nursery.start_soon(functools.partial(forward, stream, local, proxy_protocol=proxy_protocol))
        assert await carried(visitor, visitor, bytes(100_000)) == bytes(100_000)
        assert came == [*([stream.proxy_header.encode()] if proxy_protocol else []), bytes(100_000)]


async def test_a_server_with_tls_gets_changed_requests(tmp_path: Path) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    async with tls_server() as (port, came), visiting() as (visitor, stream), trio.open_nursery() as nursery:
        local = HttpsAddress("localhost", port, ca_file=tmp_path / "ca.pem")
        nursery.start_soon(functools.partial(forward, stream, local, proxy_protocol="v2", host_header="localhost:1"))
        changed = request(host="localhost:1", body=bytes(100_000))
        assert await carried(visitor, visitor, request(body=bytes(100_000))) == changed
        assert came == [stream.proxy_header.encode(), changed]


@pytest.mark.parametrize(
    ("name", "trusted", "why"),
    [
        ("localhost", CA_OTHER, "its certificate is not trusted"),
        ("other.test", CA, "its certificate is for another name"),
    ],
)
async def test_a_certificate_that_is_wrong_turns_visitors_away(
    tmp_path: Path, name: str, trusted: trustme.CA, why: str
) -> None:
    trusted.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    events: list[Event] = []
    async with tls_server(name) as (port, came), visiting() as (visitor, stream):
        await forward(stream, HttpsAddress("localhost", port, ca_file=tmp_path / "ca.pem"), report=events.append)
        await is_reset(visitor)
        assert came == []
    (event,) = events
    assert isinstance(event, LocalDialFailed)
    assert why in event.message


async def test_any_certificate_will_do_where_verification_is_switched_off() -> None:
    events: list[Event] = []
    async with tls_server("other.test") as (port, _), visiting() as (visitor, stream), trio.open_nursery() as nursery:
        local = HttpsAddress("localhost", port, verify=False)
        nursery.start_soon(functools.partial(forward, stream, local, report=events.append))
        assert await carried(visitor, visitor, b"hello") == b"hello"
    assert events == [LocalDialOk()]


async def test_a_ca_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    events: list[Event] = []
    async with tls_server() as (port, _), visiting() as (visitor, stream):
        await forward(stream, HttpsAddress("localhost", port, ca_file=tmp_path / "none.pem"), report=events.append)
        await is_reset(visitor)
    (event,) = events
    assert isinstance(event, LocalDialFailed)
    assert "none.pem" in event.message


async def test_a_tunnel_probes_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "app"
    with no_hang():
        async with open_memory_relay() as relay:
            options: dict[str, Any] = {"key": relay.key, "dial": relay.dial, "local": f"unix:{path}"}
            async with open_tunnel(relay.url, **options) as tunnel:
                await eventually(lambda: tunnel.status.error_kind is ErrorKind.LOCAL_GATEWAY_UNAVAILABLE)
                assert str(path) in str(tunnel.status.message)
            async with unix_listener(path) as listener, open_tunnel(relay.url, **options) as tunnel:
                async with await listener.accept() as probe:
                    assert await read_all(probe) == b""
                assert tunnel.status.error_kind is None


@pytest.mark.parametrize("proxy_protocol", [None, "v2"])
async def test_the_probe_makes_the_handshake_as_a_visit_does(
    tmp_path: Path, proxy_protocol: ProxyProtocol | None
) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with no_hang():
        async with tls_server() as (port, came):
            local = HttpsAddress("localhost", port, ca_file=tmp_path / "ca.pem")
            await probe_local(local, proxy_protocol=proxy_protocol)
            header = ProxyHeader(visitor=None).encode()
            await eventually(lambda: came == [*([header] if proxy_protocol else []), b""])
        async with tls_server("other.test") as (port, _):
            with pytest.raises(LocalGatewayError, match="its certificate is for another name"):
                await probe_local(HttpsAddress("localhost", port, ca_file=tmp_path / "ca.pem"))


async def test_a_tunnel_shows_that_the_local_server_has_a_wrong_certificate(tmp_path: Path) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with no_hang():
        async with tls_server("other.test") as (port, _), open_memory_relay() as relay:

            async def dial(host: str, port: int) -> trio.abc.Stream:
                return await (trio.open_tcp_stream if host == "localhost" else relay.dial)(host, port)

            local = HttpsAddress("localhost", port, ca_file=tmp_path / "ca.pem")
            async with open_tunnel(relay.url, key=relay.key, dial=dial, local=local) as tunnel:
                await eventually(lambda: tunnel.status.error_kind is ErrorKind.LOCAL_GATEWAY_UNAVAILABLE)
                assert "for another name" in str(tunnel.status.message)


async def test_remote_access_shows_that_the_local_server_has_a_wrong_certificate(tmp_path: Path) -> None:
    """And goes on showing it: the probe does what a visit does."""
    (tmp_path / "gateway").mkdir()
    CA_OTHER.cert_pem.write_to_path(str(tmp_path / "gateway" / "ca.pem"))
    with no_hang():
        async with tls_server() as (port, _), open_memory_relay() as relay, trio.open_nursery() as nursery:

            async def dial(host: str, port: int) -> trio.abc.Stream:
                return await (trio.open_tcp_stream if host == "localhost" else relay.dial)(host, port)

            remote_access = Gateway(tmp_path / "gateway").remote_access(
                {"relay_addr": relay.url, "local_addr": f"https://localhost:{port}", "local_ca_file": "ca.pem"},
                handler=None,
                dial=dial,
                transports=TRANSPORTS,
            )
            await remote_access.apply(SettingsUpdate(enabled=True, key=relay.key))
            await nursery.start(remote_access.run)
            await eventually(lambda: remote_access.status.error_kind is ErrorKind.LOCAL_GATEWAY_UNAVAILABLE)
            assert "its certificate is not trusted" in str(remote_access.status.message)
            nursery.cancel_scope.cancel()


async def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(InvalidSettingsError, match=r"local: .*'nonsense'"):
        async with open_memory_relay() as relay, open_tunnel(relay.url, key=relay.key, local="nonsense"):
            pytest.fail("it was let in")
    async with visiting() as (_, stream):
        with pytest.raises(ValueError, match="'nonsense'"):
            await forward(stream, "nonsense")


async def test_a_system_without_unix_sockets_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    events: list[Event] = []
    async with visiting() as (visitor, stream):
        await forward(stream, f"unix:{os.sep}app", report=events.append)
        await is_reset(visitor)
    (event,) = events
    assert isinstance(event, LocalDialFailed)
    assert "no Unix sockets" in event.message
