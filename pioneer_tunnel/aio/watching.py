"""Statuses for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import final

from .._hosts.trio_thread import Stopped, TrioThread
from .._model.status import Status
from ..tunnel.status_feed import StatusFeed
from .calls import call

__all__ = ["StatusWatcher"]


@final
class StatusWatcher(AsyncIterator[Status]):
    """The status now, then the newest after each change. Holds nothing that has to be closed.

    If `__anext__` is cancelled, the next one yields what the cancelled one would have yielded, or a newer status.
    """

    def __init__(self, thread: TrioThread, feed: StatusFeed) -> None:
        self._thread = thread
        self._feed = feed
        self._seen = -1
        self._ended = False

    def __aiter__(self) -> StatusWatcher:
        return self

    async def __anext__(self) -> Status:
        if not self._ended:
            try:
                change = await call(self._thread, partial(self._feed.next_after, self._seen))
            except Stopped:
                change = self._feed.newer_than(self._seen)  # the last one, if the end was faster
            if change is not None:
                self._seen, status = change
                return status
            self._ended = True
        raise StopAsyncIteration
