"""Which tunnels a relay in memory has, which change, and by which dial of a gateway each session came about.

Neighbours: the doors of the real relay ask; `MemoryRelay` tells its test what they were told.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, NoReturn, final

import trio

from ..relay.config import TunnelEntry
from ..relay.gateways.registry import Directory, LiveSession, LocalDirectory, Registry
from ..relay.gateways.takeover import NEWEST_WINS, TakeoverRules
from .faulty_dialer import Dial

__all__ = ["Sessions", "Tunnels", "dial_of_this_task"]

dial_of_this_task: Final[ContextVar[Dial]] = ContextVar("dial_of_this_task")
"""The dial whose connection the door serves in this task."""


@final
class Tunnels(Registry):
    """A registry that changes, by tunnel id."""

    def __init__(self) -> None:
        self.entries: Final[dict[str, TunnelEntry]] = {}

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        return next((entry for entry in self.entries.values() if key_id in entry.keys_by_id), None)

    async def by_host(self, host: str) -> TunnelEntry | None:
        return next((entry for entry in self.entries.values() if entry.url.host == host), None)


@final
class Sessions(Directory):
    """A directory that knows by which dial of a gateway each session came about.

    Attributes:
        dials: of the sessions that there are, by tunnel id.
        last_dials: the same, also of sessions that are over.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.dials: Final[dict[str, Dial]] = {}
        self.last_dials: Final[dict[str, Dial]] = {}
        self._sessions: Final = LocalDirectory()
        self._wake: Final = wake

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        await self._sessions.admit(tunnel_id, session, rules=rules)

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        await self._sessions.enter(tunnel_id, session, rules=rules)
        dial = dial_of_this_task.get()
        dial.connected_at = trio.current_time()
        self.dials[tunnel_id] = self.last_dials[tunnel_id] = dial
        self._wake()

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        await self._sessions.leave(tunnel_id, session)
        dial = dial_of_this_task.get()
        if dial.connected_at is not None:
            dial.ended_at = trio.current_time()
        if self.dials.get(tunnel_id) is dial:
            del self.dials[tunnel_id]
        self._wake()

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return await self._sessions.find(tunnel_id)

    async def take_over(self, tunnel_id: str, *, own: bool) -> None:
        """A session takes the place of the one that there is, and is gone again."""
        session = await self._sessions.find(tunnel_id)
        assert session is not None
        newer = _Passing(session, session.instance if own else "another-gateway")
        await self._sessions.enter(tunnel_id, newer)
        await self._sessions.leave(tunnel_id, newer)
        del self.dials[tunnel_id]
        self._wake()


@final
class _Passing(LiveSession):
    """A session that is gone before anybody could use it."""

    def __init__(self, before: LiveSession, instance: str) -> None:
        self._before: Final = before
        self._instance: Final = instance

    @property
    def instance(self) -> str:
        return self._instance

    @property
    def key_id(self) -> str:
        return self._before.key_id

    @property
    def since(self) -> float:
        return self._before.since

    async def open_stream(self) -> NoReturn:
        raise trio.BrokenResourceError("this session is gone")

    async def answers(self, within: float) -> bool:  # noqa: ARG002
        return False

    def replace(self, by: str) -> None:
        """Nothing is left to end; the same goes for the other two."""

    def retire(self, by: str) -> None:
        """See `replace`."""

    def abandon(self) -> None:
        """See `replace`."""
