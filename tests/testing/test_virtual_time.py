"""Virtual time: it jumps when everybody waits, stands still for threads, and ends what waits in vain."""

from __future__ import annotations

import sys
import time
from random import Random

import pytest
import trio
import trio.testing
from hypothesis import given, settings, strategies as st

from pioneer_tunnel.testing import virtual_time, wall_clock
from pioneer_tunnel.testing.virtual_time import EPOCH, run_virtually, stop_the_clock_for_threads


@settings(deadline=None)
@given(seconds=st.integers(0, 10**6))
@virtual_time(limit=10**7)
async def test_each_example_begins_at_the_beginning(seconds: int) -> None:
    assert trio.current_time() == 0
    await trio.sleep(seconds)
    assert trio.current_time() == seconds
    assert wall_clock() == EPOCH + seconds


@pytest.mark.parametrize("again", range(2))
def test_the_clock_stands_still_while_a_thread_works(again: int) -> None:
    async def work() -> None:
        with trio.fail_after(1):
            await trio.to_thread.run_sync(time.sleep, 0.05)
            assert trio.current_time() == 0
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(trio.to_thread.run_sync, time.sleep, 0.02)
        assert trio.current_time() == 0
        await trio.sleep(3600)
        assert trio.current_time() == 3600

    run_virtually(work)


def test_without_it_the_clock_runs_away() -> None:
    """This is what the kit is for; should Trio learn to, the kit can forget it."""

    async def work() -> None:
        with trio.move_on_after(3600) as too_long:
            await trio.to_thread.run_sync(time.sleep, 0.05)
        assert too_long.cancel_called

    trio.run(work, clock=trio.testing.MockClock(autojump_threshold=0))


async def test_with_another_clock_nothing_changes() -> None:
    stop_the_clock_for_threads()
    await trio.to_thread.run_sync(time.sleep, 0)


def test_what_waits_in_vain_is_ended() -> None:
    @virtual_time(limit=60)
    async def hang() -> None:
        await trio.sleep_forever()

    with pytest.raises(trio.TooSlowError):
        hang()


def test_the_order_of_tasks_comes_from_the_seed() -> None:
    async def race() -> list[int]:
        order: list[int] = []

        async def run(number: int) -> None:
            for _ in range(3):
                await trio.lowlevel.checkpoint()
                order.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(run, number)
        return order

    orders = [run_virtually(race, seed=seed) for seed in range(8)]
    assert [run_virtually(race, seed=seed) for seed in range(8)] == orders
    assert len({tuple(order) for order in orders}) > 4


def test_the_scheduler_goes_on_as_it_was() -> None:
    scheduler = sys.modules["trio._core._run"]
    scheduler._r.seed(5)
    run_virtually(trio.lowlevel.checkpoint, seed=9)
    assert scheduler._r.random() == Random(5).random()


def test_a_test_keeps_its_name_and_its_result() -> None:
    @virtual_time
    async def documented(number: int) -> int:
        """What it does."""
        return number + 1

    assert documented(1) == 2
    assert (documented.__name__, documented.__doc__) == ("documented", "What it does.")
