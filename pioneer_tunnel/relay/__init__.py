"""A relay to host: gateways connect to it and stay connected; visitors connect to it and reach them.

config, tunnels, limits        what the operator decides
reload                         reread the file when it changes
administration/…               make the file, change it, check it; ask a relay that runs
identity                       the key with which the relay proves itself
server                         the relay as a whole
addresses, start_log           where it listens, and what it logs of that
certificates                   what its TLS shows: files, or ordered of an authority
routing                        pass each connection to the gateways' or the visitors' side
listeners                      the sockets that listen
inherited, handover            sockets from systemd or from the process before; a successor that takes over
accept_loop                    accept connections, or reset them
connection                     an accepted connection, with a task or without
admission, rates               limits on connections, visitors and failed proofs
dashboard                      the operator's page, for this host alone
workers/…                      N processes that serve the same addresses
request_head                   read the first request of a connection
gateways/endpoint              a gateway connects and proves its key
gateways/session               a connected gateway
gateways/takeover              the rules when two gateways want one tunnel
gateways/registry              which tunnels exist, and which session each one has
gateways/expected              tunnels whose gateway was connected to the process before
visitors/plain                 answer an ACME authority, and send visitors to https://
visitors/tls                   route TLS by the name in the ClientHello
visitors/arriving              read the first request head, without a task
visitors/ingress               route HTTP by the Host, and serve visitors
visitors/rules, asking         whether a request is let through, and for whom
visitors/opening               find the session, and open a stream to the gateway
visitors/passage               carry a visit over its stream, with a task or without
visitors/followed_leg, turns   follow the requests of a visitor's connection, in fair turns
"""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .addresses import RelayAddresses
from .config import RelayConfig
from .fleet.config import FleetConfig, FleetMember
from .gateways.takeover import Takeover
from .limits import RelayLimits
from .server import Relay
from .stats import ConnectionStats, FleetStats, RelayStats, RelayTunnelStats, WorkerStats
from .tunnels import Route, ServiceEntry, TunnelEntry

__all__ = [
    "ConnectionStats",
    "FleetConfig",
    "FleetMember",
    "FleetStats",
    "Relay",
    "RelayAddresses",
    "RelayConfig",
    "RelayLimits",
    "RelayStats",
    "RelayTunnelStats",
    "Route",
    "ServiceEntry",
    "Takeover",
    "TunnelEntry",
    "WorkerStats",
]

_publish(globals())
