"""The keystore for containers: a read-only key from an environment variable or a mounted file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, NoReturn, final

import trio

from ..._model.errors import StorageError
from ..._model.keys import RelayKey
from ..._storage import files
from ..detached import read_in_thread
from .interface import DEFAULT_SECRET_REF, check_secret_ref, put_argument_error

__all__ = ["EnvironmentKeystore"]

_LOGGER: Final = logging.getLogger("pioneer_tunnel.keystore.environment")
_FILE_LIMIT: Final = 64 * 1024

# Keys that were removed from the environment, by variable, for a second keystore object in the same process. None
# stands for a value that is not a key.
_taken: dict[str, RelayKey | None] = {}


@final
class EnvironmentKeystore:
    """One relay key, from an environment variable or a file that the container runtime mounts. It cannot be changed.

    The constructor removes the variable from the environment, so that child processes do not inherit the key. A later
    object for the same variable still has the key. A file is read at each `get`, because runtimes update mounted
    secrets in place.

    Args:
        variable: the name of the environment variable.
        file: the path of the mounted file. Exactly one of the two must be given.
        reference: the reference of the key; any other reference has no key.
        readable_by_others: accept a file that the group or others can read. Some runtimes mount secrets like that by
            default (0444 in Docker, 0644 in Kubernetes), in containers without other users. Better mount the file with
            mode 0400.

    Raises:
        ValueError: not exactly one of `variable` and `file` is given, or the reference is invalid.
    """

    def __init__(
        self,
        *,
        variable: str | None = None,
        file: str | os.PathLike[str] | None = None,
        reference: str = DEFAULT_SECRET_REF,
        readable_by_others: bool = False,
    ) -> None:
        if (variable is None) == (file is None):
            raise ValueError("an EnvironmentKeystore reads either a variable or a file: give one of the two")
        self._variable = variable
        self._file = None if file is None else Path(file)
        self._reference = check_secret_ref(reference)
        self._private = not readable_by_others
        if variable is not None and variable in os.environ:
            _taken[variable] = _key_or_none(os.environ.pop(variable))

    async def get(self, reference: str) -> RelayKey | None:
        """See `Keystore.get`."""
        if check_secret_ref(reference) != self._reference:
            await trio.lowlevel.checkpoint()
            return None
        return await read_in_thread(self._get)

    async def put(self, reference: str, key: RelayKey) -> None:
        """Not supported.

        Raises:
            StorageError: always; it names the variable or file in which to change the key.
        """
        problem = put_argument_error(reference, key)
        del key
        await trio.lowlevel.checkpoint()
        if problem is not None:
            raise problem
        self._refuse()

    async def delete(self, reference: str) -> None:
        """Not supported, except for a reference without a key, where it does nothing.

        Raises:
            StorageError: there is a key; it names the variable or file in which to change it.
        """
        if await self.exists(reference):
            self._refuse()

    async def exists(self, reference: str) -> bool:
        """See `Keystore.exists`."""
        if check_secret_ref(reference) != self._reference:
            await trio.lowlevel.checkpoint()
            return False
        if self._file is not None:
            return await read_in_thread(files.exists, self._file)
        await trio.lowlevel.checkpoint()
        return self._variable in _taken

    def __repr__(self) -> str:
        return f"EnvironmentKeystore({self._source})"

    @property
    def _source(self) -> str:
        return f"the environment variable {self._variable}" if self._file is None else str(self._file)

    def _get(self) -> RelayKey | None:
        if self._file is None:
            if self._variable not in _taken:
                return None
            key = _taken[self._variable]
        else:
            content = files.read(self._file, limit=_FILE_LIMIT, private=self._private)
            if content is None:
                return None
            key = _key_or_none(content)
        if key is None:
            raise StorageError(
                f"{self._source} does not hold a relay key: it is empty, longer than 4096 characters, "
                "not UTF-8, or holds control characters"
            )
        return key

    def _refuse(self) -> NoReturn:
        raise StorageError(f"the relay key comes from {self._source}, which is only read; change it there")


def _key_or_none(text: str | memoryview) -> RelayKey | None:
    """The key in `text`, or None. It does not raise, because a traceback might show the key."""
    try:
        return RelayKey(text if isinstance(text, str) else str(text, "utf-8"))
    except ValueError:
        return None
