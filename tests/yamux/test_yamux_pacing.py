"""`yamux.pacing`: the batch follows the rate of the link."""

from __future__ import annotations

import pytest
from fuzzing import fuzzed
from hypothesis import given, strategies as st

from pioneer_tunnel.yamux.pacing import (
    BATCH_SECONDS,
    FIRST_BATCH,
    LARGEST_BATCH,
    SMALLEST_BATCH,
    TURNS_OF_BATCH,
    Pacing,
)


def send_for(pacing: Pacing, seconds: float, rate: float, *, burst: int = 1) -> None:
    """Send full batches at `rate`, in bytes a second. Of `burst` batches the last one waits for all."""
    while seconds > 0:
        amount = pacing.batch * burst
        for _ in range(burst - 1):
            pacing.sent(amount // burst, 0.0)
        pacing.sent(amount // burst, amount / rate)
        seconds -= amount / rate


@pytest.mark.parametrize("rate", [8e3, 25e3, 125e3, 1.25e6, 12.5e6, 1e9])
@pytest.mark.parametrize("before", [8e3, 1e9])
@pytest.mark.parametrize("burst", [1, 8])
def test_a_batch_takes_a_moment_on_any_path(rate: float, before: float, burst: int) -> None:
    """Also when the path was another one before, and when it takes much at once and then nothing for a while."""
    pacing = Pacing()
    send_for(pacing, 2.0, before)
    send_for(pacing, 4.0, rate, burst=burst)
    wanted = min(max(rate * BATCH_SECONDS, SMALLEST_BATCH), LARGEST_BATCH)
    assert wanted * 0.7 <= pacing.batch <= wanted * 1.5
    assert pacing.unsent == 2 * pacing.batch


def test_a_fast_path_is_known_after_a_few_milliseconds() -> None:
    pacing = Pacing()
    send_for(pacing, 0.05, 1e9)
    assert pacing.batch == LARGEST_BATCH


@pytest.mark.parametrize("rate", [1e5, 12.5e6, 1e8, 1e9])
def test_a_turn_takes_a_quarter_of_the_time_of_a_batch_until_it_is_one(rate: float) -> None:
    pacing = Pacing()
    send_for(pacing, 4.0, rate)
    wanted = min(rate * BATCH_SECONDS / TURNS_OF_BATCH, LARGEST_BATCH)
    assert wanted * 0.7 <= pacing.turn <= wanted * 1.5


def test_a_turn_is_as_large_as_before_after_a_path_took_almost_nothing() -> None:
    pacing = Pacing()
    for _ in range(2):
        pacing.sent(pacing.batch, 10.0)
    assert pacing.batch == SMALLEST_BATCH
    send_for(pacing, 1.0, 1e9)
    assert pacing.turn == LARGEST_BATCH


def test_a_small_answer_says_nothing_about_the_path() -> None:
    pacing = Pacing()
    for _ in range(1000):
        assert not pacing.sent(200, 0.001)
    assert pacing.batch == FIRST_BATCH


@fuzzed()
@given(st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 100))))
def test_a_batch_has_its_bounds_whatever_the_link_does(sends: list[tuple[int, float]]) -> None:
    pacing = Pacing()
    for amount, seconds in sends:
        before = pacing.batch
        assert pacing.sent(amount, seconds) == (pacing.batch != before)
        assert SMALLEST_BATCH <= pacing.batch <= LARGEST_BATCH
