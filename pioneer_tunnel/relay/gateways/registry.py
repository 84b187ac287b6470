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

from ..._net.streams import ByteStream
from ..._wire.messages import instance_shown
from ..config import MOST_KEYS, TunnelEntry
from .takeover import NEWEST_WINS, Party, TakeoverRules, Verdict, answer_timeout, same_gateway

__all__ = ["Directory", "LiveSession", "LocalDirectory", "LocalRegistry", "Registry", "TunnelTaken"]

MOST_CANDIDATES: Final = 16
"""Sessions of one tunnel that were welcomed and whose gateways have sent nothing since."""


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

    async def open_stream(self) -> ByteStream:
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
    """Where each tunnel is connected. At any moment a tunnel has one session at the most, besides retired ones.

    A session is a candidate from `admit` until `enter`: its gateway has proved itself to the relay, but may not accept
    the relay. A candidate never changes the session that has the tunnel.
    """

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        """Make `session` a candidate for this tunnel. Call before the welcome is sent.

        May take some seconds, while the session that has the tunnel is asked whether it is still there. The caller
        sets the deadline.

        Raises:
            TunnelTaken: that one answers, and `rules` let it keep the tunnel.
        """

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        """Make `session` the one of this tunnel. Call when its gateway has accepted the relay.

        `rules` decide what becomes of the session that has the tunnel, and of older candidates. May take some seconds,
        as `admit` does.

        Raises:
            TunnelTaken: another session keeps the tunnel.
        """

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        """Forget `session`, also as a candidate; nothing happens when another has taken its place."""

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
    more, the longest retired ends. A tunnel has at most 16 candidates. When there is one more, the oldest ends.
    """

    def __init__(self) -> None:
        self._sessions: Final[dict[str, LiveSession]] = {}
        self._retired: Final[dict[str, list[LiveSession]]] = {}
        self._candidates: Final[dict[str, list[LiveSession]]] = {}

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        holder = self._sessions.get(tunnel_id)
        if (
            holder is not None
            and rules.verdict(holder=holder, newcomer=session) is Verdict.ASK
            and await holder.answers(answer_timeout(holder.instance, session.instance))
        ):
            for ghost in self._ghosts(tunnel_id, session):
                if not await ghost.answers(answer_timeout(ghost.instance, session.instance)):
                    ghost.abandon()
            raise TunnelTaken(holder, session)
        candidates = self._candidates.setdefault(tunnel_id, [])
        candidates.append(session)
        if len(candidates) > MOST_CANDIDATES:
            candidates.pop(0).abandon()

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        candidates = self._candidates.setdefault(tunnel_id, [])
        if session not in candidates:
            candidates.append(session)
        for ghost in self._ghosts(tunnel_id, session):
            ghost.replace(session.instance)
        # No other task runs between a look at the holder and the entry, except while the holder is asked. Then look
        # again.
        while (holder := self._sessions.get(tunnel_id)) is not None:
            match rules.verdict(holder=holder, newcomer=session):
                case Verdict.REPLACE:
                    holder.replace(session.instance)
                    break
                case Verdict.RETIRE:
                    self._retire(tunnel_id, holder, by=session.instance)
                    break
                case Verdict.ASK:
                    answers = await holder.answers(answer_timeout(holder.instance, session.instance))
                    if answers or session not in self._candidates.get(tunnel_id, ()):  # replaced while it waited
                        raise TunnelTaken(holder, session)
                    holder.abandon()
                    await self.leave(tunnel_id, holder)
        self._replace_older_candidates(tunnel_id, session, rules)
        self._sessions[tunnel_id] = session

    def _replace_older_candidates(self, tunnel_id: str, session: LiveSession, rules: TakeoverRules) -> None:
        """End the candidates that came before `session` and that it would replace, so that none replaces it later."""
        candidates = self._candidates.pop(tunnel_id)
        place = candidates.index(session)
        staying = candidates[place + 1 :]
        for older in candidates[:place]:
            if rules.verdict(holder=older, newcomer=session) is Verdict.REPLACE:
                older.replace(session.instance)
            else:
                staying.append(older)
        if staying:
            self._candidates[tunnel_id] = staying

    def _ghosts(self, tunnel_id: str, session: LiveSession) -> list[LiveSession]:
        """The retired sessions of the gateway that `session` is of."""
        return [
            retired
            for retired in self._retired.get(tunnel_id, ())
            if retired.key_id == session.key_id and same_gateway(retired.instance, session.instance)
        ]

    def _retire(self, tunnel_id: str, session: LiveSession, *, by: str) -> None:
        session.retire(by)
        retired = self._retired.setdefault(tunnel_id, [])
        retired.append(session)
        if len(retired) > MOST_KEYS:
            retired.pop(0).replace(by)

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        if self._sessions.get(tunnel_id) is session:
            del self._sessions[tunnel_id]
        for others in (self._retired, self._candidates):
            staying = [other for other in others.pop(tunnel_id, []) if other is not session]
            if staying:
                others[tunnel_id] = staying

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return self._sessions.get(tunnel_id)
