"""A relay's file while the relay runs: read again when it changes, or when asked to, and applied whole or not at all.

    file = ConfigFile("relay.toml")
    relay = Relay(file.load())
    ...
    await follow(file, relay.apply)

The file is looked at every two seconds: its time of change, size and inode. A change is taken up when the file has been
left alone for half a second, so that one that is just being written is not read half. SIGHUP, where the system has it,
has it read at once.

Neighbours: the command line runs `follow` beside a relay; `server` applies, and asks `Changes` what is different.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn, TypeAlias, final

import attrs
import trio

from .._model.errors import TunnelError
from .config import RelayConfig

__all__ = ["POLL_INTERVAL", "Changes", "ConfigFile", "follow", "hangups"]

POLL_INTERVAL: Final = 2.0
"""Seconds between two looks at the file."""

SETTLE_INTERVAL: Final = 0.5
"""Seconds for which a file that has changed has to stay as it is before it is read."""

_Stamp: TypeAlias = tuple[int, int, int, int] | None

_log: Final = logging.getLogger("pioneer_tunnel.relay.reload")


@final
@attrs.frozen(kw_only=True)
class Changes:
    """What is different between two configurations.

    Attributes:
        added, removed, changed: tunnels, by id.
        for_a_restart: keys of `[relay]` that a running relay cannot take up.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    for_a_restart: tuple[str, ...]

    @classmethod
    def between(cls, before: RelayConfig, after: RelayConfig) -> Changes:
        """What `after` has that `before` has not, and the other way round."""
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
    """A relay's file, and what it looked like when it was last read.

    Args:
        path: where it is. What a symbolic link points to now is what counts.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(path)
        self._read: _Stamp = None

    def load(self) -> RelayConfig:
        """Read it.

        Raises:
            As `RelayConfig.load`.
        """
        self._read = self._look()  # before, so that a change meanwhile is one
        return RelayConfig.load(self.path)

    async def differs(self) -> bool:
        """Whether it is another one than that which was read."""
        return await trio.to_thread.run_sync(self._look) != self._read

    async def settle(self) -> None:
        """Wait until it is left alone."""
        seen = await trio.to_thread.run_sync(self._look)
        while True:
            # No deadline: a file that is written without end is one that never is.
            await trio.sleep(SETTLE_INTERVAL)
            before, seen = seen, await trio.to_thread.run_sync(self._look)
            if seen == before:
                return

    def _look(self) -> _Stamp:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino)


async def follow(
    file: ConfigFile,
    apply: Callable[[RelayConfig], Awaitable[object]],
    *,
    asked: AsyncIterator[object] | None = None,
    interval: float = POLL_INTERVAL,
) -> NoReturn:
    """Apply `file` again whenever it has changed, until cancelled.

    A file that cannot be read or applied changes nothing. That is logged with all that is wrong, once for each change.

    Args:
        file: it was loaded already.
        apply: takes what it holds.
        asked: gives something each time when it is to be read at once, changed or not.
        interval: seconds between two looks.
    """
    while True:
        with trio.move_on_after(interval) as waiting:
            await (trio.sleep_forever() if asked is None else anext(asked))
        if waiting.cancelled_caught:
            if not await file.differs():
                continue
            await file.settle()
        try:
            config = await trio.to_thread.run_sync(file.load)
            if not await file.differs():  # or else it was written at meanwhile, and comes up again
                await apply(config)
        except (TunnelError, OSError) as error:
            _log.error("%s is not applied, the relay goes on as before: %s", file.path, error)


@contextmanager
def hangups() -> Iterator[AsyncIterator[object] | None]:
    """The SIGHUPs that come meanwhile, which else would end the process; None where the system has none."""
    if sys.platform == "win32":
        yield None
    else:
        with trio.open_signal_receiver(signal.SIGHUP) as received:
            yield received
