"""`visitor_tls`: a visitor's TLS ends in the gateway's process, and what goes wrong is that visitor's trouble."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import trustme
from gateway import Gateway, in_virtual_time
from rig import (
    KEY,
    RelayRig,
    ask,
    echo,
    in_background,
    no_hang,
    nothing_left_behind,
    read_all,
    read_exactly,
    relay_rig,
    request,
    run_until_it_waits,
)

from pioneer_tunnel import Certificate, InvalidSettingsError, RemoteAccessConfig, forward, terminate_tls
from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.closing import abandon
from pioneer_tunnel._net.tls import certificate as certificate_room
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.gateway.settings import SettingsUpdate
from pioneer_tunnel.transports.built_in import TRANSPORTS
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel
from pioneer_tunnel.tunnel.visitor_tls import _DecryptedStream

BLIND: Final = "blind.test"
CA: Final = trustme.CA()
TUNNEL: Final[dict[str, Any]] = {
    "id": "blind",
    "url": f"https://{BLIND}",
    "key": str(KEY.identity().public_key),
    "tls": "passthrough",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    put(tmp_path, BLIND)
    return tmp_path


def put(folder: Path, *names: str) -> None:
    issued = CA.issue_cert(*names)
    for file, blobs in (("tls.key", [issued.private_key_pem]), ("tls.crt", issued.cert_chain_pems)):
        (folder / "new").write_bytes(b"".join(blob.bytes() for blob in blobs))
        (folder / "new").replace(folder / file)


@pytest.fixture
def certificate(folder: Path) -> Certificate:
    return Certificate(folder / "tls.crt", folder / "tls.key")


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    return context


@asynccontextmanager
async def serving(handler: Callable[[TunnelStream], Awaitable[None]]) -> AsyncIterator[tuple[RelayRig, Tunnel]]:
    async with relay_rig(tunnels=[TUNNEL]) as rig, rig.tunnel() as tunnel:
        with no_hang():
            await tunnel.wait_connected()
            async with in_background(lambda: trio.serve_listeners(handler, [tunnel])):
                yield rig, tunnel


async def visit(rig: RelayRig, name: str = BLIND) -> TlsStream:
    stream = TlsStream(await rig.visit(), client_context(), server_hostname=name)
    await stream.do_handshake()
    return stream


# Through


async def test_the_handler_gets_what_the_visitor_says_in_clear(certificate: Certificate) -> None:
    seen: list[TunnelStream] = []

    async def look(stream: TunnelStream) -> None:
        seen.append(stream)
        await echo(stream)

    with nothing_left_behind():
        async with serving(terminate_tls(look, certificate)) as (rig, _), await visit(rig) as visitor:
            assert await ask(visitor, bytes(500_000)) == bytes(500_000)
            connected_from = visitor.transport_stream.socket.getsockname()  # type: ignore[attr-defined]
        (stream,) = seen
        assert stream.visitor == Address(*connected_from)
        assert (stream.tls, stream.tunnelled) == (True, True)


async def test_the_visitor_may_end_first_and_still_be_answered(certificate: Certificate) -> None:
    async def answer(stream: TunnelStream) -> None:
        async with stream:
            asked = await read_all(stream)
            await stream.send_all(b"you said " + asked)

    async with serving(terminate_tls(answer, certificate)) as (rig, _), await visit(rig) as visitor:
        assert await ask(visitor, b"this") == b"you said this"


async def test_a_visitor_that_just_closes_has_ended_and_one_that_resets_has_not(certificate: Certificate) -> None:
    ends: list[str] = []
    arrived, ended = trio.Event(), trio.Event()

    async def listen(stream: TunnelStream) -> None:
        arrived.set()
        try:
            async with stream:
                ends.append((await read_all(stream)).decode())
        except trio.BrokenResourceError:
            ends.append("broken")
        ended.set()

    async with serving(terminate_tls(listen, certificate)) as (rig, _):
        for said in ("end", "reset"):
            arrived, ended = trio.Event(), trio.Event()
            visitor = await visit(rig)
            await visitor.send_all(said.encode())
            await arrived.wait()  # a reset before the end of the handshake would turn the visitor away
            if said == "end":
                await visitor.transport_stream.send_eof()
            else:
                await abandon(visitor)
            await ended.wait()
            await trio.aclose_forcefully(visitor)
    assert ends == ["end", "broken"]


async def test_a_reset_of_the_handler_is_a_reset_at_the_visitor(certificate: Certificate) -> None:
    async def give_up(stream: TunnelStream) -> None:
        await stream.send_all(b"half of ")
        await stream.receive_some(1)
        stream.reset()

    async with serving(terminate_tls(give_up, certificate)) as (rig, _):
        visitor = await visit(rig)
        await read_exactly(visitor, 8)
        await visitor.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError):
            await read_all(visitor)
        await visitor.aclose()


async def test_a_handler_that_closes_while_it_sends_resets_and_may_close_again(certificate: Certificate) -> None:
    closed = trio.Event()

    async def close(stream: TunnelStream) -> None:
        await stream.receive_some(1)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                    await stream.send_all(bytes(100_000_000))  # which nobody reads

            await trio.testing.wait_all_tasks_blocked(0.01)
            await stream.aclose()
        await stream.aclose()
        closed.set()

    async with serving(terminate_tls(close, certificate)) as (rig, _):
        visitor = await visit(rig)
        await visitor.send_all(b"x")
        with no_hang():
            await closed.wait()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(visitor)
        await visitor.aclose()


async def test_it_keeps_trios_contract(certificate: Certificate) -> None:
    arrived, arrivals = trio.open_memory_channel[TunnelStream](0)

    async def arrive(stream: TunnelStream) -> None:
        await arrived.send(stream)
        await trio.sleep_forever()

    async with serving(terminate_tls(arrive, certificate)) as (rig, _):

        async def make_pair() -> tuple[ClientSide, TunnelStream]:
            visitor = await visit(rig)
            return ClientSide(visitor), await arrivals.receive()

        await trio.testing.check_half_closeable_stream(make_pair, None)


class ClientSide(trio.abc.HalfCloseableStream):
    """A visitor's TLS with what `TlsStream` leaves to others: one task at a time, and a word on being closed."""

    def __init__(self, stream: TlsStream) -> None:
        self.transport_stream = stream
        self._stream = _DecryptedStream(stream, _Socket(stream.transport_stream))  # type: ignore[arg-type]

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Socket:
    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream

    def reset(self) -> None:
        self._stream.socket.close()  # type: ignore[attr-defined]


