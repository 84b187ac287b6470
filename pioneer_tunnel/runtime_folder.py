"""The runtime folder: what one gateway keeps between its runs, and what it leaves behind from the last one.

There is one file that is kept: `instance`, a random name by which a relay tells this gateway coming back from another
gateway with the same key. Files here are ours by their names; whatever else somebody put there is left alone.

Everything here blocks and is called in a thread.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from . import files
from .errors import StorageError

__all__ = ["load_instance"]

_INSTANCE: Final = re.compile(r"[0-9a-f]{32}")


def load_instance(folder: Path) -> str:
    """This gateway's instance name, made the first time; the folder is made too, for this user alone.

    A file that does not hold such a name is replaced: it is worth nothing to anybody.

    Raises:
        StorageError: the folder or the file cannot be made, read or written.
    """
    if not files.exists(folder.parent):
        raise StorageError(f"the runtime folder {folder} cannot be made: there is no {folder.parent}")
    files.make_private_folder(folder)
    path = folder / "instance"
    with files.locked(path):
        files.remove_temporaries(path)
        content = files.read(path, limit=4096)
        kept = "" if content is None else bytes(content).decode("ascii", "replace").strip()
        if _INSTANCE.fullmatch(kept):
            return kept
        instance = secrets.token_hex(16)
        files.replace(path, memoryview(instance.encode()))
    return instance
