"""Which certificate is ordered next, and when: the rules, and what holds whatever happens."""

from __future__ import annotations

import json
import math
from random import Random
from typing import Final

import pytest
from fuzzing import fuzzed, fuzzed_machine
from hypothesis import given, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pioneer_tunnel.certificates.policy import MOST_ORDERS, MOST_ORDERS_OF_A_NAME, Lifetime, Schedule

NOW: Final = 1_800_000_000.0
MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0
NAMES: Final = ["a.test", "b.test", "c.test"]


def schedule() -> Schedule:
    return Schedule(Random(7))


def ninety_days(since: float = NOW) -> Lifetime:
    return Lifetime(since, since + 90 * DAY)


def test_names_without_a_certificate_come_first_and_in_their_order() -> None:
    policy = schedule()
    policy.note_certificate("b.test", ninety_days(NOW - 89 * DAY))
    assert policy.next_order(["b.test", "a.test", "c.test"], NOW) == "a.test"
    policy.note_certificate("a.test", ninety_days())
    policy.note_certificate("c.test", ninety_days())
    assert policy.next_order(NAMES, NOW) == "b.test", "then those that are due"
    policy.note_certificate("b.test", ninety_days(NOW - 91 * DAY))
    policy.note_certificate("a.test", ninety_days(NOW - 89 * DAY))
    assert policy.next_order(NAMES, NOW) == "b.test", "one that has expired is worth nothing"


def test_without_a_suggestion_it_is_renewed_after_two_thirds_of_its_life() -> None:
    policy = schedule()
    policy.note_certificate("a.test", ninety_days())
    policy.note_suggestion("a.test", None, check_at=math.inf)
    assert policy.next_order(["a.test"], NOW + 57 * DAY) is None
    assert 57 * DAY < policy.wake_at(["a.test"], NOW) - NOW <= 60 * DAY
    assert policy.next_order(["a.test"], NOW + 60 * DAY) == "a.test"


def test_a_suggestion_counts_but_never_beyond_its_life() -> None:
    policy = schedule()
    policy.note_certificate("a.test", ninety_days())
    assert policy.next_check(["a.test"], NOW) == "a.test"
    policy.note_suggestion("a.test", NOW - 1, check_at=NOW + HOUR)
    assert policy.next_order(["a.test"], NOW) == "a.test", "it was revoked"
    assert policy.next_check(["a.test"], NOW) is None
    policy.note_suggestion("a.test", NOW + 900 * DAY, check_at=NOW + HOUR)
    assert policy.next_order(["a.test"], NOW + 80 * DAY) is None
    assert policy.next_order(["a.test"], NOW + 86 * DAY) == "a.test"
    assert policy.next_check(["a.test"], NOW + 91 * DAY) is None, "nobody asks about one that has expired"


def test_a_name_that_fails_waits_longer_and_longer_and_stops_no_other() -> None:
    policy, now, waits = schedule(), NOW, []
    for _ in range(9):
        policy.note_order("a.test", now)
        policy.note_failure("a.test", now, "no")
        assert policy.next_order(NAMES, now) == "b.test"
        waits.append(policy.wake_at(["a.test"], now) - now)
        now += waits[-1]
    for wait, least in zip(waits, (1, 4, 16, 64, 256, 1024, 1440, 1440, 1440), strict=True):
        assert 1 <= wait / (least * MINUTE) <= 1.25
    assert policy.status("a.test", now - 1).message == "no"
    policy.note_success("a.test")
    policy.note_failure("a.test", now, "again")
    assert policy.wake_at(["a.test"], now) - now < 2 * MINUTE, "a success clears the count"


def test_names_that_fail_do_not_use_up_the_hour() -> None:
    policy, now = schedule(), NOW
    policy.note_certificate("a.test", ninety_days(NOW - 60 * DAY + HOUR))
    policy.note_suggestion("a.test", NOW + HOUR, check_at=math.inf)
    failing = [f"bad{number}.test" for number in range(30)]
    while now < NOW + 2 * HOUR:
        name = policy.next_order([*failing, "a.test"], now)
        if name == "a.test":
            break
        if name is not None:
            policy.note_order(name, now)
            policy.note_failure(name, now, "no")
        now += 30
    assert now < NOW + 2 * HOUR, "a renewal comes before what has failed"


