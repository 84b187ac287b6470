"""Reload a relay's file when it changes or on SIGHUP. A file is applied as a whole or not at all.

    file = ConfigFile("relay.toml")
    relay = Relay(file.load())
    ...
    await follow(file, relay.apply)

`follow` checks the file's modification time, size and inode every 2 seconds. After a change it waits until the file has
been unchanged for half a second, so that it does not read a file that is half written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, final

import attrs
import trio

from .._model.errors import TunnelError
from .._model.log_fields import about
from .._storage.toml_read import read_content
from ..access.guard import check_files
from .config import RelayConfig, config_of

__all__ = ["Changes", "ConfigFile", "check_access", "follow"]

POLL_INTERVAL: Final = 2.0
"""Seconds between two checks of the file."""

SETTLE_INTERVAL: Final = 0.5
"""Seconds that a changed file must stay unchanged before it is read."""

_Stamp: TypeAlias = tuple[int, int, int, int] | None

_log: Final = logging.getLogger("pioneer_tunnel.relay.reload")


@final
@attrs.frozen(kw_only=True)
class Changes:
    """The differences between two configurations.

    Attributes:
        added, removed, changed: ids of tunnels.
        for_a_restart: changed keys of `[relay]` that a running relay cannot apply.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    for_a_restart: tuple[str, ...]

    @classmethod
    def between(cls, before: RelayConfig, after: RelayConfig) -> Changes:
        """Compare two configurations."""
        old, new = ({entry.id: entry for entry in config.tunnels} for config in (before, after))
        return cls(
            added=tuple(name for name in new if name not in old),
            removed=tuple(name for name in old if name not in new),
            changed=tuple(name for name in new if name in old and new[name] != old[name]),
            for_a_restart=tuple(
                field.name
                for field in attrs.fields(RelayConfig)
                if field.name not in {"tunnels", "base_dir"}
                and getattr(before, field.name) != getattr(after, field.name)
            ),
        )

    def __str__(self) -> str:
        parts = {"added": self.added, "removed": self.removed, "changed": self.changed}
        return ", ".join(f"{what} {', '.join(map(repr, names))}" for what, names in parts.items() if names) or "none"


@final
class ConfigFile:
    """A relay's file, and its state when it was last read.

    Args:
        path: of the file. A symbolic link is followed each time.

    Attributes:
        path: as above.
        content: what was read last.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(path)
        self.content = b""
        self._loaded: _Stamp = None

    def load(self) -> RelayConfig:
        """Read the file.

        Raises:
            StorageError, InvalidSettingsError: see `RelayConfig.load`.
        """
        self._loaded = self._stamp()  # before reading, so that a change during it is noticed
        self.content = read_content(self.path)
        return config_of(self.content, self.path)

    async def has_changed(self) -> bool:
        """Whether the file has changed since it was last read."""
        return await trio.to_thread.run_sync(self._stamp) != self._loaded

    async def wait_unchanged(self) -> None:
        """Wait until the file has been unchanged for `SETTLE_INTERVAL`."""
        seen = await trio.to_thread.run_sync(self._stamp)
        while True:
            # No deadline: a file that keeps changing is never read.
            await trio.sleep(SETTLE_INTERVAL)
            before, seen = seen, await trio.to_thread.run_sync(self._stamp)
            if seen == before:
                return

    def _stamp(self) -> _Stamp:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


async def follow(
    file: ConfigFile,
    apply: Callable[[RelayConfig], Awaitable[object]],
    *,
    reload_now: AsyncIterator[object] | None = None,
    interval: float = POLL_INTERVAL,
) -> NoReturn:
    """Apply `file` each time it has changed, until cancelled.

    A file that cannot be read or applied changes nothing. The error is logged once for each change, with all problems.

    Args:
        file: has been loaded once.
        apply: applies a configuration.
        reload_now: each item makes `follow` read the file at once, changed or not. It must not end.
        interval: seconds between two checks.
    """
    while True:
        with trio.move_on_after(interval) as waiting:
            await (trio.sleep_forever() if reload_now is None else anext(reload_now))
        if waiting.cancelled_caught:
            if not await file.has_changed():
                continue
            await file.wait_unchanged()
        try:
            config = await trio.to_thread.run_sync(file.load)
            if not await file.has_changed():  # else it was written while it was read; the next check finds the change
                await apply(config)
        except (TunnelError, OSError) as error:
            fields = about("configuration_refused", file=file.path, reason=error)
            _log.error("%s is not applied, the relay goes on as before: %s", file.path, error, extra=fields)


def check_access(config: RelayConfig) -> None:
    """Read the files of access rules, so that what is wrong with them is known before a visitor comes. Blocks.

    Raises:
        InvalidSettingsError, StorageError: a file cannot be used.
    """
    for tunnel in config.tunnels:
        for route in tunnel.routes:
            if route.access is not None:
                check_files(route.access.below(config.base_dir))
