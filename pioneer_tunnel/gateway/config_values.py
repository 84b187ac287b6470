"""What the keys of `[gateway.remote_access]` may hold: converters for `RemoteAccessConfig`.

Each raises a `TypeError` or `ValueError` that says what is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import attrs

from .._model.addresses import LocalAddress, RelayAddress, local_address, normal_audience
from .._model.errors import Problem
from .._model.proxies import Direct, Proxy, configured_proxy
from .._model.services import MOST_SERVICES, SERVICE_NAMES, is_service_name
from .._model.text import hide_secrets, redact_reason, shown
from .._storage.validation import RefusedItemsError, a_text, nearest
from ..access.rules import Access, an_access
from ..transports.rathole.key_mode import KeyMode
from .transport import Transport

__all__ = [
    "a_host_header",
    "a_key_mode",
    "a_local_address",
    "a_proxy",
    "a_relay_address",
    "a_transport",
    "access_by_service",
    "first_relay",
    "names_of_services",
    "several_relays",
    "several_services",
]

DEFAULT_RELAY: Final = RelayAddress(None, "relay-eu-west-1.getpioneer.dev", 2333)
MOST_RELAYS: Final = 16


def a_local_address(value: str | LocalAddress) -> LocalAddress:
    if isinstance(value, LocalAddress):
        return value
    return local_address(a_text(value, "allowed is host:port, unix:/path or https://host:port, as a string"))


def several_services(value: Mapping[str, str | LocalAddress]) -> Mapping[str, LocalAddress]:
    given: object = value
    if not isinstance(given, Mapping):
        raise TypeError("allowed is a table of addresses")
    if len(given) >= MOST_SERVICES:
        raise ValueError(f"a tunnel has {MOST_SERVICES} services at most")
    services: dict[str, LocalAddress] = {}
    problems = []
    for name, address in value.items():
        key = hide_secrets(name) if is_service_name(name) else "…"
        try:
            if not is_service_name(name):
                raise ValueError(f"allowed is {SERVICE_NAMES} as the name of a service")
            services[name] = a_local_address(address)
        except (TypeError, ValueError) as error:
            problems.append(Problem(key=key, value=shown(name, address), message=redact_reason(str(error), address)))
    if problems:
        raise RefusedItemsError(problems)
    return MappingProxyType(services)


def a_relay_address(value: str | RelayAddress) -> RelayAddress:
    if isinstance(value, RelayAddress):
        return value
    return RelayAddress.parse(a_text(value, "allowed is host:port or a ws:// or wss:// URL, as a string"))


def several_relays(value: Sequence[str | RelayAddress]) -> tuple[RelayAddress, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of addresses")
    if len(given) > MOST_RELAYS:
        raise ValueError(f"allowed are {MOST_RELAYS} relays at most")
    addresses: list[RelayAddress] = []
    problems = []
    for index, item in enumerate(value):
        try:
            addresses.append(a_relay_address(item))
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, item), message=redact_reason(str(error), item)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(addresses)


def first_relay(config: Any) -> RelayAddress:
    """The default of `relay_addr`. `relay_addrs` may have been refused."""
    addresses = config.relay_addrs
    return addresses[0] if isinstance(addresses, tuple) and addresses else DEFAULT_RELAY


def a_transport(value: str | None) -> Transport | None:
    return None if value is None else Transport.parse(a_text(value, f"allowed are {', '.join(Transport)}, as a string"))


def a_key_mode(value: str) -> KeyMode:
    known = [str(mode) for mode in KeyMode]
    word = a_text(value, f"allowed are {', '.join(known)}, as a string")
    if word not in known:
        raise ValueError(f"allowed are {', '.join(known)}; the nearest of them is {nearest(word, known)!r}")
    return KeyMode(word)


def a_proxy(value: str | Proxy) -> Proxy | Direct:
    if isinstance(value, Proxy):
        return value
    return configured_proxy(a_text(value, "allowed is a http://, https:// or socks5:// URL, or 'none', as a string"))


def a_host_header(value: str) -> str:
    return normal_audience(a_text(value, "allowed is host or host:port, as a string"))


def names_of_services(value: Sequence[str]) -> tuple[str, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of names of services")
    if not all(isinstance(name, str) and is_service_name(name) for name in given):
        raise ValueError(f"allowed is {SERVICE_NAMES} as the name of a service")
    return tuple(given)


def access_by_service(value: Mapping[str, Access | Mapping[str, Any]]) -> Mapping[str, Access]:
    given: object = value
    if not isinstance(given, Mapping):
        raise TypeError("allowed is a table of tables, by the names of services")
    found: dict[str, Access] = {}
    problems: list[Problem] = []
    for name, rules in value.items():
        key = hide_secrets(name) if is_service_name(name) else "…"
        try:
            if not is_service_name(name):
                raise ValueError(f"allowed is {SERVICE_NAMES} as the name of a service")
            found[name] = an_access(rules)
        except RefusedItemsError as refused:
            problems += [attrs.evolve(problem, key=f"{key}.{problem.key}") for problem in refused.problems]
        except (TypeError, ValueError) as error:
            problems.append(Problem(key=key, message=str(error)))
    if problems:
        raise RefusedItemsError(problems)
    return MappingProxyType(found)
