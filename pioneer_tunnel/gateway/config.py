"""`[gateway.remote_access]`: the operator's part of remote access, as one frozen `RemoteAccessConfig`.

The gateway contract fixes the table, its names and its defaults. All problems are reported at once, with file, key
path, value and what is allowed (see `_storage.validation`).

The user's settings are applied to it with `attrs.evolve`, which validates again. The relay key is not here: it is in a
keystore.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, final

import attrs

from .._model.addresses import Address, HttpsAddress, LocalAddress, RelayAddress, local_address, normal_audience
from .._model.errors import Problem, UnsupportedTransportError
from .._model.keys import PublicKey
from .._model.proxies import Direct, Proxy, configured_proxy
from .._model.services import ANY_SERVICE, MOST_SERVICES, SERVICE_NAMES, is_service_name
from .._model.text import hide_secrets, redact_reason, shown
from .._net.proxies.choice import ProxyChoice
from .._net.tls.client import SYSTEM_TRUSTS, SystemTrust
from .._storage.toml_read import read_toml, subtable
from .._storage.validation import (
    NOT_A_KEY,
    RefusedItemsError,
    Rule,
    a_flag,
    a_path,
    a_public_key,
    a_text,
    hold_back,
    label,
    nearest,
    settle,
    structure,
    whole_number,
)
from .._wire.heartbeat import MAX_HEARTBEAT_MS, MIN_HEARTBEAT_MS
from .._wire.links import MOST_LINKS
from ..access.rules import Access, an_access
from ..access_log.entry import AccessLogFormat, a_log_format, full_or_short
from ..access_log.writer import STANDARD_OUTPUT
from ..certificates.config import AcmeConfig, an_acme
from ..monitoring.address import SiteAddress, site_address
from ..transports.process.config import ProcessConfig, a_process
from ..transports.rathole.key_mode import KeyMode
from .tls_config import TlsConfig, a_tls

__all__ = ["RemoteAccessConfig", "Transport"]

DEFAULT_RELAY: Final = RelayAddress(None, "relay-eu-west-1.getpioneer.dev", 2333)
MOST_RELAYS: Final = 16
SERVICE_NAME_LIMIT: Final = 128
_TABLE: Final = "gateway.remote_access"
_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 60 * _MINUTE_MS
_DAY_MS: Final = 24 * _HOUR_MS


@final
class Transport(enum.StrEnum):
    """How the tunnel reaches the relay. The values are the words of the configuration."""

    WEBSOCKET = "websocket"
    """Native: one WebSocket, yamux inside."""
    TCP = "tcp"
    """The Pioneer Relay / rathole protocol in clear: an eavesdropper can read visitors' tokens."""
    TLS = "tls"
    """The same inside TLS."""
    NOISE = "noise"
    """Known to gateways, not offered by this library: a generation with it fails with `unsupported_transport`."""
    PROCESS = "process"
    """Another program, such as frpc, makes the tunnel."""

    @classmethod
    def parse(cls, word: str) -> Transport:
        """Read the word of a configuration or a setting.

        Raises:
            UnsupportedTransportError: the word is unknown.
        """
        try:
            return cls(word)
        except ValueError:
            known = [str(member) for member in cls]
        raise UnsupportedTransportError(
            f"unknown transport {shown('transport', word) or '…'}; known are {', '.join(known)}; "
            f"the nearest of them is {nearest(word, known)!r}"
        )


def _local_address(value: str | LocalAddress) -> LocalAddress:
    if isinstance(value, LocalAddress):
        return value
    return local_address(a_text(value, "allowed is host:port, unix:/path or https://host:port, as a string"))


def _services(value: Mapping[str, str | LocalAddress]) -> Mapping[str, LocalAddress]:
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
            services[name] = _local_address(address)
        except (TypeError, ValueError) as error:
            problems.append(Problem(key=key, value=shown(name, address), message=redact_reason(str(error), address)))
    if problems:
        raise RefusedItemsError(problems)
    return MappingProxyType(services)


def _relay_address(value: str | RelayAddress) -> RelayAddress:
    if isinstance(value, RelayAddress):
        return value
    return RelayAddress.parse(a_text(value, "allowed is host:port or a ws:// or wss:// URL, as a string"))


