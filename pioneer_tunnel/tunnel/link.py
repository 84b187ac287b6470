"""The life of one link of a tunnel: it dials, carries visitors, drains, and waits before it dials again.

    while True:
        choose a relay; wait while there is none for this link
        start a run, and wait until it has ended or its relay drains
        drains?      the run finishes its streams in the background; wait as the relay asks, and repeat
        otherwise    wait as the policy says, and repeat

A run is one call of the transport, from its dial to the end of its session. The session may lose its connection and get
another one: the transport does that, and reports it. The `TunnelError` of a run says what a failure means, and
`restart_policy` how long to wait. While a relay drains, its run counts as up until the next one is up. If that fails,
or takes more than seconds, no new visitor gets through.

A failure that is final ends a tunnel with one link. With several it ends this link; after a rejection another relay is
tried, or the same one much later. The supervisor decides whether that is the end of the tunnel.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable
from typing import Final, NoReturn, Protocol, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._model.errors import LinkLostError, RelayConnectError, TunnelError, fresh_copy
from .._model.log_fields import about
from .._model.stats import SessionStats
from .._net.log_limiter import LogLimiter
from .._wire.links import LinkPlace
from .._wire.messages import Spread
from ..transports.interface import (
    Deliver,
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    LocalDialFailed,
    LocalDialOk,
    Replaced,
    RoundTrip,
    Serve,
    ServicesMoved,
    Session,
    SessionRenewed,
    SpreadTold,
    Target,
    VisitorRefused,
)
from ..transports.redial import Redial
from .opening import Opening
from .relay_choice import RelayChoice
from .restart_policy import Restarts, RunEnd
from .run_failure import failure_in
from .standing import Standing

__all__ = ["Link", "LinkObserver"]

HANDOVER_TIMEOUT: Final = 3.0
"""Seconds, beyond those that a draining relay gives, after which the link is down."""

MOST_DRAINING: Final = 4
"""Runs that may finish their streams in the background. One more ends the oldest. The relay ends them in time."""

_log_limiter: Final = LogLimiter(logging.getLogger("pioneer_tunnel.supervisor"))


class LinkObserver(Protocol):
    """Whom a link tells what happens, and asks about the others. Nothing here waits."""

    def changed(self) -> None:
        """The standing of a link has changed."""

    def came_up(self, link: Link, *, was_down: bool) -> None:
        """A run has come up. `was_down`: no visitor got through this link before."""

    def report(self, event: Event) -> None:
        """A transport that dials the local gateway itself says how that went, or that it has refused a visitor."""

    def replaced_by_own(self, link: Link) -> None:
        """The relay has ended the session for a newer one of this gateway."""

    def serves_without(self, link: Link) -> bool:
        """Whether another link carries visitors."""

    async def next_change(self) -> None:
        """Wait until the standing of a link has changed. No deadline: it may never."""


@final
@attrs.define(eq=False, kw_only=True)
class _Run:
    """One run of the transport.

    Attributes:
        relay: which it dials.
        redial: the memory of this link's attempts there.
        opening: how it comes up; None before it begins.
        session: what its transport has said; None before it came up.
        connected_at, since_unix: when it came up; None before.
        round_trip: seconds; None while it is unknown.
        spread: what its relay has asked for the time after a loss; None if it asked nothing.
        lost: why its connection is lost, while that is being restored.
        restore_at_unix: when the next attempt to restore it begins; None while none is planned.
        reconnect_within: seconds that the draining relay gives; None while it does not drain.
        failure: why it has ended; None before, and when it was cancelled.
        settled: set when it has ended, or is up and drains. Then the next one may begin.
        scope: cancels it.
    """

    relay: RelayAddress
    redial: Redial
    opening: Opening | None = None
    session: Session | None = None
    connected_at: float | None = None
    since_unix: float | None = None
    round_trip: float | None = None
    spread: Spread | None = None
    lost: TunnelError | None = None
    restore_at_unix: int | None = None
    reconnect_within: float | None = None
    failure: TunnelError | None = None
    settled: trio.Event = attrs.field(factory=trio.Event)
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)


@final
class Link:
    """One of a tunnel's links.

    Args:
        place: which one.
        serve: the transport.
        target: what it connects to; its address is replaced by the chosen one.
        deliver: takes visitors' streams.
        relays: chooses the relay.
        restarts: when to retry.
        observer: the set that it belongs to.
        wall_clock: seconds since 1970, only for the `*_unix` fields.
        bugs: exceptions of the transport that `keep_up` raises instead of a retry.

    Attributes:
        standing: what is known of it now.
        up_since: when its run came up last, in Trio's time; minus infinity before.
    """

    def __init__(
        self,
        place: LinkPlace,
        serve: Serve,
        target: Target,
        deliver: Deliver,
        *,
        relays: RelayChoice,
        restarts: Restarts,
        observer: LinkObserver,
        wall_clock: Callable[[], float],
        bugs: tuple[type[Exception], ...],
    ) -> None:
        self.standing: Final = Standing()
        self.up_since = -math.inf
        self.index: Final = place.index
        self._serve: Final = serve
        self._target: Final = attrs.evolve(
            target, redial_delay=self._redial_delay, place=place if place.of > 1 else None
        )
        self._redials: Final[dict[RelayAddress, Redial]] = {}
        if place.index == 0:
            self._redials[target.address] = target.redial
        self._deliver: Final = deliver
        self._relays: Final = relays
        self._restarts: Final = restarts
        self._observer: Final = observer
        self._wall_clock: Final = wall_clock
        self._bugs: Final = bugs
        self._carrying: _Run | None = None  # while `standing.up`
        self._draining: Final[deque[_Run]] = deque()
        self._spread: Spread | None = None  # of the last run that was up
        self._opening: Opening | None = None
        self._retry_now = trio.Event()
        self._hurries = False  # whether a change of the network ends the wait
        self._over = False

    async def keep_up(self, runs: trio.Nursery) -> NoReturn:
        """Start one run after another, in `runs`, until cancelled."""
        while True:
            run = await self._next_run()
            self._target.counts.attempts += 1
            runs.start_soon(self._run, run)
            # No deadline: a transport has one for each step of coming up, and may stay up for ever.
            await run.settled.wait()
            delay = self._delay_after(run)
            if run.failure is None:
                runs.start_soon(self._limit_handover, run)
            del run  # its failure's traceback holds the failed session with all its buffers
            await self._wait(delay)

    def end(self) -> None:
        """The tunnel has ended: late events change nothing."""
        self._over = True

    async def _next_run(self) -> _Run:
        standing = self.standing
        while (relay := self._relays.choose(self.index)) is None:
            if not standing.without_relay:
                standing.without_relay = True
                self._observer.changed()
            await self._observer.next_change()
        standing.without_relay = False
        standing.relay = relay
        standing.attempts += 1
        self._observer.changed()
        if relay not in self._redials:
            self._redials[relay] = Redial(self._target.redial)
        return _Run(relay=relay, redial=self._redials[relay])

    def _delay_after(self, run: _Run) -> float:
        """Note how a run has ended, and return how long to wait before the next one."""
        standing, failure = self.standing, run.failure
        if failure is not None:
            self._target.counts.failures[str(failure.kind)] += 1
        if run.connected_at is not None:
            self._spread = run.spread
        standing.rejected = standing.hopeless = False
        rejection = failure is not None and failure.final and failure.rejection
        failed = failure is not None and run.connected_at is None and not failure.retry_at_once
        if failed or rejection:
            self._relays.note_failed(self.index, rejected=rejection)
        if failure is not None and failure.final and not failure.rejection:
            standing.hopeless = True
            self._is_down(failure)
            return math.inf
        if rejection and self._relays.is_only(self.index):
            standing.rejected = True
            standing.hopeless = not self._relays.was_up(self.index)
        delay = self._restarts.after(
            RunEnd(
                connected_for=None if run.connected_at is None else trio.current_time() - run.connected_at,
                reconnect_within=run.reconnect_within if failure is None else None,
                retry_after=None if failure is None else failure.retry_after,
                retry_slowly=failure is not None and failure.retry_slowly,
                retry_at_once=failure is not None and failure.retry_at_once,
                rejected=standing.rejected,
                spread=self._spread,
            )
        )
        if delay is None:
            delay = self._restarts.longest_delay()
            if not self._observer.serves_without(self):
                limit = self._restarts.limit_reached(failure or _drains())
                limit.__cause__ = failure or _drains()
                standing.hopeless, failure = True, limit
        self._hurries = failure is not None and not (
            standing.rejected or failure.retry_slowly or failure.retry_after is not None
        )
        if failure is not None:
            self._is_down(failure)
        return delay

    def _is_down(self, cause: TunnelError) -> None:
        standing = self.standing
        if self._observer.serves_without(self):
            line = f"the link to {standing.relay} is down: {cause}"
            fields = about("link_down", peer=standing.relay, reason=cause)
            _log_limiter.log((standing.relay, type(cause)), line, about=fields)
        self._carrying = None
        standing.up, standing.lost, standing.round_trip = False, None, None
        standing.cause = cause if standing.hopeless else _without_frames(cause)

    async def _wait(self, delay: float) -> None:
        self._retry_now = trio.Event()
        self.standing.retry_at_unix = None if math.isinf(delay) else self._after(delay)
        self._observer.changed()
        with trio.move_on_after(delay):
            await self._retry_now.wait()
        self.standing.retry_at_unix = None
        self._hurries = False

    async def drain(self) -> None:
        """Ask the relay for no more visitors, and wait until those who are there have gone.

        The caller sets the deadline. Runs that come up later are not asked.
        """
        async with trio.open_nursery() as nursery:
            for run in self._up:
                if run.session is not None and run.session.drain is not None:
                    nursery.start_soon(run.session.drain)

    @property
    def sessions(self) -> list[SessionStats]:
        """The numbers of the sessions that are up, of the newest one last."""
        return [_stats(run) for run in self._up]

    @property
    def _up(self) -> list[_Run]:
        runs = [*self._draining] if self._carrying is None else [*self._draining, self._carrying]
        return [*dict.fromkeys(runs)]

    def retry_now(self) -> None:
        """End the wait before the next run, if there is one."""
        self._retry_now.set()

    def network_changed(self) -> None:
        """See `Supervisor.network_changed`."""
        if self._opening is not None:
            self._opening.give_up()
        if self._hurries:
            self._retry_now.set()

    def retry_if_rejected(self) -> None:
        """End the wait before the next run, if it is a wait after a rejection."""
        if self.standing.rejected:
            self._retry_now.set()

    def _report(self, run: _Run, event: Event) -> None:
        """Take an event of a run, which may report it before it is up."""
        carries = self._carrying is run and not self._over
        match event:
            case RoundTrip(seconds=seconds):
                run.round_trip = seconds
                if carries:
                    self.standing.round_trip = seconds
                    self._observer.changed()
            case Draining(reconnect_within=seconds):
                run.reconnect_within = seconds
                if self._carrying is run:
                    run.settled.set()
            case SpreadTold(spread=spread):
                run.spread = spread
            case LinkLost(error=error, retry_in=seconds):
                self._is_lost(run, error, seconds)
            case LinkRestored():
                was_lost, run.lost = run.lost, None
                self._target.counts.resumes += 1
                if was_lost is not None and carries:
                    self.standing.lost = self.standing.retry_at_unix = None
                    self._observer.changed()
            case SessionRenewed(session=session):
                run.lost = None
                if run.session is None:  # a run that is not up has none to renew
                    return
                run.session = session
                run.connected_at, run.since_unix = trio.current_time(), self._wall_clock()
                self._target.counts.sessions += 1
                if carries:
                    self._relays.note_up(self.index, beside_others=session.beside_others)
                    self.standing.session = session
                    self.standing.lost = self.standing.retry_at_unix = None
                    self._observer.changed()
            case ServicesMoved(services=services):
                if carries:
                    assert self.standing.session is not None
                    self.standing.session = attrs.evolve(self.standing.session, services=services)
                    self._observer.changed()
            case Replaced(by=by):
                if carries and by and by == self._target.instance:
                    self._observer.replaced_by_own(self)
            case LocalDialFailed() | LocalDialOk() | VisitorRefused():
                self._observer.report(event)

    async def _run(self, run: _Run) -> None:
        """Run the transport until it fails, also while its relay drains."""
        try:
            with run.scope:
                async with trio.open_nursery() as nursery:
                    self._connected(run, await nursery.start(self._carry, run))
                    # No deadline: most runs never drain.
                    await run.settled.wait()
                    self._let_finish(run)
        except BaseException as error:
            failure = failure_in(error, bugs=self._bugs)
            if failure is None:
                raise
            # A cancelled transport may fail. That is no failure of the tunnel.
            await trio.lowlevel.checkpoint_if_cancelled()
            if not run.settled.is_set():  # otherwise it drained, and its end is no failure
                if run.session is not None and run.lost is None:
                    self._target.counts.losses += 1
                run.failure = failure
                self._carrying = None
                run.settled.set()
        finally:
            if run in self._draining:
                self._draining.remove(run)

    async def _carry(self, run: _Run, *, task_status: trio.TaskStatus[Session]) -> NoReturn:
        report = functools.partial(self._report, run)
        opening = self._opening = run.opening = Opening(task_status)
        target = attrs.evolve(self._target, address=run.relay, redial=run.redial)
        try:
            with opening.scope:
                await self._serve(target, self._deliver, report, task_status=opening)
                raise RuntimeError("the transport ended without a reason")  # `Serve` must not return
            raise RelayConnectError("the network has changed during the attempt", retry_at_once=True)
        finally:
            run.redial.note_down()

    def _connected(self, run: _Run, session: Session) -> None:
        standing = self.standing
        was_down = not standing.serves
        run.session, run.connected_at, run.since_unix = session, trio.current_time(), self._wall_clock()
        self.up_since = run.connected_at
        self._target.counts.sessions += 1
        self._carrying = run
        run.redial.note_up()
        self._relays.note_up(self.index, beside_others=session.beside_others)
        standing.session, standing.up, standing.lost, standing.cause = session, True, None, None
        standing.round_trip, standing.retry_at_unix = run.round_trip, None
        standing.rejected = standing.hopeless = False
        self._observer.came_up(self, was_down=was_down)
        if run.reconnect_within is not None:
            run.settled.set()
        elif run.lost is not None:  # its transport has said so before this task had its turn
            self._show_loss(run)

    def _let_finish(self, run: _Run) -> None:
        """Let `run` finish its streams while another one comes up."""
        self._draining.append(run)
        if len(self._draining) > MOST_DRAINING:
            self._draining.popleft().scope.cancel()

    def _redial_delay(self, failed: int, retry_after: float | None) -> float:
        spread = None if self._carrying is None else self._carrying.spread
        return self._restarts.redial_delay(failed, spread, retry_after=retry_after)

    def _is_lost(self, run: _Run, error: TunnelError, retry_in: float | None) -> None:
        """`run` has lost its connection, and its transport tries to restore it. If it drains, that changes nothing."""
        if self._over or run.settled.is_set() or run.opening is None or not run.opening.up:
            return
        self._target.counts.losses += run.lost is None
        run.lost, run.round_trip = error, None
        run.restore_at_unix = None if retry_in is None else self._after(retry_in)
        if self._carrying is run:
            self._show_loss(run)

    def _show_loss(self, run: _Run) -> None:
        self.standing.lost, self.standing.round_trip = run.lost, None
        self.standing.retry_at_unix = run.restore_at_unix
        self._observer.changed()

    async def _limit_handover(self, run: _Run) -> None:
        """If no other run is up some time after `run` began to drain, the link is not up any more."""
        assert run.reconnect_within is not None
        await trio.sleep(run.reconnect_within + HANDOVER_TIMEOUT)
        if self._carrying is run:
            self._is_down(_drains())
            self._observer.changed()

    def _after(self, delay: float) -> int:
        """The time in `delay` seconds; rounded up, so that a client with a clock of whole seconds is not early."""
        return math.ceil(self._wall_clock() + delay)


def _stats(run: _Run) -> SessionStats:
    session = run.session
    assert session is not None  # it was up
    assert run.since_unix is not None
    stats = SessionStats(id=session.id) if session.stats is None else session.stats()
    return attrs.evolve(stats, since_unix=run.since_unix, draining=run.reconnect_within is not None)


def _without_frames(error: TunnelError) -> TunnelError:
    """A copy that says the same. The frames of a failure's traceback hold the failed session with all its buffers."""
    bare = fresh_copy(error)
    bare.__cause__ = None
    return bare


def _drains() -> LinkLostError:
    return LinkLostError("the relay is stopping, and no other session is up yet")
