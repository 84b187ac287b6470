"""The newest status of a tunnel, for any number of watchers. A slow watcher never slows the tunnel."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Final, final

import attrs
import trio

from .._async_library import need_trio
from .._model.certificate_status import CertificateStatus
from .._model.status import Status

__all__ = ["StatusFeed"]

HISTORY_LIMIT: Final = 256


@final
class StatusFeed:
    """The newest status, for any number of watchers.

    The feed conflates: a watcher that is slower than the tunnel skips statuses, but never misses the newest one.
    `publish` is synchronous, and its cost does not depend on the watchers. `history` holds the last 256 changes;
    `dropped` counts the older ones.
    """

    def __init__(self, initial: Status) -> None:
        self._current = initial
        self._sequence = 0
        self._ended = False
        self._changed = trio.Event()
        self._history: deque[Status] = deque([initial], maxlen=HISTORY_LIMIT)
        self._dropped = 0
        self._certificates: Mapping[str, CertificateStatus] | None = None

    @property
    def current(self) -> Status:
        """The newest status."""
        return self._current

    @property
    def history(self) -> tuple[Status, ...]:
        """The last 256 statuses, oldest first."""
        return tuple(self._history)

    @property
    def dropped(self) -> int:
        """How many statuses are older than `history` reaches back."""
        return self._dropped

    def publish(self, status: Status) -> None:
        """Make `status` the newest. If it equals the current one, nothing changes and no watcher wakes.

        Its `certificates` are those of `note_certificates`.
        """
        if status.certificates != self._certificates:
            status = attrs.evolve(status, certificates=self._certificates)
        if status == self._current:
            return
        if attrs.evolve(status, relay_rtt_ms=self._current.relay_rtt_ms) == self._current:
            self._history.pop()  # another round trip is no change of its own
        elif len(self._history) == HISTORY_LIMIT:
            self._dropped += 1
        self._history.append(status)
        self._current = status
        self._sequence += 1
        self._wake()

    def note_certificates(self, certificates: Mapping[str, CertificateStatus] | None) -> None:
        """Publish these with the current status and all that follow. None for none."""
        self._certificates = certificates
        self.publish(self._current)

    def end(self) -> None:
        """Let watchers finish once they have seen the newest status. Ending twice is ending once."""
        self._ended = True
        self._wake()

    def resume(self) -> None:
        """Let new watchers wait for changes again, after `end`. Those that had ended stay ended."""
        self._ended = False

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def watch(self) -> AsyncIterator[Status]:
        """The current status at once, then the newest after each change; ends after `end`.

        A plain iterator, not an async generator: it holds a number and nothing that has to be closed.
        """
        return _Watcher(self)

    def newer_than(self, seen: int) -> tuple[int, Status] | None:
        """The number of the current status, and the status; None if its number is `seen`. The first number is 0."""
        return None if self._sequence == seen else (self._sequence, self._current)

    async def next_after(self, seen: int) -> tuple[int, Status] | None:
        """Wait until `newer_than` has a status; returns None at the end."""
        need_trio("a status feed", "pioneer_tunnel.aio")
        await trio.lowlevel.checkpoint()
        while (change := self.newer_than(seen)) is None and not self._ended:
            # No deadline: a quiet tunnel is a healthy one.
            await self._changed.wait()
        return change


@final
class _Watcher(AsyncIterator[Status]):
    def __init__(self, feed: StatusFeed) -> None:
        self._feed = feed
        self._seen = -1
        self._ended = False

    def __aiter__(self) -> _Watcher:
        return self

    async def __anext__(self) -> Status:
        if self._ended:
            await trio.lowlevel.checkpoint()
        elif (change := await self._feed.next_after(self._seen)) is not None:
            self._seen, status = change
            return status
        self._ended = True  # for good, whatever `resume` does for others
        raise StopAsyncIteration
