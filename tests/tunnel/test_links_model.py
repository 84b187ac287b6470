"""Several links against any transport: what holds whatever happens to each of them.

A story says what the transport of each link does, attempt by attempt, and what the host does meanwhile. It is told in
virtual time, as in the model of the restart loop with one link.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Final, NoReturn, TypeAlias, final

import attrs
import trio
import trio.testing
from fuzzing import examples
from hypothesis import example, given, settings, strategies as st
from supervised import TARGET, Supervised, supervised

from pioneer_tunnel._model.addresses import RelayAddress
from pioneer_tunnel._model.errors import (
    LinkLostError,
    ReplacedError,
    RestartLimitError,
    StorageError,
    TunnelAuthError,
    TunnelError,
)
from pioneer_tunnel._model.status import State
from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel.testing import Connect, Fail, ScriptedTransport, Stall, Step
from pioneer_tunnel.transports.interface import (
    Deliver,
    Draining,
    Event,
    LinkLost,
    LinkRestored,
    Replaced,
    Report,
    Session,
    Target,
)
from pioneer_tunnel.tunnel.restart_policy import RestartPolicy

HANDOVER: Final = 3.0
RELAYS: Final = [RelayAddress.parse(f"wss://relay{number}.test") for number in range(3)]


@attrs.frozen
class Wait:
    seconds: float


@attrs.frozen
class RetryNow:
    """The host knows that the network is back."""


@attrs.frozen
class NetworkChanged:
    """The system says so."""


HostAction: TypeAlias = Wait | RetryNow | NetworkChanged


@attrs.frozen
class Story:
    """What happens.

    Attributes:
        scripts: the steps of each link.
        relays: how many there are.
        knowing: the relays that keep several links of a gateway, by number.
        host: what the host does.
        max_restarts: of the policy.
    """

    scripts: list[list[Step]]
    relays: int
    knowing: frozenset[int]
    host: list[HostAction]
    max_restarts: int = 0
    seed: int = 0


some_seconds = st.sampled_from([0.0, 0.5, 3.0, 29.5, 31.0, 100.0, 1000.0])
fails = st.builds(
    Fail,
    st.sampled_from([LinkLostError, LinkLostError, TunnelAuthError, ReplacedError, StorageError]),
    after=some_seconds,
)
events = st.sampled_from([LinkLost(LinkLostError("gone")), LinkRestored(), Draining(0.0), Draining(3.0)])
connects = st.builds(
    Connect,
    some_seconds,
    after=some_seconds,
    then=fails,
    reports=st.lists(st.tuples(some_seconds, events), max_size=3).map(tuple),
    public_url=st.sampled_from([None, "https://office.test", "https://other.test"]),
)
steps: st.SearchStrategy[Step] = connects | fails | st.builds(Stall, some_seconds)
stories = st.builds(
    Story,
    scripts=st.lists(st.lists(steps, max_size=6), min_size=2, max_size=4),
    relays=st.integers(1, len(RELAYS)),
    knowing=st.frozensets(st.integers(0, len(RELAYS) - 1)),
    host=st.lists(
        st.builds(Wait, some_seconds | st.just(3000.0)) | st.sampled_from([RetryNow(), NetworkChanged()]), max_size=8
    ),
    max_restarts=st.sampled_from([0, 0, 1, 3]),
    seed=st.integers(0, 1000),
)


@final
@attrs.define(eq=False, kw_only=True)
class Run:
    """One call of a link's transport."""

    place: LinkPlace
    relay: RelayAddress
    up: bool = False
    lost: bool = False
    drained_at: float = math.inf
    drains_for: float = 0.0
    error: Exception | None = None
    ended: bool = False

    @property
    def drains(self) -> bool:
        return self.up and self.drained_at < math.inf

    @property
    def serves(self) -> bool:
        return self.up and not (self.lost or self.ended or self.drains)


@final
class Rising(trio.TaskStatus[Session]):
    """Notes that a run is up, and whether its relay keeps several links."""

    def __init__(self, run: Run, task_status: trio.TaskStatus[Session], shown: set[RelayAddress] | None) -> None:
        self._run, self._task_status, self._shown = run, task_status, shown

    def started(self, value: Session | None = None) -> None:
        assert value is not None
        self._run.up = True
        if self._shown is not None:
            self._shown.add(self._run.relay)
        self._task_status.started(attrs.evolve(value, beside_others=self._shown is not None))


