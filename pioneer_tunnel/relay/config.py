"""The file of a relay that one hosts oneself: `[relay]` and its `[[relay.tunnels]]`, as one frozen `RelayConfig`.

    [relay]
    control_addr = "0.0.0.0:8443"              # gateways come here
    ingress_addr = "0.0.0.0:443"               # visitors come here; may be the same
    id = "relay-1"
    public_names = ["relay.example.com:8443"]  # how gateways dial this relay
    tls_certificate = "relay.crt"
    tls_private_key = "relay.key"

    [[relay.tunnels]]
    id = "office"
    url = "https://office.example.com"
    key = "ed25519:…"                          # the public half: whoever steals this file opens nothing with it

Whatever is wrong is told at once, with file, key path, value and what is allowed (see `tables.py`).

Neighbours: the server listens where this says; the registry is made of `tunnels`.
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
    """The addresses to listen at, of a key that holds one address, several or none."""
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


def _no_name_to_pass_by(tls: str, url: PublicUrl) -> str | None:
    if tls == "terminate":
        return None
    if url.scheme != "https":
        return "its visitors come with TLS, so its url is an https:// one"
    return (
        "visitors do not name an IP address when they come with TLS; url needs a name"
        if is_ip_address(url.host)
        else None
    )


def _passed_through_anyhow(tls: str, bind_addr: _Addresses | None) -> str | None:
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
        except (TypeError, ValueError) as error:  # of a key, nothing is quoted
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
    """One tunnel that the relay carries, as a `[[relay.tunnels]]`.

    Attributes:
        id: its name in logs and commands.
        url: where visitors find it. Without a `bind_addr` they are told apart by its host.
        key: the public half of the gateway's identity; None where there are `keys`.
        keys: while one key takes the place of another: the old one and then the new one, 8 at the most. All of them
            are valid. A session with a later key moves the tunnel to it, without dropping a visitor of the old one.
        bind_addr: an address of its own to listen at for this tunnel's visitors, whatever they speak; or several.
        service: the label that the gateway has to name; None takes any.
        tls: who ends the TLS of visitors: `terminate` is the relay, `passthrough` whoever stands behind the tunnel.
            Then visitors are told apart by the name in their ClientHello, and the relay cannot read what they say.
        takeover: which of two gateways with one key has the tunnel, the newest or the first to come.

    Raises:
        InvalidSettingsError: with everything that is wrong in its `problems`.
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
        Rule(("tls", "url"), _no_name_to_pass_by),
        Rule(("tls", "bind_addr"), _passed_through_anyhow),
    )

    def __attrs_post_init__(self) -> None:
        settle(self)

    @property
    def passes_tls(self) -> bool:
        """Whether the TLS of its visitors is not the relay's to end."""
        return self.tls == "passthrough"

    @property
    def valid_keys(self) -> tuple[PublicKey, ...]:
        """Every key that opens this tunnel, the oldest first."""
        return self.keys if self.keys is not None else () if self.key is None else (self.key,)

    @functools.cached_property
    def keys_by_id(self) -> Mapping[str, PublicKey]:
        """The same by their ids, made once: looking a known key up shall not take longer than an unknown one."""
        return MappingProxyType({key.key_id: key for key in self.valid_keys})

    @property
    def takeover_rules(self) -> TakeoverRules:
        """What happens when a second gateway comes."""
        return TakeoverRules(takeover=self.takeover, keys=tuple(self.keys_by_id))


def _tunnels(value: Sequence[TunnelEntry | Mapping[str, Any]]) -> tuple[TunnelEntry, ...]:
    entries, problems = examine_each(TunnelEntry, value)
    problems += _taken_twice(entries)
    if problems:
        raise RefusedItemsError(problems)
    return tuple(TunnelEntry(**entry) for entry in entries)


