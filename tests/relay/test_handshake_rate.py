"""How many handshakes a relay takes, and the turns that it gives to the others: arithmetic, without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._wire.messages import LONGEST_WAIT
from pioneer_tunnel.relay.rates import HandshakeRate


def gone_through(gate: HandshakeRate, now: float, count: int) -> list[float | None]:
    """What so many gateways are told that arrive at `now`; whoever may go on proves its key at once."""
    waits = []
    for _ in range(count):
        wait = gate.wait(now)
        if wait is None:
            gate.proved(now)
        waits.append(wait)
    return waits


def test_those_of_a_second_may_come_at_once_and_the_others_get_one_turn_after_the_other() -> None:
    gate = HandshakeRate(10)
    waits = gone_through(gate, 100, 15)
    assert waits == [None] * 10 + [pytest.approx(turn / 10) for turn in range(1, 6)]
    assert gone_through(gate, 100.5, 1) == [None]


def test_whoever_comes_at_its_turn_goes_on_unless_others_took_it() -> None:
    gate = HandshakeRate(10)
    turns = [wait for wait in gone_through(gate, 100, 30) if wait is not None]
    assert [gone_through(gate, 100.001 + turn, 1) for turn in turns] == [[None]] * 20


def test_the_line_does_not_outlive_its_turns() -> None:
    gate = HandshakeRate(10)
    gone_through(gate, 100, 60)
    gone_through(gate, 1000, 10)
    assert gone_through(gate, 1000, 1) == [pytest.approx(0.1)]


def test_strangers_who_prove_nothing_take_nothing() -> None:
    gate = HandshakeRate(10)
    assert [gate.wait(100) for _ in range(1000)] == [None] * 1000


def test_what_was_under_way_too_much_is_made_up_for() -> None:
    gate = HandshakeRate(10)
    for _ in range(30):
        assert gate.wait(100) is None
    for _ in range(30):
        gate.proved(100)
    assert gate.wait(102) is not None
    assert gate.wait(102.2) is None


def test_no_gateway_is_asked_to_wait_for_longer_than_it_does() -> None:
    gate = HandshakeRate(1)
    waits = [wait for wait in gone_through(gate, 100, 2002) if wait is not None]
    assert max(waits) == LONGEST_WAIT
    assert waits.count(1) == 3


def test_no_rate_is_no_limit() -> None:
    assert gone_through(HandshakeRate(0), 100, 10_000) == [None] * 10_000


@settings(deadline=None, max_examples=100)
@given(
    rate=st.floats(0.1, 1000),
    arrivals=st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50)), min_size=1, max_size=40),
)
def test_in_no_span_more_go_on_than_the_rate_and_a_second_of_it(rate: float, arrivals: list[tuple[float, int]]) -> None:
    gate, went_on = HandshakeRate(rate), 0
    arrivals.sort()
    for now, count in arrivals:
        waits = gone_through(gate, now, count)
        went_on += waits.count(None)
        assert all(wait is None or 0 < wait <= LONGEST_WAIT for wait in waits)
        assert went_on <= max(rate, 1) + rate * (now - arrivals[0][0]) + 1e-6
