"""The goals for gateways that all come back at once, in the simulation of benchmarks/storm.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from benchmarks.storm import MOST_BIN, MOST_TIME, Advice, simulate

OUTAGES: Final = [pytest.param(1, marks=pytest.mark.slow), 15, pytest.param(150, marks=pytest.mark.slow)]
"""Seconds."""


@pytest.mark.parametrize("gateways", [1, 30, 1_000, 10_000])
@pytest.mark.parametrize("advice", ["spread", "resume"])
def test_gateways_that_were_told_a_span_come_back_as_fast_as_the_relay_takes_them(
    gateways: int, advice: Advice
) -> None:
    storm = simulate(gateways, advice)
    assert storm.most <= MOST_BIN
    assert storm.back[0] <= MOST_TIME * storm.best


@pytest.mark.parametrize("outage", OUTAGES)
def test_however_long_the_relay_was_away_they_do_not_flood_it(outage: float) -> None:
    storm = simulate(40_000, "spread", outage=outage, rate=200)  # as long as 100,000 take at 500/s
    assert storm.most <= MOST_BIN
    assert storm.back[0] <= MOST_TIME * storm.best


@pytest.mark.parametrize("outage", OUTAGES)
def test_gateways_that_try_to_resume_come_a_little_more_often(outage: float) -> None:
    storm = simulate(20_000, "resume", outage=outage, rate=200)
    assert storm.most <= 3.5
    assert storm.back[0] <= MOST_TIME * storm.best


def test_gateways_without_advice_flood_the_relay_once_and_come_back_in_turn() -> None:
    storm = simulate(10_000, "turns")
    assert storm.most > MOST_BIN
    assert max(count for second, count in storm.connects.items() if second >= 3) <= 1.1 * storm.rate
    assert storm.back[1] <= storm.best
    assert simulate(10_000, "fixed").back[0] > MOST_TIME * storm.best


def test_it_prints_a_line_for_each_storm() -> None:
    command = [sys.executable, "-m", "benchmarks.storm", "--gateways", "10", "--gateways", "100", "--advice", "spread"]
    printed = subprocess.run(
        command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=60, check=True
    ).stdout.splitlines()
    assert [row.split()[0] for row in printed if row.endswith("yes")] == ["10", "100"]
