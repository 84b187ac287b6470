"""The PROXY protocol, version 2: a header at the start of a stream that names the visitor. Bytes in, bytes out.

The specification is HAProxy's `proxy-protocol.txt`. A tunnel needs four facts of it: the two addresses, whether the
visitor came over TLS, and the service that it wants, in a TLV of our own. Other well-formed TLVs are skipped.
Malformed bytes are refused at the first byte that shows it. The CRC32c TLV is not checked (the specification leaves
that to the receiver), as the link below has its own checks.

The relay writes a header at the start of each stream, and the native transport reads it. `tunnel.forward` writes it
again for a local gateway that asks for it. This is our own code because the package `proxy-protocol` (0.11) has no size
limit, refuses a wrong signature only after 16 bytes, and raises `struct.error` when the addresses are cut short.
"""

from __future__ import annotations

import struct
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Final, final

import attrs

from .._model.addresses import Address
from .._model.errors import LocalProtocolError, RemoteProtocolError
from .._model.services import is_service_name

__all__ = ["MAX_LENGTH", "ProxyHeader"]

MAX_LENGTH: Final = 536
"""The largest header that we accept, in bytes. It fits the smallest TCP segment that every host must accept."""

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED_SIZE: Final = 16
_MAX_BLOCK: Final = MAX_LENGTH - _FIXED_SIZE

_COMMAND_LOCAL: Final = 0x20
_COMMAND_PROXY: Final = 0x21
_COMMANDS: Final = frozenset({_COMMAND_LOCAL, _COMMAND_PROXY})
_UNSPEC: Final = 0x00
_TCP4: Final = 0x11
_UDP4: Final = 0x12
_TCP6: Final = 0x21
_UDP6: Final = 0x22
_UNIX_STREAM: Final = 0x31
_UNIX_DATAGRAM: Final = 0x32
# The byte with family and transport, and the size of the addresses that follow. Any other byte must be refused.
_ADDRESSES_SIZE: Final = {
    _UNSPEC: 0,
    _TCP4: 12,
    _UDP4: 12,
    _TCP6: 36,
    _UDP6: 36,
    _UNIX_STREAM: 216,
    _UNIX_DATAGRAM: 216,
}

_INET: Final = struct.Struct("!4s4sHH")
_INET6: Final = struct.Struct("!16s16sHH")
_HEADER: Final = struct.Struct("!12sBBH")
_TCP4_HEADER: Final = struct.Struct("!14sH4s4sHH")
_TCP6_HEADER: Final = struct.Struct("!14sH16s16sHH")
_TCP4_START: Final = _SIGNATURE + bytes([_COMMAND_PROXY, _TCP4])
_TCP6_START: Final = _SIGNATURE + bytes([_COMMAND_PROXY, _TCP6])
_V4_MAPPED: Final = bytes(10) + b"\xff\xff"
_UNSPECIFIED: Final = frozenset({bytes(4), bytes(16), _V4_MAPPED + bytes(4)})
_ANY4: Final = Address("0.0.0.0", 0)  # noqa: S104  (nothing is bound: it stands for an address that is not known)
_ANY6: Final = Address("::", 0)

_TLV_SIZE: Final = 3
_TLV_SSL: Final = 0x20
_SSL_SIZE: Final = 5
_CLIENT_SSL: Final = 0x01
# `verify` is 0 only where the visitor presented a valid certificate. The relay asks for none, so it is 1: a gateway
# that looks at this field alone must not treat the visitor as authenticated.
_TLS_TLV: Final = {
    None: b"",
    False: struct.pack("!BHBL", _TLV_SSL, _SSL_SIZE, 0, 1),
    True: struct.pack("!BHBL", _TLV_SSL, _SSL_SIZE, _CLIENT_SSL, 1),
}
_TLV_SERVICE: Final = 0xE0
"""PP2_TYPE_MIN_CUSTOM, the first type that the specification leaves to applications: the name of a service."""

_LOCAL_HEADER: Final = _HEADER.pack(_SIGNATURE, _COMMAND_LOCAL, _UNSPEC, 0)