async def test_trios_own_listener_works_too(certificate: Certificate) -> None:
    """For whoever would rather have `trio.SSLStream`: the visitor's address is one stream further down."""
    async with relay_rig(tunnels=[TUNNEL]) as rig, rig.tunnel() as tunnel, trio.open_nursery() as nursery:
        await tunnel.wait_connected()
        listener = trio.SSLListener(tunnel, await certificate.context())

        async def handler(stream: trio.SSLStream[TunnelStream]) -> None:
            async with stream:
                await stream.do_handshake()
                assert stream.transport_stream.visitor is not None
                assert await read_exactly(stream, 5) == b"hello"
                await stream.send_all(b"and goodbye")

        nursery.start_soon(trio.serve_listeners, handler, [listener])
        with no_hang():
            visitor = await visit(rig)
            await visitor.send_all(b"hello")
            assert await read_all(visitor) == b"and goodbye"
            await visitor.aclose()
        nursery.cancel_scope.cancel()


# To the local gateway


async def test_the_local_gateway_gets_it_in_clear_behind_a_header_in_clear(certificate: Certificate) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    local = Address("127.0.0.1", listener.socket.getsockname()[1])

    async def hand_on(stream: TunnelStream) -> None:
        await forward(stream, local, proxy_protocol="v2")

    async with listener, serving(terminate_tls(hand_on, certificate)) as (rig, _), await visit(rig) as visitor:
        await visitor.send_all(request(host=BLIND))
        async with await listener.accept() as connection:
            received = b""
            while not received.endswith(request(host=BLIND)):
                received += await connection.receive_some()
            parsed = ProxyHeader.parse(received)
            assert parsed is not None
            header, length = parsed
            own = visitor.transport_stream.socket.getsockname()  # type: ignore[attr-defined]
            assert (header.visitor, header.tls) == (Address(*own), True)
            assert received[length:] == request(host=BLIND)
            await connection.send_all(b"HTTP/1.1 200 OK\r\n\r\nhello")
        assert await read_all(visitor) == b"HTTP/1.1 200 OK\r\n\r\nhello"


