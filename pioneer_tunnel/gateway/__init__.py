"""What a gateway embeds: configuration, settings, keystore, `RemoteAccess`, JSON-RPC. `pioneer_tunnel` publishes it."""

from __future__ import annotations

from .._model.public_names import publish as _publish
from .._wire.json_rpc import RpcError
from .config import RemoteAccessConfig
from .keystore import EnvironmentKeystore, FileKeystore, KeyringKeystore, Keystore, MemoryKeystore
from .remote_access import RemoteAccess
from .rpc import RemoteAccessRpc
from .settings import Settings, SettingsFile, SettingsUpdate
from .snapshot import Snapshot
from .transport import Transport

__all__ = [
    "EnvironmentKeystore",
    "FileKeystore",
    "KeyringKeystore",
    "Keystore",
    "MemoryKeystore",
    "RemoteAccess",
    "RemoteAccessConfig",
    "RemoteAccessRpc",
    "RpcError",
    "Settings",
    "SettingsFile",
    "SettingsUpdate",
    "Snapshot",
    "Transport",
]

_publish({**globals(), "__name__": "pioneer_tunnel"})
