"""TLS of visitors: the ClientHello decides whether it passes through, and it reaches no other tunnel."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trio.testing
import trustme
from rig import (
    HOST,
    KEY,
    RELAY_NAME,
    RelayRig,
    ask,
    connect,
    in_background,
    no_hang,
    read_all,
    read_exactly,
    relay_config,
    relay_rig,
    request,
)

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._net.tls import certificate as certificate_room
from pioneer_tunnel._net.tls.certificate import Certificate
from pioneer_tunnel._net.tls.client_hello import Alert
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader
from pioneer_tunnel.relay import Relay, TunnelEntry
from pioneer_tunnel.relay.gateways.registry import LocalDirectory, LocalRegistry
from pioneer_tunnel.relay.visitors.ingress import Ingress
from pioneer_tunnel.relay.visitors.tls import SniRouter
from pioneer_tunnel.relay.visitors.visit import Visit
from pioneer_tunnel.transports.tunnel_stream import TunnelStream
from pioneer_tunnel.tunnel.tunnel import Tunnel

BLIND: Final = "blind.test"
BLIND_KEY: Final = RelayKey("ptk1_the-key-of-a-blind-tunnel-0123456")
TUNNELS: Final[list[dict[str, Any]]] = [
    {"id": "office", "url": f"https://{HOST}", "key": str(KEY.identity().public_key)},
    {"id": "blind", "url": f"https://{BLIND}", "key": str(BLIND_KEY.identity().public_key), "tls": "passthrough"},
]
CA: Final = trustme.CA()


def client_context(**settings: Any) -> ssl.SSLContext:
    context = ssl.create_default_context()
    CA.configure_trust(context)
    for name, value in settings.items():
        setattr(context, name, value)
    return context


def server_context(*names: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    CA.issue_cert(*names).configure_cert(context)
    return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The relay's own certificate, which is not that of the blind tunnel."""
    folder = tmp_path_factory.mktemp("relay")
    issued = CA.issue_cert(HOST, RELAY_NAME)
    issued.private_key_pem.write_to_path(str(folder / "relay.key"))
    for blob in issued.cert_chain_pems:
        blob.write_to_path(str(folder / "relay.crt"), append=True)
    return {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": folder}


LISTENERS: Final = ["TLS", "plain", "TLS, shared", "plain, shared"]


def listener(which: str, files: dict[str, Any]) -> dict[str, Any]:
    one = {"control_addr": "localhost:0", "ingress_addr": "localhost:0"}
    match which:
        case "TLS":
            return files | {"control_tls": False}
        case "plain":
            return {}
        case "TLS, shared":
            return files | one
        case _:
            return one


async def echo_in_tls(stream: TunnelStream) -> None:
    """A gateway that ends TLS itself, with nothing but Trio."""
    async with trio.SSLStream(stream, server_context(BLIND), server_side=True, https_compatible=True) as secured:
        async for data in secured:
            await secured.send_all(data)


@asynccontextmanager
async def serving(which: str, files: dict[str, Any]) -> AsyncIterator[tuple[RelayRig, Tunnel, Tunnel]]:
    """A relay with an ingress listener of this kind, and a gateway for each of its two tunnels."""
    async with relay_rig(tunnels=TUNNELS, **listener(which, files)) as rig:
        (folder,) = (files["base_dir"],)
        CA.cert_pem.write_to_path(str(folder / "ca.pem"))
        scheme = "wss" if rig.config.control_tls else "ws"
        options: dict[str, Any] = {"relay": f"{scheme}://{RELAY_NAME}", "ca_file": folder / "ca.pem"}
        async with rig.tunnel(**options) as office, rig.tunnel(**options, key=BLIND_KEY) as blind:
            with no_hang():
                await office.wait_connected()
                await blind.wait_connected()
                yield rig, office, blind


async def visit(rig: RelayRig, name: str, **settings: Any) -> trio.SSLStream[trio.SocketStream]:
    stream = trio.SSLStream(await rig.visit(), client_context(**settings), server_hostname=name, https_compatible=True)
    await stream.do_handshake()
    return stream


async def alert_of(rig: RelayRig, name: str | None) -> str:
    """The alert that a visitor gets that asks for `name`."""
    context = client_context(check_hostname=name is not None)
    stream = trio.SSLStream(await rig.visit(), context, server_hostname=name)
    with no_hang(), pytest.raises(trio.BrokenResourceError) as refused:
        await stream.do_handshake()
    assert isinstance(refused.value.__cause__, ssl.SSLError)
    await trio.aclose_forcefully(stream)
    return refused.value.__cause__.reason or ""


# Through


@pytest.mark.parametrize("which", LISTENERS)
async def test_a_visitor_and_a_gateway_speak_tls_through_the_relay(which: str, files: dict[str, Any]) -> None:
    async with (
        serving(which, files) as (rig, _, blind),
        in_background(lambda: trio.serve_listeners(echo_in_tls, [blind])),
    ):
        visitor = await visit(rig, BLIND)
        (name,) = (visitor.getpeercert() or {})["subjectAltName"]
        assert name == ("DNS", BLIND), "the certificate is the gateway's"
        await visitor.send_all(bytes(100_000))
        assert await read_exactly(visitor, 100_000) == bytes(100_000)
        await visitor.aclose()


@pytest.mark.parametrize("which", LISTENERS)
async def test_every_byte_passes_as_it_came_behind_a_header_that_says_tls(which: str, files: dict[str, Any]) -> None:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=BLIND).do_handshake()
    said = outgoing.read() + b"and then whatever comes, \x15\x03\x03 or not"
    async with serving(which, files) as (rig, _, blind), await rig.visit() as visitor:
        await visitor.send_all(said[:7])
        await visitor.send_all(said[7:])
        async with await blind.accept() as stream:
            assert await read_exactly(stream, len(said)) == said
            assert stream.tls is True
            local = Address(*visitor.socket.getpeername())
            assert stream.proxy_header == ProxyHeader(Address(*visitor.socket.getsockname()), local, tls=True)
            await stream.send_all(b"not TLS at all")
            await stream.send_eof()
            assert await read_exactly(visitor, 14) == b"not TLS at all"
            await visitor.send_eof()
            assert await read_all(stream) == b""


