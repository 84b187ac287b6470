"""When to try again, as arithmetic: what holds for every policy and every sequence of endings."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import attrs
import pytest
from fuzzing import examples
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._wire.messages import Spread
from pioneer_tunnel.tunnel.restart_policy import (
    FIRST_SHARE,
    LONGEST_REDIAL_DELAY,
    LONGEST_WAIT,
    QUICK_HANDOVERS,
    SETTLED,
    RestartPolicy,
    Restarts,
    RunEnd,
)

seconds = st.floats(0.001, 10_000)
policies = st.builds(
    RestartPolicy,
    initial=seconds,
    maximum=seconds,
    jitter=st.floats(0, 1),
    max_restarts=st.integers(0, 6),
    stable=st.floats(0, 1000),
)
spreads = st.builds(Spread, span=st.floats(0, 900), longest=st.floats(0, 900))
endings = st.builds(
    RunEnd,
    connected_for=st.none() | st.floats(0, 10_000),
    retry_after=st.none() | st.floats(allow_nan=True, allow_infinity=True),
    retry_slowly=st.booleans(),
    rejected=st.booleans(),
    spread=st.none() | spreads,
)
drains = st.builds(RunEnd, connected_for=st.floats(0, 10_000), reconnect_within=st.floats(0, 1000))
seeds = st.integers(0, 2**32)

COMMON = settings(deadline=None, derandomize=True, max_examples=examples(200))


def own_delay(policy: RestartPolicy, ending: RunEnd, used: int, waited: float) -> tuple[float, float]:
    """Between what and what the policy's own delay lies; `used` counts this restart, `waited` the waits before it."""
    spread = ending.spread
    longest = policy.maximum if spread is None else max(policy.maximum, spread.longest)
    if ending.rejected:
        middle = LONGEST_WAIT
    elif ending.retry_slowly:
        middle = longest
    elif ending.connected_for is not None and used == 1 and ending.retry_after is None:
        return 0, 2 * policy.initial if spread is None else spread.span
    else:
        middle = policy.initial * 2 ** (used - 1)
        if spread is not None and ending.retry_after is None:
            middle = max(middle, min(2 * waited, spread.span))
        middle = min(middle, longest)
    return middle * (1 - policy.jitter), middle * (1 + policy.jitter)


@COMMON
@given(policy=policies, history=st.lists(endings, max_size=12), seed=seeds)
def test_every_delay_lies_within_the_policy_and_restarts_are_counted(
    policy: RestartPolicy, history: list[RunEnd], seed: int
) -> None:
    restarts, used, waited = Restarts(policy, Random(seed)), 0, 0.0
    for ending in history:
        if ending.connected_for is not None:
            waited = 0.0
        used = 1 if ending.connected_for is not None and ending.connected_for >= policy.stable else used + 1
        delay = restarts.after(ending)
        if policy.max_restarts and used > policy.max_restarts:
            assert delay is None
            return
        assert delay is not None
        assert restarts.used == used
        least, most = own_delay(policy, ending, used, waited)
        if ending.retry_after is not None and ending.retry_after > least:
            asked = min(ending.retry_after, LONGEST_WAIT)
            least, most = max(least, asked), max(most, asked)
        assert least - 1e-9 <= delay <= most + 1e-9
        waited += delay


@COMMON
@given(policy=policies, history=st.lists(endings, max_size=12), seed=seeds)
def test_the_same_seed_gives_the_same_delays(policy: RestartPolicy, history: list[RunEnd], seed: int) -> None:
    one, other = Restarts(policy, Random(seed)), Restarts(policy, Random(seed))
    assert [one.after(ending) for ending in history] == [other.after(ending) for ending in history]


@COMMON
@given(max_restarts=st.integers(1, 20), seed=seeds)
def test_so_many_restarts_and_no_more(max_restarts: int, seed: int) -> None:
    restarts = Restarts(RestartPolicy(max_restarts=max_restarts), Random(seed))
    delays = [restarts.after(RunEnd()) for _ in range(max_restarts + 3)]
    assert None not in delays[:max_restarts]
    assert delays[max_restarts:] == [None] * 3


def test_zero_restarts_are_any_number() -> None:
    restarts = Restarts(RestartPolicy(max_restarts=0), Random(0))
    assert all(restarts.after(RunEnd()) is not None for _ in range(5000))


@pytest.mark.parametrize(
    ("policy", "delays"),
    [
        (RestartPolicy(jitter=0), [1, 2, 4, 8, 16, 30, 30]),
        (RestartPolicy(jitter=0, initial=5, maximum=5), [5, 5, 5]),
        (RestartPolicy(jitter=0, initial=60, maximum=30), [30, 30]),
        (RestartPolicy(jitter=0, initial=0.25, maximum=1), [0.25, 0.5, 1, 1]),
    ],
)
def test_delays_double_up_to_the_maximum(policy: RestartPolicy, delays: list[float]) -> None:
    restarts = Restarts(policy, Random(0))
    assert [restarts.after(RunEnd()) for _ in delays] == delays


