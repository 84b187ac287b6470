"""The interface of a keystore, the form of a reference, and `MemoryKeystore`."""

from __future__ import annotations

import re
from typing import Final, Protocol, final, runtime_checkable

import trio

from ..._model.keys import MIN_NATIVE_KEY_LENGTH, RelayKey

__all__ = ["DEFAULT_SECRET_REF", "Keystore", "MemoryKeystore", "check_secret_ref"]

DEFAULT_SECRET_REF: Final = "remote_access"  # noqa: S105 (it names a secret, and is none)
_REFERENCE: Final = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")


@runtime_checkable
class Keystore(Protocol):
    """Relay keys by reference.

    All four methods raise `ValueError` for a reference that `check_secret_ref` refuses. They raise `StorageError`,
    which names the file or place, when the keystore cannot be read or written. No message and no traceback shows a key.

    Cancellation: a method that is cancelled before it has begun does nothing. A `put` or `delete` that has begun is
    completed first, for at most 5 seconds; after that its thread continues alone. A key is stored completely or not at
    all. A keystore of your own that blocks must call `trio.to_thread.run_sync` with `abandon_on_cancel=True`: Trio
    waits for other threads, so one that hangs would keep the process from ending.
    """

    async def get(self, reference: str) -> RelayKey | None:
        """The key that was last stored under `reference`; None when there is none."""

    async def put(self, reference: str, key: RelayKey) -> None:
        """Store `key` under `reference`, replacing the key there. It is durable when this returns."""

    async def delete(self, reference: str) -> None:
        """Delete the key stored under `reference`. It does nothing when there is none."""

    async def exists(self, reference: str) -> bool:
        """Whether something is stored under `reference`. It is not read, so `get` may still fail."""


def is_secret_ref(text: str) -> bool:
    """Whether `text` is a valid reference: 1 to 64 of A-Z a-z 0-9 `_` `.` `-`, with no dot first."""
    return _REFERENCE.fullmatch(text) is not None


def check_secret_ref(reference: str) -> str:
    """Return `reference` if it is valid.

    Raises:
        ValueError: it is invalid. A long one is not quoted, because it may be the key itself, put there by mistake.
    """
    if is_secret_ref(reference):
        return reference
    shown = repr(reference) if len(reference) < MIN_NATIVE_KEY_LENGTH else f"({len(reference)} characters, not shown)"
    raise ValueError(f"the secret reference {shown} is not 1 to 64 of A-Z a-z 0-9 _ . - with no dot first")


def put_argument_error(reference: str, key: object) -> Exception | None:
    """The exception for invalid arguments of `put`, or None. The caller deletes its `key` before it raises it."""
    if not isinstance(key, RelayKey):
        return TypeError(f"a keystore stores a RelayKey, not {type(key).__name__}")
    try:
        check_secret_ref(reference)
    except ValueError as error:
        return error.with_traceback(None)
    return None


@final
class MemoryKeystore:
    """A keystore in memory: for tests, and for hosts that store the key again at each start."""

    def __init__(self) -> None:
        self._keys: dict[str, RelayKey] = {}

    async def get(self, reference: str) -> RelayKey | None:
        """See `Keystore.get`."""
        await trio.lowlevel.checkpoint()
        return self._keys.get(check_secret_ref(reference))

    async def put(self, reference: str, key: RelayKey) -> None:
        """See `Keystore.put`."""
        problem = put_argument_error(reference, key)
        if problem is not None:
            del key  # a traceback that shows local variables must not show it
            raise problem
        await trio.lowlevel.checkpoint()
        self._keys[reference] = key

    async def delete(self, reference: str) -> None:
        """See `Keystore.delete`."""
        await trio.lowlevel.checkpoint()
        self._keys.pop(check_secret_ref(reference), None)

    async def exists(self, reference: str) -> bool:
        """See `Keystore.exists`."""
        await trio.lowlevel.checkpoint()
        return check_secret_ref(reference) in self._keys

    def __repr__(self) -> str:
        return f"MemoryKeystore({', '.join(sorted(self._keys))})"
