"""`fastpath/timers.py`, compared with a list of deadlines that is searched from end to end."""

from __future__ import annotations

import math
from typing import Final, final

from fuzzing import fuzzed_machine
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pioneer_tunnel._net.fastpath.timers import Timer, Timers

# Few different ones, so that many deadlines are equal.
WAITS: Final = st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 8.0])
# Few timers, so that much happens to each.
WHICH: Final = st.integers(0, 2)


@final
class TimersMachine(RuleBasedStateMachine):
    """Some timers, and somebody who looks at them when told to, as the event loop does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.alarm = math.inf  # when to look next
        self.tested = Timers(self.on_earlier)
        self.called: list[Timer] = []
        self.timers = [self.new() for _ in range(3)]
        self.deadlines = [math.inf] * 3

    def new(self) -> Timer:
        timer = self.tested.add(lambda: self.called.append(timer))
        return timer

    def on_earlier(self, deadline: float) -> None:
        assert deadline < self.alarm, "it says earlier, and is not"
        self.alarm = deadline

    @rule(which=WHICH, wait=WAITS | st.just(math.inf))
    def move(self, which: int, wait: float) -> None:
        self.deadlines[which] = self.now + wait
        self.timers[which].move(self.now + wait)

    @rule(which=WHICH)
    def close(self, which: int) -> None:
        self.timers[which].close()
        self.timers[which], self.deadlines[which] = self.new(), math.inf

    @rule(wait=WAITS)
    def pass_time(self, wait: float) -> None:
        self.now += wait
        if self.alarm > self.now:
            return
        self.alarm = math.inf  # it has gone off
        expected = sorted(deadline for deadline in self.deadlines if deadline <= self.now)
        came: list[float] = []
        while (timer := self.tested.next_due(self.now)) is not None:
            timer.call()
            which = self.timers.index(self.called.pop())  # a closed one is not among them
            assert self.timers[which] is timer
            came.append(self.deadlines[which])
            self.deadlines[which] = math.inf
        assert came == expected, "what is due first is called first"
        self.alarm = self.tested.next_look

    @invariant()
    def nobody_is_called_late(self) -> None:
        assert self.alarm <= min(self.deadlines)

    @invariant()
    def each_tells_its_deadline(self) -> None:
        assert [timer.deadline for timer in self.timers] == self.deadlines


TestTimers = fuzzed_machine(TimersMachine.TestCase, 200)


def test_moving_later_costs_no_entry() -> None:
    """The idle deadline of a busy visitor moves with each byte."""
    alarms: list[float] = []
    timers = Timers(alarms.append)
    timer = timers.add(lambda: None)
    for deadline in range(10, 1000):
        timer.move(deadline)
    assert alarms == [10]
    assert timers.next_due(10) is None
    assert timers.next_look == 999
    assert timers.next_due(999) is timer
    assert timers.next_look == math.inf, "one entry was all"


def test_a_timer_that_came_may_be_set_by_its_own_callback() -> None:
    called: list[float] = []
    timers = Timers(lambda deadline: None)

    def again() -> None:
        called.append(timer.deadline)
        timer.move(2)

    timer = timers.add(again)
    timer.move(1)
    for now in (1, 2, 3):
        due = timers.next_due(now)
        assert due is timer
        due.call()
    assert called == [math.inf] * 3


def test_an_old_entry_of_a_timer_does_not_let_it_delay_another() -> None:
    alarms: list[float] = []
    timers = Timers(alarms.append)
    timer, other = timers.add(lambda: None), timers.add(lambda: None)
    timer.move(5)
    timer.move(3)
    other.move(7)
    assert timers.next_due(3) is timer
    timer.move(10)
    assert alarms == [5, 3], "10 is later than 7"


def test_closed_timers_do_not_pile_up() -> None:
    """Each short connection closes a deadline that is minutes away."""
    alarms: list[float] = []
    timers = Timers(alarms.append)
    called: list[int] = []
    kept = [timers.add(lambda number=number: called.append(number)) for number in range(10)]  # type: ignore[misc]
    for number, timer in enumerate(kept):
        timer.move(300 + number)
    most = 0
    for _ in range(10_000):
        timer = timers.add(lambda: None)
        timer.move(300)
        timer.close()
        timer.close()
        most = max(most, len(timers._heap))
    assert most < 3000
    while (due := timers.next_due(400)) is not None:
        due.call()
    assert called == [*range(10)]
    assert timers.next_look == math.inf


def test_nobody_looks_for_closed_timers_nor_for_those_that_moved_later() -> None:
    """Each short connection closes a deadline seconds before it would come."""
    timers = Timers(lambda deadline: None)
    closed, moved, kept = (timers.add(lambda: None) for _ in range(3))
    closed.move(1)
    moved.move(2)
    kept.move(4)
    closed.close()
    moved.move(3)
    assert timers.next_look == 3
    moved.close()
    assert timers.next_look == 4
