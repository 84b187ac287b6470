"""`turn`: what runs in one, what at its end, and what nothing may cut in two."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio
import trio.testing

from pioneer_tunnel._net.turn import Turn


async def test_a_run_has_one_turn_and_the_next_run_another() -> None:
    assert Turn.current() is Turn.current()
    turn = Turn.current()

    async def other_run() -> None:
        assert Turn.current() is not turn

    await trio.to_thread.run_sync(lambda: trio.run(other_run))


def test_what_is_asked_for_several_times_is_done_once_at_the_end() -> None:
    turn = Turn()
    done: list[str] = []

    def flush() -> None:
        assert turn.running, "what it calls belongs to this turn"
        done.append("flush")

    def callback() -> str:
        turn.at_end(flush)
        done.append("callback")
        assert turn.run(inner) == "inner", "a turn inside of one is the same"
        done.append("callback goes on")
        return "result"

    def inner() -> str:
        turn.at_end(flush)
        done.append("inner")
        return "inner"

    for _ in range(2):
        assert turn.run(callback) == "result"
        assert done == ["callback", "inner", "callback goes on", "flush"]
        assert not turn.running
        done.clear()


def test_what_the_end_asks_for_is_part_of_the_same_end() -> None:
    turn = Turn()
    done: list[int] = []

    def step() -> None:
        done.append(len(done))
        if len(done) < 3:
            turn.at_end(step)

    turn.run(lambda: turn.at_end(step))
    assert done == [0, 1, 2]
    turn.run(lambda: None)
    assert done == [0, 1, 2]


def test_a_callback_that_fails_ends_its_turn_in_order() -> None:
    turn = Turn()
    done: list[str] = []

    def fail() -> None:
        turn.at_end(lambda: done.append("flush"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        turn.run(fail)
    assert done == ["flush"]
    assert not turn.running


async def test_the_time_stands_still_in_a_turn(mock_clock: trio.testing.MockClock) -> None:
    turn = Turn()

    def now_and_later() -> tuple[float, float]:
        now = turn.now()
        mock_clock.jump(5)
        return now, turn.now()

    assert turn.run(now_and_later) == (0, 0)
    assert turn.now() == 5
    mock_clock.jump(5)
    assert turn.now() == 10, "between turns it goes on"
    assert turn.run(now_and_later) == (10, 10)


INTERRUPTED = """
import signal
import trio
from pioneer_tunnel._net.turn import Turn

turn = Turn()

def callback():
    turn.at_end(lambda: print("flush"))
    signal.raise_signal(signal.SIGINT)
    print("callback")

async def main():
    turn.run(callback)
    await trio.sleep_forever()

try:
    trio.run(main)
except KeyboardInterrupt:
    print("interrupt")
"""


def test_an_interrupt_waits_for_the_end_of_the_turn() -> None:
    """In a process of its own, since it would interrupt a worker of these tests as well."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["callback", "flush", "interrupt"]
