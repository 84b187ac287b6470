"""The exceptions of this library.

    TunnelError                      the tunnel cannot be up: `kind` says why on the wire, `final` whether to give up
    ├── InvalidSettingsError         invalid_settings           final
    │   └── ReplacedError            invalid_settings           final: another gateway uses our key
    ├── MissingKeyError              missing_key                final
    ├── MissingBinaryError           missing_binary             final
    ├── UnsupportedTransportError    unsupported_transport      final
    ├── TunnelAuthError              tunnel_auth_failed         final: the relay rejects the key
    ├── RestartLimitError            restart_limit_reached      final
    ├── StorageError                 io                         final
    ├── LocalGatewayError            local_gateway_unavailable  retried
    ├── RelayResolveError            relay_resolve_failed       retried
    ├── RelayConnectError            relay_connect_failed       retried
    │   └── LinkLostError            relay_connect_failed       retried: the link was up and was lost
    ├── ProcessExitedError           process_exited             retried
    └── UnknownError                 unknown                    retried: an unexpected exception
    ProtocolError                    a protocol was violated
    ├── LocalProtocolError           by us: a bug of this library or of its caller
    └── RemoteProtocolError          by the peer

A relay's registry can be wrong for a short time. So a tunnel that was up with the same key at the same relay retries a
`rejection` every 15 minutes: a `TunnelAuthError`, and an `InvalidSettingsError` that says that the relay does not know
the service or the dialled name.

A transport raises a `TunnelError`. Only its attributes (`kind`, `final`, `retry_after` and the others) decide what the
supervisor does. Messages name the thing (which address, key, file) and never hold a secret. A file or a configuration
is checked completely before it is refused: one error then holds every `Problem`.

Streams raise Trio's exceptions: `trio.BrokenResourceError` when the peer or the link is gone,
`trio.ClosedResourceError` when this end was closed, `trio.BusyResourceError` when two tasks use the same direction.
"""

from __future__ import annotations

from typing import ClassVar, TypeVar, final

import attrs

from .status import ErrorKind

__all__ = [
    "InvalidSettingsError",
    "LinkLostError",
    "LocalGatewayError",
    "LocalProtocolError",
    "MissingBinaryError",
    "MissingKeyError",
    "Problem",
    "ProcessExitedError",
    "ProtocolError",
    "RelayConnectError",
    "RelayResolveError",
    "RemoteProtocolError",
    "ReplacedError",
    "RestartLimitError",
    "StorageError",
    "TunnelAuthError",
    "TunnelError",
    "UnknownError",
    "UnsupportedTransportError",
    "fresh_copy",
    "is_copy",
]

ErrorT = TypeVar("ErrorT", bound=BaseException)


@final
@attrs.frozen(kw_only=True)
class Problem:
    """One problem in a file or a configuration. `str` returns all of it on one line.

    Attributes:
        source: the file; None when the values came from a program.
        key: the key's path, such as `relay.tunnels[2].url`; empty when the whole file is meant.
        value: the value, as an error may show it; None when there is none, or when it may be a secret.
        message: what is wrong with it, and what is allowed.
        nearest: for an unknown name, the most similar known one.
        kind: the error kind of the gateway contract.
    """

    source: str | None = None
    key: str = ""
    value: str | None = None
    message: str
    nearest: str | None = None
    kind: ErrorKind = ErrorKind.INVALID_SETTINGS

    def __str__(self) -> str:
        # The message about an address already quotes the address.
        show_value = self.value is not None and not (self.value.startswith(("'", '"')) and self.value in self.message)
        place = f"{self.key} = {self.value}" if show_value else self.key
        nearest = f"; the nearest known one is {self.nearest!r}" if self.nearest is not None else ""
        return ": ".join(part for part in (self.source, place, self.message + nearest) if part)