@final
@attrs.frozen
class ProxyHeader:
    """What a PROXY header says of a connection.

    Attributes:
        visitor: where the connection comes from; None when the header does not say (LOCAL, UNSPEC, a UNIX socket).
        local: the address that the visitor connected to; None when it is not known, and always without a visitor.
        tls: whether the visitor came over TLS; None when the header does not say.
        service: the service that the visitor wants; None when the header does not say.
    """

    visitor: Address | None
    local: Address | None = None
    tls: bool | None = None
    service: str | None = None

    def encode(self) -> bytes:
        """The bytes of this header.

        A header has one address family. When one address is IPv4 and the other is IPv6, the IPv4 one is mapped into
        IPv6 (`::ffff:a.b.c.d`). The zone of a link-local address (`%eth0`) means nothing on another host and is left
        out. A `local` that is None becomes the unspecified address with port 0. Without a visitor the header is LOCAL,
        which every receiver accepts. With `tls` or `service` but without a visitor it is UNSPEC, because receivers
        discard all that follows a LOCAL.

        Raises:
            LocalProtocolError: an address is not an IP address.
        """
        visitor = self.visitor
        tlv = _TLS_TLV[self.tls]
        if self.service is not None:
            name = self.service.encode()
            tlv += struct.pack("!BH", _TLV_SERVICE, len(name)) + name
        if visitor is None:
            return _HEADER.pack(_SIGNATURE, _COMMAND_PROXY, _UNSPEC, len(tlv)) + tlv if tlv else _LOCAL_HEADER
        local = self.local or (_ANY6 if ":" in visitor.host else _ANY4)
        try:
            if ":" in visitor.host or ":" in local.host:
                source, destination = _packed6(visitor.host), _packed6(local.host)
                start = _TCP6_HEADER.pack(
                    _TCP6_START, _INET6.size + len(tlv), source, destination, visitor.port, local.port
                )
            else:
                source, destination = inet_pton(AF_INET, visitor.host), inet_pton(AF_INET, local.host)
                start = _TCP4_HEADER.pack(
                    _TCP4_START, _INET.size + len(tlv), source, destination, visitor.port, local.port
                )
        except (OSError, ValueError):
            raise LocalProtocolError(f"a PROXY header takes IP addresses, not {visitor} and {local}") from None
        return start + tlv

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> tuple[ProxyHeader, int] | None:
        """Read the header at the start of `data`, which is all that has arrived so far.

        An IPv4 address that is mapped into IPv6 is returned as IPv4, so that a visitor's address does not depend on the
        socket that it came to. An unspecified local address with port 0 is returned as None.

        Returns:
            The header and its size in bytes (the visitor's bytes follow); or None when `data` is the beginning of a
            header and more bytes are needed. `MAX_LENGTH` bytes are always enough.

        Raises:
            RemoteProtocolError: no further bytes can make this a header that we accept: another signature, version,
                command or family, more than `MAX_LENGTH` bytes, addresses or a TLV that overrun the header, a TLS TLV
                that is too short or occurs twice, or two services. Raised at the first byte that shows it, except for
                services.
        """
        start = bytes(data[:_FIXED_SIZE])
        _check_start(start)
        if len(start) < _FIXED_SIZE:
            return None
        _, command, family, length = _HEADER.unpack(start)
        end = _FIXED_SIZE + length
        if end > MAX_LENGTH:
            raise RemoteProtocolError(f"the PROXY header would have {end} bytes; at most {MAX_LENGTH} are taken")
        if command == _COMMAND_LOCAL:
            # The specification: accept the connection, and discard the rest of the header, its family included.
            return (cls(None), end) if len(data) >= end else None
        size = _ADDRESSES_SIZE[family]
        if length < size:
            raise RemoteProtocolError(f"the PROXY header has {length} bytes for addresses of {size}")
        tls = _tls_of(data, _FIXED_SIZE + size, end) if length > size else None
        if len(data) < end:
            return None
        service = _service_of(data, _FIXED_SIZE + size, end) if length > size else None
        if size == _INET.size:
            source, destination, visitor_port, local_port = _INET.unpack_from(data, _FIXED_SIZE)
            visitor_host, local_host = inet_ntop(AF_INET, source), inet_ntop(AF_INET, destination)
        elif size == _INET6.size:
            source, destination, visitor_port, local_port = _INET6.unpack_from(data, _FIXED_SIZE)
            visitor_host, local_host = _unpacked6(source), _unpacked6(destination)
        else:
            return cls(None, None, tls, service), end
        known = local_port or destination not in _UNSPECIFIED
        visitor = Address.of_socket((visitor_host, visitor_port))
        local = Address.of_socket((local_host, local_port)) if known else None
        return cls(visitor, local, tls, service), end