@pytest.mark.parametrize("which", ["TLS", "TLS, shared"])
async def test_the_relay_ends_the_tls_of_everyone_else(which: str, files: dict[str, Any]) -> None:
    async with serving(which, files) as (rig, office, _), await visit(rig, HOST) as visitor:
        assert dict((visitor.getpeercert() or {})["subjectAltName"])["DNS"] in {HOST, RELAY_NAME}
        await visitor.send_all(request())
        async with await office.accept() as stream:
            assert await read_exactly(stream, len(request())) == request()
            assert stream.tls is True


@pytest.mark.parametrize("which", ["plain", "plain, shared"])
async def test_a_plain_listener_still_speaks_http(which: str, files: dict[str, Any]) -> None:
    async with serving(which, files) as (rig, office, _), await rig.visit() as visitor:
        for byte in request():
            await visitor.send_all(bytes([byte]))
        async with await office.accept() as stream:
            assert await read_exactly(stream, len(request())) == request()
            assert stream.tls is False


# Not through


@pytest.mark.parametrize("which", ["plain", "plain, shared"])
async def test_plain_http_does_not_reach_a_tunnel_that_takes_tls(which: str, files: dict[str, Any]) -> None:
    async with serving(which, files) as (rig, _, blind), await rig.visit() as visitor:
        answer = await ask(visitor, request(host=BLIND))
        assert answer.startswith(b"HTTP/1.1 421 ")
        assert b"https://" in answer
        await nobody_comes(blind)


@pytest.mark.parametrize("which", ["TLS", "TLS, shared"])
async def test_nor_does_what_the_relay_has_decrypted(which: str, files: dict[str, Any]) -> None:
    """A visitor with the ClientHello of one tenant and the Host of another."""
    async with serving(which, files) as (rig, _, blind), await visit(rig, HOST) as visitor:
        await visitor.send_all(request(host=BLIND))
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 421 ")
        await nobody_comes(blind)


