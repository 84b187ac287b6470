"""`proxy_v1`: what the specification says is read, from any number of bytes, and nothing else is."""

from __future__ import annotations

import ipaddress

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st

from pioneer_tunnel._model.addresses import Address
from pioneer_tunnel._model.errors import RemoteProtocolError
from pioneer_tunnel._wire.proxy_v1 import MAX_LENGTH, parse_v1
from pioneer_tunnel._wire.proxy_v2 import ProxyHeader

FULL = "ffff:f...f:ffff ffff:f...f:ffff 65535 65535".replace("ffff:f...f:ffff", ":".join(["ffff"] * 8))
PORTS = st.integers(0, 65535)


@st.composite
def headers(draw: st.DrawFn) -> tuple[bytes, ProxyHeader]:
    addresses = st.ip_addresses(v=4) if draw(st.booleans()) else st.ip_addresses(v=6)
    visitor, local = draw(addresses), draw(addresses)
    ports = draw(PORTS), draw(PORTS)
    line = f"PROXY TCP{visitor.version} {visitor} {local} {ports[0]} {ports[1]}\r\n"
    return line.encode(), ProxyHeader(Address(host(visitor), ports[0]), Address(host(local), ports[1]))


def host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    return str((address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address)


@given(header=headers(), rest=st.binary(max_size=200))
def test_a_header_is_read_from_any_number_of_bytes(header: tuple[bytes, ProxyHeader], rest: bytes) -> None:
    line, expected = header
    assert parse_v1(line + rest) == (expected, len(line))
    assert all(parse_v1(line[:length]) is None for length in range(len(line)))


@pytest.mark.parametrize("line", ["PROXY UNKNOWN\r\n", f"PROXY UNKNOWN {FULL}\r\n", "PROXY UNKNOWN and more\r\n"])
def test_unknown_has_no_visitor(line: str) -> None:
    assert parse_v1(line.encode() + b"GET") == (ProxyHeader(None), len(line))


def test_the_longest_line_is_read() -> None:
    assert len(f"PROXY UNKNOWN {FULL}\r\n") == MAX_LENGTH


@pytest.mark.parametrize(
    "line",
    [
        "GET / HTTP/1.1\r\n",
        "proxy TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY\r\n",
        "PROXY TCP4\r\n",
        "PROXY TCP5 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY UDP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY UNKNOWNS\r\n",
        "PROXY  TCP4 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2 \r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 1 65536\r\n",
        "PROXY TCP4 1.2.3.4 5.6.7.8 -1 2\r\n",
        "PROXY TCP4 1.2.3 5.6.7.8 1 2\r\n",
        "PROXY TCP4 01.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP4 ::1 ::2 1 2\r\n",
        "PROXY TCP6 1.2.3.4 5.6.7.8 1 2\r\n",
        "PROXY TCP6 [::1] [::2] 1 2\r\n",
        "PROXY TCP6 fe80::1%1 ::2 1 2\r\n",
        "PROXY UNKNOWN " + "x" * 93,
        "PROXY TCP4 " + "1" * 97,
    ],
)
def test_anything_else_is_refused(line: str) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_v1(line.encode())


def test_a_wrong_start_is_refused_at_once() -> None:
    for length in range(1, 7):
        with pytest.raises(RemoteProtocolError):
            parse_v1(b"PROXY "[: length - 1] + b"\0")


@fuzzed()
@given(data=st.binary(max_size=200) | st.text("TCP46 .:0123\r\n").map(lambda tail: f"PROXY {tail}".encode()))
def test_no_bytes_make_it_fail_otherwise(data: bytes) -> None:
    try:
        found = parse_v1(data)
    except RemoteProtocolError:
        return
    if found is not None:
        _, length = found
        assert data[:length].endswith(b"\r\n")
