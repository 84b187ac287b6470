"""A transport that does as it is told: for tests of whatever reacts to a tunnel, without a relay or a byte.

A script is a sequence of steps, one for each attempt to connect. Steps are data: they compare equal, they shrink well
under Hypothesis, and their repr is the code that makes them.

    transport = ScriptedTransport([Fail(RelayResolveError), Connect(60), Stall(10)])
    async with open_tunnel("wss://relay.test", key=key, transport=transport) as tunnel:
        ...

This first fails to resolve a name, then is up for a minute and loses its link, then hangs for ten seconds, and after
that is up for ever. Times are Trio's, so under `trio.testing.MockClock` a script of years runs at once.

Neighbours: `transports.seam` says what a transport is; `StatusContract` judges what comes out on the other side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NoReturn, TypeAlias, final

import attrs
import trio

from .._model.errors import LinkLostError, RelayConnectError, TunnelError
from ..transports.interface import Deliver, Event, Report, Session, Target
from ..transports.tunnel_stream import TunnelStream
from .printable import Printable

__all__ = ["Attempt", "Connect", "Crash", "Fail", "Return", "ScriptedTransport", "Stall", "Step"]


@final
@attrs.frozen(repr=False)
class Fail(Printable):
    """Raise a `TunnelError`, as a transport has to.

    Attributes:
        error: which one; made anew each time.
        after: seconds until it is raised.
        message: what it says.
        retry_after: seconds that the relay asks us to wait.
        retry_slowly: whether only every `RestartPolicy.maximum` is worth a try.
        rejection: whether the relay rejects the gateway; a `TunnelAuthError` says so anyway.
    """

    error: type[TunnelError] = RelayConnectError
    after: float = attrs.field(default=0.0, kw_only=True)
    message: str = attrs.field(default="as the script has it", kw_only=True)
    retry_after: float | None = attrs.field(default=None, kw_only=True)
    retry_slowly: bool = attrs.field(default=False, kw_only=True)
    rejection: bool = attrs.field(default=False, kw_only=True)


@final
@attrs.frozen(repr=False)
class Crash(Printable):
    """Raise what no transport should: an exception that no one foresaw.

    Attributes:
        error: which one; made anew each time, with `message` as its argument.
        after: seconds until it is raised.
        message: what it says.
    """

    error: type[Exception] = RuntimeError
    after: float = attrs.field(default=0.0, kw_only=True)
    message: str = attrs.field(default="as the script has it", kw_only=True)


@final
@attrs.frozen(repr=False)
class Return(Printable):
    """Return, which a transport promises never to do.

    Attributes:
        after: seconds until it returns.
    """

    after: float = attrs.field(default=0.0, kw_only=True)


@final
@attrs.frozen(repr=False)
class Stall(Printable):
    """Hang before the tunnel is up, then time out as a transport's own deadline would have it.

    Attributes:
        seconds: for how long (default: for ever).
    """

    seconds: float = math.inf


@final
@attrs.frozen(repr=False)
class Connect(Printable):
    """Come up, stay up, go down.

    Attributes:
        seconds: how long the tunnel is up (default: for ever).
        after: seconds that it takes to come up.
        then: how it goes down (default: the link is lost).
        reports: events to report, each after so many seconds of being up; those after the end are left out.
        public_url: what the relay tells.
    """

    seconds: float = math.inf
    after: float = attrs.field(default=0.0, kw_only=True)
    then: Fail | Crash | Return = attrs.field(
        default=Fail(LinkLostError, message="the link is lost, as the script has it"), kw_only=True
    )
    reports: tuple[tuple[float, Event], ...] = attrs.field(default=(), kw_only=True)
    public_url: str | None = attrs.field(default=None, kw_only=True)


Step: TypeAlias = Fail | Crash | Return | Stall | Connect
"""What a `ScriptedTransport` does in one attempt."""


@final
@attrs.define(kw_only=True)
class Attempt:
    """One time that a transport was run. Times are those of `trio.current_time`.

    Attributes:
        step: the step it followed.
        target: what it was to connect to.
        began: when it was called.
        connected: when the tunnel came up; None when it did not.
        ended: when it had ended, goodbye included; None while it runs.
    """

    step: Step
    target: Target = attrs.field(repr=False)
    began: float
    connected: float | None = None
    ended: float | None = None


@final
class ScriptedTransport:
    """A transport (`transports.seam.Serve`) that follows a script.

    Args:
        steps: what the first attempt does, what the second does, and so on.
        then: what every attempt after those does (default: come up for ever).
        goodbye: seconds that it takes to end when it is cancelled, as a real one that takes its leave of the relay.

    Attributes:
        attempts: what happened, attempt by attempt.
        overlapped: True when two attempts ever ran at once.
    """

    def __init__(self, steps: Sequence[Step] = (), *, then: Step = Connect(), goodbye: float = 0.0) -> None:
        self.steps: Final = tuple(steps)
        self.then: Final = then
        self.goodbye: Final = goodbye
        self.attempts: Final[list[Attempt]] = []
        self.overlapped: bool = False
        self._report: Report | None = None
        self._deliver: Deliver | None = None

    @property
    def running(self) -> int:
        """How many attempts run now: 0 or 1, unless something is wrong."""
        return sum(attempt.ended is None for attempt in self.attempts)

    def report(self, event: Event) -> None:
        """Report `event` now, as the newest attempt would, though it may have ended long ago."""
        if self._report is not None:
            self._report(event)

    def visit(self, stream: TunnelStream) -> None:
        """Hand over a visitor's stream, as the newest attempt would.

        Raises:
            trio.WouldBlock: too many visitors wait, or there was no attempt yet.
        """
        if self._deliver is None:
            raise trio.WouldBlock
        self._deliver(stream)

    async def __call__(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        """Follow the next step. See `Serve`."""
        number = len(self.attempts)
        step = self.steps[number] if number < len(self.steps) else self.then
        attempt = Attempt(step=step, target=target, began=trio.current_time())
        self.overlapped = self.overlapped or self.running > 0
        self.attempts.append(attempt)
        self._report, self._deliver = report, deliver
        try:
            match step:
                case Stall(seconds=seconds):
                    await trio.sleep(seconds)
                    raise RelayConnectError(f"timed out after {seconds:g} seconds, as the script has it")
                case Connect():
                    await trio.sleep(step.after)
                    attempt.connected = trio.current_time()
                    task_status.started(Session(id=f"session-{number + 1}", public_url=step.public_url))
                    await self._stay_up(step, report)
                    await self._end(step.then)
                case _:
                    await self._end(step)
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.goodbye)
            raise
        finally:
            attempt.ended = trio.current_time()
        return  # type: ignore[misc]  # the promise that `Return` is there to break

    async def _stay_up(self, step: Connect, report: Report) -> None:
        began = trio.current_time()
        for seconds, event in sorted(step.reports, key=lambda timed: timed[0]):
            if seconds <= step.seconds:
                await trio.sleep_until(began + seconds)
                report(event)
        await trio.sleep_until(began + step.seconds)

    async def _end(self, how: Fail | Crash | Return) -> None:
        await trio.sleep(how.after)
        match how:
            case Fail():
                raise how.error(
                    how.message,
                    retry_after=how.retry_after,
                    retry_slowly=how.retry_slowly,
                    rejection=how.rejection,
                )
            case Crash():
                raise how.error(how.message)

    def __repr__(self) -> str:
        shown: list[Any] = [[*self.steps]]
        if self.then != Connect():
            shown.append(f"then={self.then!r}")
        if self.goodbye:
            shown.append(f"goodbye={self.goodbye!r}")
        return f"ScriptedTransport({', '.join(map(str, shown))})"
