"""The seam between the supervisor and whatever carries a tunnel.

A transport is one async function, `Serve`. It connects, calls `task_status.started(session)`, hands each visitor's
stream to `deliver`, and ends by raising: a `TunnelError` says what went wrong and whether to try again. Nothing else
decides what a failure means. So a transport for a test is five lines.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeAlias, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._model.errors import InvalidSettingsError
from .._model.keys import PublicKey, RelayKey
from .._net.dialing import Dialer, dial_tcp
from ..websocket import EngineName
from ..yamux import Limits
from .process.config import TunnelProgram
from .rathole.key_mode import KeyMode
from .redial import Redial
from .tunnel_stream import TunnelStream

__all__ = [
    "Deliver",
    "Draining",
    "Event",
    "LinkLost",
    "LinkRestored",
    "LocalDialFailed",
    "LocalDialOk",
    "Replaced",
    "Report",
    "RoundTrip",
    "Serve",
    "Session",
    "Target",
    "refuse_unusable_key",
]


@final
@attrs.frozen(kw_only=True)
class Target:
    """What a transport has to know to come up. Its repr shows no key.

    Attributes:
        address: where the relay listens.
        key: the relay key.
        service: the service label.
        key_mode: how the relay knows the key; for `tcp` and `tls`.
        instance: tells this gateway from another one with the same key; kept over restarts.
        relay_identity: the only relay that is accepted, by its public key; None accepts any, on TLS's word.
        make_tls: makes the TLS context; called for each attempt, in a thread, so that a changed CA file is seen.
        redial: what the attempts of this generation share.
        connect_timeout: seconds for each step of the opening.
        dial: how a TCP connection comes about.
        limits: what a session may cost. Where visitors have connections of their own, only the number of them counts.
        websocket_engine: None for the fastest that is installed.
        program: the tunnel program; for `process`, which needs one.
    """

    address: RelayAddress
    key: RelayKey
    service: str = "pioneer_gateway"
    key_mode: KeyMode = KeyMode.TOKEN_ROUTING
    instance: str | None = None
    relay_identity: PublicKey | None = None
    make_tls: Callable[[], ssl.SSLContext] | None = None
    connect_timeout: float = 10.0
    dial: Dialer = dial_tcp
    limits: Limits = attrs.field(factory=Limits)
    websocket_engine: EngineName | None = None
    program: TunnelProgram | None = None
    redial: Redial = attrs.field(factory=Redial, eq=False, repr=False)


def refuse_unusable_key(key: RelayKey, *, native: bool) -> None:
    """Check what shows without a relay; `native` is True for transport `websocket`.

    Raises:
        InvalidSettingsError: `key` is a public key, or too short for the transport.
    """
    problem = key.why_unusable(native=native)
    if problem is not None:
        raise InvalidSettingsError(problem)


@final
@attrs.frozen(kw_only=True)
class Session:
    """A tunnel that is up.

    Attributes:
        id: the relay's name for the session; None where the protocol has none.
        public_url: where visitors reach the gateway; None where the relay does not tell.
    """

    id: str | None = None
    public_url: str | None = None


@final
@attrs.frozen
class LinkLost:
    """The connection below the session is gone, and the transport tries to restore it; nothing is lost yet."""

    message: str


@final
@attrs.frozen
class LinkRestored:
    """The session goes on over a new connection."""


@final
@attrs.frozen
class Draining:
    """The relay goes away within so many seconds."""

    reconnect_within: float


@final
@attrs.frozen
class Replaced:
    """Another session of the same key took the tunnel over."""

    by: str


@final
@attrs.frozen
class RoundTrip:
    """A round trip to the relay took so many seconds."""

    seconds: float


@final
@attrs.frozen
class LocalDialFailed:
    """A visitor came, and the local gateway did not answer."""

    message: str


@final
@attrs.frozen
class LocalDialOk:
    """The local gateway answered."""


Event: TypeAlias = LinkLost | LinkRestored | Draining | Replaced | RoundTrip | LocalDialFailed | LocalDialOk

Report: TypeAlias = Callable[[Event], None]
"""Takes an event; synchronous, never blocks, never raises."""

Deliver: TypeAlias = Callable[[TunnelStream], None]
"""Takes a visitor's stream; synchronous. Raises `trio.WouldBlock` when too many wait: the transport resets it."""


class Serve(Protocol):
    """A transport."""

    async def __call__(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        """Be the tunnel until it fails.

        Raises:
            TunnelError: the tunnel could not come up, or is down.
            trio.Cancelled: when cancelled, after a bounded goodbye.
        """