def _relay_addresses(value: Sequence[str | RelayAddress]) -> tuple[RelayAddress, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of addresses")
    if len(given) > MOST_RELAYS:
        raise ValueError(f"allowed are {MOST_RELAYS} relays at most")
    addresses: list[RelayAddress] = []
    problems = []
    for index, item in enumerate(value):
        try:
            addresses.append(_relay_address(item))
        except (TypeError, ValueError) as error:
            key = f"[{index}]"
            problems.append(Problem(key=key, value=shown(key, item), message=redact_reason(str(error), item)))
    if problems:
        raise RefusedItemsError(problems)
    return tuple(addresses)


def _first_relay(config: Any) -> RelayAddress:
    """The default of `relay_addr`. `relay_addrs` may have been refused."""
    addresses = config.relay_addrs
    return addresses[0] if isinstance(addresses, tuple) and addresses else DEFAULT_RELAY


def _transport(value: str | None) -> Transport | None:
    return None if value is None else Transport.parse(a_text(value, f"allowed are {', '.join(Transport)}, as a string"))


def _key_mode(value: str) -> KeyMode:
    known = [str(mode) for mode in KeyMode]
    word = a_text(value, f"allowed are {', '.join(known)}, as a string")
    if word not in known:
        raise ValueError(f"allowed are {', '.join(known)}; the nearest of them is {nearest(word, known)!r}")
    return KeyMode(word)


def _proxy(value: str | Proxy) -> Proxy | Direct:
    if isinstance(value, Proxy):
        return value
    return configured_proxy(a_text(value, "allowed is a http://, https:// or socks5:// URL, or 'none', as a string"))


def _proxy_protocol(_instance: Any, _field: Any, value: Any) -> None:
    if value is not None and value != "v2":
        raise ValueError("allowed is 'v2'; leave it out for none")


def _forwarded_headers(_instance: Any, _field: Any, value: Any) -> None:
    if value is not None and value != "set":
        raise ValueError("allowed is 'set'; leave it out for none")


def _request_id(_instance: Any, _field: Any, value: Any) -> None:
    if value is not None and value not in {"set", "keep"}:
        raise ValueError("allowed are 'set' and 'keep'; leave it out for none")


def _host_header(value: str) -> str:
    return normal_audience(a_text(value, "allowed is host or host:port, as a string"))


def _raw_services(value: Sequence[str]) -> tuple[str, ...]:
    given: object = value
    if isinstance(given, str | bytes) or not isinstance(given, Sequence):
        raise TypeError("allowed is an array of names of services")
    if not all(isinstance(name, str) and is_service_name(name) for name in given):
        raise ValueError(f"allowed is {SERVICE_NAMES} as the name of a service")
    return tuple(given)


def _service_access(value: Mapping[str, Access | Mapping[str, Any]]) -> Mapping[str, Access]:
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


def _system_trust(_instance: Any, _field: Any, value: Any) -> None:
    if value not in SYSTEM_TRUSTS:
        raise ValueError("allowed are 'openssl' and 'os'")


def _effective(transport: Transport | None, relay_addr: RelayAddress) -> Transport:
    """The transport; where none is named, a URL means `websocket`, and a bare address `tcp`."""
    if transport is not None:
        return transport
    return Transport.TCP if relay_addr.scheme is None else Transport.WEBSOCKET


def _transport_contradicts(transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    # `noise` is refused later, by its own error kind. What addresses `process` can dial depends on its program.
    if transport not in (Transport.TCP, Transport.TLS) or relay_addr.scheme is None:
        return None
    return (
        f"relay_addr is a {relay_addr.scheme}:// URL, which means websocket; "
        f"leave transport out, or write relay_addr as host:port"
    )


def _relays_contradict(
    relay_addrs: Sequence[RelayAddress], relay_addr: RelayAddress, transport: Transport | None
) -> str | None:
    if not relay_addrs:
        return None
    if relay_addr != relay_addrs[0]:
        return "relay_addr is given too; leave one of them out"
    if transport is Transport.PROCESS and len(relay_addrs) > 1:
        return "a tunnel program connects to one relay; write relay_addr"
    if transport is not Transport.WEBSOCKET and len({address.scheme is None for address in relay_addrs}) > 1:
        return "some are host:port, and some are URLs, which means websocket; write all in the same way"
    return None


def _links_of_a_program(links: int | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if links in (None, 1) or _effective(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program makes its own connections; leave it out"


def _longest_under_first(longest: int, first: int) -> str | None:
    return f"allowed is restart_initial_ms, which is {first}, or more" if longest < first else None


def _key_mode_means_nothing(mode: KeyMode, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    effective = _effective(transport, relay_addr)
    if mode is KeyMode.TOKEN_ROUTING or effective in (Transport.TCP, Transport.TLS, Transport.NOISE):
        return None
    return f"it says how a relay of transport tcp or tls knows the key, and this is {effective}; leave one of them out"


def _pin_unchecked(pin: PublicKey | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    # A pin that is not checked would be worse than none.
    effective = _effective(transport, relay_addr)
    if pin is None or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return f"only a relay of transport websocket can prove its identity, and this is {effective}; leave one of them out"


def _heartbeat_means_nothing(
    heartbeat_ms: int | None, transport: Transport | None, relay_addr: RelayAddress
) -> str | None:
    effective = _effective(transport, relay_addr)
    if heartbeat_ms is None or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return f"only a relay of transport websocket can be asked for it, and this is {effective}; leave one of them out"


def _tls_out_of_reach(tls: TlsConfig | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if tls is None or _effective(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program brings visitors past this library, which cannot end their TLS then; leave one of them out"


def _local_out_of_reach(local: LocalAddress, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if isinstance(local, Address) or _effective(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program connects to the local gateway itself; allowed is host:port"


def _services_out_of_reach(
    services: Mapping[str, LocalAddress], transport: Transport | None, relay_addr: RelayAddress
) -> str | None:
    effective = _effective(transport, relay_addr)
    if not services or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return (
        f"only a relay of transport websocket carries several services, and this is {effective}; leave one of them out"
    )


def _credentials_without_proxy(file: Path | None, proxy: Proxy | Direct | None) -> str | None:
    if file is None or isinstance(proxy, Proxy):
        return None
    return "holds the credentials for the proxy that the key proxy names, and it names none"


def _proxy_passed_by(
    proxy: Proxy | Direct | None,
    process: ProcessConfig | None,
    transport: Transport | None,
    relay_addr: RelayAddress,
) -> str | None:
    if process is None or _effective(transport, relay_addr) is not Transport.PROCESS:
        return None
    if isinstance(proxy, Proxy) and not process.uses_proxy:
        return (
            "a tunnel program connects to the relay itself, and gets the proxy as '{proxy}' in its command, environment"
            " or config_template; none of them holds it"
        )
    if process.uses_proxy and not isinstance(proxy, Proxy):
        return "names no proxy, and the table process holds '{proxy}'"
    return None


def _requests_out_of_reach(value: str | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if value is None or _effective(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program brings visitors past this library, which cannot change their requests; leave it out"


def _log_out_of_reach(path: Path | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if path is None or _effective(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program brings visitors past this library, which cannot see them; leave it out"


def _access_out_of_reach(access: Access | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if access is None:
        return None
    effective = _effective(transport, relay_addr)
    if effective is Transport.PROCESS:
        return "a tunnel program brings visitors past this library, which cannot check them; leave it out"
    if access.names_networks and effective in (Transport.TCP, Transport.TLS):
        return f"allow and deny need the visitor's address, which a relay of transport {effective} does not say"
    return None


def _raw_service_with_password(
    service_access: Mapping[str, Access], access: Access | None, raw_services: Sequence[str]
) -> str | None:
    for name in raw_services:
        rules = service_access.get(name, access)
        if rules is not None and rules.needs_http:
            return f"the service {name!r} is not HTTP, so its visitors cannot send a password or a token"
    return None


def _access_to_nothing(
    service_access: Mapping[str, Access],
    services: Mapping[str, LocalAddress],
    transport: Transport | None,
    relay_addr: RelayAddress,
) -> str | None:
    if service_access and _effective(transport, relay_addr) is not Transport.WEBSOCKET:
        return "only a relay of transport websocket carries several services; leave it out"
    unknown = [name for name in service_access if name not in services]
    return f"services does not have {unknown[0]!r}" if unknown else None


def _acme_out_of_reach(acme: AcmeConfig | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    effective = _effective(transport, relay_addr)
    if acme is None or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return f"only a relay of transport websocket says under which names visitors come, and this is {effective}"


def _two_certificates(acme: AcmeConfig | None, tls: TlsConfig | None) -> str | None:
    return None if acme is None or tls is None else "stands beside tls; leave one of them out"


def _no_local_tls(file: Path | None, local: LocalAddress) -> str | None:
    return None if file is None or isinstance(local, HttpsAddress) else f"local_addr is {local}, which has no TLS"


def _no_local_tls_to_verify(verify: bool, local: LocalAddress) -> str | None:
    return None if verify or isinstance(local, HttpsAddress) else f"local_addr is {local}, which has no TLS"


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
            nowhere, see `pioneer_tunnel.monitoring.serve_metrics`. A change takes effect when `run` begins anew.
        base_dir: the folder of the file, to which relative paths are relative. Not a key of the table.

    Raises:
        InvalidSettingsError: with all problems in `problems`.
        UnsupportedTransportError: the same, when one of the problems is an unknown transport.
    """

    runtime_dir: Path = attrs.field(default=Path("remote-access"), converter=a_path)
    relay_addrs: tuple[RelayAddress, ...] = attrs.field(default=(), converter=_relay_addresses)
    relay_addr: RelayAddress = attrs.field(
        default=attrs.Factory(_first_relay, takes_self=True), converter=_relay_address
    )
    links: int | None = attrs.field(default=None, validator=attrs.validators.optional(whole_number(1, MOST_LINKS)))
    local_addr: LocalAddress = attrs.field(default=Address("127.0.0.1", 17878), converter=_local_address)
    service_name: str = attrs.field(default="pioneer_gateway", validator=label(SERVICE_NAME_LIMIT))
    transport: Transport | None = attrs.field(default=None, converter=_transport)
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
    system_trust: SystemTrust = attrs.field(default="openssl", validator=_system_trust)
    proxy: Proxy | Direct | None = attrs.field(default=None, converter=attrs.converters.optional(_proxy))
    proxy_credentials_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    relay_identity: PublicKey | None = attrs.field(default=None, converter=attrs.converters.optional(a_public_key))
    key_mode: KeyMode = attrs.field(default=KeyMode.TOKEN_ROUTING, converter=_key_mode)
    local_ca_file: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    local_verify: bool = attrs.field(default=True, validator=a_flag)
    proxy_protocol: Literal["v2"] | None = attrs.field(default=None, validator=_proxy_protocol)
    forwarded_headers: Literal["set"] | None = attrs.field(default=None, validator=_forwarded_headers)
    host_header: str | None = attrs.field(default=None, converter=attrs.converters.optional(_host_header))
    request_id: Literal["set", "keep"] | None = attrs.field(default=None, validator=_request_id)
    raw_services: tuple[str, ...] = attrs.field(default=(), converter=_raw_services)
    access: Access | None = attrs.field(default=None, converter=attrs.converters.optional(an_access))
    service_access: Mapping[str, Access] = attrs.field(factory=dict, converter=_service_access, hash=False)
    tls: TlsConfig | None = attrs.field(default=None, converter=attrs.converters.optional(a_tls))
    acme: AcmeConfig | None = attrs.field(default=None, converter=an_acme)
    process: ProcessConfig | None = attrs.field(default=None, converter=attrs.converters.optional(a_process))
    services: Mapping[str, LocalAddress] = attrs.field(factory=dict, converter=_services, hash=False)
    access_log: Path | None = attrs.field(default=None, converter=attrs.converters.optional(a_path))
    access_log_format: AccessLogFormat = attrs.field(default=AccessLogFormat.COMMON, converter=a_log_format)
    access_log_addresses: Literal["full", "short"] = attrs.field(default="full", validator=full_or_short)
    metrics: SiteAddress | None = attrs.field(default=None, converter=attrs.converters.optional(site_address))
    base_dir: Path = attrs.field(default=Path(), converter=a_path, metadata={NOT_A_KEY: True})

    _RULES: ClassVar[tuple[Rule, ...]] = (
        Rule(("transport", "relay_addr"), _transport_contradicts),
        Rule(("relay_addrs", "relay_addr", "transport"), _relays_contradict),
        Rule(("links", "transport", "relay_addr"), _links_of_a_program),
        Rule(("restart_max_ms", "restart_initial_ms"), _longest_under_first),
        Rule(("relay_identity", "transport", "relay_addr"), _pin_unchecked),
        Rule(("heartbeat_ms", "transport", "relay_addr"), _heartbeat_means_nothing),
        Rule(("key_mode", "transport", "relay_addr"), _key_mode_means_nothing),
        Rule(("tls", "transport", "relay_addr"), _tls_out_of_reach),
        Rule(("acme", "transport", "relay_addr"), _acme_out_of_reach),
        Rule(("acme", "tls"), _two_certificates),
        Rule(("forwarded_headers", "transport", "relay_addr"), _requests_out_of_reach),
        Rule(("host_header", "transport", "relay_addr"), _requests_out_of_reach),
        Rule(("request_id", "transport", "relay_addr"), _requests_out_of_reach),
        Rule(("access", "transport", "relay_addr"), _access_out_of_reach),
        Rule(("access_log", "transport", "relay_addr"), _log_out_of_reach),
        Rule(("service_access", "access", "raw_services"), _raw_service_with_password),
        Rule(("service_access", "services", "transport", "relay_addr"), _access_to_nothing),
        Rule(("local_addr", "transport", "relay_addr"), _local_out_of_reach),
        Rule(("services", "transport", "relay_addr"), _services_out_of_reach),
        Rule(("proxy_credentials_file", "proxy"), _credentials_without_proxy),
        Rule(("proxy", "process", "transport", "relay_addr"), _proxy_passed_by),
        Rule(("local_ca_file", "local_addr"), _no_local_tls),
        Rule(("local_verify", "local_addr"), _no_local_tls_to_verify),
    )

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
        return _effective(self.transport, self.relay_addr)

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
