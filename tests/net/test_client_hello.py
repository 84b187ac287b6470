"""`_net.tls.client_hello`: OpenSSL's own hellos in any pieces, and everything that is no hello refused by rule."""

from __future__ import annotations

import itertools
import ssl
import struct
from typing import Any, Final

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st

from pioneer_tunnel._model.errors import LocalProtocolError
from pioneer_tunnel._net.tls.client_hello import Alert, BadClientHello, ClientHello, ClientHelloReader, looks_like_tls

NAME: Final = "office.test"


def openssl_hello(name: str | None, **settings: Any) -> bytes:
    """The ClientHello of the OpenSSL that Python has."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for setting, value in settings.items():
        if setting == "alpn":
            context.set_alpn_protocols(value)
        else:
            setattr(context, setting, value)
    context.check_hostname = name is not None
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


HELLOS: Final = {
    "TLS 1.3": (openssl_hello(NAME), ClientHello(NAME)),
    "TLS 1.2": (openssl_hello(NAME, maximum_version=ssl.TLSVersion.TLSv1_2), ClientHello(NAME)),
    "with ALPN": (openssl_hello(NAME, alpn=["h2", "http/1.1"]), ClientHello(NAME, (b"h2", b"http/1.1"))),
    "upper case": (openssl_hello("OFFICE.Test"), ClientHello(NAME)),
    "nobody": (openssl_hello(None), ClientHello(None)),
    "long": (openssl_hello("a." * 100 + "test"), ClientHello("a." * 100 + "test")),
    "internationalised": (openssl_hello("büro.example"), ClientHello("xn--bro-hoa.example")),
}
AN_OPENSSL_HELLO: Final = st.sampled_from(sorted(HELLOS.values(), key=repr))


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size) + data


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack("!H", kind) + vector(2, data)


def server_names(*names: bytes, kind: int = 0) -> bytes:
    return extension(0, vector(2, b"".join(bytes([kind]) + vector(2, name) for name in names)))


def message(
    *extensions: bytes,
    version: bytes = b"\3\3",
    session: bytes = b"",
    ciphers: bytes = b"\x13\x01",
    compression: bytes = b"\0",
    tail: bytes | None = None,
    kind: int = 1,
) -> bytes:
    """A hello by hand; `tail` takes the place of its extensions."""
    body = version + bytes(32) + vector(1, session) + vector(2, ciphers) + vector(1, compression)
    body += vector(2, b"".join(extensions)) if tail is None else tail
    return bytes([kind]) + vector(3, body)


def records(handshake: bytes, size: int = 2**14, version: bytes = b"\3\1") -> bytes:
    pieces = [handshake[start : start + size] for start in range(0, len(handshake), size)]
    return b"".join(b"\x16" + version + vector(2, piece) for piece in pieces)


def read(data: bytes, cuts: list[int] | None = None) -> ClientHello | BadClientHello | None:
    """The verdict on `data`, cut into pieces at `cuts`."""
    reader = ClientHelloReader()
    borders = [0, *sorted(cuts or []), len(data)]
    fed = b""
    try:
        for start, end in itertools.pairwise(borders):
            hello = reader.feed(data[start:end])
            fed += data[start:end]
            assert reader.received == fed
            if hello is not None:
                return hello
    except BadClientHello as error:
        return error
    return None


def verdict(data: bytes, cuts: list[int] | None = None) -> object:
    found = read(data, cuts)
    return (found.alert, str(found)) if isinstance(found, BadClientHello) else found


def alert_of(data: bytes) -> Alert:
    found = read(data)
    assert isinstance(found, BadClientHello), found
    return found.alert


# Real ones


@pytest.mark.parametrize("which", HELLOS)
def test_openssls_hello_tells_its_name(which: str) -> None:
    data, expected = HELLOS[which]
    assert looks_like_tls(data)
    assert read(data) == expected
    assert read(data, list(range(len(data)))) == expected
    assert read(data[:-1]) is None


@fuzzed()
@given(AN_OPENSSL_HELLO, st.integers(1, 600), st.lists(st.integers(0, 3000)), st.binary(max_size=40))
def test_it_is_the_same_in_any_records_any_pieces_and_with_anything_behind(
    hello: tuple[bytes, ClientHello], size: int, cuts: list[int], behind: bytes
) -> None:
    data, expected = hello
    fragmented = records(data[5:], size)
    assert read(fragmented + behind, [min(cut, len(fragmented)) for cut in cuts]) == expected


def test_one_byte_in_each_record_is_a_hello_too() -> None:
    data, expected = HELLOS["TLS 1.3"]
    assert read(records(data[5:], 1)) == expected


def test_what_came_behind_it_is_kept() -> None:
    data, _ = HELLOS["TLS 1.3"]
    reader = ClientHelloReader()
    assert reader.feed(data + b"early data") is not None
    assert reader.received == data + b"early data"


# By hand: what is taken


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (records(message(server_names(b"office.test"))), NAME),
        (records(message(server_names(b"OFFICE.test."))), NAME),
        (records(message(extension(0x0A0A, b""), server_names(b"office.test"), extension(0x1A1A, b"\0"))), NAME),
        (records(message(ciphers=b"\x2a\x2a\x13\x01")), None),
        (records(message(tail=b"")), None),
        (records(message(), version=b"\3\0"), None),
        (records(message(server_names(b"office.test"), version=b"\3\1")), NAME),
        (records(message(server_names(b"office.test"), version=b"\3\0")), NAME),
        (records(message(server_names(b"203.0.113.7"))), None),
        (records(message(server_names(b"2001:db8::1"))), None),
        (records(message(server_names(b"[2001:db8::1]"))), None),
        # Encrypted Client Hello: what it hides is none of a relay's business.
        (records(message(extension(0xFE0D, bytes(200)), server_names(b"outer.test"))), "outer.test"),
    ],
    ids=["one name", "case and dot", "grease", "grease suites", "no extensions", "version 3.0", "TLS 1.0", "SSL 3",
         "IPv4", "IPv6", "IPv6 in brackets", "outer name"],
)  # fmt: skip
def test_what_is_taken(data: bytes, name: str | None) -> None:
    assert read(data) == ClientHello(name)
    assert read(data, list(range(len(data)))) == ClientHello(name)


# By hand: what is refused


@pytest.mark.parametrize(
    ("data", "alert"),
    [
        (b"GET / HTTP/1.1\r\n", Alert.UNEXPECTED_MESSAGE),
        (b"\x80\x2e\x01\x03\x01", Alert.UNEXPECTED_MESSAGE),
        (b"\x17\x03\x03\x00\x01x", Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x02", Alert.PROTOCOL_VERSION),
        (b"\x16\x03\x01\0\0", Alert.UNEXPECTED_MESSAGE),
        (b"\x16\x03\x01\x40\x01", Alert.RECORD_OVERFLOW),
        (records(message(kind=2)), Alert.UNEXPECTED_MESSAGE),
        (records(message() + b"\0"), Alert.UNEXPECTED_MESSAGE),
        (records(message(*(extension(number, b"") for number in range(17, 146)))), Alert.ILLEGAL_PARAMETER),
        (records(message()[:8]) + b"\x15\x03\x01\x00\x02\x01\x00", Alert.UNEXPECTED_MESSAGE),
        (records(message(version=b"\2\0")), Alert.PROTOCOL_VERSION),
        (records(message(session=bytes(33))), Alert.DECODE_ERROR),
        (records(message(ciphers=b"")), Alert.DECODE_ERROR),
        (records(message(ciphers=b"\x13\x01\x13")), Alert.DECODE_ERROR),
        (records(message(compression=b"")), Alert.DECODE_ERROR),
        (records(message(tail=b"\0")), Alert.DECODE_ERROR),
        (records(message(tail=b"\0\1")), Alert.DECODE_ERROR),
        (records(message(tail=b"\0\0\0")), Alert.DECODE_ERROR),
        (records(message(b"\0\0\0\1")), Alert.DECODE_ERROR),
        (records(message(server_names(b"a.test", b"b.test"))), Alert.ILLEGAL_PARAMETER),
        (records(message(server_names(b"a.test"), server_names(b"b.test"))), Alert.ILLEGAL_PARAMETER),
        (records(message(extension(0x0A0A, b""), extension(0x0A0A, b""))), Alert.ILLEGAL_PARAMETER),
        (records(message(server_names(b"a.test", kind=1))), Alert.ILLEGAL_PARAMETER),
        (records(message(extension(16, b""))), Alert.DECODE_ERROR),
        (records(message(extension(16, vector(2, b"")))), Alert.DECODE_ERROR),
        (records(message(extension(16, vector(2, b"\0")))), Alert.DECODE_ERROR),
        (records(message(extension(16, vector(2, b"\2h2\0")))), Alert.DECODE_ERROR),
        (records(message(extension(16, vector(2, b"\3h2")))), Alert.DECODE_ERROR),
        (records(message(extension(16, vector(2, b"\2h2") + b"x"))), Alert.DECODE_ERROR),
        (records(message(server_names(b""))), Alert.DECODE_ERROR),
        (records(message(server_names())), Alert.DECODE_ERROR),
        (records(message(extension(0, b""))), Alert.DECODE_ERROR),
        (records(message(extension(0, vector(2, b"\0" + vector(2, b"a.test")) + b"\0"))), Alert.DECODE_ERROR),
        (records(message(server_names(b"office.test\0.evil"))), Alert.ILLEGAL_PARAMETER),
        (records(message(server_names(b"two words"))), Alert.ILLEGAL_PARAMETER),
        (records(message(server_names(b"b\xc3\xbcro.test"))), Alert.ILLEGAL_PARAMETER),
        (records(message(server_names(b"a" * 300))), Alert.ILLEGAL_PARAMETER),
        (records(message(extension(21, bytes(40_000)))), Alert.ILLEGAL_PARAMETER),
        # Small, but for the headers of its records.
        (records(b"\1" + (20_000).to_bytes(3) + bytes(20_000), 1), Alert.ILLEGAL_PARAMETER),
    ],
)  # fmt: skip
def test_what_is_refused(data: bytes, alert: Alert) -> None:
    assert alert_of(data) is alert
    assert verdict(data, list(range(len(data)))) == verdict(data)


def test_an_oversize_hello_is_refused_before_it_has_come() -> None:
    assert alert_of(b"\x16\x03\x01\x00\x04\x01" + (2**24 - 1).to_bytes(3)) is Alert.ILLEGAL_PARAMETER
    assert read(records(message(extension(21, bytes(30_000)), server_names(b"office.test")))) == ClientHello(NAME)


def test_the_refused_name_is_not_quoted() -> None:
    refused = read(records(message(server_names(b"secret name"))))
    assert isinstance(refused, BadClientHello)
    assert "secret" not in str(refused)
    assert refused.__context__ is None or refused.__suppress_context__


@fuzzed()
@given(st.binary(max_size=300) | st.binary(max_size=200).map(records), st.lists(st.integers(0, 300)))
def test_junk_is_refused_or_incomplete_and_the_same_in_any_pieces(data: bytes, cuts: list[int]) -> None:
    assert verdict(data, [min(cut, len(data)) for cut in cuts]) == verdict(data)


@fuzzed()
@given(AN_OPENSSL_HELLO, st.data())
def test_a_hello_with_any_byte_changed_is_a_hello_or_refused(
    hello: tuple[bytes, ClientHello], data: st.DataObject
) -> None:
    changed = bytearray(hello[0])
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    assert verdict(bytes(changed), list(range(len(changed)))) == verdict(bytes(changed))


def test_a_reader_reads_one_hello() -> None:
    reader = ClientHelloReader()
    reader.feed(HELLOS["TLS 1.3"][0])
    with pytest.raises(LocalProtocolError):
        reader.feed(b"")
    reader = ClientHelloReader()
    with pytest.raises(BadClientHello):
        reader.feed(b"GET")
    with pytest.raises(LocalProtocolError):
        reader.feed(b"")


@pytest.mark.parametrize("alert", Alert)
def test_openssl_understands_the_alerts(alert: Alert) -> None:
    context = ssl.create_default_context()
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=NAME)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    incoming.write(alert.record)
    with pytest.raises(ssl.SSLError) as failed:
        client.do_handshake()
    assert alert.name in (failed.value.reason or "")