def test_what_the_authority_asks_for_is_not_cut_short() -> None:
    policy = schedule()
    policy.note_rate_limit("a.test", NOW, "too many", retry_after=5 * HOUR)
    policy.note_failure("b.test", NOW, "no")
    assert policy.next_order(NAMES, NOW) is None, "the others wait a little, too"
    assert policy.next_order(NAMES, NOW + 2 * MINUTE) == "c.test"
    policy.retry_now()
    assert policy.next_order(["a.test"], NOW + 5 * HOUR - 1) is None
    assert policy.next_order(["b.test"], NOW + 2 * MINUTE) == "b.test"
    assert policy.status("a.test", NOW).retry_at_unix == NOW + 5 * HOUR
    assert policy.next_order(["a.test"], NOW + 5 * HOUR) == "a.test"


def test_an_authority_that_fails_makes_all_wait() -> None:
    policy, now = schedule(), NOW
    for minutes in (1, 2, 4, 8, 16, 32, 60, 60):
        policy.note_authority_failure(now, "down")
        assert policy.next_order(NAMES, now) is None
        assert {policy.status(name, now).message for name in NAMES} == {"down"}
        wait = policy.wake_at(NAMES, now) - now
        assert 1 <= wait / (minutes * MINUTE) <= 1.25
        now += wait
    policy.note_authority_failure(now, "down", retry_after=3 * HOUR)
    assert policy.wake_at(NAMES, now) == now + 3 * HOUR
    policy.retry_now()
    assert policy.next_order(NAMES, now) == "a.test"


def test_orders_of_an_hour_are_limited() -> None:
    policy = schedule()
    for count in range(MOST_ORDERS_OF_A_NAME):
        assert policy.next_order(["a.test"], NOW + count) == "a.test"
        policy.note_order("a.test", NOW + count)
    assert policy.wake_at(["a.test"], NOW + 4) == NOW + HOUR
    names = [f"host{number}.test" for number in range(MOST_ORDERS)]
    for name in names[: MOST_ORDERS - MOST_ORDERS_OF_A_NAME]:
        policy.note_order(name, NOW + 5)
    assert policy.next_order(names, NOW + 6) is None
    assert policy.next_order(names, NOW + HOUR) is not None


def test_a_clock_that_was_wrong_does_no_lasting_harm() -> None:
    policy = schedule()
    in_2100 = 4_102_444_800.0
    policy.note_order("a.test", in_2100)
    policy.note_rate_limit("a.test", in_2100, "no", retry_after=HOUR)
    restored = schedule()
    restored.restore(policy.records(in_2100), NOW)
    assert restored.wake_at(["a.test"], NOW) <= NOW + 7 * DAY


def test_what_waits_is_set_back_with_the_clock() -> None:
    """As on a machine without a clock of its own, which has begun in the future, and has no network yet."""
    policy, in_2100 = schedule(), 4_102_444_800.0
    policy.note_time(in_2100)
    policy.note_certificate("c.test", Lifetime(NOW - DAY, in_2100 + DAY))
    policy.note_suggestion("c.test", None, check_at=in_2100 + DAY)
    policy.note_order("a.test", in_2100)
    policy.note_failure("a.test", in_2100, "no")
    policy.note_order("b.test", in_2100)
    policy.note_authority_failure(in_2100, "cannot be reached")
    policy.note_time(NOW)
    assert policy.wake_at(["b.test"], NOW) <= NOW + 2 * MINUTE
    assert policy.wake_at(["a.test"], NOW) <= NOW + 2 * MINUTE
    assert policy.wake_at(["c.test"], NOW) <= NOW + DAY
    for _ in range(MOST_ORDERS_OF_A_NAME - 1):
        policy.note_order("a.test", NOW)
    policy.retry_now()
    assert policy.next_order(["a.test"], NOW + 10 * MINUTE) is None, "the order of before counts"


