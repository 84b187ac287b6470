"""Calls from asyncio into the Trio thread: results, exceptions and cancellation pass as if both were one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from .._hosts.trio_thread import CallCancelled, Stopped, TrioThread

__all__ = ["call", "open_thread", "run_beside", "start", "task_group"]

_T = TypeVar("_T")


async def call(thread: TrioThread, work: Callable[[], Awaitable[_T]]) -> _T:
    """Run an async function in the Trio thread. If cancelled, cancel it there, and wait until it has ended.

    Raises:
        asyncio.CancelledError: cancelled. An error that the function raises all the same comes out instead of it.
        Stopped: the thread has ended meanwhile.
    """
    running = thread.call(work)
    del work  # its arguments may hold a key, which no traceback may show
    interruption = await _wait(running.future, running.cancel)
    try:
        result = running.future.result()
    except CallCancelled:
        raise interruption or Stopped("it has been stopped") from None
    if interruption is not None:
        raise interruption
    return result


async def _wait(future: Future[Any], cancel: Callable[[], None]) -> asyncio.CancelledError | None:
    """Wait until `future` is done, cancelled or not; returns the cancellation."""
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def wake_from_thread(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop is closed, so no task waits
            loop.call_soon_threadsafe(wake)

    future.add_done_callback(wake_from_thread)
    interruption: asyncio.CancelledError | None = None
    while not future.done():
        try:
            # No deadline: work in the thread has its own, also when it is cancelled.
            await asyncio.wait([done])
        except asyncio.CancelledError as error:
            interruption = error
            cancel()
    return interruption


@asynccontextmanager
async def open_thread(name: str) -> AsyncIterator[TrioThread]:
    """A Trio thread, which ends with the block."""
    thread = TrioThread(name)
    try:
        interruption = await _wait(thread.started, thread.stop)
        if interruption is not None:
            raise interruption
        thread.started.result()
        yield thread
    finally:
        thread.stop()
        interruption = await _wait(thread.ended, thread.stop)
        thread.join()
        if interruption is not None:
            raise interruption


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group for our own tasks: a single error comes out bare, also one of the block.

    Its tasks are not cancelled when the block ends.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        error = group.exceptions[0]
        context = error.__context__
        try:
            raise error
        finally:
            error.__context__ = context  # not the group
            del error, context


async def start(
    thread: TrioThread, tasks: asyncio.TaskGroup, work: Callable[[Callable[[], None]], Awaitable[object]]
) -> asyncio.Task[object]:
    """Call `work` in a task of `tasks`; returns when it has called its argument. If it fails first, `tasks` raises."""
    loop = asyncio.get_running_loop()
    has_started = asyncio.Event()

    def started() -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(has_started.set)

    task = tasks.create_task(call(thread, partial(work, started)), name="pioneer-tunnel")
    try:
        # No deadline: without `started`, the task fails, and then the group cancels this.
        await has_started.wait()
    except BaseException:
        task.cancel()
        raise
    return task


@asynccontextmanager
async def run_beside(work: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Run `work` in a task beside the block, and cancel it when the block ends. If `work` raises, cancel the block."""
    async with task_group() as tasks:

        async def run() -> None:
            await work()

        task = tasks.create_task(run())
        try:
            yield
        finally:
            task.cancel()