async def nobody_comes(tunnel: Tunnel) -> None:
    with trio.move_on_after(0.05) as waited:
        await tunnel.accept()
    assert waited.cancelled_caught


@pytest.mark.parametrize("which", ["plain", "plain, shared"])
@pytest.mark.parametrize("name", ["nobody.test", HOST])
async def test_at_a_plain_listener_another_name_is_unrecognized(which: str, name: str, files: dict[str, Any]) -> None:
    """Also the name of a tunnel with `terminate`: the relay has no certificate here."""
    async with serving(which, files) as (rig, office, _):
        assert "UNRECOGNIZED_NAME" in await alert_of(rig, name)
        await nobody_comes(office)


async def test_at_a_plain_listener_no_name_is_told_so(files: dict[str, Any]) -> None:
    async with serving("plain", files) as (rig, _, _):
        assert "MISSING_EXTENSION" in await alert_of(rig, None)


@pytest.mark.parametrize("which", LISTENERS)
async def test_without_its_gateway_a_visitor_gets_an_alert(which: str, files: dict[str, Any]) -> None:
    async with relay_rig(tunnels=TUNNELS, **listener(which, files)) as rig:
        assert "INTERNAL_ERROR" in await alert_of(rig, BLIND)


async def test_a_gateway_that_breaks_off_before_it_answers_is_an_alert_too(files: dict[str, Any]) -> None:
    async with serving("TLS", files) as (rig, _, blind), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def break_off() -> None:
            (await blind.accept()).reset()

        assert "INTERNAL_ERROR" in await alert_of(rig, BLIND)


@pytest.mark.parametrize("which", LISTENERS)
@pytest.mark.parametrize(
    ("said", "alert"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506), Alert.DECODE_ERROR),
        (b"\x16\x03\x01\x00\x04\x02\x00\x00\x00", Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x03\x01\xff\xff", Alert.RECORD_OVERFLOW),
    ],
)
async def test_a_crooked_hello_is_answered_in_tls(which: str, said: bytes, alert: Alert, files: dict[str, Any]) -> None:
    async with relay_rig(tunnels=TUNNELS, **listener(which, files)) as rig, await rig.visit() as visitor:
        with no_hang():
            assert await ask(visitor, said) == alert.record


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n", b"\x80\x2e\x01\x03\x01", b"SSH-2.0-x\r\n"])
async def test_at_a_tls_listener_everything_else_is_answered_in_tls(said: bytes, files: dict[str, Any]) -> None:
    async with relay_rig(tunnels=TUNNELS, **files) as rig, await rig.visit() as visitor:
        with no_hang():
            assert await ask(visitor, said) == Alert.UNEXPECTED_MESSAGE.record


@pytest.mark.parametrize("which", LISTENERS)
@pytest.mark.parametrize("said", [b"", b"\x16\x03", b"\x16\x03\x01\x00\x04\x01\x00"])
async def test_a_visitor_that_leaves_in_the_middle_is_told_nothing(
    which: str, said: bytes, files: dict[str, Any]
) -> None:
    async with relay_rig(tunnels=TUNNELS, **listener(which, files)) as rig, await rig.visit() as visitor:
        with no_hang():
            assert await ask(visitor, said) == b""


async def test_a_handshake_that_fails_ends_with_an_alert_and_a_fin(files: dict[str, Any]) -> None:
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST).do_handshake()
    async with relay_rig(tunnels=TUNNELS, **files) as rig, await rig.visit() as visitor:
        with no_hang():
            assert await ask(visitor, outgoing.read() + b"\x17\x03\x03\x00\x05hello")


async def test_a_reload_switches_a_tunnel_to_passing_through() -> None:
    """The alert shows it: first no tunnel has the name, then its gateway is not connected."""
    relay = Relay(relay_config(tunnels=TUNNELS[:1]))

    async def answer() -> bytes:
        async with await connect(addresses.ingress) as visitor:
            outgoing = ssl.MemoryBIO()
            with pytest.raises(ssl.SSLWantReadError):
                client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=BLIND).do_handshake()
            return await ask(visitor, outgoing.read())

    async with trio.open_nursery() as nursery:
        addresses = await nursery.start(relay.serve)
        with no_hang():
            assert await answer() == Alert.UNRECOGNIZED_NAME.record
            await relay.apply(relay_config(tunnels=TUNNELS))
            assert await answer() == Alert.INTERNAL_ERROR.record
        nursery.cancel_scope.cancel()


