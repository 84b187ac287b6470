"""`trust`: no relay is believed that does not prove its name, over either transport, and nothing switches that off."""

from __future__ import annotations

import datetime as dt
import inspect
import re
import socket
import ssl
import struct
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

import attrs
import pytest
import trio
import trio.testing
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from rig import AT_ONCE, HANG, KEY, RELAY_NAME, connect, eventually, no_hang, read_all

from pioneer_tunnel import Address, InvalidSettingsError, RemoteAccess, RemoteAccessConfig, SettingsUpdate, open_tunnel
from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import RelayConnectError
from pioneer_tunnel._model.status import ErrorKind, State
from pioneer_tunnel._net.dialing import dial_relay
from pioneer_tunnel._net.tls.client import SYSTEM_TRUSTS, SystemTrust, client_tls, why_tls_failed
from pioneer_tunnel._net.tls.stream import TlsStream
from pioneer_tunnel.cli.expose import expose
from pioneer_tunnel.gateway.settings import Settings
from pioneer_tunnel.relay import RelayConfig, TunnelEntry

Keys: TypeAlias = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePrivateKey]
"""The private key of a certificate, and that of its issuer."""

CA: Final = trustme.CA()
PAST: Final = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


def presenting(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


def speaking_tls_1_1() -> ssl.SSLContext:
    context = presenting(CA.issue_cert(RELAY_NAME))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    return context


def wanting_a_certificate(highest: ssl.TLSVersion) -> ssl.SSLContext:
    context = presenting(CA.issue_cert(RELAY_NAME))
    context.maximum_version = highest
    context.verify_mode = ssl.CERT_REQUIRED
    CA.configure_trust(context)
    return context


def knowing_another_name() -> ssl.SSLContext:
    context = presenting(CA.issue_cert("other.test"))
    context.sni_callback = lambda *_: ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
    return context


def self_signed(folder: Path) -> ssl.SSLContext:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, RELAY_NAME)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(RELAY_NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "self.pem").write_bytes(
        certificate.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "self.pem")
    return context


IMPOSTORS: Final[dict[str, tuple[Callable[[Path], ssl.SSLContext], str]]] = {
    "another name": (lambda _: presenting(CA.issue_cert("other.test")), "another name.*relay.test.*dial it by a name"),
    "out of date": (lambda _: presenting(CA.issue_cert(RELAY_NAME, not_after=PAST)), "out of date.*clock"),
    "signed by itself": (self_signed, "not trusted.*self.signed.*ca_file"),
    "of an unknown authority": (lambda _: presenting(trustme.CA().issue_cert(RELAY_NAME)), "not trusted.*ca_file"),
    "of TLS 1.1": (lambda _: speaking_tls_1_1(), "protocol_version.*TLS 1.2 or newer"),
    "a demand": (lambda _: wanting_a_certificate(ssl.TLSVersion.TLSv1_3), "certificate_required.*client certificate"),
    "a demand in TLS 1.2": (lambda _: wanting_a_certificate(ssl.TLSVersion.TLSv1_2), "demands a client certificate"),
    "an alert": (lambda _: knowing_another_name(), "unrecognized_name: .*for the name 'relay.test'"),
}


@asynccontextmanager
async def impostor(context: ssl.SSLContext) -> AsyncIterator[tuple[Address, list[bytes]]]:
    """A listener that shakes hands, and notes what it was told after that."""
    heard: list[bytes] = []

    async def serve(stream: trio.SocketStream) -> None:
        secured = TlsStream(stream, context, server_side=True)
        with suppress(trio.BrokenResourceError):
            await secured.do_handshake()
            heard.append(bytes(await secured.receive_some()))

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield Address("127.0.0.1", listener.socket.getsockname()[1]), heard
        nursery.cancel_scope.cancel()


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("ca") / "ca.pem"
    CA.cert_pem.write_to_path(str(file))
    return file


