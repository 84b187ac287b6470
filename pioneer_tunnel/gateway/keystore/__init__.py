"""Where the relay key lives, outside every settings file: `Keystore`, and the kinds of it that we bring along.

A secret is found by its reference, which the settings name (`secret_ref`). `FileKeystore` is the one for most gateways;
`KeyringKeystore` is for desktops, `EnvironmentKeystore` for containers, `MemoryKeystore` for tests. A host that keeps
its keys elsewhere writes the four methods of `Keystore` itself.

Neighbours: `RemoteAccess` puts the key that a client sends here, and takes it out for each generation.
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
