"""The folder in which the workers of one relay reach each other."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["private_folder", "remove_if_left"]

_OF_A_PROCESS: Final = re.compile(r".*-[0-9a-f]{16}")
"""The socket of a process. It removes that itself when it ends."""


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that only this user may enter, for as long as the block runs.

    It is in the folder that systemd has made for the service (`RuntimeDirectory=`), in the user's runtime folder, or
    else where temporary files go.
    """
    above = next((path for path in _above() if os.access(path, os.W_OK | os.X_OK)), None)
    folder = Path(tempfile.mkdtemp(prefix="pioneer-tunnel-workers-", dir=above))  # mode 0700
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_if_left(folder: Path) -> None:
    """Remove the folder of a parent that was killed, if no worker uses it any more."""
    with suppress(OSError):  # another worker does the same at this moment
        if not any(_OF_A_PROCESS.fullmatch(path.name) for path in folder.iterdir()):
            shutil.rmtree(folder)


def _above() -> Iterator[str]:
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        path = os.environ.get(variable, "").partition(":")[0]
        if os.path.isabs(path):  # noqa: PTH117  # a relative one counts for none
            yield path
