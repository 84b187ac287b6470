"""The interface between the supervisor and a transport, which carries a tunnel.

A transport is one async function, `Serve`. It connects, calls `task_status.started(session)`, hands each visitor's
stream to `deliver`, and ends by raising a `TunnelError`. The error says what went wrong and whether to retry; nothing
else decides what a failure means. A transport for a test is five lines.

The transports of this library are attrs classes (`BuiltInTransport`): a class has the options of its transport, checks
them, and its instances are the async functions.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NoReturn, Protocol, TypeAlias, final

import attrs
import trio

from .._model.addresses import RelayAddress
from .._model.errors import InvalidSettingsError, MissingKeyError, TunnelError
from .._model.keys import RelayKey
from .._model.stats import SessionStats
from .._net.dialing import Dialer, dial_tcp
from .._net.proxies.choice import WITHOUT_PROXY, ProxyChoice
from .._wire.links import LinkPlace
from .._wire.messages import Spread
from .counts import TunnelCounts
from .link_checks import LinkChecks
from .redial import Redial
from .services import Services
from .tunnel_stream import TunnelStream

__all__ = [
    "IN_CLEAR",
    "BuiltInTransport",
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
    "ServicesMoved",
    "Session",
    "SessionRenewed",
    "SpreadTold",
    "TLS_OF_NATIVE",
    "TLS_OF_RATHOLE",
    "Target",
    "VisitorRefused",
    "usable_key",
]


IN_CLEAR: Final = (
    "%s is reached in clear, without TLS: on the way, visitors' traffic and tokens can be read and changed; use %s"
)
"""The warning about a link, with the relay's address and what to use instead."""

TLS_OF_NATIVE: Final = "a wss:// address"
TLS_OF_RATHOLE: Final = "the transport tls, or a wss:// address (a bare host:port alone means tcp)"


def _doubled(failed: int, retry_after: float | None) -> float:
    """The default of `Target.redial_delay`."""
    return max(min(2.0 ** (failed - 1), 30.0) if failed else 0.0, retry_after or 0.0)


@final
@attrs.frozen(kw_only=True)
class Target:
    """What every transport needs to connect. The options of one transport are its own. The repr shows no key.

    Attributes:
        address: where the relay listens.
        key: the relay key.
        service: the service label.
        instance: tells this gateway from another one with the same key; kept over restarts.
        make_tls: makes the TLS context; called for each attempt, in a thread, so that a changed CA file is seen.
        connect_timeout: seconds for each step of the opening.
        dial: makes TCP connections, to the relay or to the proxy.
        proxy: which proxy leads to the relay; by default none.
        redial: what the attempts of one generation share.
        services: what the gateway offers; None for a gateway that takes visitors of the tunnel's first service alone.
        checks: asks for checks of the link; a transport that can check its link listens while it is up.
        counts: counts visitors' streams and refusals.
        redial_delay: seconds to wait before the next attempt to restore a lost link. It is given how many have failed
            since the loss, and how many seconds the relay has asked for. Without a failed attempt it is called if the
            relay may be gone.
        place: which of the gateway's links this is; None if it is the only one.
    """

    address: RelayAddress
    key: RelayKey
    service: str = "pioneer_gateway"
    instance: str | None = None
    make_tls: Callable[[], ssl.SSLContext] | None = None
    connect_timeout: float = 10.0
    dial: Dialer = dial_tcp
    proxy: ProxyChoice = WITHOUT_PROXY
    redial: Redial = attrs.field(factory=Redial, eq=False, repr=False)
    services: Services | None = attrs.field(default=None, eq=False)
    checks: LinkChecks = attrs.field(factory=LinkChecks, eq=False, repr=False)
    counts: TunnelCounts = attrs.field(factory=TunnelCounts, eq=False, repr=False)
    redial_delay: Callable[[int, float | None], float] = attrs.field(default=_doubled, eq=False, repr=False)
    place: LinkPlace | None = None


