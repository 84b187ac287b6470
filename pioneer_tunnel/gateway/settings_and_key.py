"""The settings file and the relay key, read and written as one.

An update may change both. It is applied whole or not at all, though they are two stores: when one write fails, the
other is undone. A wait for a store that hangs is bounded, see `detached`.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Protocol, TypeAlias, TypeVar, final

import attrs
import trio

from .._model.errors import InvalidSettingsError, StorageError, TunnelError
from .._model.keys import RelayKey
from .._model.log_fields import about
from .detached import LAST_SECONDS, Detached, read_in_thread
from .keystore import Keystore
from .settings import Settings, SettingsFile, SettingsUpdate

__all__ = ["Desired", "KeyProvider", "NotRead", "Stores", "StoresHangError", "Written"]

KeyProvider: TypeAlias = Callable[[], Awaitable[RelayKey | None]]
"""Returns the relay key of a host that keeps it elsewhere; None when there is none."""

Judge: TypeAlias = Callable[[Settings, RelayKey | None], TunnelError | None]
"""Given the settings before an update, and the stored key where it is known, returns why the update is refused."""


@final
class NotRead(enum.Enum):
    """In place of a key: it has not been read."""

    YET = enum.auto()


StoredKey: TypeAlias = RelayKey | StorageError | NotRead | None
"""A stored key; None when there is none; or why it is not known."""

PATIENCE: Final = 20.0
"""Seconds to wait for a store."""

_SHORT_PATIENCE: Final = 2.0
"""Seconds to wait for a key that an update can do without."""

_READS_AT_ONCE: Final = 4
"""Reads at once; more wait. A read that hangs may hold a thread."""

_T = TypeVar("_T")


class _Read(Protocol):
    async def __call__(self, ask: Callable[[], Awaitable[_T]], seconds: float = ..., /) -> _T: ...


_log: Final = logging.getLogger("pioneer_tunnel.stores")


@final
class StoresHangError(StorageError):
    """The settings file, the keystore or the key provider did not answer in time."""


@final
@attrs.frozen(kw_only=True)
class Desired:
    """What a generation is made of.

    Attributes:
        settings: the settings.
        key: the relay key.
    """

    settings: Settings
    key: StoredKey


@final
@attrs.frozen(kw_only=True)
class Written:
    """The result of an update: what is stored now, and whether the update changed it."""

    desired: Desired
    changed: bool


@final
class Stores:
    """Both stores.

    Args:
        settings: the settings file, which other programs may write too.
        keystore: where the relay key is stored.
        key_provider: called for the key in place of `keystore`. Then the key cannot be saved or cleared.

    Attributes:
        writes: the number of updates that have begun or been undone. When it is the same before and after a read, the
            read saw one state.

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
        self._reads: Final = trio.Semaphore(_READS_AT_ONCE)
        self._key_read: Detached[RelayKey | None] | None = None
        self._hanging_writes = 0
        self.writes: int = 0

    async def settings(self) -> Settings:
        """What the settings file says now.

        Raises:
            StorageError: it cannot be read.
            InvalidSettingsError: its content is not allowed.
        """
        try:
            return await self._read(lambda: read_in_thread(self._settings_file.read))
        except trio.TooSlowError:
            raise StoresHangError(f"{self._settings_file.path} has not been read within {PATIENCE:g} s") from None

    async def key(self, desired: Desired) -> RelayKey | None:
        """The key of `desired`; reads it if needed. After a `StoresHangError`, the next call waits for the same read.

        Raises:
            StoresHangError: there is no answer yet.
            StorageError: the key cannot be opened. What a host's keystore or provider raises comes out as it is.
        """
        if isinstance(desired.key, StorageError):
            raise desired.key
        if not isinstance(desired.key, NotRead):
            return desired.key
        if self._key_read is None:
            self._key_read = Detached(lambda: self._key(desired.settings))
        try:
            key = await self._key_read.result(seconds=PATIENCE)
        except trio.TooSlowError:
            raise self._no_answer() from None
        except BaseException:
            self.forget_key()
            raise
        self.forget_key()
        return key

    def forget_key(self) -> None:
        """Let the next `key` ask for itself, and not wait for what was asked before."""
        if self._key_read is not None:
            self._key_read.cancel()
            self._key_read = None

    async def has_key(self, desired: Desired) -> bool:
        """Whether there is a key.

        Raises:
            StorageError: the keystore cannot tell, or not in time.
        """
        if isinstance(desired.key, StorageError | NotRead):
            try:
                return await self._read(lambda: self._has_key(desired.settings))
            except trio.TooSlowError:
                raise self._no_answer() from None
        return desired.key is not None

    async def write(self, update: SettingsUpdate, judge: Judge) -> Written | TunnelError:
        """Write what `update` changes, to both stores or to neither; returns why `judge` refuses it, if it does.

        A new key is stored before the settings, and a key is deleted after them. So a crash in between leaves each
        store whole, and never enables remote access without its key.

        If cancelled after it has begun, it finishes first, for up to 5 s.

        Raises:
            StoresHangError: a store does not answer. A write that still happens is undone afterwards.
            StorageError: a file or the keystore cannot be read or written. Nothing was changed, or the message says
                what was.
            InvalidSettingsError: the content of the settings file is not allowed, or the key is kept where it cannot
                be changed. Nothing was changed.
        """
        about_key = update.key is not None or update.deletes_key
        if about_key and self._keystore is None:
            raise InvalidSettingsError("the relay key of this host is kept elsewhere; it is not saved or cleared here")
        if about_key and self._hanging_writes:
            raise StoresHangError(f"{self._place_of_key} has not finished an earlier update; nothing was changed")
        await trio.lowlevel.checkpoint_if_cancelled()
        transaction = _Transaction(
            self._settings_file, self._keystore, update, judge, read=self._read, begins_to_write=self._count_write
        )
        work = Detached(lambda: self._carry_out(transaction))
        try:
            return await work.result(seconds=PATIENCE, last_seconds=LAST_SECONDS)
        except trio.TooSlowError:
            raise StoresHangError(
                f"{transaction.doing} has not ended within {PATIENCE:g} s; it cannot be rolled back while it hangs."
                " If it ends later, it is undone, and the log says so"
            ) from None
        finally:
            if work.abandoned:
                transaction.given_up = True
                self._hanging_writes += 1
                fields = about("update_given_up", reason=transaction.doing)
                _log.error("an update was given up: %s has not ended", transaction.doing, extra=fields)

    async def _carry_out(self, transaction: _Transaction) -> Written | TunnelError:
        try:
            return await transaction.run()
        finally:
            if transaction.given_up:
                self._hanging_writes -= 1
                self._count_write()

    def _count_write(self) -> None:
        self.writes += 1

    async def _read(self, ask: Callable[[], Awaitable[_T]], seconds: float = PATIENCE) -> _T:
        """Call a store, which may hang.

        Raises:
            trio.TooSlowError: there is no answer yet.
        """

        async def work() -> _T:
            async with self._reads:
                return await ask()

        read = Detached(work)
        try:
            return await read.result(seconds=seconds)
        finally:
            read.cancel()

    async def _key(self, settings: Settings) -> RelayKey | None:
        if self._keystore is not None:
            return await self._keystore.get(settings.secret_ref)
        assert self._key_provider is not None
        return await self._key_provider()

    async def _has_key(self, settings: Settings) -> bool:
        if self._keystore is not None:
            return await self._keystore.exists(settings.secret_ref)
        assert self._key_provider is not None
        return await self._key_provider() is not None

    def _no_answer(self) -> StoresHangError:
        return StoresHangError(f"{self._place_of_key} has not answered within {PATIENCE:g} s")

    @property
    def _place_of_key(self) -> str:
        return "the key provider" if self._keystore is None else f"the keystore ({type(self._keystore).__name__})"


