"""Faults on the way to a relay, as data: one for each attempt to connect.

    plan = FaultPlan([NotResolved(), StallAt(Stage.WELCOME), Up(60.0)], then=Reject())

At the first attempt the name does not resolve. The second attempt hangs in the handshake. The third is up for a minute.
At every later attempt the relay rejects the key. The repr of a plan is code: `eval` of it, with the names of this
module, gives an equal plan.

Each fault has the status that the gateway contract asks for: `kind` (the `error_kind`), and whether it is `final`. So a
test can compute the expected status of any plan.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable
from typing import Final, Literal, TypeAlias, final

import attrs

from .._model.status import ErrorKind
from .printable import Printable

__all__ = [
    "MAY_BE_UP",
    "BadTls",
    "BlackHole",
    "CaptivePortal",
    "ChangeNetwork",
    "CutAfter",
    "CutAtWelcome",
    "Drain",
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
"""Rejections after which a gateway gives up. If the tunnel was up before, it retries every 15 minutes instead."""


@attrs.frozen(repr=False)
class _Retried(Printable):
    """The default: the gateway shows `relay_connect_failed` and retries."""

    @property
    def kind(self) -> ErrorKind | None:
        """The `error_kind` that the gateway must show; None if it need not notice the fault."""
        return ErrorKind.RELAY_CONNECT_FAILED

    @property
    def final(self) -> bool:
        """Whether the gateway must give up: it makes no attempt until its settings change."""
        return False


# Before the tunnel is up


@final
@attrs.frozen(repr=False)
class Refuse(_Retried):
    """The connection is refused: nothing listens at the address."""


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
    """The TLS handshake fails: the peer answers the ClientHello with a fatal alert."""


@final
@attrs.frozen(repr=False)
class CaptivePortal(_Retried):
    """A captive portal answers in place of the relay, with its sign-in page.

    Attributes:
        status: the HTTP status; 302 redirects to the page, 200 is the page (default 302).
    """

    status: int = 302


@final
@attrs.frozen(repr=False)
class Unavailable(_Retried):
    """A proxy in front of the relay answers with HTTP status 503.

    Attributes:
        retry_after: whole seconds in the header `Retry-After`; None sends no such header (default).
    """

    retry_after: int | None = None


@final
class Stage(enum.StrEnum):
    """A step of the connection set-up: what the gateway waits for."""

    DIAL = "dial"
    """The TCP connection."""
    FIRST_BYTE = "first_byte"
    """The first byte of the answer: TLS for `wss://`, HTTP for `ws://`."""
    UPGRADE = "upgrade"
    """The HTTP response that upgrades to WebSocket."""
    CHALLENGE = "challenge"
    """The relay's challenge."""
    WELCOME = "welcome"
    """The relay's answer to the proof."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


@final
@attrs.frozen(repr=False)
class StallAt(_Retried):
    """The connection set-up hangs at one step. The connection stays open, without an error.

    Attributes:
        stage: the step (default: the TCP connection).
    """

    stage: Stage = attrs.field(default=Stage.DIAL, converter=Stage)


@final
@attrs.frozen(repr=False)
class Reject(_Retried):
    """The relay reads the proof and rejects the gateway.

    Attributes:
        reason: a reason of docs/protocol.md. `auth_failed` rejects the key. It, `service_unknown` and
            `wrong_audience` are final; `busy`, `version` and any other reason are not. A gateway that was connected
            before retries after 15 minutes.
        retry_after: seconds to wait before the next attempt; None if the relay does not say (default).
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


@final
@attrs.frozen(repr=False)
class CutAtWelcome(_Retried):
    """The relay admits the gateway, or resumes its session, and the connection is cut before its welcome arrives.

    So after a fault such as `Up(60.0)`, the link is lost in the middle of a resume, when the relay has changed to the
    new connection and the gateway has not.
    """


# Once the tunnel is up


