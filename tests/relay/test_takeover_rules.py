"""Who has a tunnel when two gateways want it: the rules alone."""

from __future__ import annotations

from typing import Final

import attrs
import pytest
from hypothesis import assume, given, strategies as st

from pioneer_tunnel._wire.links import LinkPlace
from pioneer_tunnel._wire.messages import instance_shown
from pioneer_tunnel.relay.gateways.takeover import (
    ANSWER_TIMEOUT,
    GHOST_TIMEOUT,
    Takeover,
    TakeoverRules,
    Verdict,
    answer_timeout,
)

OLD, NEW, STRANGE = "the old key", "the new key", "a key that is not in the list"
KEYS: Final = (OLD, NEW)


@attrs.frozen
class Somebody:
    """A `Party`."""

    instance: str
    key_id: str = OLD
    place: LinkPlace | None = None


@pytest.mark.parametrize(
    ("takeover", "holder", "newcomer", "verdict"),
    [
        (Takeover.NEWEST, Somebody("a"), Somebody("a"), Verdict.REPLACE),
        (Takeover.NEWEST, Somebody("a"), Somebody("b"), Verdict.REPLACE),
        (Takeover.NEWEST, Somebody(""), Somebody(""), Verdict.REPLACE),
        (Takeover.FIRST, Somebody("a"), Somebody("a"), Verdict.REPLACE),
        (Takeover.FIRST, Somebody("a"), Somebody("b"), Verdict.ASK),
        (Takeover.FIRST, Somebody("a"), Somebody(""), Verdict.ASK),
        (Takeover.FIRST, Somebody(""), Somebody("b"), Verdict.ASK),
        (Takeover.FIRST, Somebody(""), Somebody(""), Verdict.ASK),
        *[
            (takeover, Somebody(one, holders), Somebody(other, newcomers), verdict)
            for takeover in Takeover
            for one, other in (("a", "a"), ("a", "b"), ("", ""), ("a", ""))
            for holders, newcomers, verdict in (
                (OLD, NEW, Verdict.RETIRE),
                (NEW, OLD, Verdict.ASK),
                (STRANGE, OLD, Verdict.RETIRE),
                (NEW, STRANGE, Verdict.ASK),
            )
        ],
    ],
)
def test_who_has_a_tunnel(takeover: Takeover, holder: Somebody, newcomer: Somebody, verdict: Verdict) -> None:
    assert TakeoverRules(takeover=takeover, keys=KEYS).verdict(holder=holder, newcomer=newcomer) is verdict


@pytest.mark.parametrize("takeover", Takeover)
@pytest.mark.parametrize(
    ("holder", "newcomer", "beside"),
    [
        (Somebody("a", place=LinkPlace(0, 2)), Somebody("a", place=LinkPlace(1, 2)), True),
        (Somebody("a", place=LinkPlace(1, 2)), Somebody("a", place=LinkPlace(1, 2)), False),
        (Somebody("a", place=LinkPlace(2, 3)), Somebody("a", place=LinkPlace(1, 2)), False),
        (Somebody("a", place=LinkPlace(0, 2)), Somebody("a"), False),
        (Somebody("a"), Somebody("a", place=LinkPlace(1, 2)), False),
    ],
)
def test_the_links_of_a_gateway_stand_side_by_side(
    takeover: Takeover, holder: Somebody, newcomer: Somebody, beside: bool
) -> None:
    verdict = TakeoverRules(takeover=takeover, keys=KEYS).verdict(holder=holder, newcomer=newcomer)
    assert verdict is (Verdict.BESIDE if beside else Verdict.REPLACE)


def test_the_links_of_two_gateways_do_not() -> None:
    one, other = Somebody("a", place=LinkPlace(0, 2)), Somebody("b", place=LinkPlace(1, 2))
    assert TakeoverRules(keys=KEYS).verdict(holder=one, newcomer=other) is Verdict.REPLACE
    assert TakeoverRules(takeover=Takeover.FIRST).verdict(holder=one, newcomer=other) is Verdict.ASK
    nameless = [attrs.evolve(each, instance="") for each in (one, other)]
    assert TakeoverRules(keys=KEYS).verdict(holder=nameless[0], newcomer=nameless[1]) is Verdict.REPLACE


somebody = st.builds(Somebody, st.sampled_from(["", "a", "b"]), st.sampled_from([*KEYS, STRANGE]))


@given(one=somebody, other=somebody, first=st.booleans())
def test_two_that_come_again_and_again_do_not_take_it_from_each_other_in_turn(
    one: Somebody, other: Somebody, first: bool
) -> None:
    """If each of two gateways replaces the other at once, one was told to stop, or they are the same gateway."""
    rules = TakeoverRules(takeover=Takeover.FIRST if first else Takeover.NEWEST, keys=KEYS)
    there = rules.verdict(holder=one, newcomer=other)
    back = rules.verdict(holder=other, newcomer=one)
    assume(not one.instance == other.instance != "")
    if first or one.key_id != other.key_id:
        assert Verdict.ASK in {there, back}
    else:
        assert there is back is Verdict.REPLACE


def test_ones_own_ghost_has_less_time_to_answer() -> None:
    assert answer_timeout("a", "a") == GHOST_TIMEOUT < 1
    assert answer_timeout("a", "b") == answer_timeout("", "") == ANSWER_TIMEOUT


def test_an_instance_is_shown_cleaned_and_short() -> None:
    assert instance_shown("host-a") == "instance 'host-a'"
    assert len(instance_shown("x" * 1024)) < 80
    assert "\n" not in instance_shown("a\nERROR forged\x1b[2J")
    assert "without name" in instance_shown("")