@pytest.mark.parametrize("system_trust", SYSTEM_TRUSTS)
@pytest.mark.parametrize("transport", ["websocket", "tls"])
@pytest.mark.parametrize("which", IMPOSTORS)
async def test_who_is_not_the_relay_is_refused_and_hears_nothing(
    which: str, transport: str, system_trust: SystemTrust, ca_file: Path, tmp_path: Path
) -> None:
    make_context, told = IMPOSTORS[which]
    async with impostor(make_context(tmp_path)) as (address, heard):

        async def dial(host: str, port: int) -> trio.SocketStream:
            assert (host, port) == (RELAY_NAME, address.port)
            return await connect(address)

        bare = f"{RELAY_NAME}:{address.port}"
        async with open_tunnel(
            bare if transport == "tls" else f"wss://{bare}",
            key=KEY,
            transport=transport,
            ca_file=ca_file,
            system_trust=system_trust,
            dial=dial,
            restart=AT_ONCE,
        ) as tunnel:
            await eventually(lambda: tunnel.status.error_kind is not None)
            assert (tunnel.status.state, tunnel.status.error_kind) == (State.FAILED, ErrorKind.RELAY_CONNECT_FAILED)
            assert re.search(told, tunnel.status.message or ""), tunnel.status.message
            assert "does it speak TLS at all" not in (tunnel.status.message or "")
        assert heard == []


@pytest.mark.parametrize("system_trust", SYSTEM_TRUSTS)
async def test_the_same_relay_with_a_good_certificate_is_heard(system_trust: SystemTrust, ca_file: Path) -> None:
    """So what the others are refused for is the certificate."""
    async with impostor(presenting(CA.issue_cert(RELAY_NAME))) as (address, heard):
        async with open_tunnel(
            f"wss://{RELAY_NAME}:{address.port}",
            key=KEY,
            ca_file=ca_file,
            system_trust=system_trust,
            dial=lambda host, port: connect(address),
            restart=AT_ONCE,
        ):
            await eventually(lambda: bool(heard))
        assert heard[0].startswith(b"GET / HTTP/1.1")


@pytest.mark.parametrize("with_ca", [True, False])
@pytest.mark.parametrize("system_trust", SYSTEM_TRUSTS)
def test_tls_is_strict_whatever_it_is_told(system_trust: SystemTrust, with_ca: bool, ca_file: Path) -> None:
    context = client_tls(ca_file if with_ca else None, system_trust=system_trust)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def test_no_public_option_switches_verification_off() -> None:
    """Whoever adds an option that has to do with TLS comes by here, and shows that it leaves the checks on."""
    options = {
        *inspect.signature(open_tunnel).parameters,
        *inspect.signature(RemoteAccess).parameters,
        *(field.name for cls in (RemoteAccessConfig, Settings, SettingsUpdate) for field in attrs.fields(cls)),
        *(str(parameter.name) for parameter in expose.params),
    }
    about_tls = re.compile("tls|ssl|cert|ca_|trust|verif|insecure|check|name_|host|unsafe|skip|pin|identity|allow")
    assert {option for option in options if about_tls.search(option)} == {
        "acme_ca_file",  # for the authority's web server, with --acme
        "allow",  # addresses of visitors
        "allow_server_override",  # which relay, not whether it is checked
        "ca_file",
        "host_header",  # of requests to the local server
        "local_ca_file",  # for the local server
        "local_verify",  # the local server's certificate; the relay's is not affected
        "relay_identity",
        "system_trust",
        "tls",  # the gateway's own, for visitors
        "tls_certificate",
        "tls_private_key",
    }
    relay = {field.name for cls in (RelayConfig, TunnelEntry) for field in attrs.fields(cls)}
    assert not {option for option in relay if re.search("verif|insecure|unsafe|skip", option)}


# What blocks


