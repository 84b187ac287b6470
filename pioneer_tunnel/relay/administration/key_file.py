"""The file with a new relay key, which the operator moves to the gateway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..._model.errors import StorageError
from ..._model.keys import RelayKey
from ..._storage import files

__all__ = ["key_text", "new_key_file"]


def key_text(key: RelayKey) -> str:
    """A key as `relay new-key` prints it: the secret on the first line, its public half on the second."""
    return f"{key.reveal()}\n{key.identity().public_key}\n"


@contextmanager
def new_key_file(path: Path, key: RelayKey) -> Iterator[None]:
    """Write a key to a new file, for this user alone. If the block raises, the file is removed. Blocks.

    Raises:
        StorageError: the file exists, or cannot be written.
    """
    if not files.create(path, memoryview(key_text(key).encode())):
        raise StorageError(f"{path} exists already; it may hold the key of another tunnel, so it is not replaced")
    try:
        yield
    except BaseException:
        files.remove(path)
        raise
