"""A thread that runs Trio, for hosts that do not.

Trio could also run as a guest in the event loop of asyncio. A thread was chosen, for what was tried:

- A callback that blocks the event loop stops a guest, and with it the heartbeat of the tunnel. A thread goes on.
- A thread of a process has one Trio run. So two tunnels in one event loop would have to share a guest.
- When an event loop ends before its guest, nothing of the guest is cleaned up. A thread ends in good order.
- Ctrl-C raises `KeyboardInterrupt` in the main thread alone, so never in the middle of Trio.

The thread ends with `stop`. If the host forgets it, the thread does not keep the process: it stops when the interpreter
exits, which waits for it for some seconds.
"""

from __future__ import annotations

import atexit
import contextvars
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Final, Generic, TypeVar, final

import trio

__all__ = ["Call", "CallCancelled", "Stopped", "TrioThread", "at_once"]

EXIT_TIMEOUT: Final = 5.0
"""Seconds that an exiting interpreter waits. A tunnel says goodbye within one."""

_T = TypeVar("_T")


async def at_once(work: Callable[[], _T]) -> _T:
    """What a function of the thread returns that does not wait."""
    return work()


@final
class CallCancelled(Exception):
    """A call was cancelled, and has ended."""


@final
class Stopped(RuntimeError):
    """The thread has ended, so nothing can be called in it."""


@final
class Call(Generic[_T]):
    """An async function that runs in the thread.

    Attributes:
        future: what comes of it: a result, the error, or `CallCancelled`.
    """

    def __init__(self, work: Callable[[], Awaitable[_T]], token: trio.lowlevel.TrioToken) -> None:
        self.future: Final[Future[_T]] = Future()
        self._work: Callable[[], Awaitable[_T]] | None = work
        self._context: Final = contextvars.copy_context()
        self._token: Final = token
        self._scope: Final = trio.CancelScope()

    def cancel(self) -> None:
        """Cancel it. It ends when Trio has unwound it, which is when `future` is done."""
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._scope.cancel)

    def begin(self, nursery: trio.Nursery) -> None:
        """Start it in the context of the caller."""
        try:
            self._context.run(nursery.start_soon, self._run)
        except RuntimeError:  # the nursery is closed
            self._work = None
            self.future.set_exception(Stopped("it has been stopped"))

    async def _run(self) -> None:
        work, self._work = self._work, None
        assert work is not None
        waiting = work()
        del work  # its arguments may hold a key, which no traceback may show
        try:
            with self._scope:
                result = await waiting
                self.future.set_result(result)
                return
            self.future.set_exception(CallCancelled())
        except trio.Cancelled:
            self.future.set_exception(CallCancelled())
            raise
        except BaseException as error:  # noqa: BLE001  # the caller gets it
            self.future.set_exception(error)


@final
class TrioThread:
    """A thread that runs Trio.

    Args:
        name: of the thread.

    Attributes:
        started: done when calls are accepted.
        ended: done when nothing is left of the Trio run; has its error, if there is one, which is a bug.
    """

    def __init__(self, name: str) -> None:
        self.started: Final[Future[None]] = Future()
        self.ended: Final[Future[None]] = Future()
        self._thread: Final = threading.Thread(target=self._run, name=name, daemon=True)
        self._process: Final = os.getpid()
        self._token: trio.lowlevel.TrioToken | None = None
        self._nursery: trio.Nursery | None = None
        self._thread.start()
        atexit.register(self._stop_at_exit)

    def call(self, work: Callable[[], Awaitable[_T]]) -> Call[_T]:
        """Run an async function in the thread.

        Raises:
            Stopped: the thread has ended.
            RuntimeError: it belongs to the process that this one was forked from, or this is the thread.
        """
        if os.getpid() != self._process:
            raise RuntimeError("it was started in another process, before a fork; start it after the fork")
        self.refuse_itself()
        assert self._token is not None
        assert self._nursery is not None
        call = Call(work, self._token)
        del work
        try:
            self._token.run_sync_soon(call.begin, self._nursery)
        except trio.RunFinishedError:
            raise Stopped("it has been stopped") from None
        return call

    def refuse_itself(self) -> None:
        """Check that the caller, which is about to wait for the thread, is another one.

        Raises:
            RuntimeError: it is this thread.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("this is the tunnel's own thread, which cannot wait for itself; use another one")

    def soon(self, work: Callable[[], object]) -> None:
        """Call a function in the thread that never blocks and never raises; nothing happens after the end."""
        with suppress(trio.RunFinishedError):
            if self._token is not None and os.getpid() == self._process:
                self._token.run_sync_soon(work)

    def stop(self) -> None:
        """Cancel all calls, and end the thread. Does not wait: `join` does."""
        atexit.unregister(self._stop_at_exit)
        nursery = self._nursery
        if nursery is not None:
            self.soon(nursery.cancel_scope.cancel)

    def join(self) -> None:
        """Wait for the end of the thread: a moment after `ended` is done. Raises the error of `ended`."""
        self._thread.join()
        self.ended.result()

    def _stop_at_exit(self) -> None:
        if os.getpid() == self._process:
            self.stop()
            self._thread.join(EXIT_TIMEOUT)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001  # the caller that waits gets it
            if not self.started.done():
                self.started.set_exception(error)
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    async def _main(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self.started.set_result(None)
            await trio.sleep_forever()  # until `stop`
