"""Where the relay key is stored, outside the settings file: the interface `Keystore`, and four implementations.

A key is stored under a reference, which the settings name (`secret_ref`). `FileKeystore` is for most gateways,
`KeyringKeystore` for desktops, `EnvironmentKeystore` for containers, `MemoryKeystore` for tests. A host that stores
keys elsewhere implements the four methods of `Keystore`.
"""

from __future__ import annotations

from .encrypted import FileKeystore
from .environment import EnvironmentKeystore
from .interface import DEFAULT_SECRET_REF, Keystore, MemoryKeystore, check_secret_ref, is_secret_ref
from .system import KeyringKeystore

__all__ = [
    "DEFAULT_SECRET_REF",
    "EnvironmentKeystore",
    "FileKeystore",
    "Keystore",
    "KeyringKeystore",
    "MemoryKeystore",
    "check_secret_ref",
    "is_secret_ref",
]
