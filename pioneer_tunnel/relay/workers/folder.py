"""The folder in which the workers of one relay reach each other."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["private_folder"]


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


def _above() -> Iterator[str]:
    for variable in ("RUNTIME_DIRECTORY", "XDG_RUNTIME_DIR"):
        path = os.environ.get(variable, "").partition(":")[0]
        if os.path.isabs(path):  # noqa: PTH117  # a relative one counts for none
            yield path
