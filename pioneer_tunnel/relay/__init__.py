"""A relay to host oneself: gateways come in at one door, visitors at the other.

config     what the operator decides
registry   which tunnels there are, and where each is connected
control    the gateways' door: prove your key, then carry visitors
ingress    the visitors' door: which tunnel is this for?
server     the sockets around both
"""

from __future__ import annotations

from .config import RelayConfig, TunnelEntry
from .server import Relay, RelayAddresses

__all__ = ["Relay", "RelayAddresses", "RelayConfig", "TunnelEntry"]
