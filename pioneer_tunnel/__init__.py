"""pioneer_tunnel: reach a gateway behind NAT through a relay.

Three faces: `RemoteAccess` for a gateway that embeds the tunnel with settings, keystore and status; `open_tunnel`
for a custom server (a tunnel is a `trio.abc.Listener`); `pioneer_tunnel.testing` for tests.

This is for Trio. `pioneer_tunnel.asgi` serves ASGI applications, `pioneer_tunnel.aio` is for asyncio, and
`pioneer_tunnel.blocking` for programs without an event loop.
"""

from __future__ import annotations

import typing as _typing

from ._interrupts import end_quietly_in_our_program as _end_quietly_in_our_program

_end_quietly_in_our_program()  # before the imports below, which take a while

from ._deprecation import PioneerTunnelDeprecationWarning
from ._model.addresses import Address, HttpsAddress, RelayAddress, UnixAddress
from ._model.certificate_status import CertificateStatus
from ._model.errors import (
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
from ._model.explanations import Cause, Explanation, explain
from ._model.keys import PublicKey, RelayKey, new_relay_key
from ._model.proxies import Proxy, ProxyCredentials
from ._model.public_names import publish as _publish
from ._model.session_limits import Limits
from ._model.stats import SessionStats, StreamStats, TunnelStats
from ._model.status import ErrorKind, LinkStatus, State, Status
from ._net.closing import abandon
from ._net.dialing import Dialer, dial_tcp
from ._net.prefixed_stream import PrefixedStream
from ._net.tls.certificate import Certificate
from ._version import __version__
from ._wire.proxy_v2 import ProxyHeader
from .access.rules import Access
from .access_log.entry import AccessLogFormat
from .access_log.writer import AccessLog
from .certificates.config import AcmeConfig
from .transports.rathole.key_mode import KeyMode
from .transports.services import Services
from .transports.tunnel_stream import TunnelStream
from .tunnel.forward import forward
from .tunnel.restart_policy import RestartPolicy
from .tunnel.status_feed import StatusFeed
from .tunnel.tunnel import Tunnel, open_tunnel
from .tunnel.visitor_tls import terminate_tls

if _typing.TYPE_CHECKING:
    from ._wire.json_rpc import RpcError
    from .gateway.config import RemoteAccessConfig
    from .gateway.keystore import EnvironmentKeystore, FileKeystore, KeyringKeystore, Keystore, MemoryKeystore
    from .gateway.remote_access import RemoteAccess
    from .gateway.rpc import RemoteAccessRpc
    from .gateway.settings import Settings, SettingsFile, SettingsUpdate
    from .gateway.snapshot import Snapshot
    from .gateway.transport import Transport

__all__ = [
    "Access",
    "AcmeConfig",
    "AccessLog",
    "AccessLogFormat",
    "Address",
    "Cause",
    "Certificate",
    "CertificateStatus",
    "Dialer",
    "EnvironmentKeystore",
    "ErrorKind",
    "Explanation",
    "FileKeystore",
    "HttpsAddress",
    "InvalidSettingsError",
    "KeyMode",
    "KeyringKeystore",
    "Keystore",
    "Limits",
    "LinkLostError",
    "LinkStatus",
    "LocalGatewayError",
    "LocalProtocolError",
    "MemoryKeystore",
    "MissingBinaryError",
    "MissingKeyError",
    "PioneerTunnelDeprecationWarning",
    "PrefixedStream",
    "Problem",
    "ProcessExitedError",
    "ProtocolError",
    "Proxy",
    "ProxyCredentials",
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
    "Services",
    "SessionStats",
    "Settings",
    "SettingsFile",
    "SettingsUpdate",
    "Snapshot",
    "State",
    "Status",
    "StatusFeed",
    "StorageError",
    "StreamStats",
    "Transport",
    "Tunnel",
    "TunnelAuthError",
    "TunnelError",
    "TunnelStats",
    "TunnelStream",
    "UnixAddress",
    "UnknownError",
    "UnsupportedTransportError",
    "__version__",
    "abandon",
    "dial_tcp",
    "explain",
    "forward",
    "new_relay_key",
    "open_tunnel",
    "terminate_tls",
]

_publish(globals())

if not _typing.TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what a gateway embeds when it is first used: a tunnel alone starts sooner without it."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import gateway  # noqa: PLC0415  # see above

        value = globals()[name] = getattr(gateway, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
