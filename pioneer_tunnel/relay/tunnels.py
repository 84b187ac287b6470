"""The tunnels of a relay's configuration: `[[relay.tunnels]]`, and the services of each.

    [[relay.tunnels]]
    id = "office"
    key = "ed25519:…"                          # the public half: a thief of this file cannot open the tunnel
    url = "https://office.example.com"         # where visitors reach it

A tunnel that carries several services names each of them in place of its own `url`:

    [[relay.tunnels.services]]
    name = "web"
    url = "https://office.example.com"

    [[relay.tunnels.services]]
    name = "ssh"
    bind_addr = "0.0.0.0:2222"

A wildcard lets the gateway create names: each service that it offers and the entry does not name is one of them.

    [[relay.tunnels.services]]
    name = "*"
    url = "https://*.box.example.com"

In each form, `TunnelEntry.routes` says how visitors reach the tunnel.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, TypeAlias, final

import attrs

from .._model.addresses import Address, PublicUrl, is_ip_address
from .._model.errors import Problem
from .._model.keys import PublicKey
from .._model.services import ANY_SERVICE, MOST_SERVICES, SERVICE_NAMES, is_service_name
from .._model.text import redact_reason, shown
from .._storage.validation import (
    RefusedItemsError,
    Rule,
    a_public_key,
    a_text,
    examine_each,
    hold_back,
    label,
    one_of,
    settle,
)
from ..access.rules import Access, an_access
from .gateways.takeover import Takeover, TakeoverRules

__all__ = [
    "LABEL_LIMIT",
    "MOST_KEYS",
    "Addresses",
    "Route",
    "ServiceEntry",
    "TunnelEntry",
    "each_address",
    "listening_addresses",
    "tunnels",
]

LABEL_LIMIT: Final = 128
MOST_KEYS: Final = 8
Addresses: TypeAlias = Address | tuple[Address, ...]
_Tls: TypeAlias = Literal["terminate", "passthrough"]


def _listening_address(value: str | Address) -> Address:
    if isinstance(value, Address):
        return value
    return Address.parse(a_text(value, "allowed is host:port, as a string"), listening=True)


def listening_addresses(value: str | Address | Sequence[str | Address]) -> Addresses:
    """A converter: one address to listen at, or several."""
    given: object = value
    if isinstance(given, str | Address):
        return _listening_address(given)
    allowed = "allowed is host:port, as a string, or an array of such strings"
    if isinstance(given, bytes) or not isinstance(given, Sequence) or not given:
        raise TypeError(allowed)
    addresses: list[Address] = []
    problems = []
    for index, item in enumerate(given):
        try:
            address = _listening_address(item)
            if address in addresses:
                raise ValueError(f"stands in [{addresses.index(address)}] too")
            addresses.append(address)
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, item), message=redact_reason(str(error), item)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(addresses)


def each_address(value: Addresses | None) -> tuple[Address, ...]:
    """The value of a key that holds one address, several or none, as a tuple."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _public_url(value: str | PublicUrl) -> PublicUrl:
    if isinstance(value, PublicUrl):
        return value
    return PublicUrl.parse(a_text(value, "allowed is an http:// or https:// URL, as a string"))


def _no_name_to_route_by(tls: str, url: PublicUrl | None) -> str | None:
    if tls == "terminate" or url is None:
        return None
    if url.scheme != "https":
        return "its visitors come with TLS, so its url is an https:// one"
    return (
        "visitors do not name an IP address when they come with TLS; url needs a name"
        if is_ip_address(url.host)
        else None
    )


def _passes_through_already(tls: str, bind_addr: Addresses | None) -> str | None:
    if tls == "terminate" or bind_addr is None:
        return None
    return "a tunnel with a bind_addr passes everything through, TLS among it; leave one of them out"


