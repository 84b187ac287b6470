"""The restart loop: one generation of a tunnel, from `starting` to its final failure or its cancellation.

    while True:
        start a link, and wait until it has ended or its relay drains
        drains?      the link finishes its streams in the background; wait as the relay asks, and repeat
        final?       publish that, and raise; a rejection is final only for a tunnel that was never up
        otherwise    publish that, wait as the policy says, and repeat

A link is one run of the transport. The `TunnelError` says what a failure means, and `restart_policy` how long to wait.
Here they meet a clock and become statuses. When `run` has ended, no task of the generation is left.

While a relay drains, the state stays `connected` until the next link is up. If that fails, or takes more than seconds,
no new visitor gets through, and the state is `reconnecting`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.errors import (
    LinkLostError,
    LocalGatewayError,
    RelayConnectError,
    RestartLimitError,
    TunnelError,
    UnknownError,
)
from .._model.exception_groups import leaves, lone_error_bare
from .._model.log_fields import about
from .._model.stats import SessionStats
from .._model.status import ErrorKind, State, Status
from .._wire.messages import Spread
from ..transports.interface import (
    Deliver,
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    LocalDialFailed,
    LocalDialOk,
    RoundTrip,
    Serve,
    ServicesMoved,
    Session,
    SessionRenewed,
    SpreadTold,
    Target,
    VisitorRefused,
)
from .opening import Opening
from .restart_policy import RestartPolicy, Restarts, RunEnd
from .status_feed import StatusFeed

__all__ = ["Supervisor", "announce", "as_of_now"]

LOCAL_FAILURES: Final = 3
"""Local dials that fail in a row before the status says so."""

PROBE_INTERVAL: Final = 5.0

HANDOVER_TIMEOUT: Final = 3.0
"""Seconds, beyond those that a draining relay gives, after which the state is `reconnecting`."""

MOST_DRAINING: Final = 4
"""Links that may finish their streams in the background. One more ends the oldest. The relay ends them in time."""

_log: Final = logging.getLogger("pioneer_tunnel.supervisor")


def announce(feed: StatusFeed, wall_clock: Callable[[], float], status: Status) -> None:
    """Publish `status` as of now."""
    feed.publish(as_of_now(feed.current, wall_clock, status))


def as_of_now(current: Status, wall_clock: Callable[[], float], status: Status) -> Status:
    """`status` with `updated_at_unix`: the time of `current` when both say the same, else now."""
    same = status.says_the_same_as(current)
    since = current.updated_at_unix if same and current.updated_at_unix is not None else int(wall_clock())
    return attrs.evolve(status, updated_at_unix=since)


@final
@attrs.define(eq=False, kw_only=True)
class _Link:
    """One run of the transport.

    Attributes:
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
        probing: cancels the probes of the local gateway that it has started.
    """

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
    probing: trio.CancelScope = attrs.field(factory=trio.CancelScope)


@final
class Supervisor:
    """One generation.

    Args:
        serve: the transport.
        target: what it connects to.
        deliver: takes visitors' streams.
        feed: gets the statuses.
        policy: when to retry.
        random: the source of jitter.
        wall_clock: seconds since 1970, only for the `*_unix` fields.
        probe: dials the local gateway, and raises `LocalGatewayError` when it does not answer. Called when the tunnel
            comes up, and every 5 seconds while the gateway does not answer. None to check no gateway.
        bugs: exceptions of the transport that `run` raises instead of a retry.
    """

    def __init__(
        self,
        serve: Serve,
        target: Target,
        deliver: Deliver,
        *,
        feed: StatusFeed,
        policy: RestartPolicy,
        random: Random,
        wall_clock: Callable[[], float],
        probe: Callable[[], Awaitable[None]] | None = None,
        bugs: tuple[type[Exception], ...] = (),
    ) -> None:
        self._serve: Final = serve
        self._deliver: Final = deliver
        self._feed: Final = feed
        self._restarts: Final = Restarts(policy, random)
        self._target: Final = attrs.evolve(target, redial_delay=self._redial_delay)
        self._wall_clock: Final = wall_clock
        self._probe: Final = probe
        self._bugs: Final = bugs
        self._attempt = 1
        self._session: Session | None = None
        self._carrying: _Link | None = None  # while the state is `connected`
        self._draining: Final[deque[_Link]] = deque()
        self._spread: Spread | None = None  # of the last link that was up
        self._retry_at_unix: int | None = None
        self._local_failures = 0
        self._local_failing = trio.Event()
        self._local_error: LocalGatewayError | None = None
        self._retry_now = trio.Event()
        self._opening: Opening | None = None
        self._hurries = False  # whether a change of the network ends the wait
        self._rejected = False
        self._over = False

    async def run(self) -> NoReturn:
        """Keep the tunnel up.

        Raises:
            TunnelError: a final one, after its status was published.
            trio.Cancelled: when cancelled. No status is published then.
        """
        self._publish(State.STARTING)
        try:
            with lone_error_bare():
                async with trio.open_nursery() as links:
                    failure = await self._keep_up(links)
                    links.cancel_scope.cancel()
            self._carrying = None
            self._publish(State.FAILED, failure)
            raise failure
        finally:
            self._over = True

    async def _keep_up(self, links: trio.Nursery) -> TunnelError:
        """Start one link after another; returns the final failure."""
        while True:
            link = _Link()
            self._target.counts.attempts += 1
            links.start_soon(self._run_link, link)
            # No deadline: a transport has one for each step of coming up, and may stay up for ever.
            await link.settled.wait()
            failure = link.failure
            if failure is not None:
                self._target.counts.failures[str(failure.kind)] += 1
            self._rejected = failure is not None and failure.final and failure.rejection and self._session is not None
            if failure is not None and failure.final and not self._rejected:
                return failure
            delay = self._restarts.after(self._how_it_ended(link))
            if delay is None:
                return self._give_up(failure or _drains())
            if failure is None:
                links.start_soon(self._limit_handover, link)
            await self._wait(delay, failure)
            del failure, link  # the traceback of the failure holds the failed session with all its buffers
            self._attempt += 1
            # State and cause stay; only the planned retry is over.
            self._feed.publish(attrs.evolve(self._feed.current, attempt=self._attempt, retry_at_unix=None))

    def _how_it_ended(self, link: _Link) -> RunEnd:
        failure = link.failure
        if link.connected_at is not None:
            self._spread = link.spread
        return RunEnd(
            connected_for=None if link.connected_at is None else trio.current_time() - link.connected_at,
            reconnect_within=link.reconnect_within if failure is None else None,
            retry_after=None if failure is None else failure.retry_after,
            retry_slowly=failure is not None and failure.retry_slowly,
            retry_at_once=failure is not None and failure.retry_at_once,
            rejected=self._rejected,
            spread=self._spread,
        )

    def _give_up(self, cause: TunnelError) -> RestartLimitError:
        limit = self._restarts.limit_reached(cause)
        limit.__cause__ = cause
        return limit

    async def drain(self) -> None:
        """Ask the relay for no more visitors, and wait until those who are there have gone.

        The caller sets the deadline. Links that come up later are not asked.
        """
        links = {*self._draining} if self._carrying is None else {*self._draining, self._carrying}
        async with trio.open_nursery() as nursery:
            for link in links:
                if link.session is not None and link.session.drain is not None:
                    nursery.start_soon(link.session.drain)

    def stopped(self) -> None:
        """Publish that the host has stopped the tunnel, after `run` was cancelled."""
        announce(self._feed, self._wall_clock, Status(state=State.STOPPED))

    @property
    def sessions(self) -> list[SessionStats]:
        """The numbers of the sessions that are up, of the newest one last."""
        links = [*self._draining] if self._carrying is None else [*self._draining, self._carrying]
        return [_stats(link) for link in dict.fromkeys(links)]

    def retry_now(self) -> None:
        """Check a link that is up. End the wait before the next attempt, if there is one."""
        self._target.checks.ask()
        self._retry_now.set()

    def network_changed(self) -> None:
        """The relay may be reached on another way now, or again: make the same checks, and try at once.

        An attempt that is under way begins anew, since it may wait for answers on the way that is gone. A wait that the
        relay has asked for is not cut short.
        """
        self._target.checks.ask(moved=True)
        if self._opening is not None:
            self._opening.give_up()
        if self._hurries:
            self._retry_now.set()

    def retry_if_rejected(self) -> None:
        """End the wait before the next attempt, if it is a wait after a rejection."""
        if self._rejected:
            self._retry_now.set()

    def report(self, event: Event) -> None:
        """Take an event of the forwarding to the local gateway. Late events are ignored."""
        if isinstance(event, VisitorRefused | LocalDialFailed):
            reason = event.reason if isinstance(event, VisitorRefused) else "local_unavailable"
            self._target.counts.refusals[reason] += 1
        if self._carrying is None or self._over:
            return
        match event:
            case LocalDialFailed(message=message):
                self._local_failures += 1
                if self._local_failures >= LOCAL_FAILURES:
                    self._local_fails(LocalGatewayError(message))
            case LocalDialOk():
                self._local_answers()

    def _report_of(self, link: _Link, event: Event) -> None:
        """Take an event of a link's transport, which may report it before the link is up."""
        match event:
            case RoundTrip(seconds=seconds):
                link.round_trip = seconds
                if self._carrying is link and not self._over:
                    self._feed.publish(attrs.evolve(self._feed.current, relay_rtt_ms=_milliseconds(seconds)))
            case Draining(reconnect_within=seconds):
                link.reconnect_within = seconds
                if self._carrying is link:
                    link.settled.set()
            case SpreadTold(spread=spread):
                link.spread = spread
            case LinkLost(error=error, retry_in=seconds):
                self._is_lost(link, error, seconds)
            case LinkRestored():
                was_lost, link.lost = link.lost, None
                self._target.counts.resumes += 1
                if was_lost is not None and self._carrying is link and not self._over:
                    self._retry_at_unix = None
                    self._publish(State.CONNECTED, self._local_error)
            case SessionRenewed(session=session):
                link.session, link.lost = session, None
                link.connected_at, link.since_unix = trio.current_time(), self._wall_clock()
                self._target.counts.sessions += 1
                if self._carrying is link and not self._over:
                    self._session, self._retry_at_unix = session, None
                    self._publish(State.CONNECTED, self._local_error)
            case ServicesMoved(services=services):
                if self._carrying is link and not self._over:
                    assert self._session is not None
                    self._session = attrs.evolve(self._session, services=services)
                    self._feed.publish(attrs.evolve(self._feed.current, services=services))
            case _:
                self.report(event)

    async def _run_link(self, link: _Link) -> None:
        """Run the transport until it fails, also while its relay drains."""
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    self._connected(link, await nursery.start(self._carry, link))
                    if self._probe is not None:
                        nursery.start_soon(self._watch_local_gateway, link.probing)
                    # No deadline: most links never drain.
                    await link.settled.wait()
                    link.probing.cancel()
                    self._let_finish(link)
        except BaseException as error:
            failure = _failure_in(error, bugs=self._bugs)
            if failure is None:
                raise
            # A cancelled transport may fail. That is no failure of the tunnel.
            await trio.lowlevel.checkpoint_if_cancelled()
            if not link.settled.is_set():  # otherwise it drained, and its end is no failure
                if link.session is not None and link.lost is None:
                    self._target.counts.losses += 1
                link.failure, self._carrying, self._retry_at_unix = failure, None, None
                link.settled.set()
        finally:
            if link in self._draining:
                self._draining.remove(link)

    async def _carry(self, link: _Link, *, task_status: trio.TaskStatus[Session]) -> NoReturn:
        report = functools.partial(self._report_of, link)
        opening = self._opening = link.opening = Opening(task_status)
        with opening.scope:
            await self._serve(self._target, self._deliver, report, task_status=opening)
            raise RuntimeError("the transport ended without a reason")  # `Serve` must not return
        raise RelayConnectError("the network has changed during the attempt", retry_at_once=True)

    def _connected(self, link: _Link, session: Session) -> None:
        was_down = self._carrying is None or self._carrying.lost is not None
        self._session = link.session = session
        self._carrying = link
        self._target.redial.note_up()
        link.connected_at, link.since_unix = trio.current_time(), self._wall_clock()
        self._target.counts.sessions += 1
        if was_down:
            self._local_failures = 0
            self._local_failing = trio.Event()
            self._local_error = None
            self._publish(State.CONNECTED)
        else:
            current = self._feed.current
            self._feed.publish(
                attrs.evolve(
                    current,
                    public_url=session.public_url,
                    services=session.services,
                    relay_rtt_ms=_milliseconds(link.round_trip),
                )
            )
        if link.reconnect_within is not None:
            link.settled.set()
        elif link.lost is not None:  # its transport has said so before this task had its turn
            self._publish_loss(link)

    def _let_finish(self, link: _Link) -> None:
        """Let `link` finish its streams while another one comes up."""
        self._draining.append(link)
        if len(self._draining) > MOST_DRAINING:
            self._draining.popleft().scope.cancel()

    def _redial_delay(self, failed: int, retry_after: float | None) -> float:
        spread = None if self._carrying is None else self._carrying.spread
        return self._restarts.redial_delay(failed, spread, retry_after=retry_after)

    def _is_lost(self, link: _Link, error: TunnelError, retry_in: float | None) -> None:
        """`link` has lost its connection, and its transport tries to restore it. If it drains, that changes nothing."""
        if self._over or link.settled.is_set() or link.opening is None or not link.opening.up:
            return
        self._target.counts.losses += link.lost is None
        link.lost, link.round_trip = error, None
        link.restore_at_unix = None if retry_in is None else self._after(retry_in)
        if self._carrying is link:
            self._publish_loss(link)

    def _publish_loss(self, link: _Link) -> None:
        self._retry_at_unix = link.restore_at_unix
        self._publish(State.RECONNECTING, link.lost)

    async def _limit_handover(self, link: _Link) -> None:
        """If no other link is up some time after `link` began to drain, the tunnel is not connected any more."""
        assert link.reconnect_within is not None
        await trio.sleep(link.reconnect_within + HANDOVER_TIMEOUT)
        if self._carrying is link:
            self._carrying = None
            self._publish(State.RECONNECTING, _drains())

    async def _wait(self, delay: float, failure: TunnelError | None) -> None:
        self._retry_now = trio.Event()
        self._hurries = failure is not None and not (
            self._rejected or failure.retry_slowly or failure.retry_after is not None
        )
        self._retry_at_unix = self._after(delay)
        if failure is not None:
            self._publish(State.FAILED if self._session is None or self._rejected else State.RECONNECTING, failure)
        with trio.move_on_after(delay):
            await self._retry_now.wait()
        self._retry_at_unix = None
        self._hurries = False

    def _after(self, delay: float) -> int:
        """The time in `delay` seconds; rounded up, so that a client with a clock of whole seconds is not early."""
        return math.ceil(self._wall_clock() + delay)

    async def _watch_local_gateway(self, probing: trio.CancelScope) -> None:
        """Probe the local gateway now, and every 5 seconds while it does not answer."""
        assert self._probe is not None
        with probing:
            while True:
                try:
                    await self._probe()
                except LocalGatewayError as error:
                    self._local_fails(error)
                else:
                    self._local_answers()
                while True:
                    # No deadline: the event is set when a local dial fails.
                    await self._local_failing.wait()
                    await trio.sleep(PROBE_INTERVAL)
                    if self._local_failing.is_set():  # otherwise a visitor has reached the gateway
                        break

    def _local_fails(self, error: LocalGatewayError) -> None:
        self._local_error = error
        self._local_failing.set()
        if self._carrying is not None and self._carrying.lost is None:
            self._publish(State.CONNECTED, error)

    def _local_answers(self) -> None:
        self._local_failures = 0
        if self._local_failing.is_set():
            self._local_failing = trio.Event()
            self._local_error = None
            if self._carrying is not None and self._carrying.lost is None:
                self._publish(State.CONNECTED)

    def _publish(self, state: State, error: TunnelError | None = None) -> None:
        session, carrying = self._session, self._carrying
        kind: ErrorKind | None = None if error is None else error.kind
        gone = error is not None and error.final
        announce(
            self._feed,
            self._wall_clock,
            Status(
                state=state,
                error_kind=kind,
                message=None if error is None else str(error),
                public_url=None if gone or session is None else session.public_url,
                services=None if gone or session is None else session.services,
                attempt=self._attempt,
                retry_at_unix=None if state is State.CONNECTED else self._retry_at_unix,
                relay_rtt_ms=None if carrying is None else _milliseconds(carrying.round_trip),
            ),
        )


