"""The runtime folder of one gateway.

One file in it is kept from run to run: `instance`, a random name. By it a relay tells a gateway that comes back from
another gateway with the same key. Files of one run (`_storage.run_files`) that a crash left behind are removed here.

The functions block: call them in a thread.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from .._model.errors import StorageError
from .._storage import files
from .._storage.run_files import remove_run_files

__all__ = ["load_instance", "prepare", "stored_instance"]

_INSTANCE: Final = re.compile(r"[0-9a-f]{32}")


def load_instance(folder: Path) -> str:
    """The instance name of this gateway. The first call makes the folder, for this user alone, and the name.

    A file that does not hold such a name is replaced.

    Raises:
        StorageError: the folder or the file cannot be made, read or written.
    """
    prepare(folder)
    path = folder / "instance"
    with files.locked(path):
        files.remove_temporaries(path)
        instance = stored_instance(folder)
        if instance is None:
            instance = secrets.token_hex(16)
            files.replace(path, memoryview(instance.encode()))
    return instance


def stored_instance(folder: Path) -> str | None:
    """The instance name of this gateway; None if it has none. Changes nothing, so a run may be going on.

    Raises:
        StorageError: the file cannot be read.
    """
    content = files.read(folder / "instance", limit=4096)
    kept = "" if content is None else bytes(content).decode("ascii", "replace").strip()
    return kept if _INSTANCE.fullmatch(kept) else None


def prepare(folder: Path) -> None:
    """Make the folder, for this user alone, and remove the files of earlier runs.

    No run may be going on in it: a folder belongs to one gateway. Two gateways with one folder would also be one
    instance to a relay.

    Raises:
        StorageError: the folder cannot be made or read, or a file cannot be removed.
    """
    if not files.exists(folder.parent):
        raise StorageError(f"the runtime folder {folder} cannot be made: there is no {folder.parent}")
    files.make_private_folder(folder)
    remove_run_files(folder)
