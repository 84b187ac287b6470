"""The restart loop against any transport and any host: what holds whatever happens.

A story is data: what the transports do, what the host does meanwhile, chapter by chapter, one generation each. It is
told in virtual time, and a story that goes wrong shrinks to the shortest that does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, TypeAlias

import attrs
import trio
import trio.testing
from fuzzing import examples
from hypothesis import example, given, settings, strategies as st
from supervised import EPOCH, LocalGateway, Published, Supervised, supervised, wall_clock

from pioneer_tunnel._model.errors import (
    InvalidSettingsError,
    LinkLostError,
    LocalGatewayError,
    MissingBinaryError,
    MissingKeyError,
    ProcessExitedError,
    RelayConnectError,
    RelayResolveError,
    ReplacedError,
    RestartLimitError,
    StorageError,
    TunnelAuthError,
    TunnelError,
    UnknownError,
    UnsupportedTransportError,
)
from pioneer_tunnel._model.status import State, Status
from pioneer_tunnel.testing import Attempt, Connect, Crash, Fail, Return, ScriptedTransport, Stall, Step
from pioneer_tunnel.transports.interface import (
    Deliver,
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    LocalDialFailed,
    LocalDialOk,
    Replaced,
    Report,
    RoundTrip,
    Session,
    SessionRenewed,
    Target,
)
from pioneer_tunnel.tunnel.restart_policy import LONGEST_WAIT, RestartPolicy
from pioneer_tunnel.tunnel.status_feed import StatusFeed

# What can happen


@attrs.frozen
class Wait:
    seconds: float


@attrs.frozen
class RetryNow:
    """The host knows that the network is back."""


@attrs.frozen
class Reported:
    """Something is reported, whether or not the link is up; `stale` by the generation before."""

    event: Event
    stale: bool = False


@attrs.frozen
class LocalGatewayIs:
    there: bool


HostAction: TypeAlias = Wait | RetryNow | Reported | LocalGatewayIs


@attrs.frozen
class Chapter:
    """One generation: what its transport does, and the host while it lasts. At its end the host cancels it.

    A `hasty` host does not wait until what it did last has had its effect.
    """

    steps: list[Step]
    host: list[HostAction]
    probed: bool = False
    goodbye: float = 0.0
    hasty: bool = False


@attrs.frozen
class Story:
    chapters: list[Chapter]
    policy: RestartPolicy = attrs.field(factory=RestartPolicy)
    seed: int = 0


RETRIED_ERRORS: Final[list[type[TunnelError]]] = [
    RelayConnectError,
    RelayResolveError,
    LinkLostError,
    ProcessExitedError,
    UnknownError,
    LocalGatewayError,  # the last two are not a transport's to raise, so each is taken for a mistake
    RestartLimitError,
]
FINAL_ERRORS: Final[list[type[TunnelError]]] = [
    TunnelAuthError,
    InvalidSettingsError,
    ReplacedError,
    MissingKeyError,
    MissingBinaryError,
    UnsupportedTransportError,
    StorageError,
]
OTHER_ERRORS: Final[list[type[Exception]]] = [
    RuntimeError,
    OSError,
    TunnelError,
    AssertionError,
    StopAsyncIteration,
    trio.TooSlowError,
    trio.BrokenResourceError,
]

some_seconds = st.sampled_from([0.0, 0.5, 3.0, 29.5, 30.0, 100.0, 1000.0]) | st.floats(0, 100)
messages = st.sampled_from(["as the script has it", "", "two\nlines", "x" * 400])
events = st.one_of(
    st.builds(RoundTrip, st.floats(0, 10)),
    st.builds(LocalDialFailed, messages),
    st.just(LocalDialFailed("connection refused")),
    st.just(LocalDialOk()),
    st.sampled_from(
        [
            LinkLost(LinkLostError("gone")),
            LinkRestored(),
            SessionRenewed(Session()),
            Draining(0.0),
            Draining(3.0),
            Replaced("another"),
        ]
    ),
)
fails = st.builds(
    Fail,
    st.sampled_from(RETRIED_ERRORS * 3 + FINAL_ERRORS),
    after=some_seconds,
    message=messages,
    retry_after=st.none() | st.floats(0, 2000) | st.just(math.inf),
    retry_slowly=st.booleans(),
)
ends = st.one_of(
    st.builds(Fail, st.sampled_from(RETRIED_ERRORS)),
    fails,
    st.builds(Crash, st.sampled_from(OTHER_ERRORS), after=some_seconds),
    st.builds(Return, after=some_seconds),
)
connects = st.builds(
    Connect,
    some_seconds,
    after=some_seconds,
    then=ends,
    reports=st.lists(st.tuples(some_seconds, events), max_size=5).map(tuple),
    public_url=st.sampled_from([None, "https://office.test", "https://other.test"]),
)
steps: st.SearchStrategy[Step] = connects | ends | st.builds(Stall, some_seconds)
waits = st.builds(Wait, some_seconds | st.sampled_from([600.0, 3000.0]))
host_actions: st.SearchStrategy[HostAction] = st.one_of(
    waits,
    st.just(RetryNow()),
    st.builds(Reported, events, st.booleans()),
    st.builds(LocalGatewayIs, st.booleans()),
)
stories = st.builds(
    Story,
    chapters=st.lists(
        st.builds(
            Chapter,
            steps=st.lists(steps, max_size=8),
            host=st.lists(host_actions | waits, max_size=10),
            probed=st.booleans(),
            goodbye=st.sampled_from([0.0, 0.7]),
            hasty=st.booleans(),
        ),
        min_size=1,
        max_size=3,
    ),
    policy=st.builds(
        RestartPolicy,
        initial=st.sampled_from([0.1, 1.0, 40.0]),
        maximum=st.sampled_from([5.0, 30.0, 2000.0]),
        jitter=st.sampled_from([0.0, 0.2, 1.0]),
        max_restarts=st.sampled_from([0, 0, 1, 2, 5]),
        stable=st.sampled_from([0.0, 3.0, 30.0]),
    ),
    seed=st.integers(0, 1000),
)


# How it is told, and judged


@attrs.define
class Drain:
    """The relay of an attempt drains: when it first said so while the tunnel was up, and what it gave at most."""

    at: float
    within: float


class Teller:
    """Runs one generation of a story and judges it, while it lasts and afterwards."""

    def __init__(self, story: Story, chapter: Chapter, feed: StatusFeed, before: Teller | None) -> None:
        self.story = story
        self.chapter = chapter
        self.feed = feed
        self.before = before
        self.local = LocalGateway()
        self.transport = ScriptedTransport(chapter.steps, goodbye=chapter.goodbye)
        self.attempts: dict[int, Attempt] = {}
        """Those that have begun, by the number that their statuses bear."""
        self.drains: dict[int, Drain] = {}
        """By the same numbers."""
        self.retried_now: list[float] = []
        self.link_is_lost = False
        """While a transport that is up has said so, and not that it is restored."""

    async def serve(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        number = self.feed.current.attempt
        assert number is not None
        assert number not in self.attempts
        following = len(self.transport.attempts)
        self.link_is_lost = False

        def note(event: Event) -> None:
            attempt = self.attempts[number] = self.transport.attempts[following]
            if isinstance(event, Draining) and attempt.ended is None:
                drain = self.drains.setdefault(number, Drain(trio.current_time(), 0.0))
                drain.at = max(drain.at, attempt.connected or trio.current_time())
                drain.within = max(drain.within, event.reconnect_within)
            if attempt.connected is not None and any(attempt is running for running in self.running()):
                self.link_is_lost = isinstance(event, LinkLost) or (
                    self.link_is_lost and not isinstance(event, LinkRestored | SessionRenewed)
                )
            report(event)

        try:
            await self.transport(target, deliver, note, task_status=task_status)
        finally:
            self.attempts[number] = self.transport.attempts[following]

    async def tell(self) -> None:
        tasks = trio.lowlevel.current_statistics().tasks_living
        async with supervised(
            self.serve,
            policy=self.story.policy,
            probe=self.local.probe if self.chapter.probed else None,
            seed=self.story.seed,
            feed=self.feed,
        ) as generation:
            for action in [Wait(0), *self.chapter.host]:
                await self.settle(generation)
                await self.act(action, generation)
            if not self.chapter.hasty:
                await self.settle(generation)
            ending = trio.current_time()
            published = len(generation.published)
        # The host has cancelled it: it ends soon, leaves nothing, and says nothing more.
        assert trio.current_time() <= ending + self.chapter.goodbye
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert self.transport.running == 0
        if not self.chapter.hasty:
            assert len(generation.published) == published
        self.judge_waits(generation)

    async def settle(self, generation: Supervised) -> None:
        """Let everything happen that can without time passing, and judge where that leads."""
        await trio.testing.wait_all_tasks_blocked()
        self.judge_now(generation)

    async def act(self, action: HostAction, generation: Supervised) -> None:
        match action:
            case Wait(seconds=seconds):
                await trio.sleep(seconds)
            case RetryNow():
                self.retried_now.append(trio.current_time())
                generation.supervisor.retry_now()
            case LocalGatewayIs(there=there):
                self.local.there = there
            case Reported(event=event, stale=stale):
                # The source may not have begun: then there is nobody to report, and nothing happens.
                source = self.before if stale else self
                before = self.feed.current
                if source is not None:
                    source.transport.report(event)
                if stale or not self.is_up():
                    assert self.feed.current is before

    def is_up(self) -> bool:
        return any(attempt.connected is not None and attempt.ended is None for attempt in self.transport.attempts)

    def running(self) -> list[Attempt]:
        """The attempts that run and do not drain."""
        draining = {id(self.attempts[number]) for number in self.drains}  # two at one time are equal
        return [
            attempt
            for attempt in self.transport.attempts
            if attempt.ended is None and (id(attempt) not in draining or attempt.connected is None)
        ]

    def judge_now(self, generation: Supervised) -> None:
        status, running = generation.status, self.running()
        assert len(running) <= 1
        if any(attempt.connected is not None for attempt in running):
            assert status.state is (State.RECONNECTING if self.link_is_lost else State.CONNECTED)
        elif not any(
            trio.current_time() <= self.drained_at(number) + drain.within + 3 + 1e-6
            for number, drain in self.drains.items()
        ):
            assert status.state is not State.CONNECTED
        if generation.over is not None:
            assert generation.failure is not None
            assert (status.state, status.error_kind) == (State.FAILED, generation.failure.kind)
            assert generation.failure.final
            assert self.transport.running == 0
            assert all(published.at <= generation.over for published in generation.published)
            assert all(attempt.began <= generation.over for attempt in self.transport.attempts)
        elif status.retry_at_unix is not None:
            assert not running
            assert status.retry_at_unix >= wall_clock()
        assert (status.relay_rtt_ms is None) or self.is_up() or self.drains

    def judge_waits(self, generation: Supervised) -> None:
        """Between two attempts lies what the policy has, neither less nor more, and there are no more than it has."""
        policy, used = self.story.policy, 0
        first: dict[int, Published] = {}
        last: dict[int, Published] = {}
        for published in generation.published:
            first.setdefault(published.status.attempt or 0, published)
            last[published.status.attempt or 0] = published
        numbers = sorted(first)
        assert numbers == [*range(1, len(numbers) + 1)]
        for number in numbers[:-1]:
            used = self.used_after(number, used)
            if policy.max_restarts:
                assert used <= policy.max_restarts
            next_one = first[number + 1]
            least, most = self.allowed_wait(number, used)
            if self.has_drained(number):
                planned_at = self.drained_at(number)
                waited = next_one.at - planned_at
                assert waited <= most + 1e-6
                continue
            planned = last[number]
            assert planned.status.retry_at_unix is not None
            waited = next_one.at - planned.at
            assert waited <= most + 1e-6
            if any(planned.at <= at <= next_one.at for at in self.retried_now):
                continue
            assert waited >= least - 1e-6
            assert -1e-6 <= planned.status.retry_at_unix - (EPOCH + next_one.at) < 1 + 1e-6
        if isinstance(generation.failure, RestartLimitError):
            used = self.used_after(numbers[-1], used)
            assert used == policy.max_restarts + 1

    def end_of(self, number: int) -> Fail | Crash | Return | Stall | None:
        """How the script ended an attempt; None when it was the probe that did."""
        attempt = self.attempts.get(number)
        if attempt is None:
            return None
        return attempt.step.then if isinstance(attempt.step, Connect) else attempt.step

    def has_drained(self, number: int) -> bool:
        """Whether the relay of an attempt that was up has said that it drains."""
        return number in self.drains and self.attempts[number].connected is not None

    def drained_at(self, number: int) -> float:
        """When it first said so while it was up. What it said while it came up counts from when it was."""
        return max(self.drains[number].at, self.attempts[number].connected or 0.0)

    def was_stable(self, number: int) -> bool:
        attempt = self.attempts.get(number)
        if attempt is None or attempt.connected is None or attempt.ended is None:
            return False
        ended = self.drained_at(number) if self.has_drained(number) else attempt.ended
        return ended - attempt.connected >= self.story.policy.stable

    def used_after(self, number: int, used: int) -> int:
        """How many restarts are used. A relay that drains costs none."""
        return (0 if self.was_stable(number) else used) + (not self.has_drained(number))

    def allowed_wait(self, number: int, used: int) -> tuple[float, float]:
        policy, attempt = self.story.policy, self.attempts.get(number)
        end = None if self.has_drained(number) else self.end_of(number)
        # A transport that says what is not its to say is not believed in how long it wants to wait either.
        was_up = any(other.connected is not None for at, other in self.attempts.items() if at <= number)
        fail = end if isinstance(end, Fail) else Fail()
        if fail.error in {RestartLimitError, LocalGatewayError}:
            fail = Fail()
        if was_up and fail.error.rejection:
            least, most = LONGEST_WAIT * (1 - policy.jitter), LONGEST_WAIT * (1 + policy.jitter)
        elif fail.retry_slowly:
            least, most = policy.maximum * (1 - policy.jitter), policy.maximum * (1 + policy.jitter)
        elif self.has_drained(number):
            least, most = 0.0, min(self.drains[number].within, policy.maximum)
        elif used == 1 and attempt is not None and attempt.connected is not None:
            least, most = 0.0, 2 * policy.initial
        else:
            middle = min(policy.initial * 2 ** (used - 1), policy.maximum)
            least, most = middle * (1 - policy.jitter), middle * (1 + policy.jitter)
        if fail.retry_after is not None:
            asked = min(fail.retry_after, LONGEST_WAIT)
            least, most = max(least, asked), max(most, asked)
        return least, most


def in_virtual_time(run: Callable[[Story], Awaitable[None]], story: Story) -> None:
    """Run with a clock of its own, and without the many tracebacks that the supervisor rightly logs."""
    log = logging.getLogger("pioneer_tunnel.supervisor")
    log.disabled = True
    try:
        trio.run(run, story, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        log.disabled = False


async def tell(story: Story) -> None:
    feed = StatusFeed(Status(state=State.DISABLED, updated_at_unix=int(wall_clock())))
    told: list[Teller] = []
    for chapter in story.chapters:
        told.append(Teller(story, chapter, feed, told[-1] if told else None))
        await told[-1].tell()
    last = feed.current
    for teller in told:
        attempts = len(teller.transport.attempts)
        teller.transport.report(LocalDialOk())
        teller.transport.report(RoundTrip(0.1))
        await trio.sleep(10_000)
        assert len(teller.transport.attempts) == attempts
    assert feed.current is last


DIALS_FAIL: Final[list[HostAction]] = [Reported(LocalDialFailed("connection refused"))] * 3


@settings(deadline=None, derandomize=True, max_examples=examples(500))
@given(story=stories)
@example(Story([Chapter([Connect(5, then=Fail(retry_after=60))], [Wait(10), *DIALS_FAIL, Wait(100)])]))
@example(Story([Chapter([Connect(5, then=Return())], [Wait(10)], probed=True)]))
@example(Story([Chapter([Connect(40)], [Wait(35), Reported(Draining(3.0)), Wait(100)], probed=True)]))
@example(Story([Chapter([Connect(40), Fail(), Stall(9)], [Wait(35), Reported(Draining(3.0)), Wait(100)])]))
@example(Story([Chapter([Connect(), Fail(TunnelAuthError)], [Wait(35), Reported(Draining(0.0)), Wait(5000)])]))
@example(Story([Chapter([Connect(9, reports=((0.0, LinkLost(LinkLostError("gone"))),))], [Wait(5)])]))
@example(Story([Chapter([], [Wait(1), Reported(LinkLost(LinkLostError("gone"))), Reported(Draining(0.0)), Wait(9)])]))
@example(Story([Chapter([Connect(0.0, after=0.5, then=Fail())], [Reported(Draining(0.0)), Wait(600)])]))
@example(
    Story([Chapter([Return(after=0.5)], [Reported(SessionRenewed(Session())), Wait(600)])], RestartPolicy(jitter=0.0))
)
@example(Story([Chapter([Crash(TunnelError)], [Wait(10)])]))
@example(Story([Chapter([Connect(5, then=Fail(LocalGatewayError))], [Wait(10)])]))
@example(Story([Chapter([], [Wait(1), *DIALS_FAIL, LocalGatewayIs(False), Wait(100)], probed=True)] * 2))
def test_whatever_happens_the_statuses_are_true_and_the_policy_is_kept(story: Story) -> None:
    in_virtual_time(tell, story)


@settings(deadline=None, derandomize=True, max_examples=examples(100))
@given(story=stories)
def test_the_same_story_is_told_the_same_way(story: Story) -> None:
    """Time is the virtual clock's and chance is the seed's, so any run can be had again."""
    histories = []

    async def listen(story: Story) -> None:
        feed = StatusFeed(Status(state=State.DISABLED, updated_at_unix=int(wall_clock())))
        for chapter in story.chapters:
            await Teller(story, chapter, feed, None).tell()
        histories.append(feed.history)

    for _ in range(2):
        in_virtual_time(listen, story)
    assert histories[0] == histories[1]