def test_however_many_restarts_it_does_not_overflow() -> None:
    restarts = Restarts(RestartPolicy(initial=1e300, maximum=1e308, jitter=0), Random(0))
    assert [restarts.after(RunEnd()) for _ in range(3000)][-1] == 1e308


def test_jitter_comes_after_the_cap_and_to_both_sides() -> None:
    delays = []
    for seed in range(200):
        restarts = Restarts(RestartPolicy(), Random(seed))
        delays += [restarts.after(RunEnd()) for _ in range(8)][-1:]
    longest = [delay for delay in delays if delay is not None]
    assert len(longest) == 200
    assert all(24 <= delay <= 36 for delay in longest)
    assert min(longest) < 25
    assert max(longest) > 35


def test_without_jitter_there_is_no_chance_but_after_a_lost_link() -> None:
    lost = RunEnd(connected_for=60)
    first = {Restarts(RestartPolicy(jitter=0), Random(seed)).after(lost) for seed in range(100)}
    assert len(first) == 100
    assert all(delay is not None and 0 <= delay <= 2 for delay in first)


def test_links_lost_soon_after_each_other_are_retried_at_longer_and_longer_delays() -> None:
    restarts = Restarts(RestartPolicy(jitter=0), Random(0))
    delays = [restarts.after(RunEnd(connected_for=1)) for _ in range(7)]
    assert delays[1:] == [2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(("lasted", "used"), [(30.0, 1), (29.999, 4), (None, 4)])
def test_a_stable_session_clears_the_count_and_the_delay(lasted: float | None, used: int) -> None:
    restarts = Restarts(RestartPolicy(jitter=0), Random(0))
    for _ in range(3):
        restarts.after(RunEnd())
    restarts.after(RunEnd(connected_for=lasted))
    assert restarts.used == used
    assert restarts.after(RunEnd()) == 2**used


@pytest.mark.parametrize(
    ("asked", "waited"), [(0, 1), (-5, 1), (math.nan, 1), (7, 7), (900, 900), (901, 900), (math.inf, 900)]
)
def test_retry_after_counts_between_the_own_delay_and_a_quarter_of_an_hour(asked: float, waited: float) -> None:
    assert Restarts(RestartPolicy(jitter=0), Random(0)).after(RunEnd(retry_after=asked)) == waited


def test_retry_after_does_not_shorten_a_delay_that_is_longer_than_a_quarter_of_an_hour() -> None:
    policy = RestartPolicy(initial=3600, maximum=3600, jitter=0)
    assert Restarts(policy, Random(0)).after(RunEnd(retry_after=math.inf)) == 3600


def test_what_is_worth_few_tries_waits_the_longest_delay_from_the_first() -> None:
    restarts = Restarts(RestartPolicy(jitter=0), Random(0))
    assert restarts.after(RunEnd(retry_slowly=True)) == 30
    assert restarts.after(RunEnd(retry_slowly=True, connected_for=60)) == 30
    assert restarts.after(RunEnd()) == 2


def test_a_rejection_is_tried_again_after_15_minutes_more_or_less() -> None:
    assert Restarts(RestartPolicy(jitter=0), Random(0)).after(RunEnd(rejected=True)) == 900
    delays = [Restarts(RestartPolicy(), Random(seed)).after(RunEnd(rejected=True)) for seed in range(100)]
    assert len(set(delays)) == 100
    assert all(delay is not None and 720 <= delay <= 1080 for delay in delays)


def test_the_longest_delay_is_spread_too() -> None:
    delays = [Restarts(RestartPolicy(), Random(seed)).after(RunEnd(retry_slowly=True)) for seed in range(100)]
    assert len(set(delays)) == 100
    assert all(delay is not None and 24 <= delay <= 36 for delay in delays)


def test_the_first_attempt_after_a_loss_comes_within_the_span_that_the_relay_told() -> None:
    lost = RunEnd(connected_for=60, spread=Spread(span=200, longest=200))
    first = [Restarts(RestartPolicy(), Random(seed)).after(lost) or 0.0 for seed in range(400)]
    assert max(first) <= 200
    assert [sum(start <= delay < start + 50 for delay in first) > 70 for start in (0, 50, 100, 150)] == [True] * 4


def test_a_relay_with_few_gateways_gets_them_back_at_once() -> None:
    lost = RunEnd(connected_for=60, spread=Spread(span=0, longest=0))
    restarts = Restarts(RestartPolicy(jitter=0), Random(0))
    assert [restarts.after(ending) for ending in (lost, *[attrs.evolve(lost, connected_for=None)] * 5)] == [
        *(0, 2, 4, 8, 16, 30)
    ]


def test_while_the_relay_is_down_each_wait_is_twice_what_was_waited_up_to_the_span_and_then_the_longest() -> None:
    restarts, spread = Restarts(RestartPolicy(jitter=0), Random(0)), Spread(span=200, longest=400)
    waited = restarts.after(RunEnd(connected_for=60, spread=spread))
    assert waited is not None
    delays = [restarts.after(RunEnd(spread=spread)) for _ in range(12)]
    assert delays[:2] == [min(2 * waited, 200), min(6 * waited, 200)]
    assert 200 in delays
    assert delays[-3:] == [256, 400, 400][-3:] or delays[-3:] == [400, 400, 400]


def test_a_busy_relay_alone_says_how_long_to_wait_beside_the_policy() -> None:
    restarts, spread = Restarts(RestartPolicy(jitter=0), Random(0)), Spread(span=200, longest=200)
    restarts.after(RunEnd(connected_for=60, spread=spread))
    assert restarts.after(RunEnd(retry_after=7.5, spread=spread)) == 7.5
    assert restarts.after(RunEnd(retry_after=0.1, spread=spread)) == 4


def test_a_longest_backoff_of_the_relay_does_not_shorten_the_own_one() -> None:
    restarts = Restarts(RestartPolicy(jitter=0), Random(0))
    spread = Spread(span=0, longest=5)
    assert [restarts.after(RunEnd(spread=spread)) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("initial", "maximum") for value in (0, -1, math.nan, math.inf)),
        *(("jitter", value) for value in (-0.1, 1.1, math.nan)),
        ("max_restarts", -1),
        ("stable", -1),
        ("stable", math.nan),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    values: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"'{name}' must be"):
        RestartPolicy(**values)


