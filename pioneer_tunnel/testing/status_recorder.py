"""A recorder of what a gateway shows, that holds it against the contract and against the truth.

    async with open_status_recorder(relay) as recorder:
        async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
            recorder.watch(tunnel)            # or a RemoteAccess; a gateway with statuses of its own calls `see`
            ...

`StatusContract` judges statuses by themselves. Whether `connected` is true only a visitor knows, and the relay in
memory: it knows at any moment what a visitor would find. A gateway has to find out first, so it may be wrong for a
while, and no longer. What is wrong is kept, and raised at the end with everything that was shown, and when.

Neighbours: `StatusContract` is the judge; `MemoryRelay` is the witness.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn, Protocol, final

import attrs
import trio

from .._model.errors import fresh_copy
from .._model.exception_groups import lone_error_bare
from .._model.status import State, Status
from .memory_relay import MemoryRelay
from .status_contract import ContractBroken, StatusContract

__all__ = ["Seen", "StatusRecorder", "StatusUntrue", "Watched", "open_status_recorder"]

SLACK: Final = 5.0
"""Seconds that a gateway has to show what it cannot but notice."""


class Watched(Protocol):
    """What has statuses and remembers them: a `Tunnel`, or a `RemoteAccess`."""

    @property
    def history(self) -> tuple[Status, ...]:
        """The last statuses, oldest first."""

    @property
    def history_dropped(self) -> int:
        """How many there were before those."""

    def watch(self) -> AsyncIterator[Status]:
        """The status now, then the newest after each change."""


@final
@attrs.frozen
class Seen:
    """A status, and when it was seen.

    Attributes:
        at: `trio.current_time()`.
        status: in the form of the wire.
    """

    at: float
    status: Mapping[str, Any]

    def __str__(self) -> str:
        details = " ".join(f"{name}={value!r}" for name, value in self.status.items() if name != "state")
        return f"{self.at:>12.3f} s  {self.status.get('state')}  {details}".rstrip()


@final
class StatusUntrue(AssertionError):
    """A gateway showed for too long what was not so.

    Attributes:
        seen: everything that it had shown.
    """

    def __init__(self, lie: str, seen: tuple[Seen, ...]) -> None:
        self.seen: Final = seen
        super().__init__("\n".join([lie, "what was shown, and when:", *(f"  {status}" for status in seen)]))


@final
class StatusRecorder:
    """See the module; `open_status_recorder` makes one that runs.

    Args:
        relay: the relay that the gateway connects to; None to leave the truth out of it.
        tunnel: the gateway's tunnel there.
        grace: seconds that a gateway may be wrong (default: 5 when its connection was closed or cut, which it notices
            at once; two heartbeats of the relay more when all there is to notice is silence).
        conflated: True for a gateway that passes on what `watch()` yields, which skips what is no longer so: statuses
            are then held against the contract each for itself.
    """

    def __init__(
        self,
        relay: MemoryRelay | None,
        *,
        tunnel: str = "office",
        grace: float | None = None,
        conflated: bool = False,
    ) -> None:
        self._seen: Final[list[Seen]] = []
        self._relay: Final = relay
        self._tunnel: Final = tunnel
        self._grace: Final = grace
        self._contract: Final = StatusContract(conflated=conflated)
        self._failure: ContractBroken | StatusUntrue | None = None
        self._sources: Final[list[_Source]] = []
        self._nursery: trio.Nursery | None = None
        self._changed = trio.Event()

    @property
    def seen(self) -> tuple[Seen, ...]:
        """Everything that was shown."""
        for source in self._sources:
            source.take()
        return tuple(self._seen)

    @property
    def states(self) -> list[str]:
        """What was shown, in short: `"connected"`, `"failed/tunnel_auth_failed"`; each once while it lasts."""
        states: list[str] = []
        for seen in self.seen:
            kind = seen.status.get("error_kind")
            state = f"{seen.status.get('state')}/{kind}" if kind else str(seen.status.get("state"))
            if states[-1:] != [state]:
                states.append(state)
        return states

    def see(self, status: Status | Mapping[str, Any]) -> None:
        """Take the next status of the gateway, at the moment that it shows it. Never raises: `check` does."""
        wire = status.to_wire() if isinstance(status, Status) else dict(status)
        self._seen.append(Seen(trio.current_time(), wire))
        if self._failure is None:
            try:
                self._contract.see(wire)
            except ContractBroken as broken:
                self._failure = broken
        self._changed.set()
        self._changed = trio.Event()

    def watch(self, source: Watched) -> None:
        """See every status of `source`, those that it remembers and those to come, until the end of the recorder."""
        assert self._nursery is not None, "this recorder does not run: open_status_recorder makes one that does"
        taken = _Source(source, self.see)
        self._sources.append(taken)
        self._nursery.start_soon(taken.follow)

    def check(self) -> None:
        """Raise what was wrong so far, if anything was.

        Raises:
            ContractBroken: a status may not be, or may not follow those before; the first that was so.
            StatusUntrue: the gateway showed for longer than `grace` that it was connected when no visitor got
                through, or that it was not when they did.
        """
        for source in self._sources:
            source.take()
        if self._failure is not None:
            raise fresh_copy(self._failure)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Watch, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            if self._relay is not None:
                self._nursery.start_soon(self._watch_truth, self._relay)
            task_status.started()
            await trio.sleep_forever()  # no deadline: whoever runs it ends it

    async def _watch_truth(self, relay: MemoryRelay) -> NoReturn:
        """Wait until what is shown has not been so for too long."""
        wrong_since = too_long_at = math.inf
        showed_connected = None
        while True:
            if not self._is_wrong(relay) or self._shows_connected() is not showed_connected:
                # Also when one untruth has turned into the other at one moment.
                wrong_since = too_long_at = math.inf
            if self._is_wrong(relay):
                showed_connected = self._shows_connected()
                now = trio.current_time()
                wrong_since = min(wrong_since, now)
                # What is noticed at once is so from when it happens: a dead link that is cut was only silent before.
                too_long_at = min(too_long_at, now + self._allowed(relay))
            with trio.move_on_at(too_long_at) as too_long:
                await self._wait_change(relay)
            if too_long.cancelled_caught and self._is_wrong(relay):
                lie = self._lie(wrong_since, too_long_at - wrong_since)
                self._failure = self._failure or StatusUntrue(lie, self.seen)
                # One is enough: there is nothing more to find out.
                await trio.sleep_forever()

    def _allowed(self, relay: MemoryRelay) -> float:
        if self._grace is not None:
            return self._grace
        noticed_at_once = self._seen and self._shows_connected() and not relay.is_silent(self._tunnel)
        return SLACK if noticed_at_once else 2 * relay.heartbeat + SLACK

    def _is_wrong(self, relay: MemoryRelay) -> bool:
        return bool(self._seen) and self._shows_connected() is not relay.is_reachable(self._tunnel)

    def _shows_connected(self) -> bool:
        return self._seen[-1].status.get("state") == State.CONNECTED

    def _lie(self, since: float, seconds: float) -> str:
        truth = "no visitor got through" if self._shows_connected() else "visitors got through"
        state = self._seen[-1].status.get("state")
        return f"it showed {str(state)!r} for {seconds:g} s, from {since:.3f} s on, while {truth}"

    async def _wait_change(self, relay: MemoryRelay) -> None:
        async with trio.open_nursery() as nursery:

            async def until(change: trio.Event) -> None:
                await change.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until, self._changed)
            await relay.change()
            nursery.cancel_scope.cancel()


@final
class _Source:
    """Reads a history that moves, so that nothing is seen twice and nothing is left out."""

    def __init__(self, watched: Watched, see: Any) -> None:
        self._watched: Final = watched
        self._see: Final = see
        self._taken = watched.history_dropped

    async def follow(self) -> None:
        async for _ in self._watched.watch():
            self.take()

    def take(self) -> None:
        history, dropped = self._watched.history, self._watched.history_dropped
        for status in history[max(self._taken - dropped, 0) :]:
            self._see(status)
        self._taken = dropped + len(history)


@asynccontextmanager
async def open_status_recorder(
    relay: MemoryRelay | None = None,
    *,
    tunnel: str = "office",
    grace: float | None = None,
    conflated: bool = False,
) -> AsyncIterator[StatusRecorder]:
    """A `StatusRecorder` for the length of an `async with`, at the end of which it raises what was wrong.

    When the body raises, that comes out, and nothing else. A single error comes out bare, also out of a group.
    """
    recorder = StatusRecorder(relay, tunnel=tunnel, grace=grace, conflated=conflated)
    with lone_error_bare():
        async with trio.open_nursery() as nursery:
            await nursery.start(recorder.run)
            yield recorder
            nursery.cancel_scope.cancel()
    recorder.check()
