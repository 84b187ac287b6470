"""The identity of a relay: the key with which it proves itself to gateways that pin it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .._model.errors import InvalidSettingsError, StorageError
from .._model.keys import SigningIdentity
from .._storage import files
from .config import RelayConfig

__all__ = ["identity_of"]

_LIMIT: Final = 64 * 1024


def identity_of(config: RelayConfig) -> SigningIdentity | None:
    """The identity in the file that `config` names; None if it names none.

    Raises:
        StorageError: the file cannot be read, or others may access it.
        InvalidSettingsError: it holds something else.
    """
    path = config.identity_key_path
    return None if path is None else SigningIdentity.from_seed(_read_seed(path))


def _read_seed(path: Path) -> bytes:
    """Read the seed from the first line. The second line may hold the public half, as `relay new-identity` prints."""
    content = files.read(path, limit=_LIMIT, private=True)
    if content is None:
        raise StorageError(f"the identity key file {str(path)!r} cannot be read: there is none")
    try:
        seed = bytes.fromhex(str(content, "ascii").strip().partition("\n")[0])
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise InvalidSettingsError(
            f"the identity key file {str(path)!r} does not hold 64 hexadecimal digits on its first line;"
            " 'pioneer-tunnel relay new-identity' prints them"
        )
    return seed