class TunnelError(Exception):
    """The tunnel cannot be up. Base class: each subclass sets `kind` and `final`.

    Attributes:
        kind: the error kind of the gateway contract.
        final: True when another attempt would fail the same way, so that none is made.
        rejection: True when the relay rejects the gateway. For a tunnel that was up, such a failure is not final.
        retry_after: seconds that the relay asked us to wait; None when it did not.
        retry_slowly: True to retry only every `restart_max_ms` (for example, another protocol version).
        retry_at_once: True to retry without a wait: the path has changed, and the next attempt takes the new one.
        problems: each problem of a file or a configuration; empty for other failures.
    """

    kind: ClassVar[ErrorKind]
    final: ClassVar[bool]
    rejection: bool = False

    def __init__(
        self,
        message: str,
        *,
        retry_after: float | None = None,
        retry_slowly: bool = False,
        retry_at_once: bool = False,
        rejection: bool = False,
        problems: tuple[Problem, ...] = (),
    ) -> None:
        if not hasattr(self, "kind") or not hasattr(self, "final"):
            raise TypeError(f"{type(self).__name__} does not say its kind, and whether it is final: raise a subclass")
        super().__init__(message)
        self.retry_after = retry_after
        self.retry_slowly = retry_slowly
        self.retry_at_once = retry_at_once
        self.rejection = rejection or self.rejection
        self.problems = problems


class InvalidSettingsError(TunnelError):
    """Configuration, settings or an address is invalid, or the relay does not know the service or the dialled name."""

    kind = ErrorKind.INVALID_SETTINGS
    final = True


class ReplacedError(InvalidSettingsError):
    """Another gateway with the same key took the tunnel over; the message names it."""


class MissingKeyError(TunnelError):
    """No relay key is stored."""

    kind = ErrorKind.MISSING_KEY
    final = True


class MissingBinaryError(TunnelError):
    """The tunnel program of the `process` transport does not exist, or is not executable."""

    kind = ErrorKind.MISSING_BINARY
    final = True


class UnsupportedTransportError(TunnelError):
    """The transport is unknown, or this installation lacks it."""

    kind = ErrorKind.UNSUPPORTED_TRANSPORT
    final = True


class TunnelAuthError(TunnelError):
    """The relay rejected the key."""

    kind = ErrorKind.TUNNEL_AUTH_FAILED
    final = True
    rejection = True


class RestartLimitError(TunnelError):
    """`max_restarts` is reached; the message has the last cause."""

    kind = ErrorKind.RESTART_LIMIT_REACHED
    final = True


class StorageError(TunnelError):
    """A file of ours cannot be read or written; the message names it."""

    kind = ErrorKind.IO
    final = True


class LocalGatewayError(TunnelError):
    """Nothing listens at the local gateway's address."""

    kind = ErrorKind.LOCAL_GATEWAY_UNAVAILABLE
    final = False


class RelayResolveError(TunnelError):
    """The relay's host name does not resolve, or no name server answers in time."""

    kind = ErrorKind.RELAY_RESOLVE_FAILED
    final = False


class RelayConnectError(TunnelError):
    """The relay refuses, times out, is not a relay, fails TLS, is busy, or speaks another protocol version."""

    kind = ErrorKind.RELAY_CONNECT_FAILED
    final = False


class LinkLostError(RelayConnectError):
    """The tunnel was up, and lost its link to the relay."""


class ProcessExitedError(TunnelError):
    """The tunnel program of the `process` transport has ended."""

    kind = ErrorKind.PROCESS_EXITED
    final = False


class UnknownError(TunnelError):
    """An unexpected exception, which is the `__cause__`. Its traceback is in the log."""

    kind = ErrorKind.UNKNOWN
    final = False


class ProtocolError(Exception):
    """A protocol was violated."""


class LocalProtocolError(ProtocolError):
    """We, or our caller, violated a protocol: a bug on this side. Nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer violated a protocol. The session cannot continue."""


def fresh_copy(error: ErrorT) -> ErrorT:
    """A copy of `error` without its traceback, with the same cause.

    An exception that is raised more than once is stored and raised as copies: each `raise` of one object makes its
    traceback longer, and keeps the frames of all callers alive.
    """
    copied: ErrorT = type(error).__new__(type(error), *error.args)
    copied.__dict__.update(error.__dict__)
    copied.__cause__ = error.__cause__
    return copied


def is_copy(error: BaseException, of: BaseException) -> bool:
    """Whether `error` is `of`, or a copy of the same exception as `of` is."""
    return type(error) is type(of) and error.args == of.args and error.__cause__ is of.__cause__