@final
@attrs.frozen(kw_only=True)
class Session:
    """A tunnel that is up.

    Attributes:
        id: the relay's name for the session; None where the protocol has none.
        public_url: where visitors reach the gateway; None where the transport does not know.
        services: where visitors reach each service that the gateway offers, by name; None where there is one at most.
        drain: asks the relay for no more visitors, and waits until those who are there have gone. The caller sets the
            deadline. None where the transport does not know its visitors.
        stats: the numbers of the session now; None where the transport has none. The caller adds `since_unix`.
        beside_others: whether the relay keeps this session beside those of the gateway's other links. Otherwise the
            newest session of a tunnel ends the one before.
    """

    id: str | None = None
    public_url: str | None = None
    services: Mapping[str, str] | None = None
    drain: Callable[[], Awaitable[None]] | None = attrs.field(default=None, eq=False, repr=False)
    stats: Callable[[], SessionStats] | None = attrs.field(default=None, eq=False, repr=False)
    beside_others: bool = False


@final
@attrs.frozen
class LinkLost:
    """The connection below the session is lost, and the transport tries to restore it. No stream is lost yet.

    Attributes:
        error: how it was lost, or why the latest attempt failed.
        retry_in: seconds until the next attempt; None while one is under way.
    """

    error: TunnelError
    retry_in: float | None = None


@final
@attrs.frozen
class LinkRestored:
    """The session goes on over a new connection."""


@final
@attrs.frozen
class SessionRenewed:
    """The relay did not have the session any more, and has granted this one. The streams of the old one are gone."""

    session: Session


@final
@attrs.frozen
class Draining:
    """The relay is stopping: make another session within so many seconds. The streams of this one may finish."""

    reconnect_within: float


@final
@attrs.frozen
class Replaced:
    """Another session with the same key took over the tunnel; `by` is its instance."""

    by: str


@final
@attrs.frozen
class ServicesMoved:
    """Visitors reach the services at these addresses now, as `Session.services`."""

    services: Mapping[str, str]


@final
@attrs.frozen
class SpreadTold:
    """The relay has said how to come back after a loss. It may be reported before the tunnel is up."""

    spread: Spread


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


@final
@attrs.frozen
class VisitorRefused:
    """A visitor's stream, or a request of it, was not served here. For `reason` see `TunnelStats.refusals_total`."""

    reason: str


Event: TypeAlias = (
    LinkLost
    | LinkRestored
    | SessionRenewed
    | Draining
    | Replaced
    | ServicesMoved
    | SpreadTold
    | RoundTrip
    | LocalDialFailed
    | LocalDialOk
    | VisitorRefused
)
"""What a transport reports while the tunnel is up. None of it is required."""

Report: TypeAlias = Callable[[Event], None]
"""Takes an event. Synchronous, never blocks, never raises."""

Deliver: TypeAlias = Callable[[TunnelStream], None]
"""Takes a visitor's stream. Synchronous. Raises `trio.WouldBlock` when too many wait; then the transport resets it."""


class Serve(Protocol):
    """A transport."""

    async def __call__(
        self, target: Target, deliver: Deliver, report: Report, *, task_status: trio.TaskStatus[Session]
    ) -> NoReturn:
        """Connect, and carry the tunnel until it fails.

        After the event `Draining`, the caller runs it a second time, while this one finishes its streams.

        Raises:
            TunnelError: the tunnel could not come up, or is down.
            trio.Cancelled: when cancelled, after a bounded goodbye.
        """


class BuiltInTransport(Serve, Protocol):
    """A transport of this library: a value with the options of the transport."""

    def check(self, key: RelayKey | None) -> RelayKey:
        """Check the options, then the key, without I/O. Calling the transport checks the same before it dials.

        Args:
            key: the relay key; None where none is stored.

        Returns:
            The key.

        Raises:
            InvalidSettingsError: an option is missing, or the key cannot work with this transport.
            MissingKeyError: there is no key.
            UnsupportedTransportError: this installation lacks what the options ask for.
        """


def usable_key(key: RelayKey | None, *, native: bool) -> RelayKey:
    """Check what shows without a relay; returns the key.

    Args:
        key: the relay key; None where none is stored.
        native: True for transport `websocket`, which takes no short key.

    Raises:
        MissingKeyError: there is no key.
        InvalidSettingsError: `key` is a public key, or too short for the transport.
    """
    if key is None:
        raise MissingKeyError("no relay key is stored; save the key that the relay's operator gave you")
    problem = key.why_unusable(native=native)
    if problem is not None:
        raise InvalidSettingsError(problem)
    return key
