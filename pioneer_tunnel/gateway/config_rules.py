"""Which keys of `[gateway.remote_access]` do not go together.

Each rule gets the values of its keys, and returns what is wrong with the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from .._model.addresses import Address, HttpsAddress, LocalAddress, RelayAddress
from .._model.keys import PublicKey
from .._model.proxies import Direct, Proxy
from .._storage.validation import Rule
from ..access.rules import Access
from ..certificates.config import AcmeConfig
from ..transports.process.config import ProcessConfig
from ..transports.rathole.key_mode import KeyMode
from .tls_config import TlsConfig
from .transport import Transport, effective_transport

__all__ = ["RULES"]


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
    if links in (None, 1) or effective_transport(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program makes its own connections; leave it out"


def _longest_under_first(longest: int, first: int) -> str | None:
    return f"allowed is restart_initial_ms, which is {first}, or more" if longest < first else None


def _key_mode_means_nothing(mode: KeyMode, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    effective = effective_transport(transport, relay_addr)
    if mode is KeyMode.TOKEN_ROUTING or effective in (Transport.TCP, Transport.TLS, Transport.NOISE):
        return None
    return f"it says how a relay of transport tcp or tls knows the key, and this is {effective}; leave one of them out"


def _pin_unchecked(pin: PublicKey | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    # A pin that is not checked would be worse than none.
    effective = effective_transport(transport, relay_addr)
    if pin is None or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return f"only a relay of transport websocket can prove its identity, and this is {effective}; leave one of them out"


def _heartbeat_means_nothing(
    heartbeat_ms: int | None, transport: Transport | None, relay_addr: RelayAddress
) -> str | None:
    effective = effective_transport(transport, relay_addr)
    if heartbeat_ms is None or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return f"only a relay of transport websocket can be asked for it, and this is {effective}; leave one of them out"


def _tls_out_of_reach(tls: TlsConfig | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if tls is None or effective_transport(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program brings visitors past this library, which cannot end their TLS then; leave one of them out"


def _local_out_of_reach(local: LocalAddress, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if isinstance(local, Address) or effective_transport(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program connects to the local gateway itself; allowed is host:port"


def _services_out_of_reach(
    services: Mapping[str, LocalAddress], transport: Transport | None, relay_addr: RelayAddress
) -> str | None:
    effective = effective_transport(transport, relay_addr)
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
    if process is None or effective_transport(transport, relay_addr) is not Transport.PROCESS:
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
    if value is None or effective_transport(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program brings visitors past this library, which cannot change their requests; leave it out"


def _log_out_of_reach(path: Path | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if path is None or effective_transport(transport, relay_addr) is not Transport.PROCESS:
        return None
    return "a tunnel program brings visitors past this library, which cannot see them; leave it out"


def _access_out_of_reach(access: Access | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    if access is None:
        return None
    effective = effective_transport(transport, relay_addr)
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
    if service_access and effective_transport(transport, relay_addr) is not Transport.WEBSOCKET:
        return "only a relay of transport websocket carries several services; leave it out"
    unknown = [name for name in service_access if name not in services]
    return f"services does not have {unknown[0]!r}" if unknown else None


def _acme_out_of_reach(acme: AcmeConfig | None, transport: Transport | None, relay_addr: RelayAddress) -> str | None:
    effective = effective_transport(transport, relay_addr)
    if acme is None or effective in (Transport.WEBSOCKET, Transport.NOISE):
        return None
    return f"only a relay of transport websocket says under which names visitors come, and this is {effective}"


def _two_certificates(acme: AcmeConfig | None, tls: TlsConfig | None) -> str | None:
    return None if acme is None or tls is None else "stands beside tls; leave one of them out"


def _no_local_tls(file: Path | None, local: LocalAddress) -> str | None:
    return None if file is None or isinstance(local, HttpsAddress) else f"local_addr is {local}, which has no TLS"


def _no_local_tls_to_verify(verify: bool, local: LocalAddress) -> str | None:
    return None if verify or isinstance(local, HttpsAddress) else f"local_addr is {local}, which has no TLS"


RULES: Final[tuple[Rule, ...]] = (
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