@final
class _GivenUpError(StorageError):
    """The caller has stopped waiting for an update."""


@final
class _Transaction:
    """One update of both stores. When it fails, or its caller gives it up, what it has written is undone.

    Attributes:
        doing: the current step, as the subject of a sentence.
        given_up: set by a caller that has stopped waiting.
    """

    def __init__(
        self,
        settings_file: SettingsFile,
        keystore: Keystore | None,
        update: SettingsUpdate,
        judge: Judge,
        *,
        read: _Read,
        begins_to_write: Callable[[], None],
    ) -> None:
        self._settings_file: Final = settings_file
        self._keystore: Final = keystore
        self._update: Final = update
        self._judge: Final = judge
        self._read: Final = read
        self._begins_to_write: Final = begins_to_write
        self._about_key: Final = update.key is not None or update.deletes_key
        self.doing = ""
        self.given_up = False

    async def run(self) -> Written | TunnelError:
        """See `Stores.write`."""
        update = self._update
        self._step(f"reading {self._settings_file.path}")
        before = await read_in_thread(self._settings_file.read)
        after = update.apply_to(before)
        stored = await self._stored_key(before)
        refusal = self._judge(before, stored if isinstance(stored, RelayKey) else None)
        if refusal is not None:
            return refusal
        # A stored key that cannot be opened is no RelayKey here: it differs from every key, and from None.
        key_changes = self._about_key and update.key != stored
        key = update.key if self._about_key else stored
        desired = Desired(settings=after, key=key)
        if not key_changes and after == before:
            return Written(desired=desired, changed=False)
        self._begins_to_write()
        try:
            if key_changes and update.key is not None:
                await self._put(before.secret_ref, update.key)
            if after != before:
                desired = attrs.evolve(desired, settings=await self._write_settings(update.apply_to))
            if key_changes and update.deletes_key:
                await self._delete(before.secret_ref)
            self._step("the update")
        except BaseException as error:
            # A write that fails may still have happened: it may be the fsync at its end that fails.
            left = await self._put_back(before, after, stored)
            if isinstance(error, _GivenUpError) and not left:
                fields = about("update_undone", reason=self.doing)
                _log.warning("an update that was given up has been undone: %s", self.doing, extra=fields)
            if left and isinstance(error, TunnelError):
                raise StorageError("; ".join([str(error), *left])) from error
            raise
        return Written(desired=desired, changed=True)

    def _step(self, doing: str) -> None:
        """Begin the next step, unless the caller has given up the update."""
        if self.given_up:
            raise _GivenUpError(f"{self.doing} has ended when the update had been given up")
        self.doing = doing

    async def _stored_key(self, before: Settings) -> StoredKey:
        """The stored key. When it cannot be read and the update does not change it, the update goes on."""
        keystore, reference = self._keystore, before.secret_ref
        if keystore is None or not (self._about_key or self._update.enabled or self._update.server is not None):
            return NotRead.YET
        self._step(f"reading the stored relay key ({type(keystore).__name__})")
        if self._about_key:
            return await _key_or_loss(keystore, reference)
        try:
            return await self._read(lambda: _key_or_loss(keystore, reference), _SHORT_PATIENCE)
        except Exception:  # noqa: BLE001  # `run` reads it again, and reports the error
            _log.debug("the stored relay key cannot be read now", extra=about("key_unreadable"))
            return NotRead.YET

    async def _put(self, reference: str, key: RelayKey) -> None:
        assert self._keystore is not None
        self._step(f"storing the relay key ({type(self._keystore).__name__})")
        await self._keystore.put(reference, key)

    async def _delete(self, reference: str) -> None:
        assert self._keystore is not None
        self._step(f"deleting the relay key ({type(self._keystore).__name__})")
        await self._keystore.delete(reference)

    async def _write_settings(self, change: Callable[[Settings], Settings]) -> Settings:
        self._step(f"writing {self._settings_file.path}")
        return await read_in_thread(self._settings_file.update, change)

    async def _put_back(self, before: Settings, after: Settings, stored: StoredKey) -> list[str]:
        """Undo an update that failed; returns what could not be undone."""

        def undone(now: Settings) -> Settings:
            written = (now.enabled, now.server) == (after.enabled, after.server)
            return attrs.evolve(now, enabled=before.enabled, server=before.server) if written else now

        left = []
        try:
            if self._about_key and self._keystore is not None:
                await _put_key_back(self._keystore, before.secret_ref, stored)
        except Exception as error:  # noqa: BLE001  # a host's keystore may raise anything; the settings have to be put back too
            left.append(f"nor could the relay key be put back as it was: {_safe_text(error)}")
        try:
            await read_in_thread(self._settings_file.update, undone)
        except TunnelError as error:
            left.append(f"nor could the settings be put back as they were: {error}")
        for problem in left:
            _log.error("an update failed; %s", problem, extra=about("update_failed", reason=problem))
        return left


async def _key_or_loss(keystore: Keystore, reference: str) -> StoredKey:
    try:
        return await keystore.get(reference)
    except StorageError as error:
        # A key that cannot be opened cannot be put back. Saving or clearing a key is how a person repairs that.
        _log.warning("the stored relay key cannot be opened: %s", error, extra=about("key_unreadable"))
        return error


async def _put_key_back(keystore: Keystore, reference: str, old: StoredKey) -> None:
    now = await _key_or_loss(keystore, reference)
    if isinstance(old, StorageError | NotRead):
        if isinstance(now, RelayKey):
            await keystore.delete(reference)  # the new key, whose update failed
    elif now != old:
        await (keystore.delete(reference) if old is None else keystore.put(reference, old))


def _safe_text(error: Exception) -> str:
    """The text of an error, for a message. Errors that are not ours may hold a secret, so only their type is named."""
    return str(error) if isinstance(error, TunnelError) else type(error).__name__
