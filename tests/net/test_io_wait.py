"""`io_wait`: events that take no step of a task."""

from __future__ import annotations

import gc
import os
import queue
import select
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
import trio.testing
from rig import nothing_left_behind, socket_pair

from pioneer_tunnel._net.fastpath import io_wait
from pioneer_tunnel._net.fastpath.event_loop import CAN_WATCH
from pioneer_tunnel._net.fastpath.io_wait import IoWait
from pioneer_tunnel._net.fastpath.stay import Stay

pytestmark = pytest.mark.skipif(not CAN_WATCH, reason="this system has no epoll")

EVENTS = 20


class Steps(trio.abc.Instrument):
    """Counts the steps of tasks."""

    def __init__(self) -> None:
        self.count = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1


class Echo:
    """Answers each byte that comes, in the callback of its event."""

    def __init__(self, answering: socket.socket) -> None:
        self._socket = answering
        self.answered = 0

    def on_events(self, events: int) -> None:
        self._socket.send(self._socket.recv(1))
        self.answered += 1


async def ask(theirs: socket.socket, times: int) -> None:
    """Send bytes, and wait for each answer as a task of Trio."""
    for _ in range(times):
        theirs.send(b"x")
        await trio.lowlevel.wait_readable(theirs)
        assert theirs.recv(1) == b"x"


@asynccontextmanager
async def answering() -> AsyncIterator[tuple[socket.socket, Echo]]:
    """The other end of an echo that the event loop calls, and the echo."""
    with socket_pair() as (ours, theirs), Stay() as stay:
        echo = Echo(ours)
        stay.reactor.watch(ours.fileno(), echo.on_events)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stay.wait)
            yield theirs, echo
            stay.reactor.unwatch(ours.fileno())
            stay.end()


@contextmanager
def counted() -> Iterator[Steps]:
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    try:
        yield steps
    finally:
        trio.lowlevel.remove_instrument(steps)


async def test_an_event_takes_no_step_of_a_task_after_the_first_one() -> None:
    # The last to leave closes the epoll. With the next one, it is the same again.
    for _ in range(2):
        with nothing_left_behind():
            async with answering() as (theirs, _):
                await ask(theirs, 1)
                with counted() as steps:
                    await ask(theirs, EVENTS)
                assert steps.count == EVENTS, "those of the task that asks"


async def test_where_trio_minds_a_task_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_wait, "_is_possible", lambda: False)
    async with answering() as (theirs, _):
        await ask(theirs, 1)
        with counted() as steps:
            await ask(theirs, EVENTS)
        assert steps.count >= 2 * EVENTS


async def test_a_process_without_proc_has_a_task_that_waits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(io_wait, "_is_possible", lambda: True)
    monkeypatch.setattr(io_wait, "Path", lambda *parts: tmp_path / "absent")
    with nothing_left_behind():
        async with answering() as (theirs, echo):
            await ask(theirs, 3)
    assert echo.answered == 3


def test_the_epoll_of_another_loop_may_have_a_file_that_had_the_same_number() -> None:
    """A copy of the file, for example in a child, keeps the entry."""

    def leave_entry(number: int) -> None:
        kept = os.dup(number)
        os.dup2(held.fileno(), number)
        other.register(number, select.EPOLLIN)
        os.dup2(kept, number)
        os.close(kept)

    async def run() -> None:
        with socket_pair() as (ours, theirs), Stay() as stay:
            leave_entry(stay.reactor.descriptor)
            stay.reactor.watch(ours.fileno(), Echo(ours).on_events)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stay.wait)
                await ask(theirs, 1)
                with counted() as steps:
                    await ask(theirs, EVENTS)
                assert steps.count == EVENTS, "those of the task that asks"
                stay.reactor.unwatch(ours.fileno())
                stay.end()

    with select.epoll() as other, socket.socket() as held:
        trio.run(run)


@pytest.fixture
def new_trial() -> Iterator[None]:
    """The trial is made again, in this test and after it."""
    io_wait._is_possible.cache_clear()
    yield
    io_wait._is_possible.cache_clear()


@pytest.mark.usefixtures("new_trial")
def test_the_trio_that_is_installed_allows_it() -> None:
    assert io_wait._is_possible()


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("new_trial")
def test_a_trio_that_knows_all_it_waits_for_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = sys.modules["trio._core._io_epoll"].EpollIOManager
    process_events = manager.process_events

    def strict(self: Any, events: list[tuple[int, int]]) -> None:
        for descriptor, _ in events:
            if descriptor not in self._registered and descriptor != self._force_wakeup_fd:
                raise KeyError(descriptor)
        process_events(self, events)

    monkeypatch.setattr(manager, "process_events", strict)
    assert not io_wait._is_possible()
    gc.collect()  # the tasks of a run that has crashed complain


