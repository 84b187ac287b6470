"""`event_loop`: which task leads, and which callbacks run. In Trio's wait for I/O, and in a task."""

from __future__ import annotations

import select

import pytest
import trio
import trio.testing
from rig import eventually, no_hang, nothing_left_behind, socket_pair

from pioneer_tunnel._net.fastpath import io_wait
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH, Reactor
from pioneer_tunnel._net.fastpath.stay import Stay
from pioneer_tunnel._net.turn import Turn

pytestmark = pytest.mark.skipif(not CAN_WATCH, reason="this system has no epoll")


@pytest.fixture(autouse=True, params=["in Trio's wait", "in a task"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where callbacks run."""
    if request.param == "in a task":
        monkeypatch.setattr(io_wait, "_is_possible", lambda: False)


async def test_news_are_told_by_their_edge_for_as_long_as_one_stays() -> None:
    told: list[int] = []
    with nothing_left_behind(), socket_pair() as (ours, theirs), Stay() as stay:
        async with trio.open_nursery() as nursery:
            stay.reactor.watch(ours.fileno(), told.append)
            nursery.start_soon(stay.wait)
            await trio.testing.wait_all_tasks_blocked()
            assert told == []
            for count in (1, 2):
                theirs.send(b"x")
                await eventually(lambda count=count: len(told) == count)  # type: ignore[misc]
                await trio.testing.wait_all_tasks_blocked()
                assert len(told) == count, "it is told again of what is there still"
            assert told[0] == select.EPOLLIN
            with pytest.raises(trio.BusyResourceError):
                stay.reactor.watch(ours.fileno(), told.append)
            stay.reactor.watch_writable(ours.fileno())
            await eventually(lambda: len(told) == 3)
            assert told[2] == select.EPOLLIN | select.EPOLLOUT
            stay.reactor.unwatch(ours.fileno())
            theirs.send(b"x")
            await trio.testing.wait_all_tasks_blocked()
            stay.end()
    assert len(told) == 3


@pytest.mark.parametrize("leaves", ["ended", "cancelled"])
@pytest.mark.parametrize("first", [True, False])
async def test_whoever_leaves_the_others_are_told_of_their_news(leaves: str, first: bool) -> None:
    told: list[str] = []
    reactor = Reactor.current()
    with socket_pair() as (ours, theirs):

        async def watch(name: str, *, task_status: trio.TaskStatus[tuple[Stay, trio.CancelScope]]) -> None:
            with trio.CancelScope() as scope, Stay() as stay:
                if name == "watching":
                    reactor.watch(ours.fileno(), lambda events: told.append(name))
                task_status.started((stay, scope))
                try:
                    await stay.wait()
                finally:
                    if name == "watching":
                        reactor.unwatch(ours.fileno())

        async with trio.open_nursery() as nursery:
            # The first to come leads.
            names = ["leaving", "watching"] if first else ["watching", "leaving"]
            stays = {}
            for name in names:
                stays[name] = await nursery.start(watch, name)
                await trio.testing.wait_all_tasks_blocked()
            stay, scope = stays["leaving"]
            if leaves == "ended":
                stay.end()
            else:
                scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            theirs.send(b"x")
            await eventually(lambda: told == ["watching"])
            stays["watching"][0].end()


async def test_turns_are_taken_in_order_and_let_other_tasks_run() -> None:
    order: list[str] = []
    reactor = Reactor.current()

    def turn(name: str, left: int) -> int:
        order.append(name)
        if left:
            reactor.queue(lambda: turn(name, left - 1))
        return 1024 * 1024  # as much as fits between two checkpoints

    with Stay() as stay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay.wait)
            await trio.testing.wait_all_tasks_blocked()
            for name in "ab":
                reactor.queue(lambda name=name: turn(name, 3))  # type: ignore[misc]
            with socket_pair() as (ours, theirs):
                reactor.watch(ours.fileno(), lambda events: None)
                theirs.send(b"x")  # the leader sleeps
                while len(order) < 8:
                    before = len(order)
                    await trio.lowlevel.checkpoint()
                    assert len(order) <= before + 2  # two rounds may meet in one step of ours
                reactor.unwatch(ours.fileno())
            stay.end()
    assert order == list("abababab")


async def test_the_lead_is_handed_over_although_the_one_who_had_it_stays_on() -> None:
    """Everything in the run stood still while a session that had ended waited for its other tasks."""
    told: list[int] = []
    reactor = Reactor.current()
    with socket_pair() as (ours, theirs), Stay() as first, Stay() as second:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as leading:
                    leading.start_soon(first.wait)
                    await trio.testing.wait_all_tasks_blocked()
                    reactor.watch(ours.fileno(), told.append)
                    nursery.start_soon(second.wait)
                    await trio.testing.wait_all_tasks_blocked()
                    scope.cancel()
            theirs.send(b"x")
            await eventually(lambda: len(told) == 1)
            reactor.unwatch(ours.fileno())
            second.end()


async def test_what_fails_is_logged_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []

    def fail(*arguments: object) -> int:
        raise ZeroDivisionError("a bug")

    reactor = Reactor.current()
    with socket_pair() as (bad, bad_peer), socket_pair() as (good, good_peer), Stay() as stay:
        async with trio.open_nursery() as nursery:
            reactor.watch(bad.fileno(), fail)  # type: ignore[arg-type]  # it fails
            reactor.watch(good.fileno(), told.append)
            reactor.queue(fail)
            nursery.start_soon(stay.wait)
            await trio.testing.wait_all_tasks_blocked()
            for peer in (bad_peer, good_peer):
                peer.send(b"x")
            await eventually(lambda: len(told) == 1)
            for watched in (good, bad):
                reactor.unwatch(watched.fileno())
            stay.end()
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ZeroDivisionError] * 2


async def test_a_turn_that_queues_itself_lets_other_tasks_run_also_if_it_moved_nothing() -> None:
    reactor = Reactor.current()
    left = 100

    def turn() -> int:
        nonlocal left
        left -= 1
        if left:
            reactor.queue(turn)
        return 0

    seen = set()
    with Stay() as stay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay.wait)
            await trio.testing.wait_all_tasks_blocked()
            reactor.queue(turn)
            while left:
                seen.add(left)
                await trio.lowlevel.checkpoint()
            stay.end()
    assert len(seen) > 100 / 8


async def test_a_timer_that_is_always_due_does_not_keep_turns_from_running() -> None:
    """They never ran, and were dropped when the last one left."""
    turned = trio.Event()

    def turn() -> int:
        turned.set()
        return 0

    with no_hang(), Stay() as stay:
        timer = stay.reactor.timer(lambda: timer.move(trio.current_time()))
        timer.move(trio.current_time())
        async with trio.open_nursery() as nursery:
            stay.reactor.queue(turn)
            nursery.start_soon(stay.wait)
            await turned.wait()
            stay.end()
        timer.close()


async def test_what_is_queued_before_the_last_one_leaves_runs() -> None:
    told: list[str] = []

    def turn() -> int:
        told.append("turn")
        return 0

    with Stay() as stay:
        stay.reactor.queue(turn)
    assert told == ["turn"]


async def test_an_exit_that_the_last_one_is_asked_for_leaves_no_epoll_behind() -> None:
    def turn() -> int:
        raise SystemExit

    with nothing_left_behind(), pytest.raises(SystemExit), Stay() as stay:
        stay.reactor.queue(turn)
    assert Reactor.current().descriptor == -1


async def test_a_turn_that_is_queued_again_and_again_runs_once() -> None:
    """Each edge queued a busy connection again, so it had more and more turns for one of the others."""
    order: list[str] = []

    class Connection:
        def __init__(self, name: str) -> None:
            self._name = name

        def turn(self) -> int:
            order.append(self._name)
            return 0

    reactor = Reactor.current()
    busy, other = Connection("busy"), Connection("other")
    with Stay() as stay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay.wait)
            await trio.testing.wait_all_tasks_blocked()
            for connection in (busy, busy, other, busy):
                reactor.queue(connection.turn)
            await trio.testing.wait_all_tasks_blocked()
            stay.end()
    assert order == ["busy", "other"]


async def test_an_exit_that_a_callback_asks_for_leaves_the_event_loop_in_order() -> None:
    """It ends the task that leads. The next one that leads must be woken by what is queued then."""

    told: list[str] = []
    reactor, turn = Reactor.current(), Turn.current()

    def leave() -> int:
        raise SystemExit

    def tell() -> int:
        told.append("again")
        return 0

    with Stay() as first, Stay() as second:
        reactor.queue(leave)
        with pytest.raises(SystemExit):
            await first.wait()
        assert (turn.running, turn.started) == (False, None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(second.wait)
            await trio.testing.wait_all_tasks_blocked()
            reactor.queue(tell)
            await trio.testing.wait_all_tasks_blocked()
            second.end()
    assert told == ["again"]


async def test_what_fails_at_the_end_of_a_turn_is_logged_and_the_turn_ends(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ZeroDivisionError("a bug")

    def end_badly() -> int:
        turn.at_end(fail)
        return 0

    reactor, turn = Reactor.current(), Turn.current()
    with Stay() as stay:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay.wait)
            await trio.testing.wait_all_tasks_blocked()
            reactor.queue(end_badly)
            await eventually(lambda: caplog.records)
            assert not turn.running
            stay.end()
    with pytest.raises(ZeroDivisionError):
        turn.run(end_badly)
    assert not turn.running
