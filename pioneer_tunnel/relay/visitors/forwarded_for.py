"""Who a request is from, as a trusted HTTP proxy in front of the relay says it in X-Forwarded-For. No I/O.

Each proxy adds the address that its connection comes from at the right end. So the list is read from there: addresses
of trusted proxies are skipped, and the first other one is the visitor. What is further to the left is the visitor's own
word. When all are trusted, or one is no address, the visitor is the last trusted one that was read.

X-Forwarded-Proto says whether the visitor used TLS. It is taken as it comes, so the proxy has to replace the visitor's.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final

from ..._http.head import RequestHead
from ..._model.addresses import Address
from ..._storage.networks import Network, is_within

__all__ = ["named_visitor"]

_MOST_PROXIES: Final = 32
_ADDRESS: Final = re.compile(
    r"(?:\[(?P<v6>[0-9A-Fa-f:.]{2,45})\]|(?P<v4>[0-9.]{7,15}))(?::(?P<port>[0-9]{1,5}))?|(?P<bare>[0-9A-Fa-f:.]{2,45})"
)
_SCHEMES: Final = {b"https": True, b"wss": True, b"http": False, b"ws": False}


def named_visitor(head: RequestHead, proxy: Address, trusted: Iterable[Network]) -> tuple[Address, bool | None]:
    """The visitor, and whether it used TLS; None if the proxy does not say.

    Args:
        head: of the request.
        proxy: the trusted proxy that sent it.
        trusted: the networks of trusted proxies.
    """
    visitor = proxy
    for member in islice(_from_the_right(head.values(b"x-forwarded-for")), _MOST_PROXIES):
        address = _address(member)
        if address is None:
            break
        visitor = address
        if not is_within(address.host, trusted):
            break
    scheme = next(_from_the_right(head.values(b"x-forwarded-proto")), b"")
    return visitor, _SCHEMES.get(scheme.lower())


def _from_the_right(values: list[bytes]) -> Iterator[bytes]:
    """The members of a list that may be in several headers, the last one first."""
    for value in reversed(values):
        rest = value
        while rest:
            rest, _, member = rest.rpartition(b",")
            if member := member.strip(b" \t"):
                yield member


def _address(member: bytes) -> Address | None:
    """An IP address with or without a port; None if it is none."""
    match = _ADDRESS.fullmatch(member.decode("latin-1"))
    if match is None:
        return None
    try:
        address = ipaddress.ip_address(match["v6"] or match["v4"] or match["bare"])
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return Address(str(mapped or address), int(match["port"] or 0))
    except ValueError:
        return None
