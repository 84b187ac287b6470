"""The registry and the directory of a relay in memory. They record which `Dial` each session belongs to."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Final, NoReturn, final

import trio

from ..relay.gateways.registry import Directory, LiveSession, LocalDirectory, Registry
from ..relay.gateways.session import GatewaySession
from ..relay.gateways.takeover import NEWEST_WINS, TakeoverRules
from ..relay.tunnels import Route, TunnelEntry
from .faults import CutAtWelcome
from .faulty_dialer import Dial

__all__ = ["Sessions", "Tunnels", "dial_of_this_task"]

dial_of_this_task: Final[ContextVar[Dial]] = ContextVar("dial_of_this_task")
"""The `Dial` whose connection this task serves."""


@final
class Tunnels(Registry):
    """A registry that tests change. `entries` maps a tunnel id to its entry."""

    def __init__(self) -> None:
        self.entries: Final[dict[str, TunnelEntry]] = {}

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        dial = dial_of_this_task.get(None)
        if dial is not None and dial.connection is not None and isinstance(dial.fault, CutAtWelcome):
            dial.connection.deafen_client()  # its proof has come; what follows is the welcome, or a rejection
        return next((entry for entry in self.entries.values() if key_id in entry.keys_by_id), None)

    async def by_host(self, host: str) -> Route | None:
        return next((route for entry in self.entries.values() for route in entry.routes if route.host == host), None)


@final
class Sessions(Directory):
    """A directory that records the `Dial` of each session.

    Attributes:
        dials: the dials of the live sessions of each tunnel, by its id; the newest comes last.
        last_dials: the dial of the last session of each tunnel, live or ended.
    """

    def __init__(self, wake: Callable[[], None]) -> None:
        self.dials: Final[dict[str, list[Dial]]] = {}
        self.last_dials: Final[dict[str, Dial]] = {}
        self._carriers: Final[dict[LiveSession, Dial]] = {}
        self._sessions: Final = LocalDirectory()
        self._wake: Final = wake

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        await self._sessions.admit(tunnel_id, session, rules=rules)
        _cut_at_welcome()

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        await self._sessions.enter(tunnel_id, session, rules=rules)
        self._carried_by(dial_of_this_task.get(), tunnel_id, session)

    def note_resumed(self, tunnel_id: str, session: LiveSession) -> None:
        before = self._carriers.get(session)
        if before is not None:  # otherwise it has just ended
            before.ended_at = trio.current_time()
            dial = dial_of_this_task.get()
            if before in self.dials.get(tunnel_id, ()):
                self._gone(tunnel_id, before)
                self._carried_by(dial, tunnel_id, session)
            else:  # it drains, and takes no visitors any more
                dial.connected_at, self._carriers[session] = trio.current_time(), dial
            _cut_at_welcome()

    def _carried_by(self, dial: Dial, tunnel_id: str, session: LiveSession) -> None:
        dial.connected_at = trio.current_time()
        self._carriers[session] = self.last_dials[tunnel_id] = dial
        self.dials.setdefault(tunnel_id, []).append(dial)
        self._wake()

    def _gone(self, tunnel_id: str, dial: Dial) -> None:
        staying = [other for other in self.dials.pop(tunnel_id, []) if other is not dial]
        if staying:
            self.dials[tunnel_id] = staying

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        await self._sessions.leave(tunnel_id, session)
        dial = self._carriers.pop(session, dial_of_this_task.get())
        if dial.connected_at is not None:
            dial.ended_at = trio.current_time()
        self._gone(tunnel_id, dial)
        self._wake()

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return await self._sessions.find(tunnel_id)

    async def drain(self, tunnel_id: str, dial: Dial) -> None:
        """Drain the live session of `dial`, as a relay that stops."""
        session = next(session for session, carrier in self._carriers.items() if carrier is dial)
        assert isinstance(session, GatewaySession)
        session.drain(0.0)
        session.finish()
        self._gone(tunnel_id, dial)
        self._wake()

    async def take_over(self, tunnel_id: str, *, own: bool) -> None:
        """Replace the live sessions with a newer one, which ends at once."""
        session = await self._sessions.find(tunnel_id)
        assert session is not None
        newer = _BriefSession(session, session.instance if own else "another-gateway")
        await self._sessions.enter(tunnel_id, newer)
        await self._sessions.leave(tunnel_id, newer)
        del self.dials[tunnel_id]
        self._wake()


def _cut_at_welcome() -> None:
    dial = dial_of_this_task.get()
    if dial.connection is not None and isinstance(dial.fault, CutAtWelcome):
        dial.connection.cut()


@final
class _BriefSession(LiveSession):
    """A session that ends as soon as it has taken over. It carries no stream."""

    def __init__(self, before: LiveSession, instance: str) -> None:
        self._before: Final = before
        self._instance: Final = instance

    @property
    def id(self) -> str:
        return "brief"

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
        """Do nothing: this session has no connection."""

    def retire(self, by: str) -> None:
        """See `replace`."""

    def abandon(self) -> None:
        """See `replace`."""
