"""What the user of a gateway needs to reach a tunnel: the relay's address, its identity, and the command."""

from __future__ import annotations

import shlex
from typing import Final

from ..._model.addresses import PublicUrl, RelayAddress, is_ip_address
from ..._model.keys import PublicKey
from ..._model.services import ANY_SERVICE
from ..config import RelayConfig
from ..names import why_no_label
from ..tunnels import TunnelEntry, each_address

__all__ = ["default_url", "expose_command", "relay_url"]

_FIRST_PORT: Final = 8000


def relay_url(config: RelayConfig) -> str:
    """How gateways dial the relay.

    Without TLS at the relay, an HTTP proxy that names visitors is one in front, and taken to end TLS.
    """
    scheme = "wss" if config.control_tls or config.trust_forwarded_from else "ws"
    return f"{scheme}://{config.public_names[0]}"


def default_url(config: RelayConfig, name: str) -> PublicUrl | None:
    """Where visitors reach the tunnel `name` unless the operator says otherwise: below the relay's own name.

    None if there is no such name: `name` is not the first label of a host, or the relay has an IP address.
    """
    public = RelayAddress.parse(relay_url(config))
    if is_ip_address(public.host) or why_no_label(name.lower()) is not None:
        return None
    proxied = bool(config.trust_forwarded_from)
    ingress = each_address(config.ingress_addr)[0]
    shared = ingress in each_address(config.control_addr)
    return PublicUrl(
        "https" if config.ingress_tls or proxied else "http",
        f"{name.lower()}.{public.host}",
        public.port if shared or proxied else ingress.port,
    )


def expose_command(config: RelayConfig, entry: TunnelEntry, *, identity: PublicKey | None, key_file: str) -> str:
    """The command that opens `entry`, for a shell. The local ports in it are examples."""
    names = [route.service for route in entry.routes]
    several = len(names) > 1 or entry.wildcard is not None
    local = [
        f"{'NAME' if name == ANY_SERVICE else name}={_FIRST_PORT + index}" if several else str(_FIRST_PORT)
        for index, name in enumerate(names)
    ]
    words = ["pioneer-tunnel", "expose", *local, "--relay", relay_url(config), "--key-file", key_file]
    if identity is not None:
        words += ["--relay-identity", str(identity)]
    if entry.service is not None:
        words += ["--service", entry.service]
    return shlex.join(words)
