"""What goes wrong on the way to a relay, and when: data that can be compared, printed, shrunk and run again.

    plan = FaultPlan([NotResolved(), StallAt(Stage.WELCOME), Up(60.0)], then=Reject())

The name does not resolve at the first attempt to connect, the second hangs half way, the third is up for a minute, and
every one after it has its key rejected. A repr is the code that makes it: `eval` of it, with the names of this module,
is an equal plan.

Each fault knows what the gateway contract has a gateway say of it: `kind`, and whether it is `final`. So a test can
ask of any plan what the truth is.

Neighbours: `FaultyDialer` has it happen; `strategies.fault_plans` makes plans up.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Final, TypeAlias, final

import attrs

from .._model.status import ErrorKind
from .printable import Printable

__all__ = [
    "MAY_BE_UP",
    "BadTls",
    "BlackHole",
    "CaptivePortal",
    "CutAfter",
    "Fault",
    "FaultPlan",
    "HostSleep",
    "NotResolved",
    "Refuse",
    "Reject",
    "Slow",
    "Stage",
    "StallAt",
    "Takeover",
    "Unavailable",
    "Up",
]

_REASONS: Final = {
    "auth_failed": ErrorKind.TUNNEL_AUTH_FAILED,
    "service_unknown": ErrorKind.INVALID_SETTINGS,
    "wrong_audience": ErrorKind.INVALID_SETTINGS,
}
"""What a relay may say that makes another attempt useless, or worth a try only every 15 minutes if the tunnel was up
before."""


@attrs.frozen(repr=False)
class _Retried(Printable):
    """After most faults the gateway says `relay_connect_failed`, and tries again."""

    @property
    def kind(self) -> ErrorKind | None:
        """The `error_kind` that the gateway has to show; None for a fault that it need not notice."""
        return ErrorKind.RELAY_CONNECT_FAILED

    @property
    def final(self) -> bool:
        """Whether the gateway has to give up: no further attempt until its settings change."""
        return False


# Before the tunnel is up


@final
@attrs.frozen(repr=False)
class Refuse(_Retried):
    """Nobody listens there."""


@final
@attrs.frozen(repr=False)
class NotResolved(_Retried):
    """The relay's name does not resolve."""

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`."""
        return ErrorKind.RELAY_RESOLVE_FAILED


@final
@attrs.frozen(repr=False)
class BadTls(_Retried):
    """What answers does not come to terms in TLS: it sends a fatal alert, whatever it was told."""


@final
@attrs.frozen(repr=False)
class CaptivePortal(_Retried):
    """The network has a sign-in page, and answers in the relay's place.

    Attributes:
        status: the HTTP status: 302 redirects to the page, 200 is the page.
    """

    status: int = 302


@final
@attrs.frozen(repr=False)
class Unavailable(_Retried):
    """A proxy before the relay answers with HTTP status 503.

    Attributes:
        retry_after: whole seconds to wait, as the header `Retry-After` says them; None when there is none.
    """

    retry_after: int | None = None


@final
class Stage(enum.StrEnum):
    """What the gateway waits for in the opening."""

    DIAL = "dial"
    """A connection."""
    FIRST_BYTE = "first_byte"
    """Any answer: of TLS where the relay has it, of HTTP where not."""
    UPGRADE = "upgrade"
    """The answer that makes a WebSocket of it."""
    CHALLENGE = "challenge"
    """The relay's challenge."""
    WELCOME = "welcome"
    """The relay's word on the proof."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


@final
@attrs.frozen(repr=False)
class StallAt(_Retried):
    """The opening hangs: what the gateway waits for never comes, and nothing says so.

    Attributes:
        stage: what that is.
    """

    stage: Stage = attrs.field(default=Stage.DIAL, converter=Stage)


@final
@attrs.frozen(repr=False)
class Reject(_Retried):
    """The relay hears the gateway out, and says no.

    Attributes:
        reason: a word of docs/protocol.md: `auth_failed` rejects the key; `service_unknown` and `wrong_audience` are
            final too; `busy`, `version` and any other word are not. A gateway that was connected before tries again
            after 15 minutes.
        retry_after: seconds to wait; None when the relay does not say.
    """

    reason: str = "auth_failed"
    retry_after: float | None = attrs.field(default=None, kw_only=True)

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`."""
        return _REASONS.get(self.reason, ErrorKind.RELAY_CONNECT_FAILED)

    @property
    def final(self) -> bool:
        """See `Refuse.final`."""
        return self.reason in _REASONS


# Once the tunnel is up


@final
@attrs.frozen(repr=False)
class Up(_Retried):
    """The tunnel comes up, and its connection is cut after a while. By default nothing goes wrong at all.

    Attributes:
        seconds: since the connection was made (default: for ever).
    """

    seconds: float = math.inf

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`."""
        return None if self.seconds == math.inf else ErrorKind.RELAY_CONNECT_FAILED


