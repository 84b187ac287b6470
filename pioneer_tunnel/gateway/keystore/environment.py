"""The keystore for containers: the key comes in an environment variable or a mounted file, and is only read."""

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
from .interface import DEFAULT_SECRET_REF, check_secret_ref, misuse_of_put

__all__ = ["EnvironmentKeystore"]

_LOGGER: Final = logging.getLogger("pioneer_tunnel.keystore.environment")
_FILE_LIMIT: Final = 64 * 1024

# What was taken out of the environment, by variable: a gateway that makes its keystore twice in one process would find
# nothing there the second time. None stands for a value that cannot be a key.
_taken: dict[str, RelayKey | None] = {}


@final
class EnvironmentKeystore:
    """One relay key, from an environment variable or a file that the container's runtime mounts. It cannot be changed.

    A variable is taken out of the environment here, so that no child process inherits the key; a later object for the
    same variable still has it. A file is read at each `get`, since runtimes renew mounted secrets in place.

    Args:
        variable: the name of the environment variable.
        file: the path of the mounted file. One of the two is given.
        reference: the reference that the key answers to; there is nothing under any other.
        readable_by_others: take a file that the group or others can read. Some runtimes mount secrets so by default
            (0444 in Docker, 0644 in Kubernetes), where nobody else is in the container; the better way is to have it
            mounted with mode 0400.

    Raises:
        ValueError: not exactly one of `variable` and `file` is given, or the reference is none.
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
        """Always refused.

        Raises:
            StorageError: naming the variable or file where the key has to be changed.
        """
        problem = misuse_of_put(reference, key)
        del key
        await trio.lowlevel.checkpoint()
        if problem is not None:
            raise problem
        self._refuse()

    async def delete(self, reference: str) -> None:
        """Always refused, unless there is nothing under `reference`.

        Raises:
            StorageError: naming the variable or file where the key has to be changed.
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
        return f"EnvironmentKeystore({self._place})"

    @property
    def _place(self) -> str:
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
                f"{self._place} does not hold a relay key: it is empty, longer than 4096 characters, "
                "not UTF-8, or holds control characters"
            )
        return key

    def _refuse(self) -> NoReturn:
        raise StorageError(f"the relay key comes from {self._place}, which is only read; change it there")


def _key_or_none(text: str | memoryview) -> RelayKey | None:
    """The key that `text` is, or None; without an exception whose traceback could show it."""
    try:
        return RelayKey(text if isinstance(text, str) else str(text, "utf-8"))
    except ValueError:
        return None
