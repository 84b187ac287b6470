"""How Linux tells of routes, addresses and interfaces: the messages of rtnetlink, and what they mean. No I/O.

Numbers and layouts are those of the kernel's include/uapi/linux/{netlink,rtnetlink,if_addr,if_link}.h. New kernels only
append.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Final, final

import attrs

from .ways import Way

__all__ = ["GROUPS", "NETLINK_ROUTE", "Notice", "notices_in", "way_in", "way_request"]

NETLINK_ROUTE: Final = 0
"""The protocol of the socket."""

GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""What to subscribe to: interfaces, IPv4 addresses and routes, IPv6 addresses and routes."""

_HEADER: Final = struct.Struct("=IHHII")  # length with the header, type, flags, sequence number, port
_LINK: Final = struct.Struct("=BxHiII")  # family, kind of hardware, interface, flags, which of them changed
_ADDRESS: Final = struct.Struct("=BBBBI")  # family, length of the prefix, flags, scope, interface
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # family, lengths of prefixes: destination, source; TOS, table, …
_ATTRIBUTE: Final = struct.Struct("=HH")  # length with this, type

_NEW_LINK: Final = 16
_DELETE_LINK: Final = 17
_DELETE_ADDRESS: Final = 21
_NEW_ROUTE: Final = 24
_DELETE_ROUTE: Final = 25
_GET_ROUTE: Final = 26

_ORDER: Final = sys.byteorder
_REQUEST: Final = 1
_RUNNING: Final = 0x40
_LINK_SCOPE: Final = 253
_DESTINATION: Final = 1
_INTERFACE: Final = 4
_GATEWAY: Final = 5
_SOURCE: Final = 7
_DEFAULT_ROUTES: Final = 1
"""The longest prefix of a default route. VPNs halve the default into two routes."""


@final
@attrs.frozen(kw_only=True)
class Notice:
    """Something has happened to an interface.

    Attributes:
        interface: its number.
        running: whether it can carry packets now; None if the notice is about something else.
        lost: whether it has lost an address, a default route, or all.
        ipv6: whether what it has lost was for IPv6; None for both versions.
    """

    interface: int
    running: bool | None = None
    lost: bool = False
    ipv6: bool | None = None


def notices_in(data: bytes) -> Iterator[Notice]:
    """What a datagram says that may matter. New addresses and routes are no notices: they show in the way."""
    for kind, body in _messages(data):
        if kind in (_NEW_LINK, _DELETE_LINK) and len(body) >= _LINK.size:
            _, _, interface, flags, _ = _LINK.unpack_from(body)
            running = kind == _NEW_LINK and bool(flags & _RUNNING)
            yield Notice(interface=interface, running=running, lost=not running)
        elif kind == _DELETE_ADDRESS and len(body) >= _ADDRESS.size:
            family, _, _, scope, interface = _ADDRESS.unpack_from(body)
            if scope < _LINK_SCOPE:
                yield Notice(interface=interface, lost=True, ipv6=family == socket.AF_INET6)
        elif kind == _DELETE_ROUTE and len(body) >= _ROUTE.size:
            found = _attributes(body[_ROUTE.size :]).get(_INTERFACE, b"")
            if body[1] <= _DEFAULT_ROUTES and len(found) == 4:
                yield Notice(interface=int.from_bytes(found, _ORDER), lost=True, ipv6=body[0] == socket.AF_INET6)


def way_request(address: IPv4Address | IPv6Address) -> bytes:
    """The message that asks which way packets to `address` take."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    packed = address.packed
    body = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(packed), _DESTINATION) + packed
    return _HEADER.pack(_HEADER.size + len(body), _GET_ROUTE, _REQUEST, 1, 0) + body


def way_in(data: bytes) -> Way | None:
    """The way that the answer names; None where there is none."""
    for kind, body in _messages(data):
        if kind == _NEW_ROUTE and len(body) >= _ROUTE.size:
            found = _attributes(body[_ROUTE.size :])
            return Way(
                interface=int.from_bytes(found.get(_INTERFACE, b""), _ORDER),
                gateway=found.get(_GATEWAY, b""),
                source=found.get(_SOURCE, b""),
            )
    return None


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The type and the body of each message."""
    while len(data) >= _HEADER.size:
        length, kind, _, _, _ = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        yield kind, data[_HEADER.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[_ATTRIBUTE.size : length]
        data = data[_aligned(length) :]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