@final
@attrs.frozen(repr=False)
class Up(_Retried):
    """The tunnel comes up, and its connection is cut later. With the default nothing goes wrong.

    Attributes:
        seconds: from the connect to the cut (default: infinity).
    """

    seconds: float = math.inf

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`."""
        return None if self.seconds == math.inf else ErrorKind.RELAY_CONNECT_FAILED


@final
@attrs.frozen(repr=False)
class CutAfter(_Retried):
    """The connection is cut after a number of bytes: during the set-up or later.

    Attributes:
        amount: bytes. The set-up takes somewhat more than a thousand, and about as many in each direction.
        towards: the end at which they arrive, `"relay"` or `"gateway"`; None counts both directions together (default).
    """

    amount: int
    towards: Literal["relay", "gateway"] | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.in_([None, "relay", "gateway"])
    )


@final
@attrs.frozen(repr=False)
class BlackHole(_Retried):
    """The connection loses its path: no byte, FIN or RST arrives, and neither end gets an error.

    Attributes:
        after: seconds since the connect.
        seconds: how long it lasts (default: infinity). After that, everything that was sent meanwhile arrives.
    """

    after: float = 0.0
    seconds: float = math.inf

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`. None up to 120 seconds: the gateway may not notice a short one."""
        return ErrorKind.RELAY_CONNECT_FAILED if self.seconds > 120 else None


@final
@attrs.frozen(repr=False)
class Slow(_Retried):
    """The connection is slow.

    Attributes:
        bytes_per_second: throughput of each direction.
        seconds: from the connect to a cut (default: infinity).
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
    """A newer session takes over the tunnel.

    Attributes:
        after: seconds since the connect; if the relay has not admitted the gateway by then, as soon as it has.
        own: True for a session of this gateway, as after a connection that only the gateway has lost. By default it is
            another gateway with the same key.
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
class Drain(_Retried):
    """The relay drains, as before a restart: it asks for another session, and ends this one with its last visitor.

    The gateway's next attempt gets the next fault of the plan.

    Attributes:
        after: seconds since the connect; if the relay has not admitted the gateway by then, as soon as it has.
    """

    after: float = 0.0

    @property
    def kind(self) -> ErrorKind | None:
        """See `Refuse.kind`. None: a gateway whose next attempt succeeds stays `connected`."""
        return None


@final
@attrs.frozen(repr=False)
class HostSleep(_Retried):
    """The gateway's host sleeps: the clock jumps, and the connection is dead. Needs virtual time.

    A gateway that gets `watch_network=relay.watch_network` hears of it, if it takes more than 5 seconds.

    Attributes:
        after: seconds since the connect.
        seconds: length of the sleep (default: 8 hours).
    """

    after: float = 0.0
    seconds: float = 8 * 3600.0


@final
@attrs.frozen(repr=False)
class ChangeNetwork(_Retried):
    """The gateway's network changes: the connection is dead, and another one can be made at once.

    A gateway that gets `watch_network=relay.watch_network` hears of it, as its system tells it in the field.

    Attributes:
        after: seconds since the connect.
    """

    after: float = 0.0


Fault: TypeAlias = (
    Refuse
    | NotResolved
    | BadTls
    | CaptivePortal
    | Unavailable
    | StallAt
    | Reject
    | CutAtWelcome
    | Up
    | CutAfter
    | Drain
    | BlackHole
    | Slow
    | Takeover
    | HostSleep
    | ChangeNetwork
)
"""A fault of one attempt to connect."""


MAY_BE_UP: Final = (Up, CutAfter, Drain, BlackHole, Slow, Takeover, HostSleep, ChangeNetwork)
"""Faults that may let the tunnel come up."""


def _faults(faults: Iterable[Fault]) -> tuple[Fault, ...]:
    return tuple(faults)


@final
@attrs.frozen(repr=False)
class FaultPlan:
    """The fault of each attempt to connect.

    Attributes:
        faults: the fault of the first attempt, of the second, and so on.
        then: the fault of every attempt after those (default: `Up()`, no fault).
    """

    faults: tuple[Fault, ...] = attrs.field(default=(), converter=_faults)
    then: Fault = attrs.field(default=Up(), kw_only=True)

    def fault(self, number: int) -> Fault:
        """The fault of attempt `number`, which counts from 0."""
        return self.faults[number] if number < len(self.faults) else self.then

    @property
    def final(self) -> Fault | None:
        """The fault at which the gateway must give up; None if there is none, or if it may not get that far.

        This holds for a gateway that was not connected before the plan. After a fault that may let the tunnel come up,
        a rejection is retried and so not final.
        """
        was_up = False
        for fault in (*self.faults, self.then):
            if fault.final and not (was_up and isinstance(fault, Reject)):
                return fault
            if fault.kind is None and not isinstance(fault, Drain):
                return None
            was_up = was_up or isinstance(fault, MAY_BE_UP)
        return None

    def __repr__(self) -> str:
        faults = f"[{', '.join(map(repr, self.faults))}]" if self.faults else ""
        then = "" if self.then == Up() else f"then={self.then!r}"
        return f"FaultPlan({', '.join(part for part in (faults, then) if part)})"
