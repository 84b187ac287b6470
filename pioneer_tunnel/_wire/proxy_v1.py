r"""The PROXY protocol, version 1: one line at the start of a connection that names the visitor. Bytes in, facts out.

    PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n

The specification is HAProxy's `proxy-protocol.txt`. The reading is as strict as it says there: one space between the
parts, addresses of the family, ports without leading zeros. A wrong start is refused at its first byte, anything else
that is malformed at the end of the line.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from .._model.addresses import Address
from .._model.errors import RemoteProtocolError
from .proxy_v2 import ProxyHeader

__all__ = ["MAX_LENGTH", "parse_v1"]

MAX_LENGTH: Final = 107
"""Bytes of the longest line, including its end."""

_START: Final = b"PROXY "
_UNKNOWN: Final = re.compile(rb"PROXY UNKNOWN(?: [^\r\n]*+)?+\r\n")
_PORT: Final = rb"(0|[1-9][0-9]{0,4})"
_LINE: Final = re.compile(rb"PROXY TCP([46]) ([0-9A-Fa-f:.]{2,39}) ([0-9A-Fa-f:.]{2,39}) %s %s\r\n" % (_PORT, _PORT))


def parse_v1(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Read a header from the start of `data`.

    Returns:
        The header and its length; None if it is not complete. `UNKNOWN` has no visitor.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    if not data.startswith(_START[: len(data)]):
        raise RemoteProtocolError("no PROXY protocol header: it does not begin with 'PROXY '")
    end = data.find(b"\n", 0, MAX_LENGTH) + 1
    if not end:
        if len(data) >= MAX_LENGTH:
            raise RemoteProtocolError(f"the PROXY header does not end within {MAX_LENGTH} bytes")
        return None
    if _UNKNOWN.fullmatch(data, 0, end):
        return ProxyHeader(None), end
    match = _LINE.fullmatch(data, 0, end)
    if match is None:
        raise RemoteProtocolError("the PROXY header is not 'PROXY TCP4' or 'TCP6' with two addresses and two ports")
    version = int(match[1])
    visitor, local = (_address(match[index], match[index + 2], version) for index in (2, 3))
    return ProxyHeader(visitor, local), end


def _address(host: bytes, port: bytes, version: int) -> Address:
    try:
        address = ipaddress.ip_address(host.decode("ascii"))
        if address.version == version:
            mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
            return Address(str(mapped or address), int(port))
    except ValueError:
        pass
    raise RemoteProtocolError(f"the PROXY header names an address that is no address of TCP{version}")
