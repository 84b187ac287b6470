"""`proxy_protocol`: what is written is read back, from any number of bytes, and nothing else is taken."""

from __future__ import annotations

import ipaddress
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import LocalProtocolError, RemoteProtocolError
from pioneer_tunnel._wire.proxy_v2 import MAX_LENGTH, ProxyHeader

VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "vectors" / "proxy-v2.json").read_text())
GOOD = [vector for vector in VECTORS if not vector.get("error")]
BAD = [vector for vector in VECTORS if vector.get("error")]

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V4 = bytes([203, 0, 113, 9, 198, 51, 100, 1]) + struct.pack("!HH", 51234, 443)
V6 = ipaddress.IPv6Address("2001:db8::9").packed + ipaddress.IPv6Address("2001:db8::1").packed + V4[8:]
VISITOR = Address("203.0.113.9", 51234)
LOCAL = Address("198.51.100.1", 443)


def header(command: int, family: int, block: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, family, len(block)) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def named(vectors: list[dict[str, Any]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("vector", vectors, ids=[vector["name"] for vector in vectors])


def read_byte_by_byte(data: bytes) -> tuple[ProxyHeader, int] | None:
    """What a reader gets that asks again after every byte."""
    buffer = bytearray()
    for byte in data:
        buffer.append(byte)
        found = ProxyHeader.parse(buffer)
        if found is not None:
            return found
    return None


def settled_at(data: bytes) -> int:
    """After how many bytes of `data` the error comes."""
    for length in range(len(data) + 1):
        try:
            found = ProxyHeader.parse(data[:length])
        except RemoteProtocolError:
            return length
        assert found is None
    raise AssertionError(f"no error in {data.hex()}")


def test_there_are_vectors_of_both_kinds() -> None:
    assert GOOD
    assert BAD


@named(GOOD)
def test_good_vector(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    visitor = None if vector["visitor"] is None else Address.parse(vector["visitor"])
    found = ProxyHeader.parse(data)
    assert found is not None
    assert (found[0].visitor, found[0].tls) == (visitor, vector.get("tls"))
    assert found[1] == len(data)
    for length in range(len(data)):
        assert ProxyHeader.parse(data[:length]) is None
    for tail in (b"G", b"GET / HTTP/1.1\r\n\r\n", data, bytes(100_000)):
        for wrapped in (data + tail, bytearray(data + tail), memoryview(data + tail)):
            assert ProxyHeader.parse(wrapped) == found
    assert read_byte_by_byte(data + b"tail") == found


@named(BAD)
def test_bad_vector(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    with pytest.raises(RemoteProtocolError):
        ProxyHeader.parse(data)
    with pytest.raises(RemoteProtocolError):
        ProxyHeader.parse(data + b"tail")
    with pytest.raises(RemoteProtocolError):
        read_byte_by_byte(data)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (ProxyHeader(VISITOR, LOCAL), header(0x21, 0x11, V4)),
        (ProxyHeader(VISITOR), header(0x21, 0x11, V4[:4] + bytes(4) + V4[8:10] + bytes(2))),
        (
            ProxyHeader(Address("2001:db8::9", 51234), Address("2001:db8::1", 443), tls=True),
            header(0x21, 0x21, V6 + tlv(0x20, b"\1\0\0\0\1")),
        ),
        (ProxyHeader(VISITOR, LOCAL, tls=False), header(0x21, 0x11, V4 + tlv(0x20, b"\0\0\0\0\1"))),
        (ProxyHeader(None), header(0x20, 0x00, b"")),
        (ProxyHeader(None, LOCAL), header(0x20, 0x00, b"")),
        (ProxyHeader(None, None, tls=True), header(0x21, 0x00, tlv(0x20, b"\1\0\0\0\1"))),
        (ProxyHeader(VISITOR, LOCAL, service="ssh"), header(0x21, 0x11, V4 + tlv(0xE0, b"ssh"))),
        (
            ProxyHeader(VISITOR, LOCAL, tls=False, service="web"),
            header(0x21, 0x11, V4 + tlv(0x20, b"\0\0\0\0\1") + tlv(0xE0, b"web")),
        ),
        (ProxyHeader(None, service="ssh"), header(0x21, 0x00, tlv(0xE0, b"ssh"))),
    ],
)
def test_the_bytes_are_those_of_the_specification(written: ProxyHeader, expected: bytes) -> None:
    assert written.encode() == expected


def test_mixed_families_are_written_as_ipv6_and_read_as_they_were() -> None:
    six = Address("2001:db8::1", 443)
    mapped = bytes(10) + b"\xff\xff" + V4[:4]
    for written in (ProxyHeader(VISITOR, six), ProxyHeader(six, VISITOR)):
        data = written.encode()
        assert data[13] == 0x21
        assert mapped in data
        assert ProxyHeader.parse(data) == (written, len(data))


def test_an_ipv4_visitor_of_a_dual_stack_socket_has_one_name() -> None:
    written = ProxyHeader(Address("::ffff:203.0.113.9", 51234), Address("::ffff:198.51.100.1", 443))
    data = written.encode()
    assert ProxyHeader.parse(data) == (ProxyHeader(VISITOR, LOCAL), len(data))


def test_a_zone_stays_at_home() -> None:
    data = ProxyHeader(Address("fe80::1%eth0", 1), Address("fe80::2%eth0", 2)).encode()
    assert ProxyHeader.parse(data) == (ProxyHeader(Address("fe80::1", 1), Address("fe80::2", 2)), len(data))


@pytest.mark.parametrize("service", ["a", "web", "a-b_c.d", "0" * 63])
@pytest.mark.parametrize("visitor", [VISITOR, Address("2001:db8::9", 1), None])
def test_a_service_is_read_as_it_was_written(service: str, visitor: Address | None) -> None:
    written = ProxyHeader(visitor, tls=True, service=service)
    data = written.encode()
    assert read_byte_by_byte(data) == (written, len(data))
    assert ProxyHeader.parse(data + b"tail") == (written, len(data))


@pytest.mark.parametrize("value", [b"", b"Web", b"a b", b"-a", b"a.", b"\xff", b"a" * 64])
def test_what_is_no_name_of_a_service_is_another_tlv(value: bytes) -> None:
    data = header(0x21, 0x11, V4 + tlv(0xE0, value) + tlv(0xE0, b"ssh"))
    assert ProxyHeader.parse(data) == (ProxyHeader(VISITOR, LOCAL, service="ssh"), len(data))


def test_two_services_are_refused() -> None:
    data = header(0x21, 0x11, V4 + tlv(0xE0, b"web") + tlv(0xE0, b"ssh"))
    with pytest.raises(RemoteProtocolError, match="two services"):
        ProxyHeader.parse(data)


@pytest.mark.parametrize("block", [b"", bytes(7), b"\xff" * 520, tlv(0x20, b"\1\0\0\0\0")])
@pytest.mark.parametrize("family", [0x00, 0x11, 0x99])
def test_local_discards_whatever_follows(family: int, block: bytes) -> None:
    data = header(0x20, family, block)
    assert ProxyHeader.parse(data) == (ProxyHeader(None), len(data))
    assert ProxyHeader.parse(data + b"tail") == (ProxyHeader(None), len(data))
    assert ProxyHeader.parse(data[:-1]) is None


@pytest.mark.parametrize("family", [0x31, 0x32])
def test_a_unix_socket_is_a_visitor_unknown(family: int) -> None:
    data = header(0x21, family, b"/run/a.sock".ljust(108, b"\0") * 2 + tlv(0x20, b"\1\0\0\0\0"))
    assert ProxyHeader.parse(data) == (ProxyHeader(None, None, True), len(data))


@pytest.mark.parametrize(("family", "block"), [(0x12, V4), (0x22, V6)])
def test_datagram_families_have_the_same_addresses(family: int, block: bytes) -> None:
    stream = ProxyHeader.parse(header(0x21, family - 1, block))
    assert stream is not None
    assert ProxyHeader.parse(header(0x21, family, block)) == stream


@pytest.mark.parametrize(
    ("value", "tls"),
    [(b"\0\0\0\0\0", False), (b"\1\0\0\0\1", True), (b"\7\0\0\0\0", True), (b"\6\0\0\0\0", False)],
)
def test_tls_is_one_bit_of_one_tlv_among_others(value: bytes, tls: bool) -> None:
    others = tlv(0x04, b"\0" * 9), tlv(0xE0, b""), tlv(0x03, b"\1\2\3\4")
    # Inside the TLS one, its own parts are not looked at.
    data = header(0x21, 0x11, V4 + b"".join(others) + tlv(0x20, value + b"\x21\xff\xffjunk") + tlv(0xEF, b"z"))
    assert ProxyHeader.parse(data) == (ProxyHeader(VISITOR, LOCAL, tls), len(data))
    assert read_byte_by_byte(data) == (ProxyHeader(VISITOR, LOCAL, tls), len(data))


def test_the_longest_header_is_taken_and_one_byte_more_is_not() -> None:
    filler = MAX_LENGTH - 16 - len(V4) - 3
    longest = header(0x21, 0x11, V4 + tlv(0xE0, bytes(filler)))
    assert len(longest) == MAX_LENGTH == 536
    assert ProxyHeader.parse(longest) == (ProxyHeader(VISITOR, LOCAL), MAX_LENGTH)
    assert settled_at(header(0x21, 0x11, V4 + tlv(0xE0, bytes(filler + 1)))) == 16


@pytest.mark.parametrize(
    ("data", "at"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 1, id="HTTP without a header"),
        pytest.param(b"PROXY TCP4 203.0.113.9 198.51.100.1 51234 443\r\n", 1, id="version 1, as text"),
        pytest.param(SIGNATURE[:11] + b"\r", 12, id="last byte of the signature"),
        pytest.param(header(0x11, 0x11, V4), 13, id="version 1"),
        pytest.param(header(0x31, 0x11, V4), 13, id="version 3"),
        pytest.param(header(0x22, 0x11, V4), 13, id="unknown command"),
        pytest.param(header(0x21, 0x10, V4), 14, id="IPv4 over nothing"),
        pytest.param(header(0x21, 0x41, V4), 14, id="unknown family"),
        pytest.param(header(0x21, 0x13, V4), 14, id="unknown transport"),
        pytest.param(header(0x21, 0x11, bytes(0x300)), 15, id="length settled by its high byte"),
        pytest.param(header(0x21, 0x11, bytes(521)), 16, id="length settled by its low byte"),
        pytest.param(header(0x20, 0x00, bytes(521)), 16, id="LOCAL, too long all the same"),
        pytest.param(header(0x21, 0x11, V4[:-1]), 16, id="short IPv4 addresses"),
        pytest.param(header(0x21, 0x21, V6[:-1]), 16, id="short IPv6 addresses"),
        pytest.param(header(0x21, 0x31, bytes(215)), 16, id="short UNIX addresses"),
        pytest.param(header(0x21, 0x11, V4 + b"\xe0"), 16, id="room for a third of a TLV"),
        pytest.param(header(0x21, 0x11, V4 + b"\xe0\0"), 16, id="room for two thirds of a TLV"),
        pytest.param(header(0x21, 0x11, V4 + b"\xe0\1\0x"), 30, id="overrun settled by the high byte"),
        pytest.param(header(0x21, 0x11, V4 + b"\xe0\0\2x"), 31, id="overrun settled by the low byte"),
        pytest.param(header(0x21, 0x11, V4 + b"\xe0\0\1xyz"), 31, id="two bytes left for the next TLV"),
        pytest.param(header(0x21, 0x11, V4 + tlv(0x20, b"\1\0\0\0")), 29, id="no room for the TLS facts"),
        pytest.param(header(0x21, 0x11, V4 + tlv(0x20, b"\1\0\0\0") + tlv(4, b"")), 31, id="short TLS facts"),
        pytest.param(header(0x21, 0x11, V4 + tlv(0x20, bytes(5)) * 2), 37, id="TLS facts, twice"),
        pytest.param(header(0x21, 0x00, b"\xe0\0\2x"), 19, id="UNSPEC, a TLV overruns"),
    ],
)
def test_an_error_comes_with_the_byte_that_settles_it(data: bytes, at: int) -> None:
    assert settled_at(data) == at
    with pytest.raises(RemoteProtocolError):
        ProxyHeader.parse(data)


@pytest.mark.parametrize(
    "written",
    [
        ProxyHeader(Address("gateway.example", 1), LOCAL),
        ProxyHeader(VISITOR, Address("gateway.example", 1)),
        ProxyHeader(Address("203.0.113.9\0", 1), LOCAL),
        ProxyHeader(Address("2001:db8::zz", 1), LOCAL),
    ],
)
def test_what_a_header_cannot_say_is_a_local_error(written: ProxyHeader) -> None:
    with pytest.raises(LocalProtocolError, match="IP addresses"):
        written.encode()


ports = st.integers(0, 65535)
v4_addresses = st.builds(Address, st.ip_addresses(v=4).map(str), ports)
v6_addresses = st.builds(
    # From 2^64 on, so that none embeds an IPv4 address: Python and inet_ntop write some of those differently.
    Address,
    st.integers(1 << 64, (1 << 128) - 1).map(lambda number: str(ipaddress.IPv6Address(number))),
    ports,
)
addresses = v4_addresses | v6_addresses
unspecified = {Address("0.0.0.0", 0), Address("::", 0)}
headers = st.builds(
    ProxyHeader,
    addresses,
    st.none() | addresses.filter(lambda address: address not in unspecified),
    st.sampled_from([None, False, True]),
) | st.builds(ProxyHeader, st.none(), st.none(), st.sampled_from([None, False, True]))


@fuzzed()
@given(headers, st.binary(max_size=64))
def test_what_is_written_is_read(written: ProxyHeader, tail: bytes) -> None:
    data = written.encode()
    assert len(data) <= MAX_LENGTH
    assert ProxyHeader.parse(data) == (written, len(data))
    assert ProxyHeader.parse(data + tail) == (written, len(data))
    assert read_byte_by_byte(data + tail) == (written, len(data))
    for length in range(len(data)):
        assert ProxyHeader.parse(data[:length]) is None


def nearly(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with one byte changed, to get further than random bytes ever would."""
    return st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)).map(
        lambda change: data[: change[0]] + bytes([change[1]]) + data[change[0] + 1 :]
    )


blocks = st.one_of(
    st.binary(max_size=600),
    st.builds(
        lambda addresses, parts: addresses + b"".join(parts),
        st.sampled_from([b"", V4, V6, bytes(216)]),
        st.lists(st.builds(tlv, st.sampled_from([0x03, 0x20, 0xE0]), st.binary(max_size=300)), max_size=4),
    ),
)
junk = st.one_of(
    st.binary(max_size=700),
    st.binary(max_size=700).map(lambda rest: SIGNATURE + rest),
    st.builds(header, st.sampled_from([0x20, 0x21]), st.sampled_from([0, 0x11, 0x21, 0x31]), blocks),
    st.builds(header, st.integers(0, 255), st.integers(0, 255), blocks),
    headers.flatmap(lambda written: nearly(written.encode())),
)


@fuzzed()
@given(junk)
def test_junk_is_a_header_or_an_error_and_the_same_in_any_pieces(data: bytes) -> None:
    try:
        whole: object = ProxyHeader.parse(data)
    except RemoteProtocolError:
        assert settled_at(data) <= min(len(data), MAX_LENGTH)
        return
    assert read_byte_by_byte(data) == whole
    if len(data) >= MAX_LENGTH:
        assert whole is not None


@fuzzed()
@given(junk, st.data())
def test_more_is_asked_for_only_where_more_can_help(data: bytes, draw: st.DataObject) -> None:
    prefix = data[: draw.draw(st.integers(0, len(data)))]
    try:
        found = ProxyHeader.parse(prefix)
    except RemoteProtocolError:
        return
    if found is None:
        completed = ProxyHeader.parse(_completed(prefix))
        assert completed is not None


def _completed(prefix: bytes) -> bytes:
    """A header that begins with `prefix`, if there is one: the proof that asking for more was right."""
    data = prefix + SIGNATURE[len(prefix) :]
    data += bytes([0x21, 0x00])[max(0, len(data) - 12) :] if len(data) < 14 else b""
    size = {0x00: 0, 0x11: 12, 0x12: 12, 0x21: 36, 0x22: 36, 0x31: 216, 0x32: 216}.get(data[13], 0)
    if len(data) == 14:
        data += b"\0"
    if len(data) == 15:
        data += bytes([size if data[14] == 0 else 0])
    end = 16 + struct.unpack_from("!H", data, 14)[0]
    offset = 16 + size
    data = data.ljust(min(offset, end), b"\0")
    if data[12] == 0x20:
        return data.ljust(end, b"\0")
    while offset < end:
        room = end - offset - 3
        if len(data) == offset:
            data += b"\xe0"
        if len(data) == offset + 1:
            data += bytes([room >> 8])
        if len(data) == offset + 2:
            low = room - (data[offset + 1] << 8)
            # All the room there is, or else what is enough for the TLS facts: a further TLV takes the rest.
            data += bytes([low if low <= 255 else 5])
        offset += 3 + int.from_bytes(data[offset + 1 : offset + 3], "big")
        data = data.ljust(min(offset, end), b"\0")
    return data