# Deadlines


@pytest.mark.parametrize("tls", [True, False])
async def test_a_slow_hello_is_given_up_after_ten_seconds(
    tls: bool, files: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    route, visitor = sni_router(files)
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def drip() -> None:
            for byte in b"\x16\x03\x01\x00\x80\x01\0\0\x7c\3\3" + bytes(20):
                await visitor.send_all(bytes([byte]))
                await trio.sleep(0.9)

        with pytest.raises(trio.TooSlowError):
            await route(tls)
        assert trio.current_time() == pytest.approx(10)
        nursery.cancel_scope.cancel()


async def test_a_visitor_that_says_nothing_may_be_one_of_http(
    files: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    route, visitor = sni_router(files)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(route, False)
        assert (await read_all(visitor)).startswith(b"HTTP/1.1 408 ")
        assert trio.current_time() == pytest.approx(10)
        await visitor.send_eof()


async def test_a_handshake_that_stops_is_given_up_too(
    files: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    route, visitor = sni_router(files)
    outgoing = ssl.MemoryBIO()
    with pytest.raises(ssl.SSLWantReadError):
        client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=HOST).do_handshake()
    await visitor.send_all(outgoing.read())
    with pytest.raises(trio.TooSlowError):
        await route(True)
    assert trio.current_time() == pytest.approx(10)


async def test_a_visitor_that_does_not_take_its_alert_is_let_go(
    files: dict[str, Any], autojump_clock: trio.testing.MockClock
) -> None:
    route, visitor = sni_router(files, trio.testing.lockstep_stream_pair)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(route, True)
        await visitor.send_all(b"GET")
    assert trio.current_time() <= 4


def sni_router(files: dict[str, Any], pair: Callable[..., Any] = trio.testing.memory_stream_pair) -> tuple[Any, Any]:
    """A function that routes a visitor, and the visitor's stream."""
    visitor, stream = pair()
    folder: Path = files["base_dir"]
    registry = LocalRegistry([TunnelEntry(**entry) for entry in TUNNELS])
    certificate = Certificate(folder / "relay.crt", folder / "relay.key")
    router = SniRouter(registry, Ingress(registry, LocalDirectory()), certificate)

    async def route(tls: bool) -> None:
        await router.route(Visit(stream=stream, visitor=None, local=None, tls=False), tls=tls)

    return route, visitor


# The relay's own certificate


async def test_the_relay_presents_a_renewed_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificate_room, "CHECK_INTERVAL", 0)

    def issue(*names: str) -> None:
        issued = CA.issue_cert(*names)
        (tmp_path / "relay.key").write_bytes(issued.private_key_pem.bytes())
        (tmp_path / "relay.crt").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    issue(HOST)
    files: dict[str, Any] = {"tls_certificate": "relay.crt", "tls_private_key": "relay.key", "base_dir": tmp_path}
    async with relay_rig(tunnels=TUNNELS, **files) as rig:
        await trio.aclose_forcefully(await visit(rig, HOST))
        issue(HOST, "new.test")
        await trio.aclose_forcefully(await visit(rig, "new.test"))


async def test_one_shared_loopback_address_needs_no_certificate(files: dict[str, Any]) -> None:
    """A relay whose tunnels all pass through has no certificate."""
    async with relay_rig(tunnels=TUNNELS[1:]) as rig, rig.tunnel(key=BLIND_KEY) as blind:
        await blind.wait_connected()
        async with in_background(lambda: trio.serve_listeners(echo_in_tls, [blind])):
            visitor = await visit(rig, BLIND)
            await visitor.send_all(b"x")
            assert await read_exactly(visitor, 1) == b"x"
            await visitor.aclose()
        async with await connect(rig.addresses.ingress) as plain:
            assert (await ask(plain, request(host=BLIND))).startswith(b"HTTP/1.1 421 ")
