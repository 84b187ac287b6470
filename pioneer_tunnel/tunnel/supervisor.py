"""The restart loop: one generation of a tunnel, from `starting` to its final failure or its cancellation.

    while True:
        run a transport in a nursery of its own, until it raises
        final?       publish that, and raise; a rejection is final only for a tunnel that was never up
        otherwise    publish that, wait as the policy says, and repeat

The `TunnelError` says what a failure means, and `restart_policy` how long to wait. Here they meet a clock and become
statuses. When `run` has ended, no task of the generation is left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from random import Random
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.errors import LocalGatewayError, RestartLimitError, TunnelError, UnknownError
from .._model.exception_groups import leaves
from .._model.status import ErrorKind, State, Status
from ..transports.interface import (
    Deliver,
    Event,
    LocalDialFailed,
    LocalDialOk,
    RoundTrip,
    Serve,
    ServicesMoved,
    Session,
    Target,
)
from .restart_policy import RestartPolicy, Restarts, RunEnd
from .status_feed import StatusFeed

__all__ = ["Supervisor", "announce", "as_of_now"]

LOCAL_FAILURES: Final = 3
"""Local dials that fail in a row before the status says so."""

PROBE_INTERVAL: Final = 5.0

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
        self._target: Final = target
        self._deliver: Final = deliver
        self._feed: Final = feed
        self._restarts: Final = Restarts(policy, random)
        self._wall_clock: Final = wall_clock
        self._probe: Final = probe
        self._bugs: Final = bugs
        self._attempt = 1
        self._session: Session | None = None
        self._round_trip: float | None = None
        self._connected_at: float | None = None
        self._local_failures = 0
        self._local_failing = trio.Event()
        self._retry_now = trio.Event()
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
            while True:
                failure = await self._attempt_once()
                # A cancelled transport may fail. That is no failure of the tunnel.
                await trio.lowlevel.checkpoint_if_cancelled()
                connected_for = self._link_is_down()
                self._rejected = failure.final and failure.rejection and self._session is not None
                if failure.final and not self._rejected:
                    self._publish(State.FAILED, failure)
                    raise failure
                delay = self._restarts.after(
                    RunEnd(
                        connected_for=connected_for,
                        retry_after=failure.retry_after,
                        retry_slowly=failure.retry_slowly,
                        rejected=self._rejected,
                    )
                )
                if delay is None:
                    limit = self._restarts.limit_reached(failure)
                    self._publish(State.FAILED, limit)
                    raise limit from failure
                await self._wait(delay, failure)
                del failure  # its traceback holds the failed session with all its buffers
                self._attempt += 1
                # State and cause stay; only the planned retry is over.
                self._feed.publish(attrs.evolve(self._feed.current, attempt=self._attempt, retry_at_unix=None))
        finally:
            self._over = True

    def retry_now(self) -> None:
        """End the wait before the next attempt, if there is one."""
        self._retry_now.set()

    def retry_if_rejected(self) -> None:
        """End the wait before the next attempt, if it is a wait after a rejection."""
        if self._rejected:
            self._retry_now.set()

    def report(self, event: Event) -> None:
        """Take an event of the transport, or of the forwarding to the local gateway. Late events are ignored."""
        if isinstance(event, RoundTrip):
            self._round_trip = event.seconds  # a transport may measure it before the tunnel is up
        if self._over or self._connected_at is None:
            return
        match event:
            case RoundTrip(seconds=seconds):
                self._feed.publish(attrs.evolve(self._feed.current, relay_rtt_ms=round(seconds * 1000, 3)))
            case LocalDialFailed(message=message):
                self._local_failures += 1
                if self._local_failures >= LOCAL_FAILURES:
                    self._local_fails(LocalGatewayError(message))
            case LocalDialOk():
                self._local_answers()
            case ServicesMoved(services=services):
                assert self._session is not None
                self._session = attrs.evolve(self._session, services=services)
                self._feed.publish(attrs.evolve(self._feed.current, services=services))

    async def _attempt_once(self) -> TunnelError:
        """Run the transport until it fails; returns why it failed."""
        try:
            async with trio.open_nursery() as nursery:
                # No deadline: a transport has one for each step of coming up.
                self._connected(await nursery.start(self._carry))
                if self._probe is not None:
                    nursery.start_soon(self._watch_local_gateway)
        except BaseException as error:
            failure = _failure_in(error, bugs=self._bugs)
            if failure is None:
                raise
            return failure
        raise AssertionError("a nursery has ended while its task goes on")

    async def _carry(self, *, task_status: trio.TaskStatus[Session]) -> NoReturn:
        await self._serve(self._target, self._deliver, self.report, task_status=task_status)
        raise RuntimeError("the transport ended without a reason")  # `Serve` must not return

    def _connected(self, session: Session) -> None:
        self._session = session
        self._target.redial.note_up()
        self._connected_at = trio.current_time()
        self._local_failures = 0
        self._local_failing = trio.Event()
        self._publish(State.CONNECTED)

    def _link_is_down(self) -> float | None:
        """Forget the state of the link; returns how many seconds it was up, None when it never was.

        Reports that still come are late: visitors of the link may still dial the local gateway.
        """
        connected_at, self._connected_at = self._connected_at, None
        self._round_trip = None
        return None if connected_at is None else trio.current_time() - connected_at

    async def _wait(self, delay: float, failure: TunnelError) -> None:
        state = State.FAILED if self._session is None or self._rejected else State.RECONNECTING
        self._retry_now = trio.Event()
        # Rounded up, so that a client with a clock of whole seconds does not come early.
        self._publish(state, failure, retry_at_unix=math.ceil(self._wall_clock() + delay))
        with trio.move_on_after(delay):
            await self._retry_now.wait()

    async def _watch_local_gateway(self) -> NoReturn:
        """Probe the local gateway now, and every 5 seconds while it does not answer."""
        assert self._probe is not None
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
        self._publish(State.CONNECTED, error)
        self._local_failing.set()

    def _local_answers(self) -> None:
        self._local_failures = 0
        if self._local_failing.is_set():
            self._local_failing = trio.Event()
            self._publish(State.CONNECTED)

    def _publish(self, state: State, error: TunnelError | None = None, *, retry_at_unix: int | None = None) -> None:
        session = self._session
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
                retry_at_unix=retry_at_unix,
                relay_rtt_ms=None if self._round_trip is None else round(self._round_trip * 1000, 3),
            ),
        )


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
        _log.error("an unforeseen failure of the tunnel", exc_info=whole)
    final_ones = [failure for failure in expected if failure.final]
    if final_ones:
        return final_ones[0]
    if len(expected) == len(errors):
        return expected[0]
    unforeseen = next(leaf for leaf in errors if leaf not in expected)
    unknown = UnknownError(f"an unforeseen failure, see the log: {type(unforeseen).__name__}")
    unknown.__cause__ = whole
    return unknown
