"""`_net.suspension`: a timer that is much too late."""

from __future__ import annotations

import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest
import trio
from rig import no_hang
from trio.testing import MockClock

from pioneer_tunnel._net import suspension
from pioneer_tunnel._net.suspension import watch_suspension

Sleep = Callable[[float], Awaitable[object]]


@contextmanager
def ten_seconds() -> Iterator[tuple[float, Sleep]]:
    yield 10.0, trio.sleep


async def test_a_timer_that_is_late_shows_a_sleep_of_the_machine(autojump_clock: MockClock) -> None:
    """The clock that counts sleep runs ahead of Trio's."""
    slept = 0.0
    resumed: Final[list[tuple[float, float]]] = []

    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            await watch_suspension(
                lambda seconds: resumed.append((trio.current_time(), seconds)),
                clock=lambda: trio.current_time() + slept,
                timer=ten_seconds,
            )

        nursery.start_soon(watch)
        await trio.sleep(15)
        slept += 4
        await trio.sleep(10)
        assert resumed == [], "too short to matter"
        slept += 600
        await trio.sleep(10)
        assert resumed == [(30, 600)]
        await trio.sleep(100)
        assert len(resumed) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(sys.platform != "linux", reason="a timer of Linux")
async def test_the_timer_of_linux_sleeps() -> None:
    with suspension._timer() as (period, sleep):
        assert period > 2
        started = time.monotonic()
        with no_hang():
            await sleep(0.05)
            await sleep(0.05)
        assert time.monotonic() - started >= 0.1


async def test_without_it_the_sleeps_are_short(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    monkeypatch.setattr(suspension, "_timerfd_create", lambda: -1)
    with suspension._timer() as (period, sleep):
        await sleep(period)
        assert trio.current_time() == period == 2
