"""`_net.netlink`: messages of the kernel, as it sends them and malformed."""

from __future__ import annotations

import socket
import struct
import sys
from contextlib import closing
from ipaddress import ip_address
from typing import Final

import pytest
from fuzzing import examples
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._net.netlink import NETLINK_ROUTE, Notice, notices_in, way_in, way_request
from pioneer_tunnel._net.ways import Way

NEW_LINK, DELETE_LINK, NEW_ADDRESS, DELETE_ADDRESS, NEW_ROUTE, DELETE_ROUTE = 16, 17, 20, 21, 24, 25
RUNNING: Final = 0x40


def message(kind: int, body: bytes) -> bytes:
    length = 16 + len(body)
    return struct.pack("=IHHII", length, kind, 0, 0, 0) + body + bytes(-length % 4)


def link(kind: int, interface: int, flags: int) -> bytes:
    return message(kind, struct.pack("=BxHiII", 0, 1, interface, flags, 0xFFFFFFFF))


def address(kind: int, interface: int, scope: int) -> bytes:
    return message(kind, struct.pack("=BBBBI", socket.AF_INET, 24, 0, scope, interface))


def route(kind: int, prefix: int, **attributes: bytes) -> bytes:
    body = struct.pack("=BBBBBBBBI", socket.AF_INET, prefix, 0, 0, 254, 3, 0, 1, 0)
    for name, value in attributes.items():
        number = {"interface": 4, "gateway": 5, "source": 7}[name]
        body += struct.pack("=HH", 4 + len(value), number) + value + bytes(-len(value) % 4)
    return message(kind, body)


def number(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


@pytest.mark.parametrize(
    ("data", "notices"),
    [
        (link(NEW_LINK, 2, RUNNING), [Notice(interface=2, running=True)]),
        (link(NEW_LINK, 2, 0), [Notice(interface=2, running=False, lost=True)]),
        (link(DELETE_LINK, 2, RUNNING), [Notice(interface=2, running=False, lost=True)]),
        (address(DELETE_ADDRESS, 3, 0), [Notice(interface=3, lost=True, ipv6=False)]),
        (address(DELETE_ADDRESS, 3, 253), []),
        (address(NEW_ADDRESS, 3, 0), []),
        (route(DELETE_ROUTE, 0, interface=number(4)), [Notice(interface=4, lost=True, ipv6=False)]),
        (route(DELETE_ROUTE, 1, interface=number(4), gateway=b"gate"), [Notice(interface=4, lost=True, ipv6=False)]),
        (route(DELETE_ROUTE, 24, interface=number(4)), []),
        (route(DELETE_ROUTE, 0, gateway=b"gate"), []),
        (route(NEW_ROUTE, 0, interface=number(4)), []),
        (
            link(NEW_LINK, 2, RUNNING) + address(DELETE_ADDRESS, 3, 0),
            [Notice(interface=2, running=True), Notice(interface=3, lost=True, ipv6=False)],
        ),
    ],
)
def test_notices(data: bytes, notices: list[Notice]) -> None:
    assert [*notices_in(data)] == notices


def test_the_way() -> None:
    assert way_in(route(NEW_ROUTE, 32, interface=number(4), gateway=b"gate", source=b"from")) == Way(
        interface=4, gateway=b"gate", source=b"from"
    )
    assert way_in(message(2, struct.pack("=i", -101))) is None, "the network is unreachable"


@given(
    st.binary(max_size=100)
    | st.lists(st.sampled_from([b"\x10\0\0\0", b"\x20\0\0\0", b"\x19\0", b"\0\0"])).map(b"".join)
)
@settings(max_examples=examples(300))
def test_malformed_messages_are_ignored(data: bytes) -> None:
    assert all(isinstance(notice, Notice) for notice in notices_in(data))
    way_in(data)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("text", ["127.0.0.1", "::1"])
def test_the_kernel_understands_the_question(text: str) -> None:
    asked = ip_address(text)
    try:
        connection = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
    except OSError as error:
        pytest.skip(f"netlink is not permitted: {error}")
    with closing(connection):
        connection.sendto(way_request(asked), (0, 0))
        way = way_in(connection.recv(65536))
    if way is None:
        pytest.skip("there is no such address here")
    assert way.interface == socket.if_nametoindex("lo")
    assert way.source == asked.packed