# Not through


async def nobody(stream: TunnelStream) -> None:
    raise AssertionError("nobody was to get here")


async def test_a_visitor_that_wants_another_tls_is_told_and_others_go_on(
    certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with serving(terminate_tls(echo, certificate)) as (rig, _):
        untrusting = ssl.create_default_context()
        refusing = TlsStream(await rig.visit(), untrusting, server_hostname=BLIND)
        with pytest.raises(trio.BrokenResourceError, match="CERTIFICATE_VERIFY_FAILED"):
            await refusing.do_handshake()
        await refusing.aclose()

        old = client_context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_ciphers("AES128-SHA")
        wanting = TlsStream(await rig.visit(), old, server_hostname=BLIND)
        with pytest.raises(trio.BrokenResourceError, match="HANDSHAKE_FAILURE"):
            await wanting.do_handshake()
        await wanting.aclose()

        async with await visit(rig) as visitor:
            assert await ask(visitor, b"still there?") == b"still there?"
    assert "a visitor from 127.0.0.1:" in caplog.text
    assert "it was turned away" in caplog.text


async def test_plain_http_from_a_relay_that_ends_tls_itself_is_told_in_the_log(
    certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with relay_rig(tunnels=[{**TUNNEL, "tls": "terminate"}]) as rig, rig.tunnel() as tunnel:
        await tunnel.wait_connected()
        handler = terminate_tls(nobody, certificate)
        async with in_background(lambda: trio.serve_listeners(handler, [tunnel])), await rig.visit() as visitor:
            with no_hang():
                assert b"HTTP/1.1 200" not in await ask(visitor, request(host=BLIND))
    assert "has the tunnel tls = 'passthrough' at the relay?" in caplog.text


class Silent:
    """What carries a visitor that never says a word."""

    usable = True

    def __init__(self) -> None:
        self.was_reset = False

    def acknowledge(self) -> None:
        pass

    def reset(self) -> None:
        self.was_reset = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        await trio.sleep_forever()
        raise AssertionError

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_a_handshake_has_ten_seconds(certificate: Certificate, autojump_clock: trio.testing.MockClock) -> None:
    carried = Silent()
    await terminate_tls(nobody, certificate)(TunnelStream(carried))
    assert trio.current_time() == pytest.approx(10)
    assert carried.was_reset


async def test_cancelled_in_the_handshake_it_resets(certificate: Certificate) -> None:
    carried = Silent()
    await run_until_it_waits(lambda: terminate_tls(nobody, certificate)(TunnelStream(carried)))
    assert carried.was_reset


async def test_a_renewed_certificate_is_presented_to_the_next_visitor(
    folder: Path, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate_room, "CHECK_INTERVAL", 0)
    async with serving(terminate_tls(echo, certificate)) as (rig, _):
        async with await visit(rig) as visitor:
            put(folder, BLIND, "new.test")
            assert await ask(visitor, b"x") == b"x"
        stream = TlsStream(await rig.visit(), client_context(), server_hostname=BLIND)
        await stream.do_handshake()
        names = stream._tls.getpeercert()["subjectAltName"]  # type: ignore[index]
        assert ("DNS", "new.test") in names
        await stream.aclose()


# As a gateway embeds it


def test_the_table_takes_two_paths(folder: Path) -> None:
    (folder / "gateway.toml").write_text(
        "[gateway.remote_access.tls]\ncertificate = 'tls.crt'\nprivate_key = '/etc/tls.key'\n"
    )
    config = RemoteAccessConfig.load(folder / "gateway.toml")
    assert config.tls_paths == (folder / "tls.crt", Path("/etc/tls.key"))
    with pytest.raises(ValueError, match="no table tls"):
        _ = RemoteAccessConfig().tls_paths


@pytest.mark.parametrize(
    ("table", "key", "told"),
    [
        ({"certificate": "a"}, "tls.private_key", "is missing"),
        ({"certificate": "a", "private_key": ""}, "tls.private_key", "allowed is a path"),
        ({"certificate": "a", "private_key": "b", "privat_key": "c"}, "tls.privat_key", "unknown key"),
        ("tls.crt", "tls", "allowed is a table"),
    ],
)
def test_what_is_wrong_in_it_is_told(table: Any, key: str, told: str) -> None:
    with pytest.raises(InvalidSettingsError) as refused:
        RemoteAccessConfig.from_table({"tls": table})
    (problem,) = refused.value.problems
    assert (problem.key, told in problem.message) == (f"gateway.remote_access.{key}", True)


def test_a_tunnel_program_brings_visitors_past_it() -> None:
    with pytest.raises(InvalidSettingsError, match="cannot end their TLS"):
        RemoteAccessConfig.from_table({"tls": {"certificate": "a", "private_key": "b"}, "transport": "process"})


@in_virtual_time
async def test_a_certificate_that_cannot_be_used_is_invalid_settings_and_names_the_file(tmp_path: Path) -> None:
    gateway = Gateway(tmp_path)
    remote_access = gateway.remote_access({"tls": {"certificate": "tls.crt", "private_key": "tls.key"}})
    await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
    async with trio.open_nursery() as nursery:
        await nursery.start(remote_access.run)
        await remote_access.settled()
        status = remote_access.status
        assert (status.state, status.error_kind) == (State.FAILED, ErrorKind.INVALID_SETTINGS)
        assert str(tmp_path / "tls.crt") in (status.message or "")
        assert status.retry_at_unix is None
        put(tmp_path, BLIND)
        await remote_access.apply(SettingsUpdate(enabled=True))
        await remote_access.settled()
        assert remote_access.status.state is State.CONNECTED
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("handled_here", [True, False])
async def test_remote_access_ends_tls_before_its_handler_and_before_the_local_gateway(
    folder: Path, handled_here: bool
) -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def local_gateway(stream: trio.SocketStream) -> None:
        async with stream:
            async for data in stream:
                await stream.send_all(data)

    async with (
        relay_rig(tunnels=[TUNNEL]) as rig,
        in_background(lambda: trio.serve_listeners(local_gateway, [listener])),
    ):
        remote_access = Gateway(folder).remote_access(
            {
                "relay_addr": "ws://relay.test",
                "local_addr": f"127.0.0.1:{listener.socket.getsockname()[1]}",
                "tls": {"certificate": "tls.crt", "private_key": "tls.key"},
            },
            handler=echo if handled_here else None,
            transports=TRANSPORTS,
            dial=lambda host, port: rig.dial(host, port) if host == "relay.test" else trio.open_tcp_stream(host, port),
        )
        await remote_access.apply(SettingsUpdate(enabled=True, key=KEY))
        with no_hang():
            async with trio.open_nursery() as nursery:
                await nursery.start(remote_access.run)
                await remote_access.settled()
                assert remote_access.status.state is State.CONNECTED
                async with await visit(rig) as visitor:
                    assert await ask(visitor, bytes(100_000)) == bytes(100_000)
                nursery.cancel_scope.cancel()