@pytest.mark.parametrize("wrong", ['{"a": 1}', '{"a": {}}', '{"a": {"orders": 1, "failures": 0}}', "[]"])
def test_records_that_are_none_are_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="no records of orders"):
        schedule().restore(json.loads(wrong), NOW)


class Runs(RuleBasedStateMachine):
    """Orders with any outcome, at any time, with restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = schedule()
        self.now = NOW
        self.orders: list[tuple[float, str]] = []
        self.not_before: dict[str, float] = {}
        self.held: set[str] = set()

    @rule(seconds=st.sampled_from([0.0, 1.0, 60.0, 600.0, 3600.0, 86_400.0, 86_400.0 * 30]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(days=st.sampled_from([1, 6, 90]), outcome=st.sampled_from(["success", "failure", "limit", "authority"]),
          retry_after=st.none() | st.floats(0, 10 * DAY))  # fmt: skip
    def order(self, days: int, outcome: str, retry_after: float | None) -> None:
        name = self.policy.next_order(NAMES, self.now)
        if name is None:
            return
        assert self.now >= self.not_before.get(name, 0.0)
        self.orders.append((self.now, name))
        self.policy.note_order(name, self.now)
        match outcome:
            case "success":
                self.policy.note_certificate(name, Lifetime(self.now, self.now + days * DAY))
                self.policy.note_success(name)
                self.held.add(name)
            case "failure":
                self.policy.note_failure(name, self.now, "no", retry_after=retry_after)
            case "limit":
                self.policy.note_rate_limit(name, self.now, "no", retry_after=retry_after)
            case _:
                self.policy.note_authority_failure(self.now, "no", retry_after=retry_after)
        if outcome in {"failure", "limit"} and retry_after is not None:
            self.not_before[name] = self.now + min(retry_after, 7 * DAY)

    @rule(renew_in=st.none() | st.floats(-DAY, 90 * DAY), again=st.floats(MINUTE, DAY))
    def check(self, renew_in: float | None, again: float) -> None:
        name = self.policy.next_check(NAMES, self.now)
        if name is not None:
            at = None if renew_in is None else self.now + renew_in
            self.policy.note_suggestion(name, at, check_at=self.now + again)

    @rule()
    def ask_to_retry(self) -> None:
        self.policy.retry_now()

    @rule()
    def restart(self) -> None:
        records = json.loads(json.dumps(self.policy.records(self.now)))
        self.policy = schedule()
        self.policy.restore(records, self.now)
        for name in self.held:
            self.policy.note_certificate(name, Lifetime(self.now - DAY, self.now + 89 * DAY))

    @invariant()
    def it_wakes_when_there_is_something_to_do(self) -> None:
        something = self.policy.next_order(NAMES, self.now) or self.policy.next_check(NAMES, self.now)
        assert (something is not None) is (self.policy.wake_at(NAMES, self.now) <= self.now)

    @invariant()
    def no_hour_has_too_many_orders(self) -> None:
        recent = [name for at, name in self.orders if at > self.now - HOUR]
        assert all(recent.count(name) <= MOST_ORDERS_OF_A_NAME for name in NAMES)

    @invariant()
    def what_is_held_stays_held(self) -> None:
        for name in NAMES:
            assert (self.policy.status(name, self.now).not_after_unix is not None) is (name in self.held)


TestRuns = fuzzed_machine(Runs.TestCase, 40, stateful_step_count=30)


@fuzzed(20)
@given(st.floats(0, 3 * HOUR))
def test_all_names_together_are_limited(span: float) -> None:
    policy, made = schedule(), 0
    many = [f"host{number}.test" for number in range(100)]
    for step in range(100):
        now = NOW + span * step / 100
        name = policy.next_order(many, now)
        if name is not None:
            policy.note_order(name, now)
            policy.note_certificate(name, ninety_days(now))
            policy.note_success(name)
            made += 1
    assert made <= MOST_ORDERS * (1 + span // HOUR)
