"""Records the statuses that a gateway shows, and checks them against the contract and against the relay."""

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
"""Seconds that a gateway has to show a change that it notices at once."""


class Watched(Protocol):
    """A source of statuses with a history: a `Tunnel` or a `RemoteAccess`."""

    @property
    def history(self) -> tuple[Status, ...]:
        """The last statuses, oldest first."""

    @property
    def history_dropped(self) -> int:
        """Number of older statuses that are no longer in `history`."""

    def watch(self) -> AsyncIterator[Status]:
        """The current status, then the newest after each change."""


@final
@attrs.frozen
class Seen:
    """A status and its time.

    Attributes:
        at: `trio.current_time()` when the recorder took it.
        status: the status in wire form.
    """

    at: float
    status: Mapping[str, Any]

    def __str__(self) -> str:
        details = " ".join(f"{name}={value!r}" for name, value in self.status.items() if name != "state")
        return f"{self.at:>12.3f} s  {self.status.get('state')}  {details}".rstrip()


@final
class StatusUntrue(AssertionError):
    """A gateway showed an untrue status for too long.

    Attributes:
        seen: all statuses that it had shown.
    """

    def __init__(self, lie: str, seen: tuple[Seen, ...]) -> None:
        self.seen: Final = seen
        super().__init__("\n".join([lie, "what was shown, and when:", *(f"  {status}" for status in seen)]))


@final
class StatusRecorder:
    """Records statuses and checks them; `open_status_recorder` makes one that runs.

        async with open_status_recorder(relay) as recorder:
            async with open_tunnel(relay.url, key=relay.key, dial=relay.dial) as tunnel:
                recorder.watch(tunnel)            # or a RemoteAccess; for other sources of statuses there is `see`
                ...

    `StatusContract` checks the statuses themselves. `MemoryRelay` knows at any moment whether a visitor would get
    through, so the recorder can also check whether `connected` is true. A gateway needs time to notice a change, so it
    may be wrong for a bounded time (`grace`). The first error is raised at the end, with all statuses and their times.

    Args:
        relay: the relay that the gateway connects to; None checks the contract only.
        tunnel: the gateway's tunnel at the relay (default `"office"`).
        grace: seconds that a status may be untrue. Default: 5 after the connection was closed or cut, which a gateway
            notices at once; two heartbeats of the relay more if only a timeout can detect the change.
        conflated: True for a gateway that shows what `watch()` yields, which skips outdated statuses. Then transitions
            are not checked (default False).
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
        """All statuses so far, oldest first."""
        for source in self._sources:
            source.take()
        return tuple(self._seen)

    @property
    def states(self) -> list[str]:
        """The statuses as `"state"` or `"state/error_kind"`, without consecutive repeats."""
        states: list[str] = []
        for seen in self.seen:
            kind = seen.status.get("error_kind")
            state = f"{seen.status.get('state')}/{kind}" if kind else str(seen.status.get("state"))
            if states[-1:] != [state]:
                states.append(state)
        return states

    def see(self, status: Status | Mapping[str, Any]) -> None:
        """Record a status at the moment the gateway shows it. Raises nothing: `check` raises the error."""
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
        """Record all statuses of `source`: its history, and new ones until the recorder ends."""
        assert self._nursery is not None, "this recorder does not run: open_status_recorder makes one that does"
        taken = _Source(source, self.see)
        self._sources.append(taken)
        self._nursery.start_soon(taken.follow)

    def check(self) -> None:
        """Raise the first error so far, if there is one.

        Raises:
            ContractBroken: a status is not allowed, or not allowed after those before.
            StatusUntrue: for longer than `grace` the gateway showed `connected` while no visitor got through, or
                another state while visitors got through.
        """
        for source in self._sources:
            source.take()
        if self._failure is not None:
            raise fresh_copy(self._failure)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Check until cancelled."""
        async with trio.open_nursery() as self._nursery:
            if self._relay is not None:
                self._nursery.start_soon(self._check_truth, self._relay)
            task_status.started()
            await trio.sleep_forever()  # no deadline: the caller cancels it

    async def _check_truth(self, relay: MemoryRelay) -> NoReturn:
        """Wait until the shown status is untrue for longer than allowed."""
        wrong_since = too_long_at = math.inf
        showed_connected = None
        while True:
            if not self._is_wrong(relay) or self._shows_connected() is not showed_connected:
                # The second condition: one untrue state may turn into the other at one moment.
                wrong_since = too_long_at = math.inf
            if self._is_wrong(relay):
                showed_connected = self._shows_connected()
                now = trio.current_time()
                wrong_since = min(wrong_since, now)
                # A black hole that is then cut becomes noticeable at once, so the shorter time counts from the cut.
                too_long_at = min(too_long_at, now + self._allowed(relay))
            with trio.move_on_at(too_long_at) as too_long:
                await self._wait_change(relay)
            if too_long.cancelled_caught and self._is_wrong(relay):
                lie = self._lie(wrong_since, too_long_at - wrong_since)
                self._failure = self._failure or StatusUntrue(lie, self.seen)
                # Only the first error is reported.
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
    """Reads a bounded history while it grows: each status once, and none left out unless the history drops it."""

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
    """Run a `StatusRecorder` during an `async with`, and call its `check` at the end. The arguments are the same.

    If the body raises, that exception is raised and `check` is not called. A single exception is raised without its
    group.
    """
    recorder = StatusRecorder(relay, tunnel=tunnel, grace=grace, conflated=conflated)
    with lone_error_bare():
        async with trio.open_nursery() as nursery:
            await nursery.start(recorder.run)
            yield recorder
            nursery.cancel_scope.cancel()
    recorder.check()
