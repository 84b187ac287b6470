"""A transport that follows a script: for tests of code that reacts to a tunnel's statuses. It needs no relay.

A script is a sequence of steps, one for each attempt to connect. Steps are data: they can be compared, Hypothesis
shrinks them well, and their repr is the code that makes them.

    transport = ScriptedTransport([Fail(RelayResolveError), Connect(60), Stall(10)])
    async with open_tunnel("wss://relay.test", key=key, transport=transport) as tunnel:
        ...

The first attempt cannot resolve the name. The second is up for a minute and loses its link. The third hangs for ten
seconds. The fourth stays up. Times are Trio's, so under `trio.testing.MockClock` a script of years runs at once.
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
    """Raise a `TunnelError`: the attempt fails.

    Attributes:
        error: its class (default `RelayConnectError`).
        after: seconds until it is raised (default 0).
        message: its text.
        retry_after: seconds that the relay asks to wait (default: None).
        retry_slowly: whether to retry only every `RestartPolicy.maximum` seconds (default False).
        rejection: whether the relay rejects the gateway (default False); always so for a `TunnelAuthError`.
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
    """Raise an exception other than `TunnelError`, as a bug in a transport does.

    Attributes:
        error: its class (default `RuntimeError`); called with `message`.
        after: seconds until it is raised (default 0).
        message: its text.
    """

    error: type[Exception] = RuntimeError
    after: float = attrs.field(default=0.0, kw_only=True)
    message: str = attrs.field(default="as the script has it", kw_only=True)


@final
@attrs.frozen(repr=False)
class Return(Printable):
    """Return, which a transport must not do.

    Attributes:
        after: seconds until it returns (default 0).
    """

    after: float = attrs.field(default=0.0, kw_only=True)


@final
@attrs.frozen(repr=False)
class Stall(Printable):
    """Hang before the tunnel is up, then time out.

    Attributes:
        seconds: time until the timeout (default: infinity).
    """

    seconds: float = math.inf


@final
@attrs.frozen(repr=False)
class Connect(Printable):
    """Connect, stay up, and end.

    Attributes:
        seconds: how long the tunnel is up (default: infinity).
        after: seconds until it is up (default 0).
        then: how it ends (default: `LinkLostError`).
        reports: pairs of seconds since the tunnel is up, and the event to report then; later than `seconds` is ignored.
        public_url: the public URL from the relay (default: None).
    """

    seconds: float = math.inf
    after: float = attrs.field(default=0.0, kw_only=True)
    then: Fail | Crash | Return = attrs.field(
        default=Fail(LinkLostError, message="the link is lost, as the script has it"), kw_only=True
    )
    reports: tuple[tuple[float, Event], ...] = attrs.field(default=(), kw_only=True)
    public_url: str | None = attrs.field(default=None, kw_only=True)


Step: TypeAlias = Fail | Crash | Return | Stall | Connect
"""A step of a `ScriptedTransport`: what one attempt does."""


@final
@attrs.define(kw_only=True)
class Attempt:
    """One call of a `ScriptedTransport`. Times are those of `trio.current_time`.

    Attributes:
        step: the step that it follows.
        target: what it was asked to connect to.
        began: when it was called.
        connected: when the tunnel came up; None if it did not.
        ended: when it ended, including `goodbye`; None while it runs.
    """

    step: Step
    target: Target = attrs.field(repr=False)
    began: float
    connected: float | None = None
    ended: float | None = None


@final
class ScriptedTransport:
    """A transport that follows a script. For `open_tunnel(transport=...)`.

    Args:
        steps: the step of the first attempt, of the second, and so on.
        then: the step of every attempt after those (default: `Connect()`, which stays up).
        goodbye: seconds that it takes to end when cancelled, like the goodbye of a real transport (default 0).

    Attributes:
        attempts: all attempts, in order.
        overlapped: True if two attempts ran at once at any time.
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
        """Number of attempts that run now: 0 or 1, unless the caller has a bug."""
        return sum(attempt.ended is None for attempt in self.attempts)

    def report(self, event: Event) -> None:
        """Report `event` as the newest attempt does, even if it has ended. Before the first attempt, do nothing."""
        if self._report is not None:
            self._report(event)

    def visit(self, stream: TunnelStream) -> None:
        """Deliver a visitor's stream as the newest attempt does.

        Raises:
            trio.WouldBlock: the backlog of the tunnel is full, or there was no attempt yet.
        """
        if self._deliver is None:
            raise trio.WouldBlock
        self._deliver(stream)

    async def __call__(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        """Follow the next step; the signature is that of a transport."""
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
        return  # type: ignore[misc]  # `Return` breaks the promise on purpose

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
