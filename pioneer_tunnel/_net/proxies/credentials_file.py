"""The file with the credentials for a proxy."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..._model.errors import StorageError
from ..._model.proxies import ProxyCredentials
from ..._storage import files

__all__ = ["read_credentials"]

_FILE_LIMIT: Final = 4096


def read_credentials(path: Path) -> ProxyCredentials:
    """The credentials in the file `path`, one line `user:password`. Blocks.

    Raises:
        StorageError: it cannot be read, others may read it, or it holds something else.
    """
    content = files.read(path, limit=_FILE_LIMIT, private=True)
    if content is None:
        raise StorageError(f"the proxy's credentials file {path} does not exist")
    try:
        return ProxyCredentials.parse(str(content, "utf-8").strip("\r\n"))
    except UnicodeDecodeError:
        why = "are not UTF-8"
    except ValueError as error:
        why = str(error)
    raise StorageError(f"the proxy's credentials in {path} {why}; the file holds one line, user:password")
