"""Tunnels that the registry of a fleet has changed: their sessions are looked at soon after."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Final, NoReturn, final

import trio

__all__ = ["ChangedTunnels"]


@final
class ChangedTunnels:
    """Collects them while they are looked at."""

    def __init__(self) -> None:
        self._ids: Final[set[str]] = set()
        self._any = trio.Event()

    def note(self, ids: Collection[str]) -> None:
        """These have changed. Does not wait."""
        self._ids.update(ids)
        self._any.set()

    async def tell(self, registry_changed: Callable[[Collection[str]], Awaitable[object]]) -> NoReturn:
        """Call `registry_changed` with those that have changed, again and again."""
        while True:
            # No deadline: without a change there is nothing to tell.
            await self._any.wait()
            self._any = trio.Event()
            changed = frozenset(self._ids)
            self._ids.clear()
            await registry_changed(changed)
