"""Each failure between a gateway and its relay, provoked over real sockets, and what `diagnose` says of it."""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs
import pytest
import trio
import trustme
from resolving import resolving
from rig import KEY, RELAY_NAME, free_port, read_until, relay_config, tunnel_entry

from pioneer_tunnel._model.errors import InvalidSettingsError
from pioneer_tunnel._model.keys import RelayKey, SigningIdentity
from pioneer_tunnel._model.status import State
from pioneer_tunnel._net.delivery import Delivery
from pioneer_tunnel._net.tcp import TcpStream
from pioneer_tunnel.diagnosis import certificates, native_link
from pioneer_tunnel.diagnosis.checks import Check, Name, Outcome, exit_status
from pioneer_tunnel.diagnosis.diagnose import diagnose
from pioneer_tunnel.gateway.config import RemoteAccessConfig
from pioneer_tunnel.relay import Relay
from pioneer_tunnel.testing import open_pioneer_relay
from pioneer_tunnel.tunnel.tunnel import open_tunnel
from pioneer_tunnel.websocket import ENGINES, EngineName

CA: Final = trustme.CA(organization_name="Relays of the tests")
OTHER_KEY: Final = RelayKey("ptk1_another-key-of-the-tests-0123456789abc")
ALL: Final = [*Name]

Handler: TypeAlias = Callable[[trio.abc.Stream], Awaitable[None]]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    return name


