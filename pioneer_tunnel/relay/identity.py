"""The identity of a relay: the key with which it proves itself to gateways that pin it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .._model.errors import InvalidSettingsError, StorageError
from .._model.keys import SigningIdentity
from .._storage import files
from .config import RelayConfig

__all__ = ["identity_of", "read_identity"]

_LIMIT: Final = 64 * 1024


def identity_of(config: RelayConfig) -> SigningIdentity | None:
    """The identity in the file that `config` names; None if it names none.

    Raises:
        StorageError: the file cannot be read, or others may access it.
        InvalidSettingsError: it holds something else.
    """
    path = config.identity_key_path
    if path is None:
        return None
    return read_identity(path, "identity key file", "'pioneer-tunnel relay new-identity' prints them")


def read_identity(path: Path, what: str, maker: str) -> SigningIdentity:
    """Read the seed from the first line of a file. The second line may hold the public half. Blocks.

    Args:
        path: the file.
        what: what it is, for errors.
        maker: what makes such a file, for errors.

    Raises:
        StorageError, InvalidSettingsError: see `identity_of`.
    """
    content = files.read(path, limit=_LIMIT, private=True)
    if content is None:
        raise StorageError(f"the {what} {str(path)!r} cannot be read: there is none")
    try:
        seed = bytes.fromhex(str(content, "ascii").strip().partition("\n")[0])
    except ValueError:
        seed = b""
    if len(seed) != 32:
        raise InvalidSettingsError(
            f"the {what} {str(path)!r} does not hold 64 hexadecimal digits on its first line; {maker}"
        )
    return SigningIdentity.from_seed(seed)
