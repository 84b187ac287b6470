"""The limit of wrong attempts, and the memory of results: no I/O."""

from __future__ import annotations

from hypothesis import given, strategies as st

from pioneer_tunnel.access.attempts import MOST_ATTEMPTS, PER_ATTEMPT, Attempts, Results


def test_an_address_has_some_attempts_and_then_one_each_few_seconds() -> None:
    attempts = Attempts()
    for _ in range(MOST_ATTEMPTS):
        assert attempts.wait("a", 0) == 0
        attempts.take("a", 0)
    assert attempts.wait("a", 0) == PER_ATTEMPT
    assert attempts.wait("a", PER_ATTEMPT / 2) == PER_ATTEMPT / 2
    assert attempts.wait("a", PER_ATTEMPT) == 0
    assert attempts.wait("b", 0) == 0


@given(steps=st.lists(st.tuples(st.sampled_from("tgw"), st.floats(0, 100)), max_size=200))
def test_no_sequence_gives_more_attempts_than_allowed(steps: list[tuple[str, float]]) -> None:
    attempts, now, taken, given_back = Attempts(), 0.0, 0, 0
    for step, seconds in steps:
        if step == "w":
            now += seconds
        elif step == "t" and not attempts.wait("a", now):
            attempts.take("a", now)
            taken += 1
        elif step == "g" and given_back < taken:
            attempts.give_back("a", now)
            given_back += 1
    assert taken - given_back <= MOST_ATTEMPTS + now / PER_ATTEMPT + 1e-6


def test_what_is_remembered_is_bounded() -> None:
    attempts, results = Attempts(), Results()
    for number in range(10_000):
        attempts.take(number, 0)
        results.set(number.to_bytes(4), False, 0)
    results.set(b"right", True, 0)
    assert len(attempts._used) == len(results._until[False]) == 4096
    assert results.get(b"right", 1) is True
    assert results.get((9999).to_bytes(4), 1) is False
    assert results.get((0).to_bytes(4), 1) is None
    assert results.get(b"right", 301) is None