@pytest.fixture
def ca_file(tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    CA.cert_pem.write_to_path(str(path))
    return path


@asynccontextmanager
async def relay_at(port: int, **changes: Any) -> AsyncIterator[Relay]:
    """A relay whose name resolves to it."""
    config = relay_config(
        control_addr=f"127.0.0.1:{port}", public_names=[f"{RELAY_NAME}:{port}", f"localhost:{port}"], **changes
    )
    with resolving("127.0.0.1"):
        async with trio.open_nursery() as nursery:
            relay = Relay(config)
            await nursery.start(relay.serve)
            yield relay
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that is no relay. It ends TLS if it has a context."""

    async def serve(stream: trio.SocketStream) -> None:
        with suppress(trio.BrokenResourceError):
            if tls is None:
                await handler(stream)
            else:
                secured = trio.SSLStream(stream, tls, server_side=True)
                await secured.do_handshake()
                await handler(secured)

    async with trio.open_nursery() as nursery:
        [listener] = await nursery.start(functools.partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def answering(answer: bytes) -> Handler:
    async def handler(stream: trio.abc.Stream) -> None:
        await read_until(stream, b"\r\n\r\n")
        await stream.send_all(answer)
        await stream.receive_some(1)

    return handler


async def silent(_: trio.abc.Stream) -> None:
    await trio.sleep_forever()


def page(status: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Length: 0", *headers, "", ""]).encode()


async def run(
    address: str,
    key: RelayKey | None = KEY,
    *,
    engine: EngineName | None = None,
    instance: str | None = None,
    **options: Any,
) -> list[Check]:
    """All checks, each in its place, and none with a secret."""
    config = RemoteAccessConfig(relay_addr=address, **({"proxy": "none"} | options))
    servers = {"": config.local, **config.services} if "local_addr" in options else {}
    reported: list[Check] = []
    checks = await diagnose(config, key, report=reported.append, servers=servers, instance=instance, engine=engine)
    assert checks == reported
    assert [check.name for check in checks] == ALL
    assert all(secret.reveal() not in repr(checks) for secret in (KEY, OTHER_KEY))
    return checks


def of(checks: list[Check], name: Name) -> Check:
    return checks[ALL.index(name)]


def outcomes(checks: list[Check]) -> str:
    """Of each check, the first letter of its outcome."""
    return "".join(check.outcome[0] for check in checks)


# Nothing is wrong


async def test_a_relay_without_tls_on_this_host(engine: EngineName) -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}", engine=engine)
    assert outcomes(checks) == "oos" + "ss" + "ooo" + "oo" + "s"
    assert of(checks, Name.PROOF).detail == "the relay accepts the key; visitors come in at http://office.test"
    assert exit_status(checks) == 0


async def test_a_relay_with_tls_and_a_gateway(engine: EngineName, tmp_path: Path, ca_file: Path) -> None:
    port, local = free_port(), free_port()
    certificate = CA.issue_cert(RELAY_NAME)
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "chain.pem"))
    identity_file = tmp_path / "identity"
    identity_file.write_text("11" * 32)
    identity_file.chmod(0o600)
    identity = SigningIdentity.from_seed(bytes.fromhex("11" * 32)).public_key
    tls = {"tls_certificate": tmp_path / "chain.pem", "tls_private_key": tmp_path / "key.pem"}
    async with relay_at(port, **tls, identity_key_file=identity_file), trio.open_nursery() as nursery:
        await nursery.start(trio.serve_tcp, silent, local)
        checks = await run(
            f"wss://{RELAY_NAME}:{port}",
            engine=engine,
            ca_file=ca_file,
            relay_identity=identity,
            local_addr=f"127.0.0.1:{local}",
        )
        nursery.cancel_scope.cancel()
    assert outcomes(checks) == "oos" + "oo" + "ooo" + "oo" + "o"
    assert of(checks, Name.TLS).detail.startswith("TLSv1.3; the certificate is valid until 3000-01-01")
    assert of(checks, Name.INTERCEPTION).detail == (
        "issued by 'Relays of the tests', an authority of the configured CA file"
    )
    assert of(checks, Name.PROOF).detail.startswith("the relay accepts the key, and has the pinned identity")


async def test_a_running_gateway_keeps_its_tunnel(engine: EngineName) -> None:
    port = free_port()
    async with relay_at(port), open_tunnel(f"ws://{RELAY_NAME}:{port}", key=KEY) as tunnel:
        await tunnel.wait_connected()
        for _ in range(3):
            checks = await run(f"ws://{RELAY_NAME}:{port}", engine=engine)
            assert of(checks, Name.PROOF).outcome is Outcome.OK
            assert of(checks, Name.MTU).outcome in {Outcome.OK, Outcome.SKIPPED}
        await trio.sleep(0.2)
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}


async def test_without_a_key_there_is_no_proof() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}", None)
    assert of(checks, Name.UPGRADE).outcome is Outcome.OK
    assert of(checks, Name.PROOF).detail == "no key was given"
    assert exit_status(checks) == 0


# Names and TCP


async def test_a_name_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", getaddrinfo)
    checks = await run("ws://relay.test")
    assert outcomes(checks) == "f" + "s" * 10
    assert of(checks, Name.NAMES).detail == "'relay.test' does not resolve: Name or service not known"
    assert of(checks, Name.PROOF).detail == "needs what failed above: names"
    assert exit_status(checks) == 10


async def test_a_resolver_that_does_not_answer() -> None:
    with resolving():
        checks = await run("ws://relay.test", connect_timeout_ms=100)
    assert "no name server answered within 0.1 seconds" in of(checks, Name.NAMES).detail


async def test_addresses_are_told_by_family() -> None:
    port = free_port()
    with resolving("127.0.0.1", "::1", "127.0.0.2"):
        checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.NAMES).detail == "IPv4: 127.0.0.1, 127.0.0.2; IPv6: ::1"


async def test_a_port_that_refuses() -> None:
    checks = await run(f"ws://127.0.0.1:{free_port()}")
    assert outcomes(checks) == "of" + "s" * 9
    assert of(checks, Name.TCP).detail.endswith("127.0.0.1: Connection refused")
    assert "nothing listens at this port" in (of(checks, Name.TCP).cure or "")
    assert exit_status(checks) == 11


@pytest.mark.skipif(not Path("/proc/net").exists(), reason="elsewhere a full backlog refuses")
async def test_a_port_that_does_not_answer() -> None:
    with socket.socket() as listener, socket.socket() as one, socket.socket() as two:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (one, two):  # the backlog is full then, and the kernel drops what comes
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        await trio.sleep(0.05)
        checks = await run(f"ws://127.0.0.1:{listener.getsockname()[1]}", connect_timeout_ms=300)
    assert of(checks, Name.TCP).detail.endswith(": 127.0.0.1: no answer")
    assert "a firewall" in (of(checks, Name.TCP).cure or "")


async def test_one_of_two_addresses_refuses() -> None:
    port = free_port()
    async with relay_at(port):
        with resolving("127.0.0.2", "127.0.0.1"):
            checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.TCP).outcome is Outcome.WARNING
    assert of(checks, Name.TCP).detail == "127.0.0.2: Connection refused; 127.0.0.1: connected"
    assert of(checks, Name.PROOF).outcome is Outcome.OK
    assert exit_status(checks) == 0


# The proxy


def proxy(answer: bytes | None = None) -> Handler:
    """An HTTP proxy that makes tunnels to ports of this host, or gives one answer to all."""

    async def handler(stream: trio.abc.Stream) -> None:
        head = await read_until(stream, b"\r\n\r\n")
        if answer is not None:
            await stream.send_all(answer)
            return
        port = int(head.split(b" ")[1].rpartition(b":")[2])
        async with await trio.open_tcp_stream("127.0.0.1", port) as relay, trio.open_nursery() as nursery:
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n")

            async def carry(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    while data := await source.receive_some():
                        await sink.send_all(data)
                nursery.cancel_scope.cancel()

            nursery.start_soon(carry, stream, relay)
            nursery.start_soon(carry, relay, stream)

    return handler


async def test_through_a_proxy_nothing_of_the_relay_is_resolved_or_dialled_here() -> None:
    port = free_port()
    async with relay_at(port), listening(proxy()) as proxy_port:
        with resolving("127.0.0.2") as resolver:
            checks = await run(f"ws://{RELAY_NAME}:{port}", proxy=f"http://localhost:{proxy_port}")
            assert outcomes(checks)[0] == "o"
            assert exit_status(checks) == 11  # the proxy's name does not lead to it
            assert set(resolver.asked) == {"localhost"}
        checks = await run(f"ws://{RELAY_NAME}:{port}", proxy=f"http://127.0.0.1:{proxy_port}")
    assert outcomes(checks) == "ooo" + "ws" + "ooo" + "oo" + "s"
    assert of(checks, Name.PROXY).detail == f"the proxy http://127.0.0.1:{proxy_port} has made a tunnel"


async def test_a_proxy_that_wants_credentials() -> None:
    refusing = proxy(page("407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="x"'))
    async with listening(refusing) as port:
        checks = await run("wss://relay.test", proxy=f"http://127.0.0.1:{port}")
    assert outcomes(checks)[:4] == "oofs"
    assert "proxy_credentials_file" in of(checks, Name.PROXY).detail
    assert exit_status(checks) == 12


async def test_a_proxy_that_opens_tls_is_seen_through_the_proxy(ca_file: Path) -> None:
    intercepting = server_tls(trustme.CA(organization_name="Guard Inc.").issue_cert("localhost"))
    async with listening(silent, intercepting) as port, listening(proxy()) as proxy_port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file, proxy=f"http://127.0.0.1:{proxy_port}")
    assert f"through the proxy http://127.0.0.1:{proxy_port}" in of(checks, Name.TLS).detail
    assert of(checks, Name.INTERCEPTION).detail.endswith("was issued by 'Guard Inc.'")


async def test_a_proxy_of_the_environment_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "gopher://proxy.test:1")
    with pytest.raises(InvalidSettingsError, match="https_proxy"):
        await run("wss://relay.test", proxy=None)


# TLS


def server_tls(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


async def test_a_certificate_of_an_unknown_authority() -> None:
    async with listening(
        silent, server_tls(trustme.CA(organization_name="Guard Inc.").issue_cert("localhost"))
    ) as port:
        checks = await run(f"wss://localhost:{port}")
    assert outcomes(checks)[3:] == "fwssssss"
    assert "not trusted" in of(checks, Name.TLS).detail
    assert of(checks, Name.INTERCEPTION).detail.endswith("was issued by 'Guard Inc.'")
    assert exit_status(checks) == 13


async def test_a_certificate_that_has_expired(ca_file: Path) -> None:
    past = datetime.now(UTC) - timedelta(days=2)
    expired = CA.issue_cert("localhost", not_before=past - timedelta(days=9), not_after=past)
    async with listening(silent, server_tls(expired)) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file)
    assert "out of date" in of(checks, Name.TLS).detail
    clock = of(checks, Name.CLOCK)
    assert clock.outcome is Outcome.WARNING
    assert f"to {past:%Y-%m-%d}" in clock.detail


async def test_a_certificate_for_another_name(ca_file: Path) -> None:
    async with listening(silent, server_tls(CA.issue_cert("elsewhere.test"))) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file)
    assert "for another name" in of(checks, Name.TLS).detail
    assert exit_status(checks) == 13


async def test_a_port_that_is_silent_in_tls() -> None:
    async with listening(silent) as port:
        checks = await run(f"wss://localhost:{port}", connect_timeout_ms=2000)
    assert of(checks, Name.TLS).detail == f"TLS with wss://localhost:{port} was not agreed on within 2 seconds"


async def test_tls_that_works_with_small_packets_alone(ca_file: Path) -> None:
    """The certificates of some relays fill several packets, and a path may drop all that are large."""
    context, seen = server_tls(CA.issue_cert("localhost")), 0

    async def large_packets_vanish(stream: trio.abc.Stream) -> None:
        nonlocal seen
        seen += 1
        assert isinstance(stream, trio.SocketStream)
        if stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) > 1500:
            await trio.sleep_forever()
        tls = trio.SSLStream(stream, context, server_side=True)
        await tls.do_handshake()
        await trio.sleep_forever()

    async with listening(large_packets_vanish) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file, connect_timeout_ms=2000)
    assert "with packets of 1220 bytes it is, so larger ones get lost on the way" in of(checks, Name.TLS).detail
    assert seen == 2


async def test_plain_http_where_tls_is_dialled() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"wss://{RELAY_NAME}:{port}")
    assert "answers in plain HTTP" in of(checks, Name.TLS).detail


async def test_an_authority_that_was_added_to_this_host_is_told(
    ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = tmp_path / "added"
    added.mkdir()
    monkeypatch.setattr(certificates, "ADDED_AUTHORITIES", (tmp_path / "nowhere", added))
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    async with listening(silent, server_tls(CA.issue_cert("localhost"))) as port:
        options: dict[str, Any] = {"connect_timeout_ms": 2000}
        replaced = of(await run(f"wss://localhost:{port}", **options), Name.INTERCEPTION)
        ca_file.rename(added / "company.crt")
        monkeypatch.setenv("SSL_CERT_FILE", str(added / "company.crt"))
        told = of(await run(f"wss://localhost:{port}", **options), Name.INTERCEPTION)
    assert (replaced.outcome, replaced.detail.partition("; ")[2]) == (
        Outcome.OK,
        "the authorities that are trusted here come from SSL_CERT_FILE",
    )
    assert told.outcome is Outcome.WARNING
    assert told.detail.endswith(f"an authority that was added to this host: {added / 'company.crt'}")


# The upgrade


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (page("302 Found", "Location: http://portal.test/login"), "redirect to 'http://portal.test/login'"),
        (page("200 OK"), "a web page"),
    ],
)
async def test_a_sign_in_page_in_place_of_the_relay(engine: EngineName, answer: bytes, told: str) -> None:
    async with listening(answering(answer)) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine)
    assert outcomes(checks)[5:] == "fsssss"
    assert told in of(checks, Name.CAPTIVE_PORTAL).detail
    assert exit_status(checks) == 15


async def test_a_page_from_whoever_has_the_relays_certificate_is_no_sign_in_page(ca_file: Path) -> None:
    async with listening(answering(page("200 OK")), server_tls(CA.issue_cert("localhost"))) as port:
        checks = await run(f"wss://localhost:{port}", ca_file=ca_file)
    assert of(checks, Name.CAPTIVE_PORTAL).outcome is Outcome.OK
    assert of(checks, Name.UPGRADE).outcome is Outcome.FAILED
    assert exit_status(checks) == 16


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (page("404 Not Found"), "HTTP status 404; is this where the relay takes gateways"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer as a WebSocket"),
        (b"", "did not answer the request for a WebSocket within 1 seconds"),
    ],
)
async def test_what_is_no_relay(engine: EngineName, answer: bytes, told: str) -> None:
    async with listening(answering(answer)) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine, connect_timeout_ms=1000)
    assert told in of(checks, Name.UPGRADE).detail
    assert of(checks, Name.PROOF).outcome is Outcome.SKIPPED
    assert exit_status(checks) == 16


async def test_a_clock_that_differs(engine: EngineName) -> None:
    async with listening(answering(page("404 Not Found", "Date: Sun, 06 Nov 1994 08:49:37 GMT"))) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine)
    clock = of(checks, Name.CLOCK)
    assert clock.outcome is Outcome.WARNING
    assert clock.detail.endswith("the relay's 1994-11-06 08:49 UTC")


async def test_a_date_that_is_none(engine: EngineName) -> None:
    async with listening(answering(page("404 Not Found", "Date: tomorrow"))) as port:
        checks = await run(f"ws://localhost:{port}", engine=engine)
    assert of(checks, Name.CLOCK).detail == "the answer has no date"


# The proof


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"key": OTHER_KEY}, "the relay rejected the key"),
        ({"service_name": "elsewhere"}, "does not know the service 'elsewhere'"),
        ({"relay_identity": OTHER_KEY.identity().public_key}, "did not prove the identity that is pinned"),
    ],
)
async def test_a_relay_that_rejects_the_gateway_or_is_another(changes: dict[str, Any], told: str) -> None:
    port = free_port()
    async with relay_at(port, tunnels=[tunnel_entry(service="office")]):
        checks = await run(f"ws://{RELAY_NAME}:{port}", **({"service_name": "office"} | changes))
    assert told in of(checks, Name.PROOF).detail
    assert of(checks, Name.MTU).outcome is Outcome.SKIPPED
    assert exit_status(checks) == 18


async def test_a_relay_that_does_not_go_by_the_dialled_name() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://127.0.0.1:{port}")
    assert f"does not go by the name '127.0.0.1:{port}'" in of(checks, Name.PROOF).detail


async def test_a_tunnel_that_another_gateway_keeps_proves_nothing() -> None:
    port = free_port()
    url = f"ws://{RELAY_NAME}:{port}"
    async with (
        relay_at(port, tunnels=[tunnel_entry(takeover="first")]),
        open_tunnel(url, key=KEY, instance="cellar") as tunnel,
    ):
        await tunnel.wait_connected()
        checks = await run(url)
        as_the_same_gateway = await run(url, instance="cellar")
    assert of(as_the_same_gateway, Name.PROOF).outcome is Outcome.OK
    proof = of(checks, Name.PROOF)
    assert proof.outcome is Outcome.WARNING
    assert "busy" in proof.detail
    assert exit_status(checks) == 0


# Large packets


@pytest.mark.parametrize(
    ("progress", "path", "outcome", "told"),
    [
        (0, True, Outcome.FAILED, "bytes get lost on the way, and small ones arrive"),
        (0, False, Outcome.FAILED, "nothing arrives any more"),
        (3000, True, Outcome.WARNING, "a slow network"),
    ],
)
async def test_large_packets_that_do_not_arrive(
    monkeypatch: pytest.MonkeyPatch, progress: int, path: bool, outcome: Outcome, told: str
) -> None:
    port, real = free_port(), TcpStream.delivery
    first: list[Delivery] = []

    def delivery(stream: TcpStream) -> Delivery | None:
        told = real(stream)
        if told is None or stream.socket.getpeername()[1] != port:  # the relay's end of it
            return told
        if not first:
            first.append(told)
            return told
        return attrs.evolve(told, acknowledged=first[0].written + progress, written=first[0].written + 15_000)

    async def small_packets_arrive(*_: object, **__: object) -> bool:
        return path

    monkeypatch.setattr(TcpStream, "delivery", delivery)
    monkeypatch.setattr(native_link, "small_packets_arrive", small_packets_arrive)
    monkeypatch.setattr(native_link, "ACKNOWLEDGED_WITHIN", 0.1)
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.MTU).outcome is outcome
    assert told in of(checks, Name.MTU).detail
    assert exit_status(checks) == (19 if outcome is Outcome.FAILED else 0)


async def test_where_the_system_tells_nothing_of_packets_the_mtu_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TcpStream, "delivery", lambda _: None)
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}")
    assert of(checks, Name.MTU).outcome is Outcome.SKIPPED


# The local gateway, and other transports


async def test_no_local_gateway() -> None:
    port = free_port()
    async with relay_at(port):
        checks = await run(f"ws://{RELAY_NAME}:{port}", local_addr=f"127.0.0.1:{free_port()}")
    assert "Connection refused" in of(checks, Name.LOCAL_GATEWAY).detail
    assert exit_status(checks) == 20


async def test_one_of_two_services_does_not_answer() -> None:
    async with listening(silent) as port, listening(answering(page("404 Not Found"))) as relay:
        local, services = f"127.0.0.1:{port}", {"ssh": f"127.0.0.1:{free_port()}"}
        checks = await run(f"ws://localhost:{relay}", local_addr=local, services=services)
    detail = of(checks, Name.LOCAL_GATEWAY).detail
    assert detail.startswith("ssh: the local gateway at")
    assert detail.endswith(f"{local} answers")


async def test_the_first_failure_decides_the_exit_status() -> None:
    checks = await run(f"ws://127.0.0.1:{free_port()}", local_addr=f"127.0.0.1:{free_port()}")
    assert of(checks, Name.LOCAL_GATEWAY).outcome is Outcome.FAILED
    assert exit_status(checks) == 11


async def test_a_pioneer_relay_is_not_asked_to_give_the_tunnel_away() -> None:
    async with (
        open_pioneer_relay(key=KEY) as relay,
        open_tunnel(str(relay.address), transport="tcp", key=KEY) as tunnel,
    ):
        await tunnel.wait_connected()
        checks = await run(str(relay.address))
        await trio.sleep(0.1)
        assert {status.state for status in tunnel.history} == {State.STARTING, State.CONNECTED}
    assert of(checks, Name.UPGRADE).detail == "a relay answers (Pioneer Relay or rathole, version 1)"
    assert of(checks, Name.PROOF).outcome is Outcome.SKIPPED
    assert exit_status(checks) == 0


async def test_a_pioneer_relay_that_is_none() -> None:
    async with listening(answering(page("400 Bad Request"))) as port:
        checks = await run(f"localhost:{port}", connect_timeout_ms=500)
    assert exit_status(checks) == 16


async def test_transport_process_has_a_way_of_its_own() -> None:
    checks = await run(
        "relay.test:7000",
        transport="process",
        process={"command": ["/bin/true"]},
        local_addr=f"127.0.0.1:{free_port()}",
    )
    assert outcomes(checks) == "s" * 10 + "f"
    assert exit_status(checks) == 20