def _taken_twice(entries: Sequence[Mapping[str, Any]]) -> list[Problem]:
    """What two entries claim; `entries` are what is good of each."""
    first: dict[tuple[str, Hashable], tuple[int, str]] = {}
    problems = []
    for index, entry in enumerate(entries):
        for name, claim, why in _claims(entry):
            kind = name.partition("[")[0].removesuffix("s")  # a key is one wherever it stands
            taken_by, there = first.setdefault((kind, claim), (index, name))
            if taken_by != index:
                key = f"[{index}].{name}"
                place = f"tunnels[{taken_by}]" if there == name else f"tunnels[{taken_by}].{there}"
                message = f"stands in {place} too; {why}"
                problems.append(Problem(key=key, value=shown(key, entry.get(name)), message=message))
    return problems


def _claims(entry: Mapping[str, Any]) -> list[tuple[str, Hashable, str]]:
    """What no other entry may have, as key, value and the reason."""
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


def _gateways_passed_through(
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


def _one_door_two_ways(
    ingress_tls: bool, control_tls: bool, ingress_addr: _Addresses, control_addr: _Addresses
) -> str | None:
    if ingress_tls == control_tls or not _shared(control_addr, ingress_addr):
        return None
    return (
        "ingress_addr is control_addr, and one address cannot be both with and without TLS; control_tls says otherwise"
    )


def _bound_elsewhere(tunnels: Sequence[TunnelEntry], control_addr: _Addresses, ingress_addr: _Addresses) -> str | None:
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
    """What the operator of a relay decides.

    Made with `load`, `from_table` or keywords, which take what the file would hold or the value itself, and raise the
    same errors.

    Attributes:
        control_addr: where to listen for gateways: an address or several. Port 0 takes any free one. `[::]:port`
            takes IPv4 as well as IPv6, unless another entry has an IPv4 address with that port.
        ingress_addr: where to listen for visitors. An address that `control_addr` has too is for both.
        id: the relay's name, which proofs are bound to.
        public_names: every name that gateways dial this relay by, `host` or `host:port`, in normal form; a proof for
            another name is refused. With `:port` only where the URL that gateways have names it.
        tls_certificate: the certificate chain, PEM; `tls_certificate_path` is where it is.
        tls_private_key: its private key, PEM; `tls_private_key_path` is where it is.
        control_tls: whether gateways speak TLS; when there is a certificate they do, unless this says otherwise.
        ingress_tls: the same for visitors. Also without it, those of tunnels with `passthrough` come with TLS.
        identity_key_file: holds the relay's Ed25519 private seed, 32 bytes in hexadecimal digits; with it the relay
            proves itself to gateways. `identity_key_path` is where it is.
        heartbeat_ms: how long a link may be silent before it is pinged.
        rotation_grace_ms: how long the visitors of a session may stay after a newer key has taken the tunnel over.
        limits: what visitors, addresses and tunnels may cost, `[relay.limits]`.
        tunnels: the tunnels that this relay carries.
        base_dir: what relative paths are relative to: the folder of the file. Not a key of the table.

    Raises:
        InvalidSettingsError: with everything that is wrong in its `problems`.
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
        Rule(("ingress_tls", "control_tls", "ingress_addr", "control_addr"), _one_door_two_ways),
        Rule(("tunnels", "control_addr", "ingress_addr"), _bound_elsewhere),
        Rule(("tunnels", "public_names", "control_addr", "ingress_addr"), _gateways_passed_through),
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
            InvalidSettingsError: it is not TOML, has no table `[relay]`, or the table is wrong; see the class.
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
        """Make a config of the table's content.

        Args:
            table: what stands under `[relay]`.
            source: the file that errors name.
            base_dir: what relative paths are relative to.

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
        """Where the certificate chain is."""
        return self._below(self.tls_certificate)

    @property
    def tls_private_key_path(self) -> Path | None:
        """Where the certificate's private key is."""
        return self._below(self.tls_private_key)

    @property
    def identity_key_path(self) -> Path | None:
        """Where the relay's Ed25519 private seed is."""
        return self._below(self.identity_key_file)

    def _below(self, path: Path | None) -> Path | None:
        return None if path is None else self.base_dir / path