def test_a_changed_way_is_tried_at_once_and_counts_as_no_restart() -> None:
    restarts = Restarts(RestartPolicy(max_restarts=1), Random(1))
    for _ in range(5):
        assert restarts.after(RunEnd(connected_for=1, retry_at_once=True)) == 0
    assert restarts.used == 0
    assert restarts.after(RunEnd()) is not None
    assert restarts.after(RunEnd(retry_at_once=True)) == 0
    assert restarts.after(RunEnd()) is None


@COMMON
@given(policy=policies, history=st.lists(endings | drains, max_size=12), drain=drains, seed=seeds)
def test_a_relay_that_drains_has_not_failed(
    policy: RestartPolicy, history: list[RunEnd], drain: RunEnd, seed: int
) -> None:
    """Whatever was before: the next session comes in the time that the relay gives, and no restart is counted."""
    restarts = Restarts(policy, Random(seed))
    for ending in history[: QUICK_HANDOVERS - 1]:
        restarts.after(ending)
    assert drain.connected_for is not None
    assert drain.reconnect_within is not None
    used = 0 if drain.connected_for >= policy.stable else restarts.used
    delay = restarts.after(drain)
    assert delay is not None
    assert 0 <= delay <= min(drain.reconnect_within, policy.maximum)
    assert restarts.used == used


def test_a_relay_that_drains_now_and_then_is_never_dialled_late() -> None:
    restarts = Restarts(RestartPolicy(), Random(0))
    often = [RunEnd(connected_for=lasted, reconnect_within=0.1) for lasted in (0.5, 1.0, SETTLED)] * 20
    delays = [restarts.after(ending) for ending in often]
    assert all(delay is not None and delay <= 0.1 for delay in delays)


def test_a_relay_that_drains_every_session_at_once_is_dialled_less_and_less_often() -> None:
    restarts = Restarts(RestartPolicy(jitter=0), Random(0))
    delays = [restarts.after(RunEnd(connected_for=1, reconnect_within=0)) for _ in range(QUICK_HANDOVERS + 7)]
    assert delays == [*[0] * QUICK_HANDOVERS, 1, 2, 4, 8, 16, 30, 30]


@COMMON
@given(policy=policies, failed=st.integers(0, 200), spread=st.none() | spreads, seed=seeds)
def test_a_lost_link_is_restored_within_the_span(
    policy: RestartPolicy, failed: int, spread: Spread | None, seed: int
) -> None:
    share = 0.0 if spread is None else spread.span if failed else FIRST_SHARE * spread.span
    delay = Restarts(policy, Random(seed)).redial_delay(failed, spread)
    own = min(policy.initial * 2 ** (failed - 1), policy.maximum, LONGEST_REDIAL_DELAY) if failed else 0.0
    assert own * (1 - policy.jitter) <= delay <= own * (1 + policy.jitter) + share + 1e-9
    assert failed or delay == 0.0 or delay >= 1.0


@COMMON
@given(policy=policies, failed=st.integers(0, 200), spread=st.none() | spreads, wanted=st.floats(0, 5000), seed=seeds)
def test_a_busy_relay_says_when_to_restore_a_link(
    policy: RestartPolicy, failed: int, spread: Spread | None, wanted: float, seed: int
) -> None:
    delay = Restarts(policy, Random(seed)).redial_delay(failed + 1, spread, retry_after=wanted)
    own = Restarts(policy, Random(seed)).redial_delay(failed + 1, None)
    assert delay == max(own, min(wanted, LONGEST_WAIT))
