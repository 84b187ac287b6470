"""The settings file and the relay key, read and written as one.

An update may be about both. It is applied whole or not at all, though they are two stores: what was written is put
back when the rest cannot be.

Neighbours: `RemoteAccess` reads what is desired here, and writes what clients want; `settings` and `keystore` are the
stores.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias, final

import attrs
import trio

from .errors import InvalidSettingsError, StorageError, TunnelError
from .identity import RelayKey
from .keystore import Keystore
from .settings import Settings, SettingsFile, SettingsUpdate

__all__ = ["KeyProvider", "Stores"]

KeyProvider: TypeAlias = Callable[[], Awaitable[RelayKey | None]]
"""Asked for the key by hosts that keep it elsewhere; None when there is none."""

_Key: TypeAlias = RelayKey | StorageError | None
"""A stored key, None when there is none, or why it cannot be opened."""

_log: Final = logging.getLogger("pioneer_tunnel.stores")


@final
class Stores:
    """Both stores.

    Args:
        settings: the settings file, which others may write too.
        keystore: where the relay key lives.
        key_provider: asked for the key in place of `keystore`; then it cannot be saved or cleared.

    Attributes:
        writes: how many updates have been begun; who reads twice and finds the same number has read one state.

    Raises:
        TypeError: neither or both of `keystore` and `key_provider` are given.
    """

    def __init__(
        self, settings: SettingsFile, *, keystore: Keystore | None = None, key_provider: KeyProvider | None = None
    ) -> None:
        if (keystore is None) == (key_provider is None):
            raise TypeError("give either keystore or key_provider")
        self._settings_file: Final = settings
        self._keystore: Final = keystore
        self._key_provider: Final = key_provider
        self.writes = 0

    async def settings(self) -> Settings:
        """What the settings file says now.

        Raises:
            StorageError: it cannot be read.
            InvalidSettingsError: what stands in it is not allowed.
        """
        return await trio.to_thread.run_sync(self._settings_file.read)

    async def key(self, settings: Settings) -> RelayKey | None:
        """The key that `settings` refer to.

        Raises:
            StorageError: it cannot be opened. What a host's own keystore or provider raises comes out as it is.
        """
        if self._keystore is not None:
            return await self._keystore.get(settings.secret_ref)
        assert self._key_provider is not None
        return await self._key_provider()

    async def has_key(self) -> bool:
        """Whether there is a key.

        Raises:
            StorageError: the keystore cannot tell.
        """
        if self._keystore is not None:
            return await self._keystore.exists((await self.settings()).secret_ref)
        assert self._key_provider is not None
        return await self._key_provider() is not None

    async def write(self, update: SettingsUpdate) -> bool:
        """Write what `update` changes, to both stores or to neither; returns whether that was anything.

        A new key is stored before the settings that want it, and a key is forgotten after them, so that a crash in
        between leaves each store whole, and nothing enabled without its key that was not so before.

        Raises:
            StorageError: a file or the keystore cannot be read or written; all is as it was, or the message says what
                is not.
            InvalidSettingsError: the settings file holds something that is not allowed, or the key is kept where it
                cannot be changed; all is as it was.
        """
        before = await self.settings()
        about_key = update.key is not None or update.deletes_key
        if about_key and self._keystore is None:
            raise InvalidSettingsError("the relay key of this host is kept elsewhere; it is not saved or cleared here")
        keystore = self._keystore if about_key else None
        old = None if keystore is None else await _key_or_loss(keystore, before.secret_ref)
        # `old` is no RelayKey when it cannot be opened: it differs from every key, and from none.
        key_changes = keystore is not None and update.key != old
        if not key_changes and update.apply_to(before) == before:
            return False
        self.writes += 1
        try:
            if keystore is not None and key_changes and update.key is not None:
                await keystore.put(before.secret_ref, update.key)
            await self._write_settings(update.apply_to)
            if keystore is not None and update.deletes_key:
                await keystore.delete(before.secret_ref)
        except BaseException as error:
            # What failed may have happened all the same: it can be the very last step, making it durable, that fails.
            left = await self._put_back(before, keystore, old)
            if left and isinstance(error, TunnelError):
                raise StorageError("; ".join([str(error), *left])) from error
            raise
        return True

    async def _put_back(self, before: Settings, keystore: Keystore | None, old: _Key) -> list[str]:
        """Make all as it was before an `apply` that failed; returns what could not be."""
        left = []
        try:
            if keystore is not None:
                await _put_key_back(keystore, before.secret_ref, old)
        except Exception as error:  # noqa: BLE001  # a host's keystore may raise anything, and the settings come next
            left.append(f"nor could the relay key be put back as it was: {_told(error)}")
        try:
            await self._write_settings(lambda now: attrs.evolve(now, enabled=before.enabled, server=before.server))
        except TunnelError as error:
            left.append(f"nor could the settings be put back as they were: {error}")
        for problem in left:
            _log.error("an update failed; %s", problem)
        return left

    async def _write_settings(self, change: Callable[[Settings], Settings]) -> None:
        await trio.to_thread.run_sync(self._settings_file.update, change)


async def _key_or_loss(keystore: Keystore, reference: str) -> _Key:
    try:
        return await keystore.get(reference)
    except StorageError as error:
        # What cannot be opened cannot be put back either. Saving or clearing a key is how a person mends that.
        _log.warning("the stored relay key cannot be opened: %s", error)
        return error


async def _put_key_back(keystore: Keystore, reference: str, old: _Key) -> None:
    now = await _key_or_loss(keystore, reference)
    if isinstance(old, StorageError):
        if isinstance(now, RelayKey):
            await keystore.delete(reference)  # the new one, which is not asked for any more
    elif now != old:
        await (keystore.delete(reference) if old is None else keystore.put(reference, old))


def _told(error: Exception) -> str:
    """What may be said of an error: who raises one that is not ours may put anything into it."""
    return str(error) if isinstance(error, TunnelError) else type(error).__name__
