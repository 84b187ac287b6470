"""Which keys of `[relay]` do not go together.

Each rule gets the values of its keys, and returns what is wrong with the first one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from .._model.addresses import Address, bracketed
from .._storage.validation import Rule
from ..certificates.config import AcmeConfig
from ..monitoring.address import SiteAddress
from .fleet.config import FleetConfig
from .tunnels import Addresses, Route, TunnelEntry, each_address

__all__ = ["RULES", "hosts_of"]

_PORT: Final = re.compile(r":\d+$")


def hosts_of(names: Sequence[str]) -> tuple[str, ...]:
    """Public names without their ports, each once."""
    return tuple(dict.fromkeys(_PORT.sub("", name) for name in names))


def _no_file_for_names(file: Path | None, tunnels: Sequence[TunnelEntry], fleet: FleetConfig | None) -> str | None:
    if file is not None or fleet is not None or all(tunnel.wildcard is None for tunnel in tunnels):
        return None
    return "is missing; with a wildcard, gateways create names, and each stays with its key for ever"


def _names_of_a_fleet(file: Path | None, fleet: FleetConfig | None) -> str | None:
    if file is None or fleet is None:
        return None
    return "stands beside fleet; the nodes keep names that gateways create in Redis, so that each name has one owner"


def _fleet_needs_an_address(
    fleet: FleetConfig | None, control_addr: Addresses, ingress_addr: Addresses, http_addr: Addresses | None
) -> str | None:
    if fleet is None:
        return None
    for name, own in (("control_addr", control_addr), ("ingress_addr", ingress_addr), ("http_addr", http_addr)):
        for address in fleet.all_listen:
            if address in each_address(own):
                which = "listen" if address == fleet.listen else "listen of a worker"
                return f"{which} is {name} too, '{address}'; it needs an address of its own"
    return None


def _half_a_pair(certificate: Path | None, private_key: Path | None) -> str | None:
    if (certificate is None) == (private_key is None):
        return None
    missing = "tls_private_key" if private_key is None else "tls_certificate"
    return f"{missing} is missing; name both or neither"


def _no_certificate(tls: bool, certificate: Path | None, acme: AcmeConfig | None) -> str | None:
    if not tls or certificate is not None or acme is not None:
        return None
    return (
        "TLS needs tls_certificate and tls_private_key, or acme; what passes through, with tls = 'passthrough', needs"
        " none of them"
    )


def _two_certificates(acme: AcmeConfig | None, certificate: Path | None) -> str | None:
    return None if acme is None or certificate is None else "stands beside tls_certificate; leave one of them out"


def _asked_at_any_node(acme: AcmeConfig | None, fleet: FleetConfig | None) -> str | None:
    if acme is None or fleet is None:
        return None
    return (
        "stands beside fleet: an authority would look at any node for what one of them has ordered; order certificates"
        " elsewhere, and name them with tls_certificate"
    )


def _nothing_to_certify(acme: AcmeConfig | None, control_tls: bool, ingress_tls: bool) -> str | None:
    if acme is None or control_tls or ingress_tls:
        return None
    return "its certificates would serve nobody, since control_tls and ingress_tls are false"


def _out_of_sight(acme: AcmeConfig | None, tunnels: Sequence[TunnelEntry], names: Sequence[str]) -> str | None:
    """A public name whose TLS passes through at the ports that an authority looks at."""
    if acme is None:
        return None
    for path, route in _routes(tunnels):
        if route.passes_tls and route.host in hosts_of(names):
            return f"{path} takes all TLS for the public name '{route.host}', for which the relay cannot order then"
    return None


def _in_clear_already(http_addr: Addresses | None, ingress_tls: bool) -> str | None:
    if http_addr is None or ingress_tls:
        return None
    return "is for visitors without TLS beside an ingress_addr with TLS; here ingress_addr takes them itself"


def _taken(http_addr: Addresses | None, control_addr: Addresses, ingress_addr: Addresses) -> str | None:
    for name, own in (("control_addr", control_addr), ("ingress_addr", ingress_addr)):
        for address in _shared(http_addr, own):
            if address.port != 0:
                return f"is {name} too, '{address}'; it needs an address of its own"
    return None


def _public_name_passes_through(
    tunnels: Sequence[TunnelEntry], names: Sequence[str], control_addr: Addresses, ingress_addr: Addresses
) -> str | None:
    if not _shared(control_addr, ingress_addr):
        return None
    for path, route in _routes(tunnels):
        if route.passes_tls and route.host is not None and bracketed(route.host) in hosts_of(names):
            return (
                f"{path} takes all TLS for '{route.host}', which is a public name of the relay too: at one address for"
                " both, gateways would not get through; give one of them another name"
            )
    return None


def _shared_address_needs_one_tls_setting(
    ingress_tls: bool, control_tls: bool, ingress_addr: Addresses, control_addr: Addresses
) -> str | None:
    if ingress_tls == control_tls or not _shared(control_addr, ingress_addr):
        return None
    return (
        "ingress_addr is control_addr, and one address cannot be both with and without TLS; control_tls says otherwise"
    )


def _tunnel_address_is_taken(
    tunnels: Sequence[TunnelEntry],
    control_addr: Addresses,
    ingress_addr: Addresses,
    http_addr: Addresses | None,
) -> str | None:
    relay = (("control_addr", control_addr), ("ingress_addr", ingress_addr), ("http_addr", http_addr))
    for path, route in _routes(tunnels):
        for name, own in relay:
            for address in _shared(route.bind_addr, own):
                if address.port != 0:
                    return f"{path}.bind_addr is {name} too, '{address}'; it needs an address of its own"
    return None


def _site_needs_an_address(
    site: SiteAddress | None,
    control_addr: Addresses,
    ingress_addr: Addresses,
    http_addr: Addresses | None,
) -> str | None:
    for name, own in (("control_addr", control_addr), ("ingress_addr", ingress_addr), ("http_addr", http_addr)):
        if isinstance(site, Address) and site.port != 0 and site in each_address(own):
            return f"is {name} too; it needs an address of its own"
    return None


def _health_host_is_taken(host: str | None, tunnels: Sequence[TunnelEntry], names: Sequence[str]) -> str | None:
    if host is None:
        return None
    if host in hosts_of(names):
        return "is a public name of the relay too; health checks need a host of their own, such as 'health.invalid'"
    for path, route in _routes(tunnels):
        if route.host == host:
            return f"{path}.url has this host too; health checks need a host of their own, such as 'health.invalid'"
    return None


def _routes(tunnels: Sequence[TunnelEntry]) -> Iterator[tuple[str, Route]]:
    """All routes, each after its key path."""
    for index, tunnel in enumerate(tunnels):
        for place, route in enumerate(tunnel.routes):
            yield f"tunnels[{index}]" + ("" if route.service is None else f".services[{place}]"), route


def _shared(one: Addresses | None, other: Addresses | None) -> list[Address]:
    return [address for address in each_address(one) if address in each_address(other)]


RULES: Final[tuple[Rule, ...]] = (
    Rule(("tls_certificate", "tls_private_key"), _half_a_pair),
    Rule(("control_tls", "tls_certificate", "acme"), _no_certificate),
    Rule(("ingress_tls", "tls_certificate", "acme"), _no_certificate),
    Rule(("acme", "tls_certificate"), _two_certificates),
    Rule(("acme", "control_tls", "ingress_tls"), _nothing_to_certify),
    Rule(("acme", "fleet"), _asked_at_any_node),
    Rule(("acme", "tunnels", "public_names"), _out_of_sight),
    Rule(("http_addr", "ingress_tls"), _in_clear_already),
    Rule(("http_addr", "control_addr", "ingress_addr"), _taken),
    Rule(("ingress_tls", "control_tls", "ingress_addr", "control_addr"), _shared_address_needs_one_tls_setting),
    Rule(("names_file", "tunnels", "fleet"), _no_file_for_names),
    Rule(("names_file", "fleet"), _names_of_a_fleet),
    Rule(("fleet", "control_addr", "ingress_addr", "http_addr"), _fleet_needs_an_address),
    Rule(("dashboard", "control_addr", "ingress_addr", "http_addr"), _site_needs_an_address),
    Rule(("metrics", "control_addr", "ingress_addr", "http_addr"), _site_needs_an_address),
    Rule(("health_host", "tunnels", "public_names"), _health_host_is_taken),
    Rule(("tunnels", "control_addr", "ingress_addr", "http_addr"), _tunnel_address_is_taken),
    Rule(("tunnels", "public_names", "control_addr", "ingress_addr"), _public_name_passes_through),
)
