"""The relay's configuration file: `[relay]` and its `[[relay.tunnels]]`, as one frozen `RelayConfig`.

    [relay]
    control_addr = "0.0.0.0:8443"              # gateways connect here
    ingress_addr = "0.0.0.0:443"               # visitors connect here; may be the same address
    id = "relay-1"
    public_names = ["relay.example.com:8443"]  # the names by which gateways dial this relay
    tls_certificate = "relay.crt"
    tls_private_key = "relay.key"

    [[relay.tunnels]]
    id = "office"
    url = "https://office.example.com"
    key = "ed25519:…"                          # the public half: a thief of this file cannot open the tunnel

One error reports all problems, each with file, key path, value and what is allowed (see `_storage/validation`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, TypeAlias, final

import attrs

from .._model.addresses import Address, PublicUrl, bracketed, is_ip_address, normal_audience
from .._model.errors import InvalidSettingsError, Problem
from .._model.keys import PublicKey
from .._model.text import redact_reason, shown
from .._storage.toml_read import read_toml, subtable
from .._storage.validation import (
    NOT_A_KEY,
    RefusedItemsError,
    Rule,
    a_flag,
    a_path,
    a_public_key,
    a_text,
    examine_each,
    hold_back,
    label,
    nearest,
    refusal,
    settle,
    structure,
    whole_number,
)
from .gateways.takeover import Takeover, TakeoverRules
from .limits import RelayLimits

__all__ = ["RelayConfig", "TunnelEntry", "each_address"]

LABEL_LIMIT: Final = 128
MOST_KEYS: Final = 8
_TABLE: Final = "relay"
_Addresses: TypeAlias = Address | tuple[Address, ...]


def _listening_address(value: str | Address) -> Address:
    if isinstance(value, Address):
        return value
    return Address.parse(a_text(value, "allowed is host:port, as a string"), listening=True)


def _listening_addresses(value: str | Address | Sequence[str | Address]) -> _Addresses:
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


def each_address(value: _Addresses | None) -> tuple[Address, ...]:
    """The value of a key that holds one address, several or none, as a tuple."""
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _public_url(value: str | PublicUrl) -> PublicUrl:
    if isinstance(value, PublicUrl):
        return value
    return PublicUrl.parse(a_text(value, "allowed is an http:// or https:// URL, as a string"))


def _public_names(value: Sequence[str]) -> tuple[str, ...]:
    allowed = "allowed is an array of host or host:port, with one name at least"
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence) or not given:
        raise TypeError(allowed)
    names, problems = [], []
    for index, name in enumerate(given):
        try:
            names.append(normal_audience(a_text(name, "allowed is host or host:port, as a string")))
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, name), message=redact_reason(str(error), name)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(names)


def _tls(_instance: Any, _field: Any, value: Any) -> None:
    if value not in ("terminate", "passthrough"):
        raise ValueError("allowed are 'terminate' and 'passthrough'")


def _no_name_to_route_by(tls: str, url: PublicUrl) -> str | None:
    if tls == "terminate":
        return None
    if url.scheme != "https":
        return "its visitors come with TLS, so its url is an https:// one"
    return (
        "visitors do not name an IP address when they come with TLS; url needs a name"
        if is_ip_address(url.host)
        else None
    )


def _passes_through_already(tls: str, bind_addr: _Addresses | None) -> str | None:
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


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class TunnelEntry:
    """One tunnel, an entry of `[[relay.tunnels]]`.

    Attributes:
        id: its name in logs and commands, up to 128 characters.
        url: the URL for visitors. Without a `bind_addr`, its host is what routes visitors to this tunnel.
        key: the gateway's public key; None if `keys` is given.
        keys: for a key rotation, 1 to 8 public keys, the oldest first. All of them are valid. A session with a later
            key takes the tunnel over, and visitors of the old session may finish.
        bind_addr: one address or several for visitors of this tunnel alone, in any protocol.
        service: the label that the gateway has to name; None accepts any.
        tls: where visitors' TLS ends: `terminate` is at the relay, `passthrough` is behind the tunnel. With
            `passthrough`, the name in the ClientHello routes visitors, and the relay cannot read their data.
        takeover: which of two gateways with the same key has the tunnel, the newest or the first.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    id: str = attrs.field(validator=label(LABEL_LIMIT))
    url: PublicUrl = attrs.field(converter=_public_url)
    key: PublicKey | None = attrs.field(default=None, converter=attrs.converters.optional(a_public_key))
    keys: tuple[PublicKey, ...] | None = attrs.field(default=None, converter=attrs.converters.optional(_public_keys))
    bind_addr: _Addresses | None = attrs.field(default=None, converter=attrs.converters.optional(_listening_addresses))
    service: str | None = attrs.field(default=None, validator=attrs.validators.optional(label(LABEL_LIMIT)))
    takeover: Takeover = attrs.field(default=Takeover.NEWEST, converter=_takeover)
    tls: Literal["terminate", "passthrough"] = attrs.field(default="terminate", validator=_tls)

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("key", "keys"), _key_or_keys),
        Rule(("tls", "url"), _no_name_to_route_by),
        Rule(("tls", "bind_addr"), _passes_through_already),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    @property
    def passes_tls(self) -> bool:
        """Whether visitors' TLS passes through the relay."""
        return self.tls == "passthrough"

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