def _check_start(start: bytes) -> None:
    """Check the fixed part, of which `start` has arrived so far.

    Raises:
        RemoteProtocolError: a byte of it is wrong.
    """
    if start[:12] != _SIGNATURE[: len(start)]:
        raise RemoteProtocolError("no PROXY protocol version 2 header: the signature is wrong")
    if len(start) > 12 and start[12] not in _COMMANDS:
        raise RemoteProtocolError(
            f"the PROXY header has version and command {start[12]:#04x}; known are 0x20 (LOCAL) and 0x21 (PROXY)"
        )
    if len(start) > 13 and start[12] == _COMMAND_PROXY and start[13] not in _ADDRESSES_SIZE:
        raise RemoteProtocolError(f"the PROXY header has the address family {start[13]:#04x}, which is unknown")
    if len(start) > 14 and start[14] > _MAX_BLOCK >> 8:
        raise RemoteProtocolError(f"the PROXY header would have more than {MAX_LENGTH} bytes")


def _tls_of(data: bytes | bytearray | memoryview, offset: int, end: int) -> bool | None:
    """What the TLS TLV says; None when there is none. Reads the TLVs from `offset` to `end`, as far as `data` goes.

    Details in the TLS TLV (version, names) are not read.

    Raises:
        RemoteProtocolError: the TLVs do not end at `end`, or the TLS TLV is too short or occurs twice.
    """
    tls: bool | None = None
    seen = False
    have = min(len(data), end)
    while offset < end:
        room = end - offset - _TLV_SIZE
        if room < 0:
            raise RemoteProtocolError(f"the PROXY header ends within a TLV: {room + _TLV_SIZE} bytes are left for it")
        if offset >= have:
            break
        is_ssl = data[offset] == _TLV_SSL
        if is_ssl and (seen or room < _SSL_SIZE):
            raise RemoteProtocolError("the PROXY header's TLS information is given twice or overruns the header")
        if offset + 1 >= have:
            break
        complete = offset + 2 < have
        # While the low byte of the length is missing, the high byte gives its minimum.
        size = data[offset + 1] << 8 | (data[offset + 2] if complete else 0)
        if size > room:
            raise RemoteProtocolError(f"a TLV of the PROXY header overruns it: {size} bytes where {room} are left")
        if not complete:
            break
        if is_ssl:
            if size < _SSL_SIZE:
                raise RemoteProtocolError(f"the PROXY header's TLS information has {size} of {_SSL_SIZE} bytes")
            seen = True
            if offset + _TLV_SIZE < have:
                tls = bool(data[offset + _TLV_SIZE] & _CLIENT_SSL)
        offset += _TLV_SIZE + size
    return tls


def _service_of(data: bytes | bytearray | memoryview, offset: int, end: int) -> str | None:
    """What the service TLV says; None when there is none. `_tls_of` has accepted the TLVs from `offset` to `end`.

    Raises:
        RemoteProtocolError: there are two.
    """
    service: str | None = None
    while offset < end:
        size = data[offset + 1] << 8 | data[offset + 2]
        start = offset + _TLV_SIZE
        if data[offset] == _TLV_SERVICE:
            name = bytes(data[start : start + size]).decode("ascii", "replace")
            if is_service_name(name):  # others may use this type for something else
                if service is not None:
                    raise RemoteProtocolError("the PROXY header names two services")
                service = name
        offset = start + size
    return service


def _packed6(host: str) -> bytes:
    """The 16 bytes of an IPv6 address, or of an IPv4 address mapped into IPv6."""
    if ":" in host:
        return inet_pton(AF_INET6, host.partition("%")[0])
    return _V4_MAPPED + inet_pton(AF_INET, host)


def _unpacked6(packed: bytes) -> str:
    return inet_ntop(AF_INET, packed[12:]) if packed.startswith(_V4_MAPPED) else inet_ntop(AF_INET6, packed)
