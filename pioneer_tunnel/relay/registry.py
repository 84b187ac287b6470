"""Which tunnels there are (`Registry`), and where each is connected right now (`Directory`).

Both are asked, never reached into, and both may take time to answer: in a fleet of relays they are services. What
stands here is what a single relay needs, in memory.

Neighbours: `takeover` decides between two sessions of one tunnel, the directory carries that out; `control` enters
sessions, `ingress` finds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final, Protocol, final

import trio

from ..handshake import instance_shown
from .config import MOST_KEYS, TunnelEntry
from .takeover import NEWEST_WINS, Party, TakeoverRules, Verdict, patience, same_gateway

__all__ = ["Directory", "LiveSession", "LocalDirectory", "LocalRegistry", "Registry", "TunnelTaken"]


class Registry(Protocol):
    """The tunnels that a relay serves."""

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        """The tunnel that the key `key_id` belongs to."""

    async def by_host(self, host: str) -> TunnelEntry | None:
        """The tunnel that visitors of `host` want: lower-case, without port or trailing dot."""


class LiveSession(Party, Protocol):
    """A gateway that is connected."""

    @property
    def since(self) -> float:
        """When it came, in seconds since 1970."""

    async def open_stream(self) -> trio.abc.HalfCloseableStream:
        """Open a stream to it. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: the session is gone, or takes no more streams.
        """

    async def answers(self, within: float) -> bool:
        """Ask it for a sign of life; False when not a byte has come from it after `within` seconds."""

    def replace(self, by: str) -> None:
        """The instance `by` takes over: say so and end. Does not wait."""

    def retire(self, by: str) -> None:
        """The instance `by` takes over with a newer key: open no stream any more, and end when the last one that is
        open has ended, or when it does not answer. Does not wait."""

    def abandon(self) -> None:
        """It did not answer: end without a word. Does not wait."""


class TunnelTaken(Exception):
    """The tunnel stays with the session that has it; the exception's text names that one."""

    def __init__(self, holder: LiveSession, newcomer: LiveSession) -> None:
        came = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.since))
        how = "" if holder.key_id == newcomer.key_id else " with a later key of the relay's list,"
        super().__init__(
            f"{instance_shown(holder.instance)} has this tunnel, since {came},{how} and keeps it while it is connected"
        )


class Directory(Protocol):
    """Where each tunnel is connected. At any moment a tunnel has one session at the most, besides retired ones."""

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        """Make `session` the one of this tunnel. What becomes of the one before it, if any, `rules` decide.

        May take some seconds, while that one is asked whether it is still there. The caller sets the deadline.

        Raises:
            TunnelTaken: that one stays.
        """

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        """Forget `session`; nothing happens when another has taken its place."""

    async def find(self, tunnel_id: str) -> LiveSession | None:
        """The session of a tunnel, None while its gateway is not connected."""


@final
class LocalRegistry(Registry):
    """The tunnels of one configuration, until another one takes its place."""

    def __init__(self, tunnels: Iterable[TunnelEntry]) -> None:
        self._by_key_id: dict[str, TunnelEntry] = {}
        self._by_host: dict[str, TunnelEntry] = {}
        self.replace(tunnels)

    def replace(self, tunnels: Iterable[TunnelEntry]) -> None:
        """From now on, these."""
        entries = tuple(tunnels)
        self._by_key_id = {key_id: entry for entry in entries for key_id in entry.keys_by_id}
        self._by_host = {entry.url.host: entry for entry in entries if entry.bind_addr is None}

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        return self._by_key_id.get(key_id)

    async def by_host(self, host: str) -> TunnelEntry | None:
        return self._by_host.get(host)


@final
class LocalDirectory(Directory):
    """The sessions of one process.

    Retired ones are kept in mind until they leave: at most 8 of a tunnel, as it has keys at most. When there is one
    more, the longest retired ends.
    """

    def __init__(self) -> None:
        self._sessions: Final[dict[str, LiveSession]] = {}
        self._retired: Final[dict[str, list[LiveSession]]] = {}

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        for ghost in self._retired.get(tunnel_id, ()):
            if ghost.key_id == session.key_id and same_gateway(ghost.instance, session.instance):
                ghost.replace(session.instance)
        # Between a look at who is here and the entry nobody else runs, except while the holder is asked: then the
        # whole is looked at again.
        while (holder := self._sessions.get(tunnel_id)) is not None:
            match rules.verdict(holder=holder, newcomer=session):
                case Verdict.REPLACE:
                    holder.replace(session.instance)
                    break
                case Verdict.RETIRE:
                    self._retire(tunnel_id, holder, by=session.instance)
                    break
                case Verdict.ASK:
                    if await holder.answers(patience(holder.instance, session.instance)):
                        raise TunnelTaken(holder, session)
                    holder.abandon()
                    await self.leave(tunnel_id, holder)
        self._sessions[tunnel_id] = session

    def _retire(self, tunnel_id: str, session: LiveSession, *, by: str) -> None:
        session.retire(by)
        retired = self._retired.setdefault(tunnel_id, [])
        retired.append(session)
        if len(retired) > MOST_KEYS:
            retired.pop(0).replace(by)

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        if self._sessions.get(tunnel_id) is session:
            del self._sessions[tunnel_id]
        staying = [other for other in self._retired.pop(tunnel_id, []) if other is not session]
        if staying:
            self._retired[tunnel_id] = staying

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return self._sessions.get(tunnel_id)
