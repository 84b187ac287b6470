"""The names that gateways have created below a wildcard, and the keys that they belong to.

A name belongs to the key that claimed it first, for ever: a gateway that is gone, or that offers the name no more, does
not free it. Otherwise another gateway could take it, and with it the visitors, bookmarks and cookies of the first one.
Only the operator frees a name, by removing it from the file while the relay is stopped.

When a tunnel changes its key, the names that it claims again while both keys are valid belong to both.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias, final

import idna
import trio

from .._model.callbacks import nothing
from .._model.errors import StorageError
from .._model.log_fields import about
from .._model.services import MOST_SERVICES
from .._storage import files
from .tunnels import TunnelEntry

__all__ = ["NameBook", "why_no_label", "why_unavailable"]

_LIMIT: Final = 64 * 1024 * 1024
"""Bytes of the file."""

_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_log: Final = logging.getLogger("pioneer_tunnel.relay.names")


async def _nobody_else() -> None:
    """The default of `let_others_know`."""


def why_no_label(label: str) -> str | None:
    """What keeps `label` from being the first label of a host; None if nothing does.

    A label with `xn--` has to be the A-label of a valid internationalised one, so that it looks like what it is.
    """
    if not _LABEL.fullmatch(label):
        return "a name below a wildcard has lower-case letters, digits and '-'"
    if label[2:4] == "--":
        try:
            valid = label.startswith("xn--") and idna.alabel(idna.ulabel(label)).decode() == label
        except UnicodeError:
            valid = False
        if not valid:
            return "it looks like an internationalised name, and is not a valid one"
    return None


def why_unavailable(label: str, reserved: Collection[str]) -> str | None:
    """What keeps every gateway from creating the name `label`, for a person; None if nothing does."""
    return why_no_label(label) or ("the relay's operator has reserved it" if label in reserved else None)


@final
class NameBook:
    """The names below wildcards.

    Args:
        path: the file that keeps them; None keeps them in memory, which is for tests.
        reserved: labels that no gateway may have.
    """

    def __init__(self, path: Path | None, *, reserved: Collection[str] = ()) -> None:
        self._path: Final = path
        self._reserved: Final = frozenset(reserved)
        self._keys: _Names = {} if path is None else _read(path)
        self._writing: Final = trio.Lock()
        self.on_claim: Callable[[], object] = nothing
        """Called when a name has been claimed."""
        self.let_others_know: Callable[[], Awaitable[object]] = _nobody_else
        """Awaited when a name has been claimed, before its gateway learns of it. For other processes with this file."""

    @property
    def hosts(self) -> Collection[str]:
        """All names that have an owner."""
        return self._keys.keys()

    def keys_of(self, host: str) -> frozenset[str]:
        """The ids of the keys that `host` belongs to; empty if no key has claimed it."""
        return self._keys.get(host, frozenset())

    async def claim(self, entry: TunnelEntry, label: str, domain: str) -> str | None:
        """Let the name `label` below `domain` belong to the keys of `entry`. It is durable when this returns.

        Returns:
            None; or why it is refused, for a person.
        """
        why_not = why_unavailable(label, self._reserved)
        if why_not is not None:
            return why_not
        host, keys = f"{label}.{domain}", frozenset(entry.keys_by_id)
        async with self._writing:
            if self.keys_of(host) >= keys:
                return None
            try:
                if self._path is None:
                    self._keys, why_not = _claimed(self._keys, host, keys)
                else:
                    # Not to be abandoned: the file and the memory have to say the same.
                    self._keys, why_not = await trio.to_thread.run_sync(_claim_in_file, self._path, host, keys)
            except StorageError as error:
                _log.error(
                    "the name %s cannot be stored: %s", host, error, extra=about("name_not_stored", reason=error)
                )
                return "the relay cannot store it at the moment"
            if why_not is None:
                self.on_claim()
        if why_not is None:
            await self.let_others_know()
        return why_not

    async def read_again(self) -> None:
        """Another process has claimed a name."""
        if self._path is not None:
            async with self._writing:
                try:
                    self._keys = await trio.to_thread.run_sync(_read, self._path)
                except StorageError as error:
                    fields = about("name_not_stored", reason=error)
                    _log.error("the names that other processes have stored are not known: %s", error, extra=fields)
                else:
                    self.on_claim()


_Names: TypeAlias = Mapping[str, frozenset[str]]


def _claim_in_file(path: Path, host: str, keys: frozenset[str]) -> tuple[_Names, str | None]:
    """Claim `host` in the file. While a relay hands over to its successor, two processes write it, so it is locked."""
    with files.locked(path):
        known = _read(path)
        claimed, why_not = _claimed(known, host, keys)
        if claimed != known:
            files.replace(path, _written(claimed))
    return claimed, why_not


def _claimed(known: _Names, host: str, keys: frozenset[str]) -> tuple[_Names, str | None]:
    """The names when `keys` claim `host`, and None; or the same names, and why it is refused, for a person."""
    owner = known.get(host, frozenset())
    if owner and not owner & keys:
        return known, "another key has it"
    if not owner and sum(not others.isdisjoint(keys) for others in known.values()) >= MOST_SERVICES:
        return known, f"this tunnel has claimed {MOST_SERVICES} names already"
    return {**known, host: owner | keys}, None


def _read(path: Path) -> dict[str, frozenset[str]]:
    content = files.read(path, limit=_LIMIT)
    if content is None:
        return {}
    try:
        document: Any = json.loads(bytes(content))
        return {str(host): frozenset(map(str, keys)) for host, keys in document["names"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise StorageError(
            f"the names file {str(path)!r} is damaged; restore it, so that no name changes hands"
        ) from None


def _written(keys_by_host: _Names) -> bytes:
    names = {host: sorted(keys) for host, keys in sorted(keys_by_host.items())}
    return json.dumps({"names": names}, indent=1).encode() + b"\n"