@final
@attrs.frozen(repr=False)
class CutAfter(_Retried):
    """The connection is cut when so many bytes have come through, both ways together: in the opening or later.

    Attributes:
        amount: bytes. An opening takes somewhat more than a thousand.
    """

    amount: int


@final
@attrs.frozen(repr=False)
class BlackHole(_Retried):
    """Nothing comes through any more, and nobody is told.

    Attributes:
        after: seconds since the connection was made.
        seconds: how long that lasts; after it everything that was sent meanwhile arrives (default: for ever).
    """

    after: float = 0.0
    seconds: float = math.inf

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`. A short one need not be noticed; a heartbeat of the relay is short enough."""
        return ErrorKind.RELAY_CONNECT_FAILED if self.seconds > 120 else None


@final
@attrs.frozen(repr=False)
class Slow(_Retried):
    """The connection is slow.

    Attributes:
        bytes_per_second: how slow, each way.
        seconds: after how many it is cut, since it was made (default: never).
    """

    bytes_per_second: float
    seconds: float = math.inf

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`."""
        return None if self.seconds == math.inf else ErrorKind.RELAY_CONNECT_FAILED


@final
@attrs.frozen(repr=False)
class Takeover(_Retried):
    """A newer session takes the tunnel over.

    Attributes:
        after: seconds since the connection was made; never before the relay has let the gateway in.
        own: True when it is this gateway's own, after a connection that it lost and the relay did not; by default it
            is another gateway with the same key.
    """

    after: float = 0.0
    own: bool = attrs.field(default=False, kw_only=True)

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`."""
        return ErrorKind.RELAY_CONNECT_FAILED if self.own else ErrorKind.INVALID_SETTINGS

    @property
    def final(self) -> bool:
        """See `Refuse.final`."""
        return not self.own


@final
@attrs.frozen(repr=False)
class HostSleep(_Retried):
    """The gateway's host goes to sleep and wakes up: the clock jumps, and the connection is no more. In virtual time.

    Attributes:
        after: seconds since the connection was made.
        seconds: for how long it sleeps (default: 8 hours).
    """

    after: float = 0.0
    seconds: float = 8 * 3600.0


Fault: TypeAlias = (
    Refuse
    | NotResolved
    | BadTls
    | CaptivePortal
    | Unavailable
    | StallAt
    | Reject
    | Up
    | CutAfter
    | BlackHole
    | Slow
    | Takeover
    | HostSleep
)
"""What becomes of one attempt to connect."""


MAY_BE_UP: Final = (Up, CutAfter, BlackHole, Slow, Takeover, HostSleep)
"""Faults with which the tunnel may have been up."""


def _faults(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    return tuple(faults)


@final
@attrs.frozen(repr=False)
class FaultPlan:
    """What becomes of each attempt to connect, one after the other.

    Attributes:
        faults: of the first attempt, of the second, and so on.
        then: of every attempt after those (default: nothing goes wrong).
    """

    faults: tuple[Fault, ...] = attrs.field(default=(), converter=_faults)
    then: Fault = attrs.field(default=Up(), kw_only=True)

    def fault(self, number: int) -> Fault:
        """What becomes of an attempt; they count from 0."""
        return self.faults[number] if number < len(self.faults) else self.then

    @property
    def final(self) -> Fault | None:
        """The fault that has the gateway give up; None when there is none, or none that it is sure to come to.

        For a gateway that was not connected before. After a fault with which it may have been, a rejection is retried.
        """
        was_up = False
        for fault in (*self.faults, self.then):
            if fault.final and not (was_up and isinstance(fault, Reject)):
                return fault
            if fault.kind is None:
                return None
            was_up = was_up or isinstance(fault, MAY_BE_UP)
        return None

    def __repr__(self) -> str:
        faults = f"[{', '.join(map(repr, self.faults))}]" if self.faults else ""
        then = "" if self.then == Up() else f"then={self.then!r}"
        return f"FaultPlan({', '.join(part for part in (faults, then) if part)})"