@final
class Teller:
    def __init__(self, story: Story) -> None:
        self.story: Final = story
        self.relays: Final = RELAYS[: story.relays]
        self.transports: Final = [ScriptedTransport(script) for script in story.scripts]
        self.runs: Final[list[Run]] = []
        self.shown: Final[set[RelayAddress]] = set()
        """Relays where a session has shown that they keep several links."""
        self.fights: Final[list[tuple[Run, Run]]] = []
        """Runs at a relay that keeps one link, or that may be such, and the ones that were there already."""

    def knows(self, relay: RelayAddress) -> bool:
        return self.relays.index(relay) in self.story.knowing

    async def serve(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        assert target.place is not None
        run = Run(place=target.place, relay=target.address)
        rivals = [other for other in self.runs if other.relay == run.relay and not (other.ended or other.drains)]
        if run.relay not in self.shown or any(rival.place.index == run.place.index for rival in rivals):
            self.fights.extend((run, rival) for rival in rivals)
        self.runs.append(run)

        def note(event: Event) -> None:
            match event:
                case Draining(reconnect_within=seconds) if run.up:
                    run.drained_at = min(run.drained_at, trio.current_time())
                    run.drains_for = max(run.drains_for, seconds)
                case LinkLost() if run.up:
                    run.lost = True
                case LinkRestored():
                    run.lost = False
            report(event)

        rising = Rising(run, task_status, self.shown if self.knows(run.relay) else None)
        try:
            await self.transports[run.place.index](target, deliver, note, task_status=rising)
        except Exception as error:
            run.error = error
            raise
        finally:
            run.ended = True

    async def tell(self) -> None:
        links = len(self.story.scripts)
        policy = RestartPolicy(max_restarts=self.story.max_restarts)
        async with supervised(
            self.serve, policy=policy, seed=self.story.seed, relays=self.relays, links=links
        ) as generation:
            for action in [Wait(0), *self.story.host]:
                await trio.testing.wait_all_tasks_blocked()
                self.judge(generation)
                match action:
                    case Wait(seconds=seconds):
                        await trio.sleep(seconds)
                    case RetryNow():
                        generation.supervisor.retry_now()
                    case NetworkChanged():
                        generation.supervisor.network_changed()
            await trio.testing.wait_all_tasks_blocked()
            self.judge(generation)
        assert all(run.ended for run in self.runs)

    def judge(self, generation: Supervised) -> None:
        assert not self.fights
        status, now = generation.status, trio.current_time()
        serving = [run for run in self.runs if run.serves]
        handing_over = [run for run in self.runs if run.drains and now <= run.drained_at + run.drains_for + HANDOVER]
        assert status.links_wanted == len(self.story.scripts)
        assert status.links_up is not None
        if generation.over is not None:
            self.judge_end(generation)
            return
        assert self.story.max_restarts or self.may_be_up(), "no link can be up, and it goes on"
        assert len(serving) <= status.links_up <= len(serving) + len({run.place for run in handing_over})
        assert (status.state is State.CONNECTED) == (status.links_up > 0)
        # A link that serves at a relay says so.
        shown = {index: link for index, link in enumerate(status.links or ()) if link.up}
        for run in serving:
            assert shown[run.place.index].relay == str(run.relay)
        # A visitor is shown an address that leads to a link which is up.
        if serving and not handing_over:
            first = min(serving, key=lambda run: run.place.index)
            assert status.public_url == shown[first.place.index].public_url

    def may_be_up(self) -> bool:
        """Whether some link runs, or is to be tried again because its last failure was not final."""
        last = {run.place.index: run for run in self.runs}
        was_up = {run.relay for run in self.runs if run.up}
        return any(
            not isinstance(run.error, TunnelError)
            or not run.error.final
            or (run.error.rejection and (run.relay in was_up or len(self.relays) > 1))
            for run in last.values()
        )

    def judge_end(self, generation: Supervised) -> None:
        """It ends only when no link can be up."""
        status, failure = generation.status, generation.failure
        assert failure is not None
        assert failure.final
        assert (status.state, status.error_kind, status.links_up) == (State.FAILED, failure.kind, 0)
        last: dict[int, list[Run]] = {}
        for run in self.runs:
            last.setdefault(run.place.index, []).append(run)
        for runs in last.values():
            errors = [run.error for run in runs if run.error is not None]
            final = isinstance(errors[-1], TunnelError) and errors[-1].final if errors else False
            assert final or self.story.max_restarts, "a link was given up that could be up"
        assert isinstance(failure, RestartLimitError) or any(type(run.error) is type(failure) for run in self.runs)


def in_virtual_time(story: Story) -> None:
    log = logging.getLogger("pioneer_tunnel.supervisor")
    log.disabled = True
    try:
        trio.run(Teller(story).tell, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        log.disabled = False


LOST: Final = LinkLost(LinkLostError("gone"))


@settings(deadline=None, derandomize=True, max_examples=examples(250))
@given(story=stories)
@example(Story([[], []], 2, frozenset(), [Wait(10)]))
@example(Story([[], []], 1, frozenset(), [Wait(10)]))
@example(Story([[], []], 1, frozenset({0}), [Wait(10)]))
@example(Story([[Connect(5), Fail(), Fail()], []], 2, frozenset(), [Wait(6), Wait(10)]))
@example(Story([[Fail(TunnelAuthError)], []], 2, frozenset(), [Wait(6), Wait(3000)]))
@example(Story([[Fail(TunnelAuthError)] * 2, [Fail(TunnelAuthError)] * 2], 2, frozenset(), [Wait(6)]))
@example(Story([[Connect(5, then=Fail(ReplacedError))], [Connect(9)]], 2, frozenset(), [Wait(6), Wait(100)]))
@example(Story([[Connect(reports=((5.0, LOST), (9.0, LinkRestored())))], []], 2, frozenset(), [Wait(6), Wait(9)]))
@example(Story([[Connect(reports=((5.0, Draining(3.0)),)), Fail()], []], 1, frozenset({0}), [Wait(6), Wait(9)]))
def test_the_tunnel_is_connected_while_one_link_is_up(story: Story) -> None:
    in_virtual_time(story)


async def test_a_link_that_is_retried_counts_for_more_than_one_that_was_rejected(
    autojump_clock: trio.testing.MockClock,
) -> None:
    teller = Teller(Story([[Fail(TunnelAuthError)], [Connect(10, after=1), Stall(50)]], 2, frozenset(), []))
    async with supervised(teller.serve, relays=RELAYS[:2], links=2) as generation:
        await trio.sleep(30)
        assert generation.said == ["starting", "connected", "reconnecting/relay_connect_failed"]
        assert generation.status.message == "wss://relay1.test: the link is lost, as the script has it"


async def test_restarts_are_not_used_up_while_another_link_is_up(autojump_clock: trio.testing.MockClock) -> None:
    failing: list[Step] = [Fail()] * 9
    teller = Teller(Story([[Connect(100, then=Fail(StorageError))], failing], 2, frozenset(), []))
    policy = RestartPolicy(max_restarts=2, jitter=0)
    async with supervised(teller.serve, policy=policy, relays=RELAYS[:2], links=2) as generation:
        await trio.sleep(101)
        assert generation.status.state is State.RECONNECTING
        assert isinstance(await generation.finish(), StorageError)
        assert generation.over == 123  # the next attempt of the other link has failed as well


async def test_two_addresses_of_one_old_relay_are_noticed(autojump_clock: trio.testing.MockClock) -> None:
    """The relay ends the older session before the newer one counts as up, and the other way round."""
    for order in (-0.1, 0.1):
        dials: list[float] = []
        replaced = [trio.Event(), trio.Event()]

        async def serve(
            target: Target,
            deliver: Deliver,
            report: Report,
            *,
            task_status: trio.TaskStatus[Session],
            order: float = order,
            dials: list[float] = dials,
            replaced: list[trio.Event] = replaced,
        ) -> NoReturn:
            assert target.place is not None
            dials.append(trio.current_time())
            await trio.sleep(1 + target.place.index)
            if target.place.index == 1:
                if order < 0:
                    replaced[0].set()
                    await trio.sleep(-order)
                task_status.started(Session())
                await trio.sleep(max(order, 0))
                replaced[0].set()
            else:
                task_status.started(Session())
            await replaced[target.place.index].wait()
            report(Replaced(target.instance or ""))
            raise LinkLostError("a newer session of this gateway took the tunnel over")

        target = attrs.evolve(TARGET, instance="it")
        async with supervised(serve, relays=RELAYS[:2], links=2, target=target) as generation:
            await trio.sleep(1000)
            assert len(dials) == 2
            assert (generation.status.state, generation.status.links_up) == (State.CONNECTED, 1)


async def outage_of(autojump_clock: trio.testing.MockClock, scripts: Mapping[int, list[Step]]) -> list[str]:
    teller = Teller(Story([scripts.get(index, []) for index in range(3)], 3, frozenset(), [Wait(1000)]))
    policy = RestartPolicy()
    async with supervised(teller.serve, policy=policy, relays=RELAYS, links=3) as generation:
        await trio.sleep(1000)
        return generation.said


async def test_the_death_of_one_of_three_is_no_outage(autojump_clock: trio.testing.MockClock) -> None:
    dying: list[Step] = [Connect(10), Fail(), Fail(), Connect(100), Fail(TunnelAuthError), Connect(10)]
    assert await outage_of(autojump_clock, {1: dying}) == ["starting", "connected"]
    assert await outage_of(autojump_clock, {0: dying}) == ["starting", "connected"]


async def test_the_death_of_all_is_one(autojump_clock: trio.testing.MockClock) -> None:
    dying: list[Step] = [Connect(10), Fail(), Fail()]
    said = await outage_of(autojump_clock, dict.fromkeys(range(3), dying))
    assert said == ["starting", "connected", "reconnecting/relay_connect_failed", "connected"]
