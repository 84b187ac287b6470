"""One generation of a tunnel: its links, and the status that follows from them.

It lasts from `starting` to its final failure or its cancellation. Each `Link` keeps itself up; `standing` says what
their state means for the tunnel. Here they meet a clock and become statuses. When `run` has ended, no task of the
generation is left.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Final, NoReturn, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._model.exception_groups import lone_error_bare
from .._model.stats import SessionStats
from .._model.status import State, Status
from .._wire.links import LinkPlace
from ..transports.interface import Deliver, Event, LocalDialFailed, LocalDialOk, Serve, Target, VisitorRefused
from .link import Link, LinkObserver
from .local_watch import LocalWatch
from .relay_choice import RelayChoice
from .restart_policy import RestartPolicy, Restarts
from .standing import common_failure, status_of, status_of_failure
from .status_feed import StatusFeed

__all__ = ["Supervisor", "announce", "as_of_now"]

TWIN_WINDOW: Final = 5.0
"""Seconds in which one link comes up and the relay ends another one for it, if both have the same relay."""


def announce(feed: StatusFeed, wall_clock: Callable[[], float], status: Status) -> None:
    """Publish `status` as of now."""
    feed.publish(as_of_now(feed.current, wall_clock, status))


def as_of_now(current: Status, wall_clock: Callable[[], float], status: Status) -> Status:
    """`status` with `updated_at_unix`: the time of `current` when both say the same, else now."""
    same = status.says_the_same_as(current)
    since = current.updated_at_unix if same and current.updated_at_unix is not None else int(wall_clock())
    return attrs.evolve(status, updated_at_unix=since)


@final
class Supervisor(LinkObserver):
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
        relays: the relays to choose from, the preferred ones first; by default that of `target`.
        links: how many links to keep (default 1).
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
        relays: Sequence[RelayAddress] = (),
        links: int = 1,
    ) -> None:
        self._feed: Final = feed
        self._target: Final = target
        self._wall_clock: Final = wall_clock
        self._local: Final = LocalWatch(probe, self.changed)
        self._relays: Final = RelayChoice(relays or [target.address], links)
        self._links: Final = [
            Link(
                LinkPlace(index, links),
                serve,
                target,
                deliver,
                relays=self._relays,
                restarts=Restarts(policy, random),
                observer=self,
                wall_clock=wall_clock,
                bugs=bugs,
            )
            for index in range(links)
        ]
        self._standings: Final = [link.standing for link in self._links]
        self._replaced_at: Final[dict[Link, float]] = {}
        self._tasks: trio.Nursery
        self._change = trio.Event()
        self._hopeless: Final = trio.Event()
        self._over = False

    async def run(self) -> NoReturn:
        """Keep the tunnel up.

        Raises:
            TunnelError: a final one, after its status was published.
            trio.Cancelled: when cancelled. No status is published then.
        """
        self._publish(status_of(self._standings, last=Status(state=State.STARTING), local_error=None))
        try:
            with lone_error_bare():
                async with trio.open_nursery() as self._tasks:
                    for link in self._links:
                        self._tasks.start_soon(link.keep_up, self._tasks)
                    # No deadline: a tunnel may stay up for ever.
                    await self._hopeless.wait()
                    self._tasks.cancel_scope.cancel()
            failure = common_failure(self._standings)
            assert failure is not None
            self._publish(status_of_failure(self._standings, failure))
            raise failure
        finally:
            self._over = True
            for link in self._links:
                link.end()

    async def drain(self) -> None:
        """Ask the relays for no more visitors, and wait until those who are there have gone.

        The caller sets the deadline. Links that come up later are not asked.
        """
        async with trio.open_nursery() as nursery:
            for link in self._links:
                nursery.start_soon(link.drain)

    def stopped(self) -> None:
        """Publish that the host has stopped the tunnel, after `run` was cancelled."""
        self._publish(Status(state=State.STOPPED))

    @property
    def sessions(self) -> list[SessionStats]:
        """The numbers of the sessions that are up, link by link, of each link's newest one last."""
        return [stats for link in self._links for stats in link.sessions]

    def retry_now(self) -> None:
        """Check each link that is up. End each wait before an attempt."""
        self._target.checks.ask()
        for link in self._links:
            link.retry_now()

    def network_changed(self) -> None:
        """The relays may be reached on another way now, or again: make the same checks, and try at once.

        An attempt that is under way starts again, since it may wait for answers on the way that is gone. A wait that a
        relay has asked for is not cut short.
        """
        self._target.checks.ask(moved=True)
        for link in self._links:
            link.network_changed()

    def retry_if_rejected(self) -> None:
        """End each wait before an attempt that is a wait after a rejection."""
        for link in self._links:
            link.retry_if_rejected()

    def report(self, event: Event) -> None:
        """Take an event of the forwarding to the local gateway. Late events are only counted."""
        if isinstance(event, VisitorRefused | LocalDialFailed):
            reason = event.reason if isinstance(event, VisitorRefused) else "local_unavailable"
            self._target.counts.refusals[reason] += 1
        if self._over or not any(standing.up for standing in self._standings):
            return
        match event:
            case LocalDialFailed(message=message):
                self._local.dial_failed(message)
            case LocalDialOk():
                self._local.answers()

    # What links tell and ask

    def changed(self) -> None:
        self._change.set()
        self._change = trio.Event()
        if self._over or self._hopeless.is_set():
            return
        if common_failure(self._standings) is not None:
            self._hopeless.set()  # it is published when everything has ended
            return
        if not any(standing.up for standing in self._standings):
            self._local.stop()
        self._publish(status_of(self._standings, last=self._feed.current, local_error=self._local.error))

    def came_up(self, link: Link, *, was_down: bool) -> None:
        if was_down and not self.serves_without(link):
            self._local.tunnel_is_up(self._tasks)
        self._find_twins()
        self.changed()

    def replaced_by_own(self, link: Link) -> None:
        self._replaced_at[link] = trio.current_time()
        self._find_twins()

    def serves_without(self, link: Link) -> bool:
        return any(other.standing.serves for other in self._links if other is not link)

    async def next_change(self) -> None:
        await self._change.wait()

    def _find_twins(self) -> None:
        """Notice that two addresses lead to one relay which keeps a single session: one link has ended another."""
        recently = trio.current_time() - TWIN_WINDOW
        for replaced, at in self._replaced_at.items():
            for newer in self._links:
                session = newer.standing.session
                alone = newer.standing.up and session is not None and not session.beside_others
                if newer is not replaced and alone and at >= recently and newer.up_since >= recently:
                    self._relays.note_same(replaced.index, newer.index)

    def _publish(self, status: Status) -> None:
        announce(self._feed, self._wall_clock, status)
