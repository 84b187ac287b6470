"""`[gateway.remote_access]`: the operator's part of remote access, as one frozen `RemoteAccessConfig`.

The gateway contract fixes the table, its names and its defaults. All problems are reported at once, with file, key
path, value and what is allowed (see `_storage.validation`).

The user's settings are applied to it with `attrs.evolve`, which validates again. The relay key is not here: it is in a
keystore.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, final

import attrs

from .._model.addresses import Address, HttpsAddress, LocalAddress, RelayAddress
from .._model.keys import PublicKey
from .._model.proxies import Direct, Proxy
from .._model.services import ANY_SERVICE
from .._net.proxies.choice import ProxyChoice
from .._net.tls.client import SYSTEM_TRUSTS, SystemTrust
from .._storage.toml_read import read_toml, subtable
from .._storage.validation import (
    NOT_A_KEY,
    Rule,
    a_flag,
    a_path,
    a_public_key,
    hold_back,
    label,
    one_of,
    settle,
    structure,
    whole_number,
)
from .._wire.heartbeat import MAX_HEARTBEAT_MS, MIN_HEARTBEAT_MS
from .._wire.links import MOST_LINKS
from ..access.rules import Access, an_access
from ..access_log.entry import AccessLogFormat, a_log_format
from ..access_log.writer import STANDARD_OUTPUT
from ..certificates.config import AcmeConfig, an_acme
from ..monitoring.address import SiteAddress, site_address
from ..transports.process.config import ProcessConfig, a_process
from ..transports.rathole.key_mode import KeyMode
from .config_rules import RULES
from .config_values import (
    a_host_header,
    a_key_mode,
    a_local_address,
    a_proxy,
    a_relay_address,
    a_transport,
    access_by_service,
    first_relay,
    names_of_services,
    several_relays,
    several_services,
)
from .tls_config import TlsConfig, a_tls
from .transport import Transport, effective_transport

__all__ = ["RemoteAccessConfig"]

SERVICE_NAME_LIMIT: Final = 128
_TABLE: Final = "gateway.remote_access"
_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 60 * _MINUTE_MS
_DAY_MS: Final = 24 * _HOUR_MS


@final
@attrs.frozen(kw_only=True, field_transformer=hold_back)
class RemoteAccessConfig:
    """The operator's part of remote access.

    Made with `load`, `from_table` or keywords. Keywords take the text of the file (`relay_addr="wss://…"`) or the value
    itself, and raise the same errors.

    Attributes:
        runtime_dir: the folder for runtime files; `runtime_path` is its resolved path.
        relay_addrs: several relays, the preferred ones first, in place of `relay_addr`, which is then the first one.
        relay_addr: the relay.
        links: how many links to keep, 1 to 8, each to another relay where there are enough; None for one to each relay,
            and 8 at most. Further relays stand in for those that fail. `effective_links` is what is used.
        local_addr: where the local gateway listens: `host:port`, `unix:/path` or `https://host:port`. `local` has
            the TLS options too.
        service_name: the service's label.
        transport: the transport; None when it follows from the address. `effective_transport` is what is used.
        restart_initial_ms: the first reconnect delay; delays double.
        restart_max_ms: the longest reconnect delay, before jitter.
        restart_jitter_percent: each delay is spread by ± this share.
        max_restarts: restarts before giving up; 0 never gives up.
        restart_stable_ms: a session that lasted this long clears the count and the delay.
        allow_server_override: whether the settings' `server` may replace `relay_addr`.
        apply_grace_ms: how long open streams may go on after a change of the settings.
        stop_grace_ms: how long they may go on after `RemoteAccess.stop`.
        connect_timeout_ms: how long each step of connecting may take.
        heartbeat_ms: silence after which the link is pinged, if the relay's heartbeat is longer; None for the relay's.
        resume_timeout_ms: how long visitors' connections survive without a link to the relay, where the relay allows
            that; 0 for not at all. Transport `websocket` only.
        ca_file: a PEM file of further certificate authorities for TLS to the relay; `ca_path` is its resolved path.
        system_trust: what is trusted in addition to `ca_file`: `openssl`, the files that Python's OpenSSL knows, or
            `os`, what the operating system trusts; that needs the extra `truststore`.
        proxy: the proxy on the way to the relay; `none` for none; None asks `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`.
        proxy_credentials_file: a file with one line `user:password` for it, for its owner alone to read.
        relay_identity: the relay's public key; a relay that does not prove it is refused.
        key_mode: how a relay of transport `tcp` or `tls` knows the key.
        local_ca_file: a PEM file of further certificate authorities for TLS to the local gateway.
        local_verify: False accepts any certificate of a local gateway with TLS.
        proxy_protocol: `v2` sends a PROXY protocol header to the local gateway, so that it sees the visitor's address.
        forwarded_headers: `set` sets X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host, X-Real-IP and Forwarded in
            each HTTP request, from what the relay says of the visitor, in place of the visitor's own.
        host_header: the Host that the local gateway gets in each HTTP request; None keeps the visitor's.
        request_id: `set` gives each HTTP request a new X-Request-ID, and `keep` only where there is none.
        raw_services: names of services that are not HTTP. `forwarded_headers`, `host_header` and `request_id` change
            nothing there.
        access: who may reach the local gateway and the services; None (default) for everybody.
        service_access: the same for one service each, by name, in place of `access`.
        tls: the certificate that ends visitors' TLS here, where the relay passes TLS through and the local gateway does
            not end it; `tls_paths` are its resolved paths.
        acme: orders certificates from an authority in place of `tls`; `acme_config` has its paths resolved. See
            docs/certificates.md.
        process: the program of transport `process`; other transports ignore it.
        services: further services that the tunnel carries, by the names that the relay's operator gave them, and where
            each listens; `local_addr` is the first one's. `websocket` only. `local_ca_file` and `local_verify` do not
            apply to them.
        access_log: the file of the access log of visitors that are forwarded, `-` for standard output, None (default)
            for none; `access_log_path` is its resolved path.
        access_log_format: `common` (default) or `json`.
        access_log_addresses: `full` (default), or `short` for visitors' networks: an IPv4 /24, an IPv6 /48.
        metrics: where `RemoteAccess.run` serves metrics and health checks, `host:port` or `unix:/path`; None for
            nowhere, see `pioneer_tunnel.monitoring.serve_metrics`. A change takes effect when `run` begins again.
        base_dir: the folder of the file, to which relative paths are relative. Not a key of the table.

    Raises:
        InvalidSettingsError: with all problems in `problems`.
        UnsupportedTransportError: the same, when one of the problems is an unknown transport.
    """

    runtime_dir: Path = attrs.field(default=Path("remote-access"), converter=a_path)
    relay_addrs: tuple[RelayAddress, ...] = attrs.field(default=(), converter=several_relays)
    relay_addr: RelayAddress = attrs.field(
        default=attrs.Factory(first_relay, takes_self=True), converter=a_relay_address
    )
    links: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(1, MOST_LINKS)))
    local_addr: LocalAddress = attrs.field(default=Address("127.0.0.1", 17878), converter=a_local_address)
    service_name: str = attrs.field(default="pioneer_gateway", validator=label(SERVICE_NAME_LIMIT))
    transport: Transport | None = attrs.field(default=None, converter=a_transport)
    restart_initial_ms: int = attrs.field(default=1000, validator=whole_number(1, _HOUR_MS))
    restart_max_ms: int = attrs.field(default=30_000, validator=whole_number(1, _DAY_MS))
    restart_jitter_percent: int = attrs.field(default=20, validator=whole_number(0, 100))
    max_restarts: int = attrs.field(default=0, validator=whole_number(0))
    restart_stable_ms: int = attrs.field(default=30_000, validator=whole_number(1, _DAY_MS))
    allow_server_override: bool = attrs.field(default=False, validator=a_flag)
    apply_grace_ms: int = attrs.field(default=1000, validator=whole_number(0, 10 * _MINUTE_MS))
    stop_grace_ms: int = attrs.field(default=5000, validator=whole_number(0, 10 * _MINUTE_MS))
    connect_timeout_ms: int = attrs.field(default=10_000, validator=whole_number(1, 10 * _MINUTE_MS))
    heartbeat_ms: int | None = attrs.field(
        default=None, validator=attrs.validators.optional(whole_number(MIN_HEARTBEAT_MS, MAX_HEARTBEAT_MS))
    )
    resume_timeout_ms: int = attrs.field(default=60_000, validator=whole_number(0, _HOUR_MS))
    ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    system_trust: SystemTrust = attrs.field(default="openssl", validator=one_of(*SYSTEM_TRUSTS))
    proxy: Proxy | Direct | None = attrs.field(default=None, converter=attrs.converters.optional(a_proxy))
    proxy_credentials_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    relay_identity: PublicKey | None = attrs.field(default=None, converter=attrs.converters.optional(a_public_key))
    key_mode: KeyMode = attrs.field(default=KeyMode.TOKEN_ROUTING, converter=a_key_mode)
    local_ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    local_verify: bool = attrs.field(default=True, validator=a_flag)
    proxy_protocol: Literal["v2"] | None = attrs.field(default=None, validator=one_of("v2", None))
    forwarded_headers: Literal["set"] | None = attrs.field(default=None, validator=one_of("set", None))
    host_header: str | None = attrs.field(default=None, converter=attrs.converters.optional(a_host_header))
    request_id: Literal["set", "keep"] | None = attrs.field(default=None, validator=one_of("set", "keep", None))
    raw_services: tuple[str, ...] = attrs.field(default=(), converter=names_of_services)
    access: Access | None = attrs.field(default=None, converter=attrs.converters.optional(an_access))
    service_access: Mapping[str, Access] = attrs.field(factory=dict, converter=access_by_service, hash=False)
    tls: TlsConfig | None = attrs.field(default=None, converter=attrs.converters.optional(a_tls))
    acme: AcmeConfig | None = attrs.field(default=None, converter=an_acme)
    process: ProcessConfig | None = attrs.field(default=None, converter=attrs.converters.optional(a_process))
    services: Mapping[str, LocalAddress] = attrs.field(factory=dict, converter=several_services, hash=False)
    access_log: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    access_log_format: AccessLogFormat = attrs.field(default=AccessLogFormat.COMMON, converter=a_log_format)
    access_log_addresses: Literal["full", "short"] = attrs.field(default="full", validator=one_of("full", "short"))
    metrics: SiteAddress | None = attrs.field(default=None, converter=attrs.converters.optional(site_address))
    base_dir: Path = attrs.field(default=Path(), converter=a_path, metadata={NOT_A_KEY: True})

    _RULES: ClassVar[tuple[Rule, ...]] = RULES

    def __attrs_post_init__(self) -> None:
        settle(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RemoteAccessConfig:
        """Read the table `[gateway.remote_access]` of a TOML file; a file without it gives the defaults.

        Raises:
            StorageError: the file cannot be read.
            InvalidSettingsError: it is not TOML, or the table is wrong; see the class.
            UnsupportedTransportError: see the class.
        """
        file = Path(path)
        table = subtable(read_toml(file), _TABLE, source=str(file))
        return cls.from_table({} if table is None else table, source=str(file), base_dir=file.absolute().parent)

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], *, source: str | None = None, base_dir: str | Path = Path()
    ) -> RemoteAccessConfig:
        """Make a config from the content of the table.

        Args:
            table: the content of `[gateway.remote_access]`.
            source: the file that errors name.
            base_dir: the folder to which relative paths are relative.

        Raises:
            InvalidSettingsError: see the class.
            UnsupportedTransportError: see the class.
        """
        return structure(cls, table, where=_TABLE, source=source, base_dir=base_dir)

    @property
    def effective_transport(self) -> Transport:
        """The transport that is used: the named one, or the one that follows from the address."""
        return effective_transport(self.transport, self.relay_addr)

    @property
    def effective_relay_addrs(self) -> tuple[RelayAddress, ...]:
        """The addresses that are dialled: a bare one becomes `wss://` when a WebSocket is named."""
        websocket = self.effective_transport is Transport.WEBSOCKET
        return tuple(
            address.with_scheme("wss") if websocket and address.scheme is None else address
            for address in self.relay_addrs or [self.relay_addr]
        )

    @property
    def effective_relay_addr(self) -> RelayAddress:
        """The first of `effective_relay_addrs`."""
        return self.effective_relay_addrs[0]

    @property
    def effective_links(self) -> int:
        """How many links are kept."""
        return min(len(self.relay_addrs) or 1, MOST_LINKS) if self.links is None else self.links

    @property
    def runtime_path(self) -> Path:
        """The path of the folder for runtime files."""
        return self.base_dir / self.runtime_dir

    @property
    def ca_path(self) -> Path | None:
        """The path of the file of further certificate authorities; None when there is none."""
        return None if self.ca_file is None else self.base_dir / self.ca_file

    @property
    def proxy_choice(self) -> ProxyChoice:
        """How the proxy on the way to a relay is chosen."""
        file = self.proxy_credentials_file
        return ProxyChoice(configured=self.proxy, credentials_file=None if file is None else self.base_dir / file)

    @property
    def local(self) -> LocalAddress:
        """The local gateway, and how its certificate is checked."""
        if not isinstance(self.local_addr, HttpsAddress):
            return self.local_addr
        ca_file = self.local_addr.ca_file if self.local_ca_file is None else self.base_dir / self.local_ca_file
        return attrs.evolve(self.local_addr, ca_file=ca_file, verify=self.local_verify and self.local_addr.verify)

    @property
    def access_rules(self) -> Mapping[str, Access | None]:
        """The rules of each service, and of all others under `*`, with the paths of their files."""
        rules = {**self.service_access, ANY_SERVICE: self.access}
        return {name: None if access is None else access.below(self.base_dir) for name, access in rules.items()}

    @property
    def acme_config(self) -> AcmeConfig | None:
        """`acme`, with its paths resolved."""
        return None if self.acme is None else self.acme.below(self.base_dir)

    @property
    def access_log_path(self) -> Path | None:
        """The path of `access_log`, from `base_dir`; `-` as it is."""
        if self.access_log is None or self.access_log == STANDARD_OUTPUT:
            return self.access_log
        return self.base_dir / self.access_log

    @property
    def tls_paths(self) -> tuple[Path, Path]:
        """The paths of the certificate of `tls` and of its private key.

        Raises:
            ValueError: there is no `tls`.
        """
        if self.tls is None:
            raise ValueError("no table tls is configured")
        return self.base_dir / self.tls.certificate, self.base_dir / self.tls.private_key
