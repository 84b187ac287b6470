"""Checks as values: their order, what is skipped, and the exit status."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from pioneer_tunnel._model.errors import RelayConnectError
from pioneer_tunnel.diagnosis.checks import Check, CheckFailedError, Checks, Name, Outcome, exit_status

ALL = [*Name]


@given(outcomes=st.dictionaries(st.sampled_from(ALL), st.sampled_from([*Outcome])))
def test_every_check_is_reported_once_in_order_and_the_first_failure_decides(outcomes: dict[Name, Outcome]) -> None:
    reported: list[Check] = []
    checks = Checks(reported.append, lambda: 0.0)
    results = sorted(outcomes.items(), key=lambda result: ALL.index(result[0]))
    for name, outcome in results:
        try:
            with checks.check(name) as finding:
                {
                    Outcome.OK: finding.ok,
                    Outcome.WARNING: finding.warning,
                    Outcome.FAILED: finding.failed,
                    Outcome.SKIPPED: finding.skipped,
                }[outcome](f"{name} is {outcome}")
        except CheckFailedError:
            assert outcome is Outcome.FAILED
    assert checks.done == reported
    assert [check.name for check in reported] == ALL[: len(reported)]
    assert all(check.outcome is outcomes.get(check.name, Outcome.SKIPPED) for check in reported)
    failed = [name for name, outcome in results if outcome is Outcome.FAILED]
    assert exit_status(reported) == (10 + ALL.index(failed[0]) if failed else 0)


def test_what_is_passed_over_names_the_failure() -> None:
    checks = Checks(lambda _: None, lambda: 0.0)
    with pytest.raises(CheckFailedError), checks.check(Name.NAMES, "Look it up."):
        raise RelayConnectError("no such name")
    checks.skip(Name.PROXY, "for another reason")
    assert [(check.detail, check.cure) for check in checks.done] == [
        ("no such name", "Look it up."),
        ("needs what failed above: names", None),
        ("for another reason", None),
    ]


def test_a_check_tells_how_long_it_took() -> None:
    times = iter([1.0, 3.5, 7.0])
    checks = Checks(lambda _: None, lambda: next(times))
    with checks.check(Name.NAMES) as finding:
        finding.ok("")
    with checks.check(Name.TCP, started=3.0) as finding:
        finding.ok("")
    assert [check.seconds for check in checks.done] == [2.5, 4.0]


def test_an_unforeseen_exception_is_no_finding() -> None:
    checks = Checks(lambda _: None, lambda: 0.0)
    with pytest.raises(ZeroDivisionError), checks.check(Name.NAMES):
        raise ZeroDivisionError
    assert checks.done == []
