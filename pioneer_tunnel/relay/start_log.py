"""What a relay logs of its configuration: where it listens, what its operator may not want, and what has changed."""

from __future__ import annotations

import logging
from typing import Final

from .._model.addresses import Address, is_loopback
from .._model.log_fields import about
from .addresses import RelayAddresses
from .config import RelayConfig
from .reload import Changes

__all__ = ["log_changes", "log_start"]

_log: Final = logging.getLogger("pioneer_tunnel.relay.server")


def log_start(config: RelayConfig, addresses: RelayAddresses, *, most_connections: int) -> None:
    """Log where a relay listens, and warn of what its operator may not want.

    Args:
        config: the configuration.
        addresses: where it listens.
        most_connections: how many this process takes.
    """
    gateways, visitors = _listed(addresses.all_control), _listed(addresses.all_ingress)
    _log.info("gateways at %s, visitors at %s", gateways, visitors, extra=about("listening"))
    for tunnel_id, bound in addresses.all_tunnels.items():
        fields = about("listening", tunnel=tunnel_id)
        _log.info("visitors of tunnel %s at %s", tunnel_id, _listed(bound), extra=fields)
    if addresses.dashboard is not None:
        _log.info("the operator's page at %s", addresses.dashboard, extra=about("listening"))
    if addresses.metrics is not None:
        _log.info("metrics and health checks at %s", addresses.metrics, extra=about("listening"))
    _warn_of_clear_text(config, addresses)
    if most_connections < config.limits.connections:
        _log.warning(
            "this process may have so few descriptors that it takes %d connections at the most, not the %d"
            " of its limits; see ulimit -n", most_connections, config.limits.connections,
            extra=about("few_descriptors"),
        )  # fmt: skip


def log_changes(changes: Changes) -> None:
    """Log that another configuration was applied, and what of it takes a restart."""
    _log.info("the configuration was applied; changes of tunnels: %s", changes, extra=about("configuration_applied"))
    if changes.for_a_restart:
        keys = ", ".join(changes.for_a_restart)
        fields = about("restart_needed", reason=keys)
        _log.warning("these have changed too, and take a restart: %s", keys, extra=fields)


def _warn_of_clear_text(config: RelayConfig, addresses: RelayAddresses) -> None:
    """Log a warning of each side that others than this host can reach without TLS."""
    routes = [route for tunnel in config.tunnels for route in tunnel.routes]
    by_host = any(not route.passes_tls and route.host is not None for route in routes)
    for who, clear, listening in (
        ("gateways", not config.control_tls, addresses.all_control),
        ("visitors", not config.ingress_tls and by_host, addresses.all_ingress),
    ):
        reachable = tuple(address for address in listening if not is_loopback(address.host))
        if clear and reachable:
            _log.warning(
                "%s come to %s without TLS: on the way, what visitors send and get can be read and changed; set"
                " tls_certificate and tls_private_key, or let a proxy in front end TLS", who, _listed(reachable),
                extra=about("in_clear"),
            )  # fmt: skip
    if isinstance(addresses.metrics, Address) and not is_loopback(addresses.metrics.host):
        line = "metrics at %s have no login: whoever can connect there can read them"
        _log.warning(line, addresses.metrics, extra=about("metrics_open"))


def _listed(addresses: tuple[Address, ...]) -> str:
    return " and ".join(map(str, addresses))
