"""Turns: no tenant and no address delays the others, whatever the number of its connections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import trio
import trio.testing

from pioneer_tunnel.relay.visitors.turns import BUDGET, TURN_COST, TURNS_PER_ROUND, WORK_PER_PASS, Turn, Turns


class Passes(trio.abc.Instrument):
    """Counts the passes of the event loop."""

    count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


def nothing() -> None:
    """The work of those who only wait."""


async def waited_for(turn: Turn, work: Callable[[], None] = nothing) -> None:
    """Wait for a turn and do `work` in it. A checkpoint only if it is not granted at once."""
    granted = trio.Event()

    def on_granted() -> None:
        work()
        granted.set()

    if turn.ask(on_granted):
        work()
    else:
        try:
            await granted.wait()
        finally:
            turn.leave()


class Crowd:
    """Connections that take turns, and the order and event loop pass of each turn."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.turns = Turns()
        self.order: list[str] = []
        self.passes: list[int] = []
        self._nursery = nursery
        self._clock = Passes()
        trio.lowlevel.add_instrument(self._clock)

    async def exhaust(self) -> None:
        """Spend what may be spent without a queue."""
        await waited_for(Turn(self.turns, "nobody", None))
        self.turns.spend(BUDGET)

    def join(self, name: str, tenant: str, address: str | None, turns: int = 1, *, items: int = WORK_PER_PASS) -> None:
        turn = Turn(self.turns, tenant, address)

        def work() -> None:
            self.order.append(name)
            self.passes.append(self._clock.count)
            turn.spend(items)

        async def take_turns() -> None:
            for _ in range(turns):
                await waited_for(turn, work)

        self._nursery.start_soon(take_turns)


async def test_a_turn_is_granted_at_once_while_little_was_spent(mock_clock: trio.testing.MockClock) -> None:
    turn = Turn(Turns(), "tenant", "192.0.2.1")
    with trio.testing.assert_no_checkpoints():
        for _ in range(BUDGET // (TURN_COST + 100)):
            await waited_for(turn)
            turn.spend(100)


async def test_what_was_spent_is_forgotten_after_a_while(mock_clock: trio.testing.MockClock) -> None:
    turn = Turn(Turns(), "tenant", "192.0.2.1")
    await waited_for(turn)
    turn.spend(BUDGET)
    with trio.testing.assert_checkpoints():
        await waited_for(turn)
    mock_clock.jump(1)
    with trio.testing.assert_no_checkpoints():
        await waited_for(turn)


@pytest.mark.parametrize(
    ("tenant", "address"),
    [("another", "192.0.2.2"), ("flooded", "192.0.2.2"), ("another", None), ("another", "192.0.2.1")],
    ids=["another tenant", "another address", "behind a proxy", "another tenant of the same address"],
)
async def test_two_hundred_connections_wait_for_each_other_and_not_others_for_them(
    mock_clock: trio.testing.MockClock, tenant: str, address: str | None
) -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.exhaust()
        for _ in range(200):
            crowd.join("flood", "flooded", "192.0.2.1", turns=5)
        while len(crowd.order) < 100:
            await trio.lowlevel.checkpoint()
        before = len(crowd.order)
        crowd.join("victim", tenant, address)
        while crowd.order.count("victim") == 0:
            await trio.lowlevel.checkpoint()
        assert crowd.order.index("victim") - before <= 4
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("addresses", "most"), [(1, 1), (100, TURNS_PER_ROUND)], ids=["all of one address", "each of another address"]
)
async def test_turns_in_a_pass_are_bounded_whatever_the_number_of_tenants(
    mock_clock: trio.testing.MockClock, addresses: int, most: int
) -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.exhaust()
        for number in range(100):
            crowd.join("one", f"tenant {number}", f"192.0.2.{number % addresses}")
        while len(crowd.order) < 100:
            await trio.lowlevel.checkpoint()
        assert max(Counter(crowd.passes).values()) == most


async def test_short_turns_share_a_pass(mock_clock: trio.testing.MockClock) -> None:
    """With one in each pass, 100 visitors of one address were served at the rate of the event loop's passes."""
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.exhaust()
        for _ in range(100):
            crowd.join("one", "tenant", "192.0.2.1", items=16)
        while len(crowd.order) < 100:
            await trio.lowlevel.checkpoint()
        assert max(Counter(crowd.passes).values()) == WORK_PER_PASS // (TURN_COST + 16)


async def test_those_who_were_cancelled_leave_the_queue(mock_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.exhaust()
        async with trio.open_nursery() as cancelled:
            gone = Crowd(cancelled)
            gone.turns = crowd.turns
            for number in range(20):
                gone.join("gone", f"tenant {number}", None)
            await trio.lowlevel.checkpoint()
            cancelled.cancel_scope.cancel()
        granted = len(gone.order)
        assert granted <= 2 * TURNS_PER_ROUND
        crowd.join("here", "tenant 0", None)
        while not crowd.order:
            await trio.lowlevel.checkpoint()
        assert crowd.order == ["here"]
        assert len(gone.order) == granted


async def test_who_asks_again_and_again_waits_once(mock_clock: trio.testing.MockClock) -> None:
    """Each packet of a visitor that waited for its turn gave it one more."""
    turns = Turns()
    Turn(turns, "nobody", None).ask(nothing)
    turns.spend(BUDGET)
    granted: list[str] = []
    turn = Turn(turns, "tenant", "192.0.2.1")
    for _ in range(10):
        assert not turn.ask(lambda: granted.append("turn"))
    await trio.testing.wait_all_tasks_blocked()
    assert granted == ["turn"]
    assert not turns.waiting