def _stats(link: _Link) -> SessionStats:
    session = link.session
    assert session is not None  # it was up
    assert link.since_unix is not None
    stats = SessionStats(id=session.id) if session.stats is None else session.stats()
    return attrs.evolve(stats, since_unix=link.since_unix, draining=link.reconnect_within is not None)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _drains() -> LinkLostError:
    return LinkLostError("the relay is stopping, and no other session is up yet")


def _failure_in(error: BaseException, *, bugs: tuple[type[Exception], ...]) -> TunnelError | None:
    """What `error`, or the group that nurseries made of several, means for the tunnel.

    None means that the supervisor does not handle it: a cancellation, the end of the program, or one of `bugs`. Of
    several failures a final one counts. Unexpected exceptions are logged with their traceback.
    """
    errors = [leaf for leaf in leaves(error) if not isinstance(leaf, trio.Cancelled)]
    if not errors or any(isinstance(leaf, bugs) or not isinstance(leaf, Exception) for leaf in errors):
        return None
    # A transport must not raise these: it counts no restarts and dials no local gateway.
    not_of_a_transport = (RestartLimitError, LocalGatewayError)
    expected = [leaf for leaf in errors if isinstance(leaf, TunnelError) and not isinstance(leaf, not_of_a_transport)]
    whole = errors[0] if len(errors) == 1 else error
    if len(expected) < len(errors):
        fields = about("unforeseen", reason=type(whole).__name__)
        _log.error("an unforeseen failure of the tunnel", exc_info=whole, extra=fields)
    final_ones = [failure for failure in expected if failure.final]
    if final_ones:
        return final_ones[0]
    if len(expected) == len(errors):
        return expected[0]
    unforeseen = next(leaf for leaf in errors if leaf not in expected)
    unknown = UnknownError(f"an unforeseen failure, see the log: {type(unforeseen).__name__}")
    unknown.__cause__ = whole
    return unknown
