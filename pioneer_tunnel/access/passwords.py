"""Checks passwords against an htpasswd file. Each is computed once, in a thread, and remembered for some minutes."""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from typing import Final, final

import trio

from .attempts import Results
from .htpasswd import Htpasswd
from .requests import Password
from .workers import Workers

__all__ = ["Passwords"]


@final
class Passwords:
    """The passwords of a file, as it was read once. After a change of the file, a new one begins without results.

    Args:
        users: the content of the file.
        workers: compute the hashes.
    """

    def __init__(self, users: Htpasswd, workers: Workers) -> None:
        self.users: Final = users
        self._workers: Final = workers
        self._key: Final = secrets.token_bytes(32)
        self._results: Final = Results()
        self._running: Final[dict[bytes, trio.Event]] = {}

    def known(self, given: Password) -> bool | None:
        """Whether a password is right, if that was computed a short time ago."""
        return self._results.get(self._digest(given), trio.current_time())

    async def computed_by_another(self, given: Password) -> bool:
        """Wait until another task has computed the same password. False if none does."""
        running = self._running.get(self._digest(given))
        if running is not None:
            await running.wait()
        return running is not None

    async def compute(self, given: Password) -> bool:
        """Compute whether a password is right.

        Raises:
            Busy: too many others wait.
        """
        digest = self._digest(given)
        done = self._running[digest] = trio.Event()
        try:
            right = await self._workers.run(functools.partial(self.users.verify, given.user, given.password))
            self._results.set(digest, right, trio.current_time())
        finally:
            del self._running[digest]
            done.set()
        return right

    def _digest(self, given: Password) -> bytes:
        text = len(given.user).to_bytes(4) + given.user + given.password
        return hmac.digest(self._key, text, hashlib.sha256)
