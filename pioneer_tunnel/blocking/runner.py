"""Calls from any thread into the Trio thread, and one call there that lasts until it is stopped."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Final, TypeVar, final

from .._hosts.trio_thread import Call, CallCancelled, Stopped, TrioThread
from .._model.log_fields import about
from .._model.status import Status
from ..tunnel.status_feed import StatusFeed

__all__ = ["OnStatus", "Runner"]

OnStatus = Callable[[Status], object]
"""Gets the status at the start, and the newest after each change: a function, or the `put` of a queue."""

_CALLBACK_TIMEOUT: Final = 5.0
"""Seconds that `Runner.stop` waits for a callback that hangs."""

_T = TypeVar("_T")

_log: Final = logging.getLogger("pioneer_tunnel.blocking")


@final
class Runner:
    """A Trio thread, and the call that is its purpose.

    Args:
        feed: the statuses of that call.
    """

    def __init__(self, feed: Callable[[], StatusFeed]) -> None:
        self._thread: Final = TrioThread("pioneer-tunnel")
        self._feed: Final = feed
        self._running: Call[object] | None = None
        self._callbacks: threading.Thread | None = None

    def start(self, work: Callable[[Callable[[], None]], Awaitable[object]], on_status: OnStatus | None) -> None:
        """Call `work` in the thread; returns when it has called its argument. What it raises before that comes out.

        Args:
            on_status: called in a thread of its own, so that it may block.
        """
        started = threading.Event()
        try:
            self._thread.started.result()
            self._running = running = self._thread.call(partial(work, started.set))
            running.future.add_done_callback(lambda _: started.set())
            started.wait()  # no deadline: opening a tunnel and reading the stores have their own
            if running.future.done():
                self._running = None
                running.future.result()
            if on_status is not None:
                self._callbacks = threading.Thread(
                    target=self._call_back, args=(on_status,), name="pioneer-tunnel-status", daemon=True
                )
                self._callbacks.start()
        except BaseException:
            self.stop()
            raise

    def call(self, work: Callable[[], Awaitable[_T]], timeout: float | None = None) -> _T:
        """Run an async function in the thread. An exception in this thread, such as `KeyboardInterrupt`, cancels it.

        Raises:
            TimeoutError: it has not ended within `timeout` seconds, and was cancelled.
            Stopped: the thread has ended.
            RuntimeError: this is that thread.
        """
        call = self._thread.call(work)
        del work  # its arguments may hold a key, which no traceback may show
        try:
            concurrent.futures.wait([call.future], timeout)
        finally:
            in_time = call.future.done()
            if not in_time:
                call.cancel()
                concurrent.futures.wait([call.future])  # no deadline: what is cancelled has its own
        try:
            return call.future.result()
        except CallCancelled:
            if not in_time:
                raise TimeoutError(f"it took longer than {timeout:g} seconds") from None
            raise Stopped("it has been stopped") from None

    def soon(self, work: Callable[[], object]) -> None:
        """See `TrioThread.soon`."""
        self._thread.soon(work)

    def watch(self) -> Iterator[Status]:
        """The status now, then the newest after each change; ends after `stopped`."""
        return _Statuses(self, self._feed())

    def stop(self) -> None:
        """Cancel the call, and end the thread. What the call has raised comes out.

        Stopping twice is stopping once.

        Raises:
            RuntimeError: this is that thread.
        """
        self._thread.refuse_itself()
        running, self._running = self._running, None
        if running is not None:
            running.cancel()
            concurrent.futures.wait([running.future])  # no deadline: it says goodbye to the relay for a second at most
        self._thread.stop()
        self._thread.join()
        if self._callbacks is not None and self._callbacks is not threading.current_thread():
            self._callbacks.join(_CALLBACK_TIMEOUT)
        if running is not None and not isinstance(error := running.future.exception(), CallCancelled | None):
            raise error

    def _call_back(self, on_status: OnStatus) -> None:
        for status in self.watch():
            try:
                on_status(status)
            except Exception:  # noqa: BLE001  # a host's callback may raise anything, and the next status counts
                _log.exception("on_status has failed", extra=about("unforeseen"))


@final
class _Statuses(Iterator[Status]):
    def __init__(self, runner: Runner, feed: StatusFeed) -> None:
        self._runner: Final = runner
        self._feed: Final = feed
        self._seen = -1

    def __next__(self) -> Status:
        try:
            change = self._runner.call(partial(self._feed.next_after, self._seen))
        except Stopped:
            change = self._feed.newer_than(self._seen)  # the last one, if the end was faster
        if change is None:
            raise StopIteration
        self._seen, status = change
        return status
