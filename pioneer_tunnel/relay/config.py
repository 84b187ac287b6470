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

`tunnels` has the tunnels. One error reports all problems, each with file, key path, value and what is allowed (see
`_storage/validation`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import attrs

from .._model.addresses import Address, normal_audience, normal_host, quotable
from .._model.errors import InvalidSettingsError, Problem
from .._model.text import redact_reason, shown
from .._storage.networks import Network, proxy_networks
from .._storage.toml_read import parse_toml, read_toml, subtable
from .._storage.validation import (
    NOT_A_KEY,
    RefusedItemsError,
    Rule,
    a_flag,
    a_path,
    a_text,
    hold_back,
    label,
    nearest,
    one_of,
    refusal,
    settle,
    structure,
    whole_number,
)
from ..access_log.entry import AccessLogFormat, a_log_format
from ..access_log.writer import STANDARD_OUTPUT
from ..certificates.config import AcmeConfig, an_acme
from ..monitoring.address import SiteAddress, local_address, site_address
from .config_rules import RULES, hosts_of
from .fleet.config import FleetConfig, a_fleet
from .limits import RelayLimits
from .tunnels import LABEL_LIMIT, Addresses, TunnelEntry, each_address, listening_addresses, tunnels

__all__ = ["RelayConfig", "config_of"]

_TABLE: Final = "relay"
# fmt: off
RESERVED_NAMES: Final = (
    "admin", "administrator", "autoconfig", "autodiscover", "ftp", "hostmaster", "imap", "mail", "mta-sts", "ns1",
    "ns2", "pop", "postmaster", "root", "smtp", "webmail", "webmaster", "wpad", "www",
)
# fmt: on
"""Names that people, mail and browsers expect to belong to the operator of a domain."""


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


def _labels(value: Sequence[str]) -> tuple[str, ...]:
    allowed = "allowed is an array of names, each the first label of a host"
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError(allowed)
    return tuple(a_text(label, allowed) for label in value)


def _limits(value: RelayLimits | Mapping[str, Any]) -> RelayLimits:
    if isinstance(value, RelayLimits):
        return value
    try:
        return structure(RelayLimits, value)
    except InvalidSettingsError as error:
        raise RefusedItemsError(error.problems) from None


def _health_host(value: str) -> str:
    text = a_text(value, "allowed is a host name without port")
    return normal_host(text, quotable(text))


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
        acme: how certificates are ordered from an authority, for the public names and for the hosts of tunnels whose
            TLS ends here; None (default) not at all. `acme_config` has its paths resolved. See docs/certificates.md.
        http_addr: one address or several, most often port 80, for visitors without TLS beside an `ingress_addr` with
            it. They are sent to https://; an authority's HTTP-01 is answered here, or passed to the gateway.
        control_tls: whether gateways connect with TLS (default: whether there is a certificate, or `acme`).
        ingress_tls: the same for visitors. Visitors of tunnels with `passthrough` use TLS in any case.
        identity_key_file: the file of the relay's Ed25519 private seed, 64 hexadecimal digits, with which the relay
            proves itself to gateways; see `identity_key_path`.
        announce_certificate: whether gateways are told the certificate with which this relay ends their TLS, so that
            they notice if it is opened on the way (default true). False where a proxy of yours does that.
        heartbeat_ms: silence after which a link is pinged (default 15 000, 1000 to 60 000).
        rotation_grace_ms: how long visitors of a session may stay after a newer key has taken the tunnel over (default
            600 000, up to 86 400 000).
        drain_timeout_ms: how long visitors may stay when the relay stops in order (default 30 000, up to 86 400 000).
        accept_proxy_from: addresses and networks of balancers. A connection from one of them at an address for visitors
            has to begin with a PROXY header, of version 1 or 2, which names the visitor. An address for gateways alone
            takes none.
        trust_forwarded_from: addresses and networks of HTTP proxies whose X-Forwarded-For names the visitor of each
            request, and whose X-Forwarded-Proto says whether the visitor used TLS. They have to set both.
        resume_timeout_ms: how long a session without connection waits for its gateway (default 60 000, up to 3 600 000;
            0: not at all). The gateway may have a smaller value.
        limits: `[relay.limits]`.
        tunnels: the tunnels.
        names_file: the file in which the relay keeps the names that gateways create below wildcards; see
            `names_path`. Needed where a tunnel has a wildcard.
        reserved_names: names that no gateway may create below a wildcard.
        dashboard: where a page for the operator listens, a loopback address or a Unix socket; None (default) for no
            page. It has no login: all who can connect there can read it.
        access_log: the file of the access log, `-` for standard output, None (default) for none; see `access_log_path`.
        access_log_format: `common` (default) or `json`.
        access_log_addresses: `full` (default), or `short` for visitors' networks: an IPv4 /24, an IPv6 /48.
        metrics: where Prometheus finds metrics, at `/metrics`, and balancers health checks, at `/-/healthy` and
            `/-/ready`; None (default) for nowhere. It has no login. It may be the address of `dashboard`. It needs the
            package prometheus-client (extra `metrics`).
        fleet: this node of a fleet, and how it finds the others; None (default) for a relay alone. `fleet_config` has
            its paths resolved. See docs/fleet.md.
        health_host: the Host of health checks at the addresses for visitors; None (default) for none. The relay answers
            requests for it itself: 200, or 503 while it drains.
        base_dir: the folder that relative paths start from: that of the file. Not a key of the table.

    Raises:
        InvalidSettingsError: its `problems` name all that is wrong.
    """

    control_addr: Addresses = attrs.field(converter=listening_addresses)
    ingress_addr: Addresses = attrs.field(converter=listening_addresses)
    id: str = attrs.field(validator=label(LABEL_LIMIT))
    public_names: tuple[str, ...] = attrs.field(converter=_public_names)
    tls_certificate: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    tls_private_key: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    acme: AcmeConfig | None = attrs.field(default=None, converter=an_acme)
    http_addr: Addresses | None = attrs.field(default=None, converter=attrs.converters.optional(listening_addresses))
    control_tls: bool = attrs.field(validator=a_flag)
    ingress_tls: bool = attrs.field(validator=a_flag)
    identity_key_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    announce_certificate: bool = attrs.field(default=True, validator=a_flag)
    heartbeat_ms: int = attrs.field(default=15_000, validator=whole_number(1000, 60_000))
    rotation_grace_ms: int = attrs.field(default=600_000, validator=whole_number(0, 86_400_000))
    drain_timeout_ms: int = attrs.field(default=30_000, validator=whole_number(0, 86_400_000))
    accept_proxy_from: tuple[Network, ...] = attrs.field(default=(), converter=proxy_networks)
    trust_forwarded_from: tuple[Network, ...] = attrs.field(default=(), converter=proxy_networks)
    resume_timeout_ms: int = attrs.field(default=60_000, validator=whole_number(0, 3_600_000))
    limits: RelayLimits = attrs.field(factory=RelayLimits, converter=_limits)
    tunnels: tuple[TunnelEntry, ...] = attrs.field(default=(), converter=tunnels)
    names_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    reserved_names: tuple[str, ...] = attrs.field(default=RESERVED_NAMES, converter=_labels)
    dashboard: SiteAddress | None = attrs.field(default=None, converter=attrs.converters.optional(local_address))
    metrics: SiteAddress | None = attrs.field(default=None, converter=attrs.converters.optional(site_address))
    health_host: str | None = attrs.field(default=None, converter=attrs.converters.optional(_health_host))
    access_log: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    access_log_format: AccessLogFormat = attrs.field(default=AccessLogFormat.COMMON, converter=a_log_format)
    access_log_addresses: Literal["full", "short"] = attrs.field(default="full", validator=one_of("full", "short"))
    fleet: FleetConfig | None = attrs.field(default=None, converter=a_fleet)
    base_dir: Path = attrs.field(default=Path(), converter=a_path, metadata={NOT_A_KEY: True})

    _RULES: ClassVar[tuple[Rule, ...]] = RULES

    @control_tls.default
    @ingress_tls.default
    def _tls_with_certificate(self) -> bool:
        return self.tls_certificate is not None or self.acme is not None

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
        return _config_in(read_toml(file), file)

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
    def public_hosts(self) -> tuple[str, ...]:
        """`public_names` without ports."""
        return hosts_of(self.public_names)

    @property
    def all_addresses(self) -> frozenset[Address]:
        """Every address that the relay listens at."""
        bound = (route.bind_addr for tunnel in self.tunnels for route in tunnel.routes)
        keys = (self.control_addr, self.ingress_addr, self.http_addr, *bound)
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
    def acme_config(self) -> AcmeConfig | None:
        """`acme`, with paths from `base_dir`."""
        return None if self.acme is None else self.acme.below(self.base_dir)

    @property
    def fleet_config(self) -> FleetConfig | None:
        """`fleet`, with paths from `base_dir`."""
        return None if self.fleet is None else self.fleet.below(self.base_dir)

    @property
    def names_path(self) -> Path | None:
        """The path of `names_file`, from `base_dir`."""
        return self._below(self.names_file)

    @property
    def identity_key_path(self) -> Path | None:
        """The path of `identity_key_file`, from `base_dir`."""
        return self._below(self.identity_key_file)

    @property
    def access_log_path(self) -> Path | None:
        """The path of `access_log`, from `base_dir`; `-` as it is."""
        return self.access_log if self.access_log == STANDARD_OUTPUT else self._below(self.access_log)

    def _below(self, path: Path | None) -> Path | None:
        return None if path is None else self.base_dir / path


def config_of(content: bytes, file: Path) -> RelayConfig:
    """The configuration that `RelayConfig.load` would read if `file` had this content.

    Raises:
        InvalidSettingsError: as there.
    """
    return _config_in(parse_toml(content, file), file)


def _config_in(document: Mapping[str, Any], file: Path) -> RelayConfig:
    table = subtable(document, _TABLE, source=str(file))
    if table is None:
        tables = [name for name, value in document.items() if isinstance(value, Mapping)]
        raise refusal(
            [Problem(source=str(file), key=_TABLE, message="the table is missing", nearest=nearest(_TABLE, tables))]
        )
    return RelayConfig.from_table(table, source=str(file), base_dir=file.absolute().parent)
