"""The keystore for most gateways: one encrypted file for each secret, in a folder that is the gateway's alone.

    FOLDER/                     mode 0700
        master.key              the master keys, themselves sealed when there is a passphrase
        REFERENCE.secret        one relay key, sealed by a master key
        master.key.lock         keeps writers apart

Every file is replaced as a whole. The rules that keep each stored secret open whatever is cut off in the middle:

1. A master key is on disk before anything is sealed with it.
2. A rotation adds the new master key to the old ones, seals every secret anew, and only then drops the old ones. One
   that was cut off leaves both keys and a mixture of secrets; the next rotation ends it.
3. A passphrase changes with the last write of a rotation, in one step.
4. A missing master key is never made anew while there are secrets, since it might come back from a backup.

Readers take no lock. They read the secret first, then the master keys: if a rotation ran to its end between the two,
the secret's key is unknown, and they read again.

Neighbours: `envelope.py` knows the bytes, `files.py` the ways of the disk.
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
from .interface import check_secret_ref, is_secret_ref, misuse_of_put

__all__ = ["FileKeystore"]

_LOGGER: Final = logging.getLogger("pioneer_tunnel.keystore.encrypted")
_SUFFIX: Final = ".secret"
_READ_ATTEMPTS: Final = 5


@final
class FileKeystore:
    """Relay keys in encrypted files (AES-256-GCM), under a master key that lies beside them or opens to a passphrase.

    Without a passphrase the master key is in the same folder: file modes are what protects it then, and a backup of the
    whole folder is as secret as the keys. With one (scrypt), the folder alone opens nothing.

    Args:
        folder: where the files are; made with mode 0700 by the first write. The folder above it must exist.
        passphrase: what seals the master key.

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
        """Where the files are."""
        return self._folder

    async def get(self, reference: str) -> RelayKey | None:
        """See `Keystore.get`."""
        return await read_in_thread(self._get, check_secret_ref(reference))

    async def put(self, reference: str, key: RelayKey) -> None:
        """See `Keystore.put`."""
        problem = misuse_of_put(reference, key)
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
        """Seal every secret anew, under a fresh master key.

        Args:
            passphrase: a new one, also for a keystore that had none; None keeps what there is. Other objects and
                programs that hold the keystore open need it from then on.

        Raises:
            ValueError: the passphrase is empty.
            StorageError: a file cannot be read or written, or a secret cannot be opened. What was stored still opens.
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
            # All are opened before anything is written, so that one that is broken stops nothing half way.
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
            masters = masters.renewed(in_use)
            files.replace(self._master, masters.to_bytes(self._passphrase), private=True)
            for reference, key in keys.items():
                files.replace(self._path(reference), memoryview(masters.seal(reference, key)), private=True)
            files.replace(self._master, masters.newest_alone().to_bytes(passphrase), private=True)
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
