"""Work that may hang, in a task of its own: its caller can stop waiting while the work goes on.

A thread that hangs cannot be stopped, and a host's keystore may ignore cancellation. A caller that waited inside such
work could not be cancelled either. So the work runs in a system task of Trio. When `trio.run` ends, the work gets 5 s
more and is then cancelled.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Awaitable, Callable
from typing import Any, Final, Generic, TypeVar, final

import trio

__all__ = ["Detached", "finish_in_thread", "read_in_thread"]

LAST_SECONDS: Final = 5.0
"""Seconds that begun work may go on when its caller is cancelled, or when `trio.run` ends."""

_T = TypeVar("_T")


@final
class Detached(Generic[_T]):
    """Work that has begun.

    Args:
        work: the work.

    Attributes:
        abandoned: True once the caller has stopped waiting before the work ended.
    """

    def __init__(self, work: Callable[[], Awaitable[_T]]) -> None:
        self.abandoned: bool = False
        self._ended = trio.Event()
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._scope: Final = trio.CancelScope(shield=True)
        trio.lowlevel.spawn_system_task(self._run, work, context=contextvars.copy_context())

    @property
    def ended(self) -> bool:
        """Whether the work is over."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Cancel the work. It may ignore that."""
        self._scope.cancel()

    async def result(self, *, seconds: float = math.inf, last_seconds: float = 0.0) -> _T:
        """Wait for the work; returns or raises what it did. Call it once.

        Args:
            seconds: how long to wait.
            last_seconds: how much longer to wait when the caller is cancelled.

        Raises:
            trio.TooSlowError: the work has not ended in time. It goes on.
            trio.Cancelled: the caller was cancelled, and the work has not ended in `last_seconds`. It goes on.
        """
        try:
            with trio.move_on_after(seconds):
                await self._ended.wait()
        except trio.Cancelled:
            with trio.move_on_after(last_seconds, shield=True):
                await self._ended.wait()
            if not self.ended:
                raise
        finally:
            self.abandoned = not self.ended
        if self.abandoned:
            raise trio.TooSlowError
        if self._results:
            return self._results.pop()
        assert self._error is not None
        error, self._error = self._error, None
        try:
            raise error
        finally:
            del error  # breaks the reference cycle of frame and error

    async def _run(self, work: Callable[[], Awaitable[_T]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._work, work)
            try:
                # No deadline: work that hangs costs a task and nothing else.
                await self._ended.wait()
            except trio.Cancelled:
                self._scope.deadline = trio.current_time() + LAST_SECONDS
                raise

    async def _work(self, work: Callable[[], Awaitable[_T]]) -> None:
        try:
            with self._scope:
                self._results.append(await work())
            if not self._results:
                self._error = trio.TooSlowError()
        except BaseException as error:  # noqa: BLE001  # raised again in `result`; a system task must not raise
            self._error = error
        finally:
            self._ended.set()


async def read_in_thread(call: Callable[..., _T], *args: Any) -> _T:
    """Call a function that blocks and changes nothing in a thread. When cancelled, do not wait for it."""
    return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True)


async def finish_in_thread(call: Callable[..., _T], *args: Any) -> _T:
    """Call a function that blocks in a thread. When cancelled after it has begun, wait up to 5 s for its end."""
    await trio.lowlevel.checkpoint_if_cancelled()

    async def work() -> _T:
        return await read_in_thread(call, *args)

    return await Detached(work).result(last_seconds=LAST_SECONDS)
