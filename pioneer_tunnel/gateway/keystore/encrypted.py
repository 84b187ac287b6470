"""The keystore for most gateways: one encrypted file for each secret, in a folder that only the gateway may access.

    FOLDER/                     mode 0700
        master.key              the master keys, encrypted when there is a passphrase
        REFERENCE.secret        one relay key, encrypted with a master key
        master.key.lock         the writers' lock

Every file is replaced atomically. These rules make sure that each stored secret can be opened after a crash at any
moment:

1. A master key is on disk before any secret is encrypted with it.
2. A rotation adds the new master key to the old ones, encrypts every secret again, and only then drops the old keys. An
   interrupted rotation leaves both keys, and secrets under either. The next rotation completes it.
3. The passphrase changes with the last write of a rotation, atomically.
4. A missing master key is never created while there are secrets, since it may be restored from a backup.

Readers take no lock. They read the secret first and then the master keys. If a rotation ended between the two, the
secret's master key is unknown, and they read again. `envelope` has the format of the files.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final, final

from ..._model.errors import StorageError
from ..._model.keys import RelayKey
from ..._storage import files
from ..detached import finish_in_thread, read_in_thread
from .envelope import (
    MASTER_LIMIT,
    SECRET_LIMIT,
    EnvelopeError,
    MasterKeys,
    Passphrase,
    UnknownMasterKeyError,
    key_id_of,
)
from .interface import check_secret_ref, is_secret_ref, put_argument_error

__all__ = ["FileKeystore"]

_LOGGER: Final = logging.getLogger("pioneer_tunnel.keystore.encrypted")
_SUFFIX: Final = ".secret"
_READ_ATTEMPTS: Final = 5


@final
class FileKeystore:
    """Relay keys in encrypted files (AES-256-GCM), under a master key in the same folder.

    Without a passphrase, only the file modes protect the master key, and a backup of the folder is as secret as the
    keys. With a passphrase (scrypt), the master key is encrypted, and the folder alone does not reveal the keys.

    Args:
        folder: where the files are. The first write makes it, with mode 0700; its parent must exist.
        passphrase: encrypts the master key; None for none.

    Raises:
        ValueError: the passphrase is empty.
    """

    def __init__(self, folder: str | os.PathLike[str], passphrase: str | None = None) -> None:
        self._folder = Path(folder)
        self._master = self._folder / "master.key"
        self._passphrase: Passphrase | None = None
        try:
            if passphrase is not None:
                self._passphrase = Passphrase(passphrase)
        finally:
            del passphrase  # a traceback that shows local variables must not show it

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self._folder

    async def get(self, reference: str) -> RelayKey | None:
        """See `Keystore.get`."""
        return await read_in_thread(self._get, check_secret_ref(reference))

    async def put(self, reference: str, key: RelayKey) -> None:
        """See `Keystore.put`."""
        problem = put_argument_error(reference, key)
        if problem is not None:
            del key  # a traceback that shows local variables must not show it
            raise problem
        await finish_in_thread(self._put, reference, key)

    async def delete(self, reference: str) -> None:
        """See `Keystore.delete`."""
        await finish_in_thread(self._delete, check_secret_ref(reference))

    async def exists(self, reference: str) -> bool:
        """See `Keystore.exists`."""
        return await read_in_thread(files.exists, self._path(check_secret_ref(reference)))

    async def rotate(self, passphrase: str | None = None) -> None:
        """Encrypt every secret again, under a new master key.

        Args:
            passphrase: the new passphrase, also for a keystore that had none; None keeps the current one, or none.
            Other
                objects and programs that use this keystore then need the new one.

        Raises:
            ValueError: the passphrase is empty.
            StorageError: a file cannot be read or written, or a secret cannot be opened. The secrets that could be
                opened before still can.
        """
        try:
            new = self._passphrase if passphrase is None else Passphrase(passphrase)
        finally:
            del passphrase
        await finish_in_thread(self._rotate, new)

    def __repr__(self) -> str:
        return f"FileKeystore({str(self._folder)!r}{', passphrase=***' if self._passphrase is not None else ''})"

    def _get(self, reference: str) -> RelayKey | None:
        path = self._path(reference)
        files.refuse_exposed_folder(self._folder)
        attempts = _READ_ATTEMPTS
        while True:
            content = files.read(path, limit=SECRET_LIMIT, private=True)
            if content is None:
                return None
            masters = self._masters()
            if masters is None:
                raise self._master_is_missing()
            try:
                return masters.open(reference, content)
            except EnvelopeError as error:
                attempts -= 1
                if attempts == 0 or not isinstance(error, UnknownMasterKeyError):
                    raise StorageError(f"{path} {error}") from None

    def _put(self, reference: str, key: RelayKey) -> None:
        files.make_private_folder(self._folder)
        files.refuse_exposed_folder(self._folder)
        with files.locked(self._master):
            files.remove_temporaries(self._folder)
            masters = self._masters()
            if masters is None:
                masters = self._first_master()
            files.replace(self._path(reference), memoryview(masters.seal(reference, key)), private=True)
        _LOGGER.info("%s: stored the secret %r", self._folder, reference)

    def _delete(self, reference: str) -> None:
        if not files.exists(self._path(reference)):
            return
        files.refuse_exposed_folder(self._folder)
        with files.locked(self._master):
            files.remove_temporaries(self._folder)
            files.remove(self._path(reference))
        _LOGGER.info("%s: deleted the secret %r", self._folder, reference)

    def _rotate(self, passphrase: Passphrase | None) -> None:
        files.make_private_folder(self._folder)
        files.refuse_exposed_folder(self._folder)
        with files.locked(self._master):
            files.remove_temporaries(self._folder)
            masters = self._masters()
            if masters is None:
                masters = self._first_master()
            # Open all secrets before writing anything, so that a broken one does not stop the rotation half way.
            keys = {}
            in_use = set()
            for reference in self._references():
                path = self._path(reference)
                content = files.read(path, limit=SECRET_LIMIT, private=True)
                if content is None:
                    continue
                try:
                    keys[reference] = masters.open(reference, content)
                    in_use.add(key_id_of(content))
                except EnvelopeError as error:
                    raise StorageError(f"{path} {error}; the master key was not rotated") from None
            masters = masters.with_new_key(in_use)
            files.replace(self._master, masters.to_bytes(self._passphrase), private=True)
            for reference, key in keys.items():
                files.replace(self._path(reference), memoryview(masters.seal(reference, key)), private=True)
            files.replace(self._master, masters.newest_only().to_bytes(passphrase), private=True)
            self._passphrase = passphrase
        _LOGGER.info("%s: rotated the master key of %d secrets", self._folder, len(keys))

    def _masters(self) -> MasterKeys | None:
        content = files.read(self._master, limit=MASTER_LIMIT, private=True)
        if content is None:
            return None
        try:
            return MasterKeys.from_bytes(content, self._passphrase)
        except EnvelopeError as error:
            raise StorageError(f"{self._master} {error}") from None

    def _first_master(self) -> MasterKeys:
        if self._references():
            raise self._master_is_missing()
        masters = MasterKeys.generate()
        files.replace(self._master, masters.to_bytes(self._passphrase), private=True)
        return masters

    def _master_is_missing(self) -> StorageError:
        return StorageError(
            f"{self._master} is missing, so the secrets beside it cannot be opened; restore it from a backup, "
            f"or remove the *{_SUFFIX} files in {self._folder} and store the keys again"
        )

    def _references(self) -> list[str]:
        names = [name.removesuffix(_SUFFIX) for name in files.names_in(self._folder) if name.endswith(_SUFFIX)]
        return sorted(name for name in names if is_secret_ref(name))

    def _path(self, reference: str) -> Path:
        return self._folder / (reference + _SUFFIX)