def _tunnels(value: Sequence[TunnelEntry | Mapping[str, Any]]) -> tuple[TunnelEntry, ...]:
    entries, problems = examine_each(TunnelEntry, value)
    problems += _conflicts(entries)
    if problems:
        raise RefusedItemsError(problems)
    return tuple(TunnelEntry(**entry) for entry in entries)


def _conflicts(entries: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """Values that two entries claim. `entries` holds the valid values of each."""
    first: dict[tuple[str, Hashable], tuple[int, str]] = {}
    problems = []
    for index, entry in enumerate(entries):
        for name, claim, why in _claims(entry):
            kind = name.partition("[")[0].removesuffix("s")  # `key` and `keys` claim the same kind of value
            taken_by, there = first.setdefault((kind, claim), (index, name))
            if taken_by != index:
                key = f"[{index}].{name}"
                place = f"tunnels[{taken_by}]" if there == name else f"tunnels[{taken_by}].{there}"
                message = f"stands in {place} too; {why}"
                problems.append(Problem(key=key, value=shown(key, entry.get(name)), message=message))
    return problems


def _claims(entry: Mapping[str, Any]) -> list[tuple[str, Hashable, str]]:
    """What no other entry may have: key path, value and reason."""
    claims: list[tuple[str, Hashable, str]] = []
    if "id" in entry:
        claims.append(("id", entry["id"], "each tunnel has its own"))
    if entry.get("key") is not None:
        claims.append(("key", entry["key"], "a key belongs to one tunnel"))
    for index, key in enumerate(entry.get("keys") or ()):
        claims.append((f"keys[{index}]", key, "a key belongs to one tunnel"))
    if "bind_addr" in entry:
        bind_addr = entry["bind_addr"]
        if bind_addr is None and "url" in entry:
            claims.append(("url", entry["url"].host, "visitors without a bind_addr are told apart by the host"))
        for index, address in enumerate(each_address(bind_addr)):
            if address.port != 0:
                name = f"bind_addr[{index}]" if isinstance(bind_addr, tuple) else "bind_addr"
                claims.append((name, address, "each tunnel has its own"))
    return claims


def _limits(value: RelayLimits | Mapping[str, Any]) -> RelayLimits:
    if isinstance(value, RelayLimits):
        return value
    try:
        return structure(RelayLimits, value)
    except InvalidSettingsError as error:
        raise RefusedItemsError(error.problems) from None


def _half_a_pair(certificate: Path | None, private_key: Path | None) -> str | None:
    if (certificate is None) == (private_key is None):
        return None
    missing = "tls_private_key" if private_key is None else "tls_certificate"
    return f"{missing} is missing; name both or neither"


def _no_certificate(tls: bool, certificate: Path | None) -> str | None:
    if not tls or certificate is not None:
        return None
    return "TLS needs tls_certificate and tls_private_key; what passes through, with tls = 'passthrough', needs neither"


def _public_name_passes_through(
    tunnels: Sequence[TunnelEntry], names: Sequence[str], control_addr: _Addresses, ingress_addr: _Addresses
) -> str | None:
    if not _shared(control_addr, ingress_addr):
        return None
    hosts = {name for public in names for name in (public, public.rpartition(":")[0])}
    for index, tunnel in enumerate(tunnels):
        if tunnel.passes_tls and bracketed(tunnel.url.host) in hosts:
            return (
                f"tunnels[{index}] takes all TLS for '{tunnel.url.host}', which is a public name of the relay too: at"
                " one address for both, gateways would not get through; give one of them another name"
            )
    return None


def _shared_address_needs_one_tls_setting(
    ingress_tls: bool, control_tls: bool, ingress_addr: _Addresses, control_addr: _Addresses
) -> str | None:
    if ingress_tls == control_tls or not _shared(control_addr, ingress_addr):
        return None
    return (
        "ingress_addr is control_addr, and one address cannot be both with and without TLS; control_tls says otherwise"
    )


def _tunnel_address_is_taken(
    tunnels: Sequence[TunnelEntry], control_addr: _Addresses, ingress_addr: _Addresses
) -> str | None:
    for index, tunnel in enumerate(tunnels):
        for name, own in (("control_addr", control_addr), ("ingress_addr", ingress_addr)):
            for address in _shared(tunnel.bind_addr, own):
                if address.port != 0:
                    return f"tunnels[{index}].bind_addr is {name} too, '{address}'; it needs an address of its own"
    return None


def _shared(one: _Addresses | None, other: _Addresses | None) -> list[Address]:
    return [address for address in each_address(one) if address in each_address(other)]


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class RelayConfig:
    """The configuration of a relay.

    `load`, `from_table` and the keywords of the class accept the same values and raise the same errors. Keywords also
    accept parsed values, for example an `Address` or a `TunnelEntry`.

    Attributes:
        control_addr: one address or several for gateways. Port 0 means any free port. `[::]:port` accepts IPv4 as well
            as IPv6, unless another entry has an IPv4 address with that port.
        ingress_addr: one address or several for visitors. An address that is also in `control_addr` serves both.
        id: the relay's name, up to 128 characters. Gateways' proofs are bound to it.
        public_names: every name by which gateways dial this relay, `host` or `host:port`, normalised. A proof for
            another name is refused. Give the port only if the gateways' URL names it.
        tls_certificate: the file of the certificate chain, PEM; see `tls_certificate_path`.
        tls_private_key: the file of its private key, PEM; see `tls_private_key_path`.
        control_tls: whether gateways connect with TLS (default: whether there is a certificate).
        ingress_tls: the same for visitors. Visitors of tunnels with `passthrough` use TLS in any case.
        identity_key_file: the file of the relay's Ed25519 private seed, 64 hexadecimal digits, with which the relay
            proves itself to gateways; see `identity_key_path`.
        heartbeat_ms: silence after which a link is pinged (default 15 000, 1000 to 60 000).
        rotation_grace_ms: how long visitors of a session may stay after a newer key has taken the tunnel over (default
            600 000, up to 86 400 000).
        limits: `[relay.limits]`.
        tunnels: the tunnels.
        base_dir: the folder that relative paths start from: that of the file. Not a key of the table.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    control_addr: _Addresses = attrs.field(converter=_listening_addresses)
    ingress_addr: _Addresses = attrs.field(converter=_listening_addresses)
    id: str = attrs.field(validator=label(LABEL_LIMIT))
    public_names: tuple[str, ...] = attrs.field(converter=_public_names)
    tls_certificate: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    tls_private_key: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    control_tls: bool = attrs.field(validator=a_flag)
    ingress_tls: bool = attrs.field(validator=a_flag)
    identity_key_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    heartbeat_ms: int = attrs.field(default=15_000, validator=whole_number(1000, 60_000))
    rotation_grace_ms: int = attrs.field(default=600_000, validator=whole_number(0, 86_400_000))
    limits: RelayLimits = attrs.field(factory=RelayLimits, converter=_limits)
    tunnels: tuple[TunnelEntry, ...] = attrs.field(default=(), converter=_tunnels)
    base_dir: Path = attrs.field(default=Path(), converter=a_path, metadata={NOT_A_KEY: True})

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("tls_certificate", "tls_private_key"), _half_a_pair),
        Rule(("control_tls", "tls_certificate"), _no_certificate),
        Rule(("ingress_tls", "tls_certificate"), _no_certificate),
        Rule(("ingress_tls", "control_tls", "ingress_addr", "control_addr"), _shared_address_needs_one_tls_setting),
        Rule(("tunnels", "control_addr", "ingress_addr"), _tunnel_address_is_taken),
        Rule(("tunnels", "public_names", "control_addr", "ingress_addr"), _public_name_passes_through),
    )

    @control_tls.default
    @ingress_tls.default
    def _tls_with_certificate(self) -> bool:
        return self.tls_certificate is not None

    def __attrs_post_init__(self) -> None:
        settle(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RelayConfig:
        """Read a relay's TOML file.

        Raises:
            StorageError: the file cannot be read.
            InvalidSettingsError: the file is not TOML, has no table `[relay]`, or the table is wrong; see the class.
        """
        file = Path(path)
        document = read_toml(file)
        table = subtable(document, _TABLE, source=str(file))
        if table is None:
            tables = [name for name, value in document.items() if isinstance(value, Mapping)]
            raise refusal(
                [Problem(source=str(file), key=_TABLE, message="the table is missing", nearest=nearest(_TABLE, tables))]
            )
        return cls.from_table(table, source=str(file), base_dir=file.absolute().parent)

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], *, source: str | None = None, base_dir: str | Path = Path()
    ) -> RelayConfig:
        """Make a configuration from a table.

        Args:
            table: the content of `[relay]`.
            source: the file that errors name.
            base_dir: the folder that relative paths start from.

        Raises:
            InvalidSettingsError: see the class.
        """
        return structure(cls, table, where=_TABLE, source=source, base_dir=base_dir)

    @property
    def all_addresses(self) -> frozenset[Address]:
        """Every address that the relay listens at."""
        keys = (self.control_addr, self.ingress_addr, *(tunnel.bind_addr for tunnel in self.tunnels))
        return frozenset(address for key in keys for address in each_address(key))

    @property
    def tls_certificate_path(self) -> Path | None:
        """The path of `tls_certificate`, from `base_dir`."""
        return self._below(self.tls_certificate)

    @property
    def tls_private_key_path(self) -> Path | None:
        """The path of `tls_private_key`, from `base_dir`."""
        return self._below(self.tls_private_key)

    @property
    def identity_key_path(self) -> Path | None:
        """The path of `identity_key_file`, from `base_dir`."""
        return self._below(self.identity_key_file)

    def _below(self, path: Path | None) -> Path | None:
        return None if path is None else self.base_dir / path
