"""Files of one run in a runtime folder, such as the configuration of a tunnel program.

Who makes such a file removes it when the run ends. After a crash, `remove_run_files` removes it before the next run.
A file is ours by its name; files with other names are left alone.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import Final

from . import files

__all__ = ["name_run_file", "remove_run_files"]

_RUN_FILE: Final = re.compile(r"process-[0-9a-f]{16}\.[a-z]+|\.process-[0-9a-f]{16}\.[a-z]+\.[0-9a-f]+\.pioneer-tmp")
"""A file of one run, or the temporary that its writer leaves behind when it is killed."""


def name_run_file(folder: Path, kind: str) -> Path:
    """A new name for a file of one run; `kind` is its extension, in small letters."""
    return folder / f"process-{secrets.token_hex(8)}.{kind}"


def remove_run_files(folder: Path) -> None:
    """Remove all files of earlier runs. Blocks: call it in a thread.

    Raises:
        StorageError: the folder cannot be read, or a file cannot be removed.
    """
    for name in files.names_in(folder):
        if _RUN_FILE.fullmatch(name):
            files.remove(folder / name)