async def test_truststore_works_in_threads(ca_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads the system's certificates for each connection, and may ask the operating system in the handshake."""
    from truststore import _api

    context, threads, asked = client_tls(ca_file, system_trust="os"), set(), threading.Event()
    wrap_bio = _api.SSLContext.wrap_bio

    def wrap(*args: Any, **kwargs: Any) -> ssl.SSLObject:
        threads.add(threading.get_ident())
        return wrap_bio(*args, **kwargs)

    def verify(*args: object, **kwargs: object) -> None:
        threads.add(threading.get_ident())
        asked.wait(HANG)

    monkeypatch.setattr(_api.SSLContext, "wrap_bio", wrap)
    monkeypatch.setattr(_api, "_verify_peercerts_impl", verify)
    async with impostor(presenting(CA.issue_cert(RELAY_NAME))) as (address, heard):
        for cancelled in (True, False):
            secured = TlsStream(await connect(address), context, server_hostname=RELAY_NAME)
            with trio.move_on_after(0.2 if cancelled else HANG) as handshake:
                await secured.do_handshake()
            assert handshake.cancelled_caught is cancelled, "the event loop goes on while it is asked"
            asked.set()
            if cancelled:
                await trio.aclose_forcefully(secured)
            else:
                await secured.send_all(b"hello")
                await eventually(lambda: b"hello" in heard)
                await secured.aclose()
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("system_trust", SYSTEM_TRUSTS)
async def test_a_connection_without_a_handshake_can_be_closed(system_trust: SystemTrust) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    secured = TlsStream(ours, client_tls(system_trust=system_trust), server_hostname=RELAY_NAME)
    with no_hang():
        await secured.aclose()
        await read_all(theirs)


@pytest.mark.parametrize("transport", ["websocket", "tls"])
async def test_certificates_are_read_in_a_thread(
    transport: str, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    load = ssl.SSLContext.load_verify_locations

    def note(*args: Any, **kwargs: Any) -> None:
        threads.add(threading.get_ident())
        load(*args, **kwargs)

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", note)
    async with impostor(presenting(CA.issue_cert(RELAY_NAME))) as (address, heard):
        bare = f"{RELAY_NAME}:{address.port}"
        async with open_tunnel(
            bare if transport == "tls" else f"wss://{bare}",
            key=KEY,
            transport=transport,
            ca_file=ca_file,
            dial=lambda host, port: connect(address),
            restart=AT_ONCE,
        ):
            await eventually(lambda: bool(heard))
    assert threads
    assert threading.get_ident() not in threads


# Private authorities


def issue(
    subject: str, issuer: x509.Certificate | None, keys: Keys, *, ca: bool, names: bool = False
) -> x509.Certificate:
    """A certificate as `openssl req -x509` made it for years: without key identifiers."""
    own, of_issuer = keys
    now = dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)])
    builder = (
        x509.CertificateBuilder(
            name if issuer is None else issuer.subject, name, own.public_key(), x509.random_serial_number()
        )
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
    )
    builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(RELAY_NAME)]), critical=False)
    return builder.sign(of_issuer, hashes.SHA256())


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in certificates)


@pytest.mark.parametrize("named", ["the authority", "the authority below it"])
@pytest.mark.parametrize("system_trust", SYSTEM_TRUSTS)
async def test_an_old_private_authority_is_trusted_under_each_python(
    system_trust: SystemTrust, named: str, tmp_path: Path
) -> None:
    """Its certificates have no Authority Key Identifier, which Python's own default refuses from 3.13 on."""
    root_key, middle_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    root = issue("root", None, (root_key, root_key), ca=True)
    middle = issue("middle", root, (middle_key, root_key), ca=True)
    leaf = issue(RELAY_NAME, middle, (leaf_key, middle_key), ca=False, names=True)
    (tmp_path / "ca.pem").write_bytes(pem(root if named == "the authority" else middle))
    private_key = leaf_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "relay.pem").write_bytes(pem(leaf, middle) + private_key)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(tmp_path / "relay.pem")
    context = client_tls(tmp_path / "ca.pem", system_trust=system_trust)
    async with impostor(server) as (address, _):
        secured = TlsStream(await connect(address), context, server_hostname=RELAY_NAME)
        with no_hang():
            await secured.do_handshake()
        await secured.aclose()


def test_the_rules_are_the_same_under_each_python(ca_file: Path) -> None:
    for context in (client_tls(), client_tls(ca_file), client_tls(ca_file, system_trust="os")):
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.verify_flags & ssl.VERIFY_X509_PARTIAL_CHAIN


@pytest.mark.parametrize(
    ("code", "with_ca", "told"),
    [
        (20, True, "neither the system nor the ca_file '.*ca.pem' has the authority"),
        (20, False, "a CA of your own is named by ca_file"),
        (85, True, "not acceptable.*Missing Authority Key Identifier.*issue it anew"),
        (66, False, "not acceptable.*issue it anew"),
    ],
)
def test_what_is_wrong_with_a_certificate_is_told(code: int, with_ca: bool, told: str, ca_file: Path) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = code, "Missing Authority Key Identifier" if code == 85 else "told"
    assert re.search(told, why_tls_failed(error, client_tls(ca_file if with_ca else None)))


