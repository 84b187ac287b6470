"""The keystore for desktops: the operating system's keyring, through the package `keyring` (extra `keyring`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Final, Protocol, TypeVar, final

from ..._model.errors import StorageError
from ..._model.keys import RelayKey
from ..detached import finish_in_thread, read_in_thread
from .interface import check_secret_ref, put_argument_error

__all__ = ["KeyringKeystore"]

_SERVICE: Final = "pioneer-tunnel"
_PROBLEMS: Final = {
    "NoKeyringError": "there is no keyring on this machine; a FileKeystore needs none",
    "_NotARelayKeyError": "what is stored there is not a relay key",
}
_ResultT = TypeVar("_ResultT")


class _NotARelayKeyError(Exception):
    pass


class _Backend(Protocol):
    """What we use of `keyring.backend.KeyringBackend`."""

    def get_password(self, service: str, username: str, /) -> str | None: ...

    def set_password(self, service: str, username: str, password: str, /) -> None: ...

    def delete_password(self, service: str, username: str, /) -> None: ...


@final
class KeyringKeystore:
    """Relay keys in the operating system's keyring (Secret Service, KWallet, Keychain, Credential Locker).

    The first use imports the package `keyring`. The import and all calls run in a thread.

    Args:
        service: the service name of the keys in the keyring; the reference is the user name.
        backend: the keyring to use; None lets the package choose.
    """

    def __init__(self, service: str = _SERVICE, *, backend: _Backend | None = None) -> None:
        self._service = service
        self._backend = backend

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
        return await read_in_thread(self._exists, check_secret_ref(reference))

    def __repr__(self) -> str:
        return f"KeyringKeystore({self._service!r})"

    def _get(self, reference: str) -> RelayKey | None:
        return self._call(reference, "read", lambda backend: self._read(backend, reference))

    def _put(self, reference: str, key: RelayKey) -> None:
        def put(backend: _Backend) -> bool:
            backend.set_password(self._service, reference, key.reveal())
            # A disabled keyring (keyring's null backend) accepts every key and stores none.
            return self._read(backend, reference) == key

        if not self._call(reference, "written", put):
            raise StorageError(f"{self._name(reference)} cannot be written: it was stored, and then was not there")

    def _delete(self, reference: str) -> None:
        def delete(backend: _Backend) -> None:
            if backend.get_password(self._service, reference) is not None:
                backend.delete_password(self._service, reference)

        self._call(reference, "deleted", delete)

    def _exists(self, reference: str) -> bool:
        return self._call(reference, "read", lambda backend: backend.get_password(self._service, reference) is not None)

    def _read(self, backend: _Backend, reference: str) -> RelayKey | None:
        password = backend.get_password(self._service, reference)
        try:
            return None if password is None else RelayKey(password)
        except ValueError:
            raise _NotARelayKeyError from None

    def _call(self, reference: str, done: str, operation: Callable[[_Backend], _ResultT]) -> _ResultT:
        """Run `operation` with the keyring.

        Raises:
            StorageError: it failed. It has only the class name of the backend's exception, which is dropped: its
            message
                may quote the key, and its frames hold it.
        """
        backend = self._open()
        try:
            return operation(backend)
        except Exception as error:  # noqa: BLE001 (backends raise what they like)
            problem = _PROBLEMS.get(type(error).__name__, type(error).__name__)
        raise StorageError(f"{self._name(reference)} cannot be {done}: {problem}")

    def _open(self) -> _Backend:
        if self._backend is None:
            try:
                keyring = importlib.import_module("keyring")
            except ImportError as error:
                raise StorageError(
                    "the operating system's keyring needs the package 'keyring': "
                    "install it with: pip install 'pioneer-tunnel[keyring]'"
                ) from error
            backend: _Backend = keyring.get_keyring()
            self._backend = backend
        return self._backend

    def _name(self, reference: str) -> str:
        return f"the secret {reference!r} of {self._service!r} in the operating system's keyring"
