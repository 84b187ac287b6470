"""pioneer_tunnel: reach a gateway behind NAT through a relay.

Three faces: `RemoteAccess` for a gateway that embeds the tunnel with settings, keystore and status; `open_tunnel`
for a custom server (a tunnel is a `trio.abc.Listener`); `pioneer_tunnel.testing` for tests.
"""

from __future__ import annotations

from ._version import __version__
from .address import Address, RelayAddress
from .certificate import Certificate
from .config import RemoteAccessConfig, Transport
from .dialer import Dialer, dial_tcp
from .endings import abandon
from .errors import (
    InvalidSettingsError,
    LinkLostError,
    LocalGatewayError,
    LocalProtocolError,
    MissingBinaryError,
    MissingKeyError,
    Problem,
    ProcessExitedError,
    ProtocolError,
    RelayConnectError,
    RelayResolveError,
    RemoteProtocolError,
    ReplacedError,
    RestartLimitError,
    StorageError,
    TunnelAuthError,
    TunnelError,
    UnknownError,
    UnsupportedTransportError,
)
from .forward import forward
from .identity import PublicKey, RelayKey, new_relay_key
from .jsonrpc import RemoteAccessRpc, RpcError
from .key_mode import KeyMode
from .keystore import EnvironmentKeystore, FileKeystore, KeyringKeystore, Keystore, MemoryKeystore
from .proxy_protocol import ProxyHeader
from .remote_access import RemoteAccess
from .restart_policy import RestartPolicy
from .settings import Settings, SettingsFile, SettingsUpdate
from .snapshot import Snapshot
from .status import ErrorKind, State, Status, StatusFeed
from .streams import PrefixedStream
from .tunnel import Tunnel, open_tunnel
from .tunnel_stream import TunnelStream
from .visitor_tls import terminate_tls
from .yamux import Limits

__all__ = [
    "Address",
    "Certificate",
    "Dialer",
    "EnvironmentKeystore",
    "ErrorKind",
    "FileKeystore",
    "InvalidSettingsError",
    "KeyMode",
    "KeyringKeystore",
    "Keystore",
    "Limits",
    "LinkLostError",
    "LocalGatewayError",
    "LocalProtocolError",
    "MemoryKeystore",
    "MissingBinaryError",
    "MissingKeyError",
    "PrefixedStream",
    "Problem",
    "ProcessExitedError",
    "ProtocolError",
    "ProxyHeader",
    "PublicKey",
    "RelayAddress",
    "RelayConnectError",
    "RelayKey",
    "RelayResolveError",
    "RemoteAccess",
    "RemoteAccessConfig",
    "RemoteAccessRpc",
    "RemoteProtocolError",
    "ReplacedError",
    "RestartLimitError",
    "RestartPolicy",
    "RpcError",
    "Settings",
    "SettingsFile",
    "SettingsUpdate",
    "Snapshot",
    "State",
    "Status",
    "StatusFeed",
    "StorageError",
    "Transport",
    "Tunnel",
    "TunnelAuthError",
    "TunnelError",
    "TunnelStream",
    "UnknownError",
    "UnsupportedTransportError",
    "__version__",
    "abandon",
    "dial_tcp",
    "forward",
    "new_relay_key",
    "open_tunnel",
    "terminate_tls",
]
