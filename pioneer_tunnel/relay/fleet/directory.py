"""The directory of a fleet: which sessions have a tunnel, at this node and at others.

A session becomes a holder in three steps: decide, commit, carry out.

    decide      `TakeoverRules` give a verdict about each holder, at this node or not. One that has to be asked is
                pinged; its node does it, if it is another one (`Peers`)
    commit      the record of the tunnel gets the new holding and loses those of the losers: a compare-and-set. If
                another node was faster, decide again about the record as it is now
    carry out   losers at this node are replaced or retired; those of other nodes learn it in two ways: their node is
                ordered to (`Peers`), and the store tells it that the record has changed. Either is enough

The record is the truth. A node compares its sessions with the records (`_reconcile`) whenever they may differ: when a
session leaves, when the store says that a record has changed, after each gap in the contact with the store, and every
few hours. What it finds:

    a session of its own that is not in the record, and nothing stands against it    announce it again
    ... and a holding with a higher fence has taken its place                        it has lost: replace or retire it
    ... and a holding with a lower fence stands against it                           that one has lost: remove it
    ... and it has no fence, since the store was unreachable when it came            decide as if it came now; but the
                                                                                     newest session of one gateway wins
    a holding of this process that has no session                                    remove it

While the store is unreachable, sessions are accepted, and visitors are served by the sessions of this node and over the
routes that it knows.

Not shared are candidates, and sessions that are retired: no new visitor goes to them. So two candidates at different
nodes do not know of each other. The one that enters last has the tunnel.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, NoReturn, TypeAlias, final

import attrs
import trio

from ..gateways.expected import Expected
from ..gateways.registry import Directory, Holder, LiveSession, LocalDirectory, TunnelTaken
from ..gateways.takeover import NEWEST_WINS, Party, Takeover, TakeoverRules, Verdict, answer_timeout
from .finding import Beside, Finder
from .peers import Asked, Order, OrderKind, Peers
from .records import NOTHING_KNOWN, Holding, Record
from .remote import RemoteSession
from .store import Changed, Store, StoreUnreachable

__all__ = ["FleetDirectory"]

RECONCILING: Final = 8
"""Records that a node compares at once. It bounds what a fleet asks of the store when it comes back."""

MOST_ROUNDS: Final = 8
"""Writes of one comparison, if others write at the same time."""

COMPARE_ALL: Final = 6 * 3600.0
"""Seconds in which a node compares all its sessions with their records, though nothing seems to be wrong."""

LONGEST_ANSWER: Final = 10.0
"""Seconds that another node may have a gateway pinged for."""

_ORDERS: Final = {Verdict.REPLACE: OrderKind.REPLACE, Verdict.RETIRE: OrderKind.RETIRE, Verdict.ASK: OrderKind.ABANDON}
"""What a loser at another node is ordered to do."""


_Name: TypeAlias = tuple[str, str, int]
"""What tells holdings apart. The rest of one does not change."""


@final
@attrs.define
class _Tunnel:
    """A tunnel that has had a session here.

    Attributes:
        rules: of the last session that came.
        fences: of the sessions that the store knows, by their id.
        entering: the session that is written to the record now. Other nodes may know it before the write has returned.
    """

    rules: TakeoverRules
    entering: LiveSession | None = None
    fences: dict[str, int] = attrs.field(factory=dict)


@final
class FleetDirectory(Directory, Asked):
    """The directory of one node. `run` has to run, else other nodes learn nothing.

    Args:
        store: keeps the records of all nodes. The directory sets its `on_change` and `on_gap`.
        peers: reach the other nodes.
        local: the sessions of this node; by default a new directory.
        beside: the sessions of the other workers of this machine; None if there are none, or the store tells them.
        expected: visitors of these tunnels wait; by default there are none.
    """

    def __init__(
        self,
        store: Store,
        peers: Peers,
        local: LocalDirectory | None = None,
        *,
        beside: Beside | None = None,
        expected: Expected | None = None,
    ) -> None:
        self._store: Final = store
        self._peers: Final = peers
        self._local: Final = local or LocalDirectory()
        self._tunnels: Final[dict[str, _Tunnel]] = {}
        self._locks: Final[dict[str, tuple[trio.Lock, int]]] = {}
        self._to_reconcile: Final[dict[str, None]] = {}
        self._reconciling = 0
        self._wake = trio.Event()
        self._tasks: trio.Nursery | None = None
        self._finder: Final = Finder(store, peers, self._local, beside or _no_sessions, expected or Expected())
        store.on_change = self._record_changed
        store.on_gap = self._gap

    @property
    def to_reconcile(self) -> int:
        """How many tunnels differ from their records, or may: sessions that are not announced yet are among them."""
        return len(self._to_reconcile) + self._reconciling

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Run the store, and keep the records true. Starts when the store does."""
        async with trio.open_nursery() as nursery:
            self._tasks = nursery
            try:
                await nursery.start(self._store.run)
                task_status.started()
                for _ in range(RECONCILING):
                    nursery.start_soon(self._keep_reconciling)
                await self._compare_all()
            finally:
                self._tasks = None
        raise AssertionError

    # Gateways

    async def admit(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        await self._local.admit(tunnel_id, session, rules=rules)
        if rules.takeover is Takeover.NEWEST and len(rules.keys) < 2:
            return  # no node has to be asked
        record = self._store.known(tunnel_id) or await self._finder.look(tunnel_id)
        for holding in () if record is None else record.holdings:
            if rules.verdict(holder=holding, newcomer=session) is Verdict.ASK and self._is_elsewhere(holding):
                await self._ask(tunnel_id, holding, session)

    async def enter(self, tunnel_id: str, session: LiveSession, *, rules: TakeoverRules = NEWEST_WINS) -> None:
        async with self._lock(tunnel_id):
            await self._local.prepare(tunnel_id, session, rules)
            tunnel = self._tunnels.setdefault(tunnel_id, _Tunnel(rules))
            tunnel.rules, tunnel.entering = rules, session
            try:
                await self._take(tunnel_id, session, tunnel, self._store.known(tunnel_id) or NOTHING_KNOWN)
            except StoreUnreachable:
                self._reconcile_soon(tunnel_id)
            finally:
                tunnel.entering = None
            self._local.enter_nowait(tunnel_id, session, rules)

    async def leave(self, tunnel_id: str, session: LiveSession) -> None:
        await self._local.leave(tunnel_id, session)
        if tunnel_id in self._tunnels:
            self._reconcile_soon(tunnel_id)

    async def _take(
        self, tunnel_id: str, session: LiveSession, tunnel: _Tunnel, record: Record, *, late: bool = False
    ) -> Record:
        """Decide and commit: write a record in which `session` has the tunnel.

        Args:
            tunnel_id: the tunnel.
            session: the newcomer.
            tunnel: what is known of the tunnel. It gets the fence.
            record: what is known of its record. If that is out of date, the write says so.
            late: the session has had the tunnel at this node for a while. So others may have come after it.

        Raises:
            TunnelTaken: a holder of another node answers, and the rules let it keep the tunnel.
            StoreUnreachable: it is not known whether it was written.
        """
        rules = tunnel.rules
        own = [self._holding(session, tunnel)]
        beside = [holder for holder in self._local.holders(tunnel_id) if _stand_beside(holder, session)]
        own += [self._holding(holder, tunnel) for holder in beside]
        silent: set[str] = set()
        while True:
            losers: list[tuple[Holding, OrderKind]] = []
            staying: list[Holding] = []
            for holding in filter(self._is_elsewhere, record.holdings):
                if late and _is_too_late(session, holding, rules):
                    raise TunnelTaken(RemoteSession(tunnel_id, holding, self._peers), session)
                verdict = rules.verdict(holder=holding, newcomer=session)
                if verdict is Verdict.BESIDE:
                    staying.append(holding)
                    continue
                if verdict is Verdict.ASK and holding.session not in silent:
                    await self._ask(tunnel_id, holding, session)
                    silent.add(holding.session)
                losers.append((holding, _ORDERS[verdict]))
            try:
                record = await self._store.write(tunnel_id, expected=record.version, holdings=[*staying, *own])
            except Changed as changed:
                record = changed.record
            else:
                break
        self._note_fences(tunnel, record)
        for holding, kind in losers:
            if self._tasks is not None:
                self._tasks.start_soon(self._peers.order, tunnel_id, holding, Order(kind, by=session.instance))
        return record

    async def _ask(self, tunnel_id: str, holding: Holding, newcomer: LiveSession) -> None:
        """Ask a holder of another node whether it lives.

        Raises:
            TunnelTaken: it does.
        """
        within = answer_timeout(holding.instance, newcomer.instance)
        if await self._peers.order(tunnel_id, holding, Order(OrderKind.ANSWERS, within=within)):
            raise TunnelTaken(RemoteSession(tunnel_id, holding, self._peers), newcomer)

    # Visitors

    def find_nowait(self, tunnel_id: str) -> Holder | None:
        return self._finder.find_nowait(tunnel_id)

    async def find(self, tunnel_id: str) -> Holder | None:
        return await self._finder.find(tunnel_id)

    # Other nodes

    def local(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        tunnel = self._tunnels.get(tunnel_id)
        entering = None if tunnel is None else tunnel.entering
        if entering is not None and entering.id == session_id:
            return entering
        return self._holder(tunnel_id, session_id)

    def _holder(self, tunnel_id: str, session_id: str) -> LiveSession | None:
        return next((holder for holder in self._local.holders(tunnel_id) if holder.id == session_id), None)

    def holdings(self, tunnel_id: str) -> Sequence[Holding]:
        """The sessions of this process that have a tunnel."""
        tunnel = self._tunnels.get(tunnel_id)
        return [] if tunnel is None else [self._holding(each, tunnel) for each in self._local.holders(tunnel_id)]

    def end_older_than(self, tunnel_id: str, holdings: Sequence[Holding]) -> None:
        """End sessions of this process that have lost a tunnel to these ones, of other workers of this machine.

        The store tells it, too. But it may be unreachable, and the gateway of such a session is gone.
        """
        tunnel = self._tunnels.get(tunnel_id)
        if tunnel is None:
            return
        for session in self._local.holders(tunnel_id):
            for holding in holdings:
                if _is_too_late(session, holding, tunnel.rules):
                    self._end(tunnel_id, session, tunnel.rules, by=holding)
                    break

    async def carry_out(self, tunnel_id: str, session_id: str, order: Order) -> bool:
        session = self._holder(tunnel_id, session_id)
        if session is None:
            return False
        if order.kind is OrderKind.ANSWERS:
            return await session.answers(min(order.within, LONGEST_ANSWER))
        if order.kind is OrderKind.REPLACE:
            self._local.replace(tunnel_id, session, by=order.by)
        elif order.kind is OrderKind.RETIRE:
            self._local.retire(tunnel_id, session, by=order.by)
        else:
            session.abandon()
            await self._local.leave(tunnel_id, session)
        self._reconcile_soon(tunnel_id)
        return True

    # Reconciling

    def _record_changed(self, tunnel_id: str) -> None:
        if tunnel_id in self._tunnels:
            self._reconcile_soon(tunnel_id)

    def _gap(self) -> None:
        for tunnel_id in self._tunnels:
            self._reconcile_soon(tunnel_id)
        self._wake.set()

    def _reconcile_soon(self, tunnel_id: str) -> None:
        self._to_reconcile[tunnel_id] = None
        self._wake.set()

    async def _compare_all(self) -> NoReturn:
        while True:
            # No deadline here and below: it runs for as long as the node does.
            await trio.sleep(COMPARE_ALL / (1 + len(self._tunnels)))
            for tunnel_id in [*self._tunnels]:
                self._reconcile_soon(tunnel_id)
                await trio.sleep(COMPARE_ALL / (1 + len(self._tunnels)))

    async def _keep_reconciling(self) -> NoReturn:
        while True:
            while not (self._to_reconcile and self._store.reachable):
                self._wake = trio.Event() if self._wake.is_set() else self._wake
                await self._wake.wait()
            tunnel_id = next(iter(self._to_reconcile))
            del self._to_reconcile[tunnel_id]
            self._reconciling += 1
            try:
                async with self._lock(tunnel_id):
                    await self._reconcile(tunnel_id)
            except StoreUnreachable:
                self._reconcile_soon(tunnel_id)
            finally:
                self._reconciling -= 1

    async def _reconcile(self, tunnel_id: str) -> None:
        """Make the record and the sessions of this process agree; see the module.

        Raises:
            StoreUnreachable: they may differ still.
        """
        tunnel = self._tunnels.get(tunnel_id)
        if tunnel is None:
            return
        record = self._store.known(tunnel_id)
        if record is None or self._wanted(tunnel_id, tunnel, record).keys() == _named(record):
            record = await self._store.read(tunnel_id)
        self._note_fences(tunnel, record)
        for session in self._local.holders(tunnel_id):
            if session.id not in tunnel.fences:
                record = await self._announce(tunnel_id, session, tunnel, record)
        for _ in range(MOST_ROUNDS):
            self._end_losers(tunnel_id, tunnel, record)
            wanted = self._wanted(tunnel_id, tunnel, record)
            if wanted.keys() == _named(record):
                break
            try:
                record = await self._store.write(tunnel_id, expected=record.version, holdings=[*wanted.values()])
            except Changed as changed:
                record = changed.record
            self._note_fences(tunnel, record)
        holders = self._local.holders(tunnel_id)
        tunnel.fences = {each.id: tunnel.fences[each.id] for each in holders if each.id in tunnel.fences}
        if not holders:
            del self._tunnels[tunnel_id]

    async def _announce(self, tunnel_id: str, session: LiveSession, tunnel: _Tunnel, record: Record) -> Record:
        """Announce a session that came while the store was unreachable, or end it. Returns the record after it."""
        try:
            return await self._take(tunnel_id, session, tunnel, record, late=True)
        except TunnelTaken as taken:
            self._end(tunnel_id, session, tunnel.rules, by=taken.holder)
            return record

    def _end_losers(self, tunnel_id: str, tunnel: _Tunnel, record: Record) -> None:
        """End the sessions of this process that have lost the tunnel to one of another process, with a higher fence."""
        for session in self._local.holders(tunnel_id):
            for holding in filter(self._is_elsewhere, record.holdings):
                if holding.fence > tunnel.fences.get(session.id, 0) and not _stand_beside(holding, session):
                    self._end(tunnel_id, session, tunnel.rules, by=holding)
                    break

    def _end(self, tunnel_id: str, session: LiveSession, rules: TakeoverRules, *, by: Party) -> None:
        if rules.verdict(holder=session, newcomer=by) is Verdict.RETIRE:
            self._local.retire(tunnel_id, session, by=by.instance)
        else:
            self._local.replace(tunnel_id, session, by=by.instance)

    def _wanted(self, tunnel_id: str, tunnel: _Tunnel, record: Record) -> dict[_Name, Holding]:
        """The holdings that the record should have: those of this process, and those that have not lost to them."""
        own = [session for session in self._local.holders(tunnel_id) if session.id in tunnel.fences]
        staying = [
            holding
            for holding in filter(self._is_elsewhere, record.holdings)
            if all(holding.fence > tunnel.fences[session.id] or _stand_beside(holding, session) for session in own)
        ]
        return {_name(holding): holding for holding in (*staying, *(self._holding(each, tunnel) for each in own))}

    def _holding(self, session: LiveSession, tunnel: _Tunnel) -> Holding:
        return Holding(
            node=self._store.node,
            process=self._store.process,
            session=session.id,
            fence=tunnel.fences.get(session.id, 0),
            key_id=session.key_id,
            instance=session.instance,
            place=session.place,
            since=session.since,
        )

    def _note_fences(self, tunnel: _Tunnel, record: Record) -> None:
        for holding in record.holdings:
            if not self._is_elsewhere(holding):
                tunnel.fences[holding.session] = holding.fence

    def _is_elsewhere(self, holding: Holding) -> bool:
        """Whether it is a session of another process."""
        return holding.process != self._store.process

    @asynccontextmanager
    async def _lock(self, tunnel_id: str) -> AsyncIterator[None]:
        """One task at a time decides about a tunnel."""
        lock, users = self._locks.get(tunnel_id) or (trio.Lock(), 0)
        self._locks[tunnel_id] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            lock, users = self._locks.pop(tunnel_id)
            if users > 1:
                self._locks[tunnel_id] = lock, users - 1


def _no_sessions(_tunnel_id: str) -> Sequence[Holding]:
    return ()


def _name(holding: Holding) -> _Name:
    return holding.process, holding.session, holding.fence


def _named(record: Record) -> set[_Name]:
    return {_name(holding) for holding in record.holdings}


def _stand_beside(party: Party, other: Party) -> bool:
    """Whether two sessions have the tunnel together. That does not depend on the rules of the tunnel."""
    return NEWEST_WINS.verdict(holder=party, newcomer=other) is Verdict.BESIDE


def _is_too_late(session: LiveSession, holding: Holding, rules: TakeoverRules) -> bool:
    """Whether `session`, which was not announced when it came, has lost to one that came after it."""
    match rules.verdict(holder=session, newcomer=holding):
        case Verdict.RETIRE:
            return True
        case Verdict.REPLACE:
            return holding.since > session.since
    return False
