"""Networks in a configuration."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from .._model.errors import Problem
from .._model.text import redact_reason, shown
from .validation import RefusedItemsError, a_text

__all__ = ["Network", "customer_of", "is_within", "networks", "proxy_networks"]

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(value: Sequence[str | Network]) -> tuple[Network, ...]:
    """Read an array of addresses and networks.

    Raises:
        TypeError: it is no array.
        RefusedItemsError: an item is neither.
    """
    return _networks(value, anyone=True)


def proxy_networks(value: Sequence[str | Network]) -> tuple[Network, ...]:
    """Read an array of addresses and networks of proxies, whose word is taken. None of them may have all addresses.

    Raises:
        As `networks`.
    """
    return _networks(value, anyone=False)


def is_within(host: str, among: Iterable[Network]) -> bool:
    """Whether the IP address `host` is in one of the networks. An IPv4 address that is mapped into IPv6 is IPv4."""
    address = _read(host)
    return any(address in network for network in among)


def customer_of(host: str) -> str:
    """What limits per address count the IP address `host` as: an IPv4 address, or an IPv6 /64.

    That is the smallest network that one customer gets.
    """
    address = _read(host)
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return str(address)


def _read(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def _networks(value: Sequence[str | Network], *, anyone: bool) -> tuple[Network, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of addresses and networks, as 192.0.2.7 or 2001:db8::/32")
    found: list[Network] = []
    problems = []
    for index, item in enumerate(value):
        try:
            network = item if isinstance(item, Network) else _network(item)
            if not anyone and network.prefixlen == 0:
                raise ValueError("has all addresses, so that anyone could name any visitor; name those of the proxies")
            found.append(network)
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, item), message=redact_reason(str(error), item)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(found)


def _network(text: str) -> Network:
    allowed = "allowed is an address or a network, as 192.0.2.7 or 2001:db8::/32"
    try:
        return ipaddress.ip_network(a_text(text, allowed))
    except ValueError:
        raise ValueError(allowed) from None