def _public_keys(value: Sequence[str | PublicKey]) -> tuple[PublicKey, ...]:
    allowed = f"allowed is an array of 1 to {MOST_KEYS} public keys, the oldest first"
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not 1 <= len(given) <= MOST_KEYS:
        raise TypeError(allowed)
    keys: list[PublicKey] = []
    problems = []
    for index, item in enumerate(given):
        try:
            key = a_public_key(item)
            if key in keys:
                raise ValueError(f"stands in [{keys.index(key)}] too; each key is named once")
            keys.append(key)
        except (TypeError, ValueError) as error:  # no part of a key is quoted
            problems.append(Problem(key=f"[{index}]", message=redact_reason(str(error), item)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(keys)


def _takeover(value: str | Takeover) -> Takeover:
    allowed = f"allowed are {' and '.join(repr(str(choice)) for choice in Takeover)}"
    text = a_text(value, allowed)
    if text not in {*Takeover}:
        raise ValueError(allowed)
    return Takeover(text)


def _key_or_keys(key: PublicKey | None, keys: tuple[PublicKey, ...] | None) -> str | None:
    if key is None and keys is None:
        return "is missing"
    if key is not None and keys is not None:
        return "stands beside keys; name one of both, and in keys every key that is valid"
    return None


def _service_name(_instance: Any, _field: Any, value: Any) -> None:
    allowed = f"allowed are {SERVICE_NAMES}; or '*' for a wildcard"
    if a_text(value, allowed) != ANY_SERVICE and not is_service_name(value):
        raise ValueError(allowed)


def _wildcard_by_another_name(name: str, url: PublicUrl | None) -> str | None:
    wildcard = url is not None and url.wildcard
    if (name == ANY_SERVICE) is wildcard:
        return None
    return (
        "a url with a wildcard belongs to a service with the name '*'" if wildcard else "its url has to be a wildcard"
    )


def _wildcard_with_address(url: PublicUrl | None, bind_addr: Addresses | None) -> str | None:
    if url is None or not url.wildcard or bind_addr is None:
        return None
    return "a wildcard stands beside a bind_addr; visitors of its names are told apart by the host"


def _no_way_to_it(url: PublicUrl | None, bind_addr: Addresses | None) -> str | None:
    return "is missing; a service has a url, a bind_addr, or both" if url is None and bind_addr is None else None


def _not_http(access: Access | None, tls: str, bind_addr: Addresses | None) -> str | None:
    if access is None or not access.needs_http or (tls == "terminate" and bind_addr is None):
        return None
    return (
        "basic_auth and bearer_tokens are for HTTP that the relay can read: not with a bind_addr, and not with"
        " tls = 'passthrough'"
    )


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class ServiceEntry:
    """One service of a tunnel, an entry of `[[relay.tunnels.services]]`.

    Attributes:
        name: its name, which the gateway uses too: 1 to 63 lower-case letters, digits, `-`, `_` and `.`; or `*`.
        url: as in `TunnelEntry`; it may be left out where there is a `bind_addr`. With the name `*`, a wildcard: each
            service that the gateway offers and the entry does not name has its name as the first label of a host.
        bind_addr, tls, access: as in `TunnelEntry`.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    name: str = attrs.field(validator=_service_name)
    url: PublicUrl | None = attrs.field(default=None, converter=attrs.converters.optional(_public_url))
    bind_addr: Addresses | None = attrs.field(default=None, converter=attrs.converters.optional(listening_addresses))
    tls: _Tls = attrs.field(default="terminate", validator=one_of("terminate", "passthrough"))
    access: Access | None = attrs.field(default=None, converter=attrs.converters.optional(an_access))

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("access", "tls", "bind_addr"), _not_http),
        Rule(("url", "bind_addr"), _no_way_to_it),
        Rule(("name", "url"), _wildcard_by_another_name),
        Rule(("url", "bind_addr"), _wildcard_with_address),
        Rule(("tls", "url"), _no_name_to_route_by),
        Rule(("tls", "bind_addr"), _passes_through_already),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)


def _services(value: Sequence[ServiceEntry | Mapping[str, Any]]) -> tuple[ServiceEntry, ...]:
    entries, problems = examine_each(ServiceEntry, value)
    if len(entries) > MOST_SERVICES:
        raise ValueError(f"a tunnel has {MOST_SERVICES} services at most")
    names = [entry.get("name") for entry in entries]
    for index, name in enumerate(names):
        if name is not None and name in names[:index]:
            key, message = f"[{index}].name", f"stands in services[{names.index(name)}] too; each service has its own"
            problems.append(Problem(key=key, value=shown(key, name), message=message))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(ServiceEntry(**entry) for entry in entries)


def _url_or_services(url: PublicUrl | None, services: tuple[ServiceEntry, ...]) -> str | None:
    if url is None and not services:
        return "is missing"
    return "stands beside services; each of these has its own" if url is not None and services else None


def _bound_beside_services(bind_addr: Addresses | None, services: tuple[ServiceEntry, ...]) -> str | None:
    return None if bind_addr is None or not services else "stands beside services; each of these has its own"


def _access_beside_services(access: Access | None, services: tuple[ServiceEntry, ...]) -> str | None:
    return None if access is None or not services else "stands beside services; each of these has its own"


def _tls_beside_services(tls: str, services: tuple[ServiceEntry, ...]) -> str | None:
    return None if tls == "terminate" or not services else "stands beside services; each of these has its own"


@final
@attrs.frozen(kw_only=True, eq=False)
class Route:
    """A way of visitors to a tunnel: to its only service, or to one of several.

    Attributes:
        entry: the tunnel.
        service: the name of the service; None for a tunnel that names none.
        first: whether it is the tunnel's first service. Only this one goes to a gateway that knows no services.
        url, bind_addr, tls, access: as in `ServiceEntry`.
    """

    entry: TunnelEntry
    service: str | None
    first: bool
    url: PublicUrl | None
    bind_addr: Addresses | None
    tls: _Tls
    access: Access | None

    @property
    def passes_tls(self) -> bool:
        """Whether visitors' TLS passes through the relay."""
        return self.tls == "passthrough"

    def below(self, label: str) -> Route:
        """Of the route of a wildcard: that of one name below it."""
        assert self.url is not None
        url = attrs.evolve(self.url, host=f"{label}.{self.url.domain}")
        return attrs.evolve(self, service=label, first=False, url=url)

    @property
    def host(self) -> str | None:
        """The host that routes visitors to it, or a wildcard; None where the address that they connect to does."""
        return None if self.url is None or self.bind_addr is not None else self.url.host


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class TunnelEntry:
    """One tunnel, an entry of `[[relay.tunnels]]`.

    Attributes:
        id: its name in logs and commands, up to 128 characters.
        url: the URL for visitors. Without a `bind_addr`, its host is what routes visitors to this tunnel. A wildcard,
            such as `https://*.box.example.com`, is the same as one service with the name `*`.
        key: the gateway's public key; None if `keys` is given.
        keys: for a key rotation, 1 to 8 public keys, the oldest first. All of them are valid. A session with a later
            key takes the tunnel over from one with an earlier key.
        bind_addr: one address or several for visitors of this tunnel alone, in any protocol.
        service: the label that the gateway has to name; None accepts any.
        tls: where visitors' TLS ends: `terminate` is at the relay, `passthrough` is behind the tunnel. With
            `passthrough`, the name in the ClientHello routes visitors, and the relay cannot read their data.
        takeover: which of two gateways with the same key has the tunnel, the newest or the first.
        access: who may reach it; None (default) for everybody. The rules of a wildcard are those of each name below it.
        services: the services of a tunnel that carries several, at most 64, each with what it needs of `url`,
            `bind_addr`, `tls` and `access` in place of the tunnel's.
            A gateway that knows no services gets visitors of the first one alone.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    id: str = attrs.field(validator=label(LABEL_LIMIT))
    url: PublicUrl | None = attrs.field(default=None, converter=attrs.converters.optional(_public_url))
    key: PublicKey | None = attrs.field(default=None, converter=attrs.converters.optional(a_public_key))
    keys: tuple[PublicKey, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_public_keys))
    bind_addr: Addresses | None = attrs.field(default=None, converter=attrs.converters.optional(listening_addresses))
    service: str | None = attrs.field(default=None, validator=attrs.validators.optional(label(LABEL_LIMIT)))
    takeover: Takeover = attrs.field(default=Takeover.NEWEST, converter=_takeover)
    tls: _Tls = attrs.field(default="terminate", validator=one_of("terminate", "passthrough"))
    access: Access | None = attrs.field(default=None, converter=attrs.converters.optional(an_access))
    services: tuple[ServiceEntry, ...] = attrs.field(default=(), converter=_services)

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("url", "services"), _url_or_services),
        Rule(("url", "bind_addr"), _wildcard_with_address),
        Rule(("key", "keys"), _key_or_keys),
        Rule(("tls", "url"), _no_name_to_route_by),
        Rule(("tls", "bind_addr"), _passes_through_already),
        Rule(("bind_addr", "services"), _bound_beside_services),
        Rule(("tls", "services"), _tls_beside_services),
        Rule(("access", "services"), _access_beside_services),
        Rule(("access", "tls", "bind_addr"), _not_http),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    @functools.cached_property
    def routes(self) -> tuple[Route, ...]:
        """How visitors reach this tunnel, the first service first."""
        if not self.services:
            service = ANY_SERVICE if self.url is not None and self.url.wildcard else None
            return (
                Route(
                    entry=self,
                    service=service,
                    first=True,
                    url=self.url,
                    bind_addr=self.bind_addr,
                    tls=self.tls,
                    access=self.access,
                ),
            )
        return tuple(
            Route(
                entry=self,
                service=one.name,
                first=not index,
                url=one.url,
                bind_addr=one.bind_addr,
                tls=one.tls,
                access=one.access,
            )
            for index, one in enumerate(self.services)
        )

    @property
    def wildcard(self) -> Route | None:
        """The route of the names that the gateway creates; None where it creates none."""
        return next((route for route in self.routes if route.service == ANY_SERVICE), None)

    @property
    def valid_keys(self) -> tuple[PublicKey, ...]:
        """Every key that opens this tunnel, the oldest first."""
        return self.keys if self.keys is not None else () if self.key is None else (self.key,)

    @functools.cached_property
    def keys_by_id(self) -> Mapping[str, PublicKey]:
        """The valid keys by key id. Cached, so that finding a known key takes no longer than an unknown one."""
        return MappingProxyType({key.key_id: key for key in self.valid_keys})

    @property
    def takeover_rules(self) -> TakeoverRules:
        """The rules for a second gateway that wants this tunnel."""
        return TakeoverRules(takeover=self.takeover, keys=tuple(self.keys_by_id))


def tunnels(value: Sequence[TunnelEntry | Mapping[str, Any]]) -> tuple[TunnelEntry, ...]:
    """A converter: the tunnels of a relay, of which no two claim the same."""
    entries, problems = examine_each(TunnelEntry, value)
    problems += _conflicts(entries)
    if problems:
        raise RefusedItemsError(problems)
    return tuple(TunnelEntry(**entry) for entry in entries)


def _conflicts(entries: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Values that two entries claim, or two services. `entries` holds the valid values of each."""
    first: dict[tuple[str, Hashable], tuple[int, str]] = {}
    problems = []
    for index, entry in enumerate(entries):
        for kind, name, value, claim, why in _claims(entry):
            taken_by, there = first.setdefault((kind, claim), (index, name))
            if taken_by != index or (there != name and kind != "key"):
                key = f"[{index}].{name}"
                place = f"tunnels[{taken_by}]" if there == name else f"tunnels[{taken_by}].{there}"
                message = f"stands in {place} too; {why}"
                problems.append(Problem(key=key, value=shown(key, value), message=message))
    return problems


_Claim: TypeAlias = tuple[str, str, object, Hashable, str]
"""The kind of a claim, the key path, the value to show, what it claims, and why nothing else may."""


def _claims(entry: Mapping[str, Any]) -> Iterator[_Claim]:
    if "id" in entry:
        yield "id", "id", entry["id"], entry["id"], "each tunnel has its own"
    if entry.get("key") is not None:
        yield "key", "key", entry["key"], entry["key"], "a key belongs to one tunnel"
    for index, key in enumerate(entry.get("keys") or ()):
        yield "key", f"keys[{index}]", None, key, "a key belongs to one tunnel"
    if "bind_addr" in entry:  # otherwise it is not valid
        yield from _claims_of_way("", entry.get("url"), entry["bind_addr"])
    for index, service in enumerate(entry.get("services") or ()):
        yield from _claims_of_way(f"services[{index}].", service.url, service.bind_addr)


def _claims_of_way(path: str, url: PublicUrl | None, bind_addr: Addresses | None) -> Iterator[_Claim]:
    if url is not None and not url.wildcard and bind_addr is None:
        yield "url", f"{path}url", url, url.host, "visitors without a bind_addr are told apart by the host"
    for index, address in enumerate(each_address(bind_addr)):
        if address.port != 0:
            several = isinstance(bind_addr, tuple)
            name = f"{path}bind_addr[{index}]" if several else f"{path}bind_addr"
            yield "bind_addr", name, None if several else bind_addr, address, "each tunnel has its own"
