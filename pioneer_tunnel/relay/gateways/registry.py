"""Which tunnels exist (`Registry`), and which sessions each of them has (`Directory`).

Both are interfaces whose methods may take time, since in a fleet of relays they are services. `LocalRegistry` and
`LocalDirectory` serve a single relay from memory.

    session   candidate   from `admit` until `enter`: proved its key, but may still reject the relay
              holder      from `enter`: visitors of the tunnel go to it; a tunnel has one for each link of its gateway
              retired     replaced by one with a newer key; takes no new visitors, keeps the ones it has
              gone        after `leave`

A new visitor goes to the holder with the fewest streams: so a link that is slow, or has died without a sign yet,
gets fewer of them. Among equals the shorter round trip decides. Holders whose connection is lost or in doubt, and those
that drain, come last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set as AbstractSet
from typing import Final, Protocol, final

import trio

from ..._model.callbacks import nothing
from ..._net.streams import ByteStream
from ..._wire.messages import instance_shown
from ..names import NameBook
from ..tunnels import MOST_KEYS, Route, TunnelEntry
from .takeover import NEWEST_WINS, Party, TakeoverRules, Verdict, answer_timeout, other_link, same_gateway

__all__ = [
    "Directory",
    "GatewayAway",
    "Holder",
    "LiveSession",
    "LocalDirectory",
    "LocalRegistry",
    "Registry",
    "RegistryAway",
    "TunnelTaken",
]

MOST_CANDIDATES: Final = 16
"""Candidates that a tunnel may have."""


class RegistryAway(Exception):
    """The registry is elsewhere and does not answer, so it is not known whether there is such a tunnel.

    Args:
        for_long: sessions that are connected end as well.
    """

    retry_after: Final = 5
    """Seconds after which a visitor or a gateway may try again."""

    def __init__(self, *, for_long: bool = False) -> None:
        super().__init__("the registry of tunnels does not answer at the moment")
        self.for_long: Final = for_long


class Registry(Protocol):
    """The tunnels of a relay."""

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        """The tunnel that the key `key_id` opens; None if there is none.

        Raises:
            RegistryAway: that is not known now.
        """

    async def created(
        self,
        entry: TunnelEntry,  # noqa: ARG002  # the default
        names: Iterable[str],
    ) -> tuple[dict[str, Route], dict[str, str]]:
        """Let a gateway create services below the wildcard of its tunnel.

        Args:
            entry: its tunnel.
            names: the services that it offers and the entry does not name.

        Returns:
            The routes of those that belong to it now, and why others are refused. By default all are refused.
        """
        return {}, dict.fromkeys(names, "its entry of this tunnel has no such service")

    async def by_host(self, host: str) -> Route | None:
        """The way for visitors of `host` (lower-case, without port and trailing dot); None if there is none.

        Raises:
            RegistryAway: that is not known now.
        """

    def by_host_nowait(self, host: str) -> Route | None:  # noqa: ARG002  # the default
        """Like `by_host`, but it never waits: None also if it takes time to find that out, as it does by default."""
        return None


class Holder(Party, Protocol):
    """A session that has a tunnel, as visitors use it. It may be at another relay."""

    @property
    def since(self) -> float:
        """When the gateway connected, in seconds since 1970."""

    @property
    def services(self) -> Collection[str] | None:
        """The services that the gateway takes visitors of; None when it knows no services (the default).

        `FIRST_SERVICE` stands for the first one, whatever its name is.
        """
        return None

    @property
    def draining(self) -> bool:
        """Whether the gateway was asked for another session, since the relay stops."""
        return False

    @property
    def sound(self) -> bool:
        """Whether the session opens streams, and nothing is known to be wrong with its connection (the default)."""
        return True

    @property
    def burden(self) -> tuple[int, float]:
        """How many streams are open, and the round trip in seconds. Visitors go to the holder with the least."""
        return 0, 0.0

    async def open_stream(self) -> ByteStream:
        """Open a stream to the gateway. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: the session has ended, or is retired.
            GatewayAway: its connection is lost and was not restored in time.
        """

    def open_stream_nowait(self) -> ByteStream:
        """Like `open_stream`, but it never waits.

        Raises:
            trio.WouldBlock: that takes time, as it does by default.
            trio.BrokenResourceError: as `open_stream`.
        """
        raise trio.WouldBlock


class LiveSession(Holder, Protocol):
    """The session of a gateway that is connected to this relay."""

    @property
    def id(self) -> str:
        """Tells it from all others: random, 16 hexadecimal digits."""

    async def answers(self, within: float) -> bool:
        """Ping the gateway. False if no byte comes from it for `within` seconds, or if the session is ending."""

    def replace(self, by: str) -> None:
        """End the session and tell the gateway that the instance `by` has its tunnel. Does not wait."""

    def retire(self, by: str) -> None:
        """Open no more streams, since the instance `by` has the tunnel with a newer key. Does not wait.

        The session ends when its last stream has ended, after the rotation grace, or if the gateway does not answer.
        """

    def abandon(self) -> None:
        """End the session without a message, since the gateway does not answer. Does not wait."""


class GatewayAway(Exception):
    """The gateway has lost its connection a moment ago, and may come back soon."""

    retry_after: Final = 5
    """Seconds after which a visitor may try again."""


class TunnelTaken(Exception):
    """Another session, `holder`, keeps the tunnel; the text names its instance, and since when it is connected."""

    def __init__(self, holder: Holder, newcomer: Party) -> None:
        self.holder: Final = holder
        came = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.since))
        how = "" if holder.key_id == newcomer.key_id else " with a later key of the relay's list,"
        super().__init__(
            f"{instance_shown(holder.instance)} has this tunnel, since {came},{how} and keeps it while it is connected"
        )


class Directory(Protocol):
    """The sessions of each tunnel: the holders, candidates and retired ones; see the module.

    A candidate never affects the holder: its gateway may still reject the relay.
    """

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        """Make `session` a candidate for this tunnel. Call before the welcome is sent.

        May take some seconds while the holder is pinged. The caller sets the deadline.

        Raises:
            TunnelTaken: the holder answers, and `rules` let it keep the tunnel.
        """

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        """Make `session` a holder of this tunnel. Call when its gateway has accepted the relay.

        `rules` decide what happens to the old holders and to older candidates. May take some seconds, as `admit` does.

        Raises:
            TunnelTaken: another session keeps the tunnel.
        """

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        """Remove `session`, whether it is a holder, a candidate or retired. Does nothing if it is none of them."""

    def note_resumed(self, tunnel_id: str, session: LiveSession) -> None:
        """Take note that the gateway of `session` has come back over another connection. Does not wait."""
        del tunnel_id, session  # a directory in memory has nothing to note

    async def find(self, tunnel_id: str) -> Holder | None:
        """The holder for the next visitor of a tunnel; None while its gateway is not connected."""

    def find_nowait(self, tunnel_id: str) -> Holder | None:  # noqa: ARG002  # the default
        """Like `find`, but it never waits.

        Raises:
            trio.WouldBlock: to find that out takes time, as it does by default.
        """
        raise trio.WouldBlock


@final
class LocalRegistry(Registry):
    """The tunnels of one configuration, in memory.

    Args:
        tunnels: the tunnels.
        names: the names that gateways have created.
    """

    def __init__(self, tunnels: Iterable[TunnelEntry], names: NameBook | None = None) -> None:
        self._names: Final = names or NameBook(None)
        self._by_key_id: dict[str, TunnelEntry] = {}
        self._by_host: dict[str, Route] = {}
        self.replace(tunnels)

    def replace(self, tunnels: Iterable[TunnelEntry]) -> None:
        """Replace all tunnels."""
        entries = tuple(tunnels)
        self._by_key_id = {key_id: entry for entry in entries for key_id in entry.keys_by_id}
        routes = [route for entry in entries for route in entry.routes]
        self._by_host = {route.host: route for route in routes if route.host is not None}

    async def by_key_id(self, key_id: str) -> TunnelEntry | None:
        return self._by_key_id.get(key_id)

    async def created(self, entry: TunnelEntry, names: Iterable[str]) -> tuple[dict[str, Route], dict[str, str]]:
        wildcard = entry.wildcard
        if wildcard is None or wildcard.url is None:
            return await super().created(entry, names)
        routes, refused = {}, {}
        for name in names:
            taken = f"{name}.{wildcard.url.domain}" in self._by_host
            why_not = "another tunnel has it" if taken else await self._names.claim(entry, name, wildcard.url.domain)
            if why_not is None:
                routes[name] = wildcard.below(name)
            else:
                refused[name] = why_not
        return routes, refused

    async def by_host(self, host: str) -> Route | None:
        return self._by_host.get(host) or self._created(host)

    def _created(self, host: str) -> Route | None:
        """The route of a name below a wildcard."""
        label, _, domain = host.partition(".")
        for key_id in self._names.keys_of(host):
            entry = self._by_key_id.get(key_id)
            wildcard = None if entry is None else entry.wildcard
            if wildcard is not None and wildcard.url is not None and wildcard.url.domain == domain:
                return wildcard.below(label)
        return None

    def by_host_nowait(self, host: str) -> Route | None:
        return self._by_host.get(host)

    @property
    def all_hosts(self) -> Iterator[tuple[str, Route]]:
        """Every host that visitors can name now, with its route: no wildcards, but the names below them."""
        for host, route in self._by_host.items():
            if route.url is not None and not route.url.wildcard:
                yield host, route
        for host in self._names.hosts:
            route_below = None if host in self._by_host else self._created(host)
            if route_below is not None:
                yield host, route_below


@final
class LocalDirectory(Directory):
    """The sessions of one process, in memory.

    A tunnel has at most 8 retired sessions for each link, since it has at most 8 keys, and at most 16 candidates. One
    more ends the oldest of them.

    Attributes:
        on_change: called with the id of a tunnel when it has got a holder, or lost one. It must not raise.
    """

    def __init__(self) -> None:
        self.on_change: Callable[[str], object] = nothing
        self._holders: Final[dict[str, list[LiveSession]]] = {}
        self._retired: Final[dict[str, list[LiveSession]]] = {}
        self._candidates: Final[dict[str, list[LiveSession]]] = {}

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        for holder in [*self._holders.get(tunnel_id, ())]:
            if rules.verdict(holder=holder, newcomer=session) is Verdict.ASK and await holder.answers(
                answer_timeout(holder.instance, session.instance)
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
        await self.prepare(tunnel_id, session, rules)
        self.enter_nowait(tunnel_id, session, rules)

    async def prepare(self, tunnel_id: str, session: LiveSession, rules: TakeoverRules) -> None:
        """The first half of `enter`: ping the holders that `rules` say to ask, and end those that do not answer.

        Raises:
            TunnelTaken: as `enter`.
        """
        self._candidates_with(tunnel_id, session)
        for ghost in self._ghosts(tunnel_id, session):
            ghost.replace(session.instance)
        # While one is pinged, others may come: the holders are read again.
        while (holder := self._first_to_ask(tunnel_id, session, rules)) is not None:
            answers = await holder.answers(answer_timeout(holder.instance, session.instance))
            if answers or session not in self._candidates.get(tunnel_id, ()):  # replaced meanwhile
                raise TunnelTaken(holder, session)
            holder.abandon()
            await self.leave(tunnel_id, holder)

    def _candidates_with(self, tunnel_id: str, session: LiveSession) -> list[LiveSession]:
        """The candidates of a tunnel, with `session` among them."""
        candidates = self._candidates.setdefault(tunnel_id, [])
        if session not in candidates:
            candidates.append(session)
        return candidates

    def _first_to_ask(self, tunnel_id: str, session: LiveSession, rules: TakeoverRules) -> LiveSession | None:
        for holder in self._holders.get(tunnel_id, ()):
            if rules.verdict(holder=holder, newcomer=session) is Verdict.ASK:
                return holder
        return None

    def enter_nowait(self, tunnel_id: str, session: LiveSession, rules: TakeoverRules) -> None:
        """The second half of `enter`: give the tunnel to `session`. No holder may have come since the first half."""
        for holder in self.holders(tunnel_id):
            match rules.verdict(holder=holder, newcomer=session):
                case Verdict.REPLACE:
                    self.replace(tunnel_id, holder, by=session.instance)
                case Verdict.RETIRE:
                    self.retire(tunnel_id, holder, by=session.instance)
        self._replace_older_candidates(tunnel_id, session, rules)
        self._holders.setdefault(tunnel_id, []).append(session)
        self.on_change(tunnel_id)

    def holders(self, tunnel_id: str) -> Sequence[LiveSession]:
        """The sessions that have the tunnel now."""
        return tuple(self._holders.get(tunnel_id, ()))

    def replace(self, tunnel_id: str, holder: LiveSession, *, by: str) -> None:
        """Take the tunnel from a holder, and end it: the instance `by` has the tunnel."""
        self._drop_holder(tunnel_id, holder)
        # One that drains has asked for the session that replaces it, and ends by itself.
        if not (holder.draining and same_gateway(holder.instance, by)):
            holder.replace(by)

    def _replace_older_candidates(self, tunnel_id: str, session: LiveSession, rules: TakeoverRules) -> None:
        """End the older candidates that `session` would replace, so that none of them replaces it later."""
        candidates = self._candidates_with(tunnel_id, session)
        del self._candidates[tunnel_id]
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
        """Retired sessions of the same gateway, key and link as `session`."""
        return [
            retired
            for retired in self._retired.get(tunnel_id, ())
            if retired.key_id == session.key_id
            and same_gateway(retired.instance, session.instance)
            and not other_link(retired, session)
        ]

    def retire(self, tunnel_id: str, holder: LiveSession, *, by: str) -> None:
        """Take the tunnel from a holder, which keeps its visitors: the instance `by` has it with a newer key."""
        self._drop_holder(tunnel_id, holder)
        holder.retire(by)
        retired = self._retired.setdefault(tunnel_id, [])
        retired.append(holder)
        if len(retired) > MOST_KEYS * (1 if holder.place is None else holder.place.of):
            retired.pop(0).replace(by)

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        self._drop_holder(tunnel_id, session)
        for sessions in (self._retired, self._candidates):
            self._drop(sessions, tunnel_id, session)

    def _drop_holder(self, tunnel_id: str, session: LiveSession) -> None:
        if session in self._holders.get(tunnel_id, ()):
            self._drop(self._holders, tunnel_id, session)
            self.on_change(tunnel_id)

    @staticmethod
    def _drop(sessions: dict[str, list[LiveSession]], tunnel_id: str, session: LiveSession) -> None:
        staying = [other for other in sessions.pop(tunnel_id, []) if other is not session]
        if staying:
            sessions[tunnel_id] = staying

    async def find(self, tunnel_id: str) -> LiveSession | None:
        return self.find_nowait(tunnel_id)

    @property
    def tunnels(self) -> AbstractSet[str]:
        """The ids of the tunnels that a session has now, in whatever state it is. This follows each change."""
        return self._holders.keys()

    def find_nowait(self, tunnel_id: str) -> LiveSession | None:
        holders = self._holders.get(tunnel_id, ())
        if len(holders) < 2:
            return holders[0] if holders else None
        return min(holders, key=lambda holder: (not holder.sound, holder.draining, *holder.burden))
