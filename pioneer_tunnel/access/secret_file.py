"""A file of secrets that may be replaced while it is in use."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar, final

import trio

from .._model.errors import InvalidSettingsError, StorageError
from .._model.log_fields import about
from .._storage import files

__all__ = ["CHECK_INTERVAL", "SecretFile"]

CHECK_INTERVAL: Final = 5.0
"""Seconds between two checks of a file."""

CHECK_TIMEOUT: Final = 2.0
"""Seconds that a request waits for a check. A file system may hang. At most one thread checks at a time."""

_Stamp: TypeAlias = tuple[int, ...] | None
_T = TypeVar("_T")
_log: Final = logging.getLogger("pioneer_tunnel.access")


@final
class SecretFile(Generic[_T]):
    """A file, and what was read from it last.

    A file that cannot be read or parsed, also after a change, changes nothing: the log says so once.

    Args:
        path: of the file. The group and others must have no access to it.
        parse: makes the value of the content; raises `InvalidSettingsError`.
        limit: the largest size, in bytes.

    Attributes:
        value: what the file had when it was last good; None if it never was.
    """

    def __init__(self, path: Path, parse: Callable[[bytes], _T], *, limit: int) -> None:
        self.value: _T | None = None
        self._path: Final = path
        self._parse: Final = parse
        self._limit: Final = limit
        self._stamp: _Stamp = None
        self._checked_at = -math.inf
        self._checking = False  # by a thread, which may have been abandoned
        self._complaint = ""  # what the log said last
        self._lock: Final = trio.Lock()

    def load(self) -> _T:
        """Read the file. Blocks.

        Raises:
            StorageError: it cannot be read, or others may access it.
            InvalidSettingsError: its content cannot be used.
        """
        content = files.read(self._path, limit=self._limit, private=True)
        if content is None:
            raise StorageError(f"{self._path} does not exist")
        try:
            return self._parse(bytes(content))
        except InvalidSettingsError as error:
            raise InvalidSettingsError(f"{self._path}: {error}") from None

    def is_fresh(self, now: float) -> bool:
        """Whether `value` needs no check now."""
        return now - self._checked_at < CHECK_INTERVAL

    async def check(self) -> None:
        """Read the file if it has changed. A thread does that, and not more often than every `CHECK_INTERVAL`."""
        with trio.move_on_after(CHECK_TIMEOUT):
            async with self._lock:
                if self.is_fresh(trio.current_time()) or self._checking:
                    return
                self._checked_at = trio.current_time()
                await trio.to_thread.run_sync(self._reload_if_changed, abandon_on_cancel=True)

    def _reload_if_changed(self) -> None:
        self._checking = True
        try:
            # Before the file is read, so that the next check sees a change in between.
            stamp = self._stamp_now()
            if stamp != self._stamp or stamp is None:
                self._stamp = stamp
                self._reload()
        finally:
            self._checking = False

    def _reload(self) -> None:
        try:
            self.value, self._complaint = self.load(), ""
        except (StorageError, InvalidSettingsError) as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                stays = "nobody is let in by it" if self.value is None else "what it had before stays in use"
                fields = about("file_refused", reason=error)
                _log.error("%s; %s, until the file changes", error, stays, extra=fields)

    def _stamp_now(self) -> _Stamp:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
