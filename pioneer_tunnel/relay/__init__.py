"""A relay to host oneself: gateways come in at one door, visitors at the other.

config     what the operator decides; limits: what it may cost
registry   which tunnels there are, and where each is connected
control    the gateways' door: prove your key, then carry visitors
ingress    the visitors' door: which tunnel is this for? head and framing: where does each request end?
admission  who may come in, and how many
server     the sockets around both
"""

from __future__ import annotations

from .config import RelayConfig, TunnelEntry
from .limits import RelayLimits
from .server import Relay, RelayAddresses

__all__ = ["Relay", "RelayAddresses", "RelayConfig", "RelayLimits", "TunnelEntry"]