ALERTS: Final = {
    40: "handshake_failure: .*client certificate",
    42: "bad_certificate: it demands a client certificate",
    49: "access_denied: ",
    70: "protocol_version: .*TLS 1.2 or newer",
    80: "internal_error: .*port for gateways",
    109: "missing_extension: .*by a name, not as '192.0.2.1'",
    112: "unrecognized_name: .*'192.0.2.1'",
    116: "certificate_required: it demands a client certificate",
    120: "no_application_protocol: ",
}


@pytest.mark.parametrize("number", [*ALERTS, 0, 99, 255])
async def test_an_alert_is_named_and_what_it_demands(number: int) -> None:
    """Whoever sends one speaks TLS, also if nobody knows what it means."""
    message = await why_a_handshake_fails(bytes([21, 3, 3, 0, 2, 2, number]))
    assert re.search(ALERTS.get(number, "TLS"), message), message
    assert "does it speak TLS" not in message


async def test_a_demand_is_heard_also_after_the_connection_was_reset(ca_file: Path) -> None:
    """A TLS 1.3 server refuses when the client believes that the handshake is over, and may close with a reset."""
    context = wanting_a_certificate(ssl.TLSVersion.TLSv1_3)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            connection, _ = listener.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.settimeout(HANG)
            with suppress(ssl.SSLError), connection:
                connection = context.wrap_socket(connection, server_side=True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, refuse)
            stream = await connect(Address(*listener.getsockname()))
            secured = TlsStream(stream, client_tls(ca_file), server_hostname=RELAY_NAME)
            await secured.do_handshake()
        with pytest.raises(trio.BrokenResourceError, match="certificate_required"):
            await secured.send_all(b"hello")
        await trio.aclose_forcefully(secured)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", r"plain HTTP; does it speak TLS at all\?.*ws://"),
        (b"SSH-2.0-what\r\n", r"does it speak TLS at all\?"),
        (bytes([0]) * 20, r"does it speak TLS at all\?"),
        (b"HTTP", "closed during the handshake"),
        (bytes([22, 3, 3, 0, 90]), "closed during the handshake"),
        (b"", "closed during the handshake"),
    ],
)
async def test_an_answer_that_is_not_tls_is_told_as_such(answer: bytes, told: str) -> None:
    assert re.search(told, message := await why_a_handshake_fails(answer)), message


async def why_a_handshake_fails(answer: bytes) -> str:
    """What is reported of a server that gives this answer to any hello."""
    ours, theirs = trio.testing.memory_stream_pair()

    async def dial(host: str, port: int) -> trio.abc.Stream:
        await theirs.send_all(answer)
        await theirs.send_eof()
        return ours

    address = RelayAddress.parse("wss://192.0.2.1:8443")
    with pytest.raises(RelayConnectError) as caught:
        await dial_relay(address, dial=dial, tls=client_tls(), timeout=HANG)
    return str(caught.value)


# What is trusted


def test_a_ca_file_is_trusted_beside_the_systems(ca_file: Path) -> None:
    assert client_tls(ca_file).cert_store_stats()["x509_ca"] == client_tls().cert_store_stats()["x509_ca"] + 1


@pytest.mark.parametrize("system_trust", SYSTEM_TRUSTS)
def test_a_ca_file_that_cannot_be_used_is_named(system_trust: SystemTrust, tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_text("")
    (tmp_path / "garbage.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    for name in ("missing.pem", "empty.pem", "garbage.pem"):
        with pytest.raises(InvalidSettingsError, match=f"{name}' cannot be used: "):
            client_tls(tmp_path / name, system_trust=system_trust)


async def test_without_truststore_the_operating_systems_trust_is_not_replaced_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "truststore", None)
    async with open_tunnel("wss://relay.test", key=KEY, system_trust="os", restart=AT_ONCE) as tunnel:
        with no_hang(), pytest.raises(InvalidSettingsError, match=r"pioneer-tunnel\[truststore\]"):
            await tunnel.accept()
    client_tls(system_trust="openssl")


async def test_an_unknown_trust_is_refused() -> None:
    with pytest.raises(InvalidSettingsError, match=r"'all'.*openssl, os"):
        async with open_tunnel("wss://relay.test", key=KEY, system_trust="all"):  # type: ignore[arg-type]
            pass
    with pytest.raises(InvalidSettingsError, match=r"system_trust = 'all'.*'openssl' and 'os'"):
        RemoteAccessConfig.from_table({"system_trust": "all"})
