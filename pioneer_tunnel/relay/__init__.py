"""A relay to host oneself: gateways come in at one door, visitors at the other.

config     what the operator decides; limits: what it may cost
registry   which tunnels there are, and where each is connected
takeover   who has a tunnel when a second gateway knocks
control    the gateways' door: prove your key
session    a gateway that has come in: it carries visitors until it is told to end
ingress    the visitors' door: which tunnel is this for? head and framing: where does each request end?
admission  who may come in, and how many
accepting  connections come in, or are turned away
listeners  the sockets that listen
server     everything around both doors
reload     the file, when it changes while the relay runs
"""

from __future__ import annotations

from .config import RelayConfig, TunnelEntry
from .gateways.takeover import Takeover
from .limits import RelayLimits
from .server import Relay, RelayAddresses

__all__ = ["Relay", "RelayAddresses", "RelayConfig", "RelayLimits", "Takeover", "TunnelEntry"]