def test_a_trio_that_is_the_guest_of_another_loop_is_woken_as_well() -> None:
    calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
    ended: list[outcome.Outcome[None]] = []

    async def run() -> None:
        async with answering() as (theirs, _):
            await ask(theirs, EVENTS)

    trio.lowlevel.start_guest_run(
        run, run_sync_soon_threadsafe=calls.put, run_sync_soon_not_threadsafe=calls.put, done_callback=ended.append
    )
    while not ended:
        calls.get(timeout=10)()
    ended[0].unwrap()


async def test_an_exit_that_a_callback_asks_for_is_raised_where_the_leader_waits() -> None:
    """Trio would log what an instrument raises, and go on without it."""

    def leave(events: int) -> None:
        raise SystemExit

    async def ask_and_leave() -> None:
        await ask(theirs, EVENTS)
        sender.send(b"x")

    with socket_pair() as (ours, theirs), socket_pair() as (last, sender), Stay() as stay:
        stay.reactor.watch(ours.fileno(), Echo(ours).on_events)
        stay.reactor.watch(last.fileno(), leave)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_and_leave)
            with pytest.raises(SystemExit):
                await stay.wait()
        for watched in (ours, last):
            stay.reactor.unwatch(watched.fileno())


async def test_an_event_and_a_queued_turn_at_once_cost_nothing_later() -> None:
    """What is queued ends the leader's wait, also one that an event has ended before. Trio has no descriptor then."""

    async def queue_with_the_event() -> None:
        await trio.lowlevel.wait_readable(last)
        stay.reactor.queue(lambda: 0)

    for _ in range(10):  # Trio chooses at random which of two tasks is first
        with socket_pair() as (ours, theirs), socket_pair() as (last, sender), Stay() as stay:
            stay.reactor.watch(ours.fileno(), Echo(ours).on_events)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stay.wait)
                nursery.start_soon(queue_with_the_event)
                await trio.testing.wait_all_tasks_blocked()
                sender.send(b"x")
                await ask(theirs, 2)
                with counted() as steps:
                    await ask(theirs, EVENTS)
                assert steps.count == EVENTS, "those of the task that asks"
                stay.reactor.unwatch(ours.fileno())
                stay.end()


async def test_an_exit_that_a_callback_asks_for_while_nobody_leads_is_raised_by_the_last_who_leaves() -> None:
    def leave(events: int) -> None:
        raise SystemExit

    async def be_left() -> None:
        with Stay() as stay:
            stay.reactor.watch(ours.fileno(), Echo(ours).on_events)
            stay.reactor.watch(last.fileno(), leave)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stay.wait)
                await ask(theirs, EVENTS)
                nursery.cancel_scope.cancel()
            sender.send(b"x")
            await trio.testing.wait_all_tasks_blocked()
            for watched in (ours, last):
                stay.reactor.unwatch(watched.fileno())

    with socket_pair() as (ours, theirs), socket_pair() as (last, sender):
        with pytest.raises(SystemExit):
            await be_left()
        with Stay():
            pass  # it is raised once


@pytest.mark.parametrize("when", ["begin", "stop"])
def test_an_interrupt_leaves_nothing_in_trios_wait(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = getattr(IoWait, when)

    def interrupted(*arguments: Any) -> Any:
        if when == "stop":
            signal.raise_signal(signal.SIGINT)
            return step(*arguments)
        io_wait = step(*arguments)
        signal.raise_signal(signal.SIGINT)
        return io_wait

    monkeypatch.setattr(IoWait, when, staticmethod(interrupted) if when == "begin" else interrupted)
    left: list[int] = []

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def run() -> None:
        before = descriptors()
        try:
            with socket_pair() as (ours, theirs), Stay() as stay:
                stay.reactor.watch(ours.fileno(), Echo(ours).on_events)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(stay.wait)
                    await ask(theirs, EVENTS)
                    stay.reactor.unwatch(ours.fileno())
                    stay.end()
        finally:
            left.append(descriptors() - before)

    with pytest.RaisesGroup(KeyboardInterrupt, allow_unwrapped=True, flatten_subgroups=True):
        trio.run(run)
    assert left == [0]
