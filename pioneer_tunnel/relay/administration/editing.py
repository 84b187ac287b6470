"""Add tunnels to a relay's file, and remove them, while others may edit it.

The operator's text stays as it is: comments, order, line ends. Our own writers exclude each other by a lock. Another
program, such as an editor, does not take it. So the file is replaced only if it still has the content that was
changed; otherwise the change is made again, to the new content. A running relay follows its file by itself.

The functions block.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from ..._model.errors import InvalidSettingsError, Problem, StorageError
from ..._storage import files
from ..._storage.toml_entries import with_entry, without_entry
from ..._storage.toml_read import FILE_LIMIT
from ..._storage.validation import refusal, structure
from ..config import RelayConfig, config_of
from ..tunnels import TunnelEntry

__all__ = ["add_tunnel", "remove_tunnel"]

_ATTEMPTS: Final = 10
_TUNNELS: Final = ("relay", "tunnels")


def add_tunnel(path: Path, entry: Mapping[str, Any]) -> RelayConfig:
    """Add a tunnel to a relay's file.

    Args:
        path: the file.
        entry: the tunnel, as a table of the file.

    Returns:
        The new configuration; its last tunnel is the new one.

    Raises:
        InvalidSettingsError: the file is not valid, or would not be valid with this entry; it stays as it is. Problems
            of the entry alone have no `source`.
        StorageError: the file cannot be read or written.
    """
    structure(TunnelEntry, entry)
    ours = ""

    def add(text: str, config: RelayConfig) -> str:
        nonlocal ours
        ours = f"relay.tunnels[{len(config.tunnels)}]."
        if any(entry["id"] == tunnel.id for tunnel in config.tunnels):
            raise refusal([Problem(key="id", message=f"the relay has a tunnel {entry['id']!r} already")])
        return with_entry(text, _TUNNELS, entry)

    try:
        return _edit(path, add)
    except InvalidSettingsError as error:
        if not ours or not any(problem.key.startswith(ours) for problem in error.problems):
            raise
        raise refusal(_of_entry(problem, ours) for problem in error.problems) from None


def _of_entry(problem: Problem, place: str) -> Problem:
    if not problem.key.startswith(place):
        return problem
    return attrs.evolve(problem, source=None, key=problem.key.removeprefix(place))


def remove_tunnel(path: Path, tunnel_id: str) -> str:
    """Remove a tunnel from a relay's file.

    Returns:
        The lines that were removed.

    Raises:
        InvalidSettingsError: the file is not valid, or has no such tunnel.
        StorageError: the file cannot be read or written.
    """
    removed = ""

    def remove(text: str, config: RelayConfig) -> str:
        nonlocal removed
        known = [tunnel.id for tunnel in config.tunnels]
        if tunnel_id not in known:
            raise refusal([Problem(key="id", message=f"the relay has no tunnel {tunnel_id!r}{_listed(known)}")])
        edited, removed = without_entry(text, _TUNNELS, known.index(tunnel_id))
        return edited

    _edit(path, remove)
    return removed


def _listed(known: list[str]) -> str:
    return f"; it has {', '.join(map(repr, known[:8]))}{', …' if known[8:] else ''}" if known else ""


def _edit(path: Path, change: Callable[[str, RelayConfig], str]) -> RelayConfig:
    if not files.exists(path):
        raise StorageError(f"there is no file {path}")  # before a lock file is made for it
    with files.locked(path):
        files.remove_temporaries(path)
        for _ in range(_ATTEMPTS):
            content = _read(path)
            config = config_of(content, path)
            mark = codecs.BOM_UTF8 if content.startswith(codecs.BOM_UTF8) else b""
            try:
                edited = mark + change(str(content.removeprefix(mark), "utf-8"), config).encode()
            except ValueError as error:
                raise InvalidSettingsError(
                    f"{path} is written in a way that cannot be changed by a command ({error}); edit it by hand"
                ) from None
            changed = config_of(edited, path)
            if files.replace(path, edited, only_if=functools.partial(_still_holds, path, content)):
                return changed
    raise StorageError(f"{path} changes all the time: another program writes it")


def _still_holds(path: Path, content: bytes) -> bool:
    return _read(path) == content


def _read(path: Path) -> bytes:
    content = files.read(path, limit=FILE_LIMIT)
    if content is None:
        raise StorageError(f"{path} is gone")
    return bytes(content)
