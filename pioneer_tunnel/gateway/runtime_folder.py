"""The runtime folder: what one gateway keeps between its runs, and what it leaves behind from the last one.

There is one file that is kept: `instance`, a random name by which a relay tells this gateway coming back from another
gateway with the same key. Files for one run, such as the configuration of a tunnel program, are removed when it ends,
and after a crash when the next one begins. Files here are ours by their names; whatever else somebody put there is
left alone.

Everything here blocks and is called in a thread.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from .._model.errors import StorageError
from .._storage import files

__all__ = ["load_instance", "name_run_file", "prepare", "remove_run_files"]

_INSTANCE: Final = re.compile(r"[0-9a-f]{32}")
_RUN_FILE: Final = re.compile(r"process-[0-9a-f]{16}\.[a-z]+|\.process-[0-9a-f]{16}\.[a-z]+\.[0-9a-f]+\.pioneer-tmp")
"""Those of one run, and what a writer of one leaves behind when it is killed."""


def load_instance(folder: Path) -> str:
    """This gateway's instance name, made the first time; the folder is made too, for this user alone.

    A file that does not hold such a name is replaced: it is worth nothing to anybody.

    Raises:
        StorageError: the folder or the file cannot be made, read or written.
    """
    prepare(folder)
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


def prepare(folder: Path) -> None:
    """Make the folder, for this user alone, and remove what the last run left in it.

    No run may be going on in it. A folder belongs to one gateway: two would be one instance to a relay, too.

    Raises:
        StorageError: the folder cannot be made or read, or a file cannot be removed.
    """
    if not files.exists(folder.parent):
        raise StorageError(f"the runtime folder {folder} cannot be made: there is no {folder.parent}")
    files.make_private_folder(folder)
    remove_run_files(folder)


def name_run_file(folder: Path, kind: str) -> Path:
    """A fresh name for a file that is there for one run; `kind` is its extension, in small letters."""
    return folder / f"process-{secrets.token_hex(8)}.{kind}"


def remove_run_files(folder: Path) -> None:
    """Remove all files that are there for one run.

    Raises:
        StorageError: the folder cannot be read, or a file cannot be removed.
    """
    for name in files.names_in(folder):
        if _RUN_FILE.fullmatch(name):
            files.remove(folder / name)
