"""`yamux.connection`, cancelled at every checkpoint."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest
import trio
from yamux_rig import GOODBYE, Running, answer_correctly, ask, body, parse, pipe, two

from pioneer_tunnel.yamux.flow import INITIAL_WINDOW


class CancelAt(trio.abc.Instrument):
    """Cancels `scope` when the tasks that are `meant` have stopped for the `count`th time, at any checkpoint."""

    def __init__(self, count: int, scope: trio.CancelScope, meant: Callable[[trio.lowlevel.Task], bool]) -> None:
        self.left = count
        self._scope: Final = scope
        self._meant: Final = meant

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.left and self._meant(task):
            self.left -= 1
            if not self.left:
                self._scope.cancel()


@contextmanager
def cancelled_at(count: int, scope: trio.CancelScope, meant: Callable[[trio.lowlevel.Task], bool]) -> Iterator[None]:
    instrument = CancelAt(count, scope, meant)
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


def is_below(task: trio.lowlevel.Task, parent: trio.lowlevel.Task | None) -> bool:
    return task.parent_nursery is not None and task.parent_nursery.parent_task is parent


async def use_a_stream(running: Running, size: int) -> None:
    """Everything that one does with a stream."""
    async with await running.open() as stream:
        assert await ask(stream, body(size)) == body(size)


async def test_a_user_of_a_stream_who_is_cancelled_anywhere_leaves_the_session_whole() -> None:
    """No half frame, no task, no stream, no byte of a budget is left behind, and the next user is served."""
    user = trio.lowlevel.current_task()
    for count in itertools.count(1):
        async with two(pipe(40_000, random.Random(count))) as both, trio.open_nursery() as nursery:
            nursery.start_soon(both.server.serve_echo)
            scope = trio.CancelScope()
            with cancelled_at(count, scope, lambda task: task is user or is_below(task, user)), scope:
                await use_a_stream(both.client, INITIAL_WINDOW + 1000)
            await answer_correctly(await both.client.open(), b"next")
            await both.settle()
            nursery.cancel_scope.cancel()
            for running in both:
                assert not running.ended.is_set()
                assert running.session.unread == 0
                assert running.session._budget.left == running.session.limits.window_growth
        if not scope.cancelled_caught:
            break
    assert count > 20


async def test_a_session_that_is_cancelled_anywhere_ends_with_a_whole_frame() -> None:
    """Whichever of its tasks stands wherever: only the cancellation comes out, and the peer sees an orderly end."""
    for count in itertools.count(1):
        ends = pipe(20_000, random.Random(count))
        ends[0].outbound.record = record = bytearray()
        async with two(ends) as (client, server), trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_echo)
            with cancelled_at(count, client.scope, lambda task, client=client: is_below(task, client.task)):  # type: ignore[misc]
                try:
                    await use_a_stream(client, 60_000)
                except* trio.BrokenResourceError:
                    pass
            cancelled = client.scope.cancel_called
            client.scope.cancel()
            await client.ended.wait()
            await server.ended.wait()
            assert client.ending is None
            assert isinstance(server.ending, trio.BrokenResourceError)
            assert parse([record]).count(GOODBYE) == 1
            with pytest.raises(trio.BrokenResourceError):
                await client.open()
            nursery.cancel_scope.cancel()
        if not cancelled:
            break
    assert count > 20
