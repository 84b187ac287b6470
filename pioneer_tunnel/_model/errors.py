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

The docstring of each subclass says what it means, then, one item each, what may have caused it: the first sentence is
the cause, the rest is the cure. docs/errors.md is made from them.

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
    "told",
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


def told(problem: Problem) -> str:
    """What is wrong, without the place."""
    bare = str(attrs.evolve(problem, source=None, key="", value=None))
    return bare if problem.value is None or problem.value in bare else f"{problem.value} is refused: {bare}"


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
    """Configuration, settings or an address is invalid, or the relay does not know the service or the dialled name.

    - A file has unknown keys or wrong values. The message names the file, the key and what is allowed, and all problems
      at once; correct them.
    - The relay's address is malformed, or contradicts the transport. Write `host:port`, or a `ws://` or `wss://` URL;
      leave `transport` out where the address says it.
    - The relay key is the public half, or shorter than 20 characters with transport `websocket`. Store the secret, the
      first line of `pioneer-tunnel relay new-key`.
    - The relay does not know the service for this key. The relay's entry has another `service`; set `service_name` to
      that, or remove `service` at the relay.
    - The relay does not go by the name that was dialled. Dial one of the relay's `public_names`, or let its operator
      add this name, with the port unless it is the scheme's default.
    - A certificate, a private key or a `ca_file` cannot be used. The message says why; correct the file or its name.
    """

    kind = ErrorKind.INVALID_SETTINGS
    final = True


class ReplacedError(InvalidSettingsError):
    """Another gateway with the same key took the tunnel over; the message names it.

    - Two gateways have the same relay key. Give each one a key of its own, or stop one; then apply the settings again.
    - A runtime folder was copied to a second host. Remove the file `instance` of the copy.
    """


class MissingKeyError(TunnelError):
    """No relay key is stored.

    - Remote access was switched on before a key was saved. Save the key that the relay's operator gave you, with
      `SettingsUpdate(key=...)` or from an app.
    - The keystore is another one than the key was saved in. Check the keystore's folder or variable, and `secret_ref`.
    """

    kind = ErrorKind.MISSING_KEY
    final = True


class MissingBinaryError(TunnelError):
    """The tunnel program of the `process` transport does not exist, or is not executable.

    - The program is not installed, or not in `PATH` of the gateway's process. Install it, or write its whole path in
      `command`.
    - The file is not executable by the gateway's user. Run `chmod +x` on it.
    """

    kind = ErrorKind.MISSING_BINARY
    final = True


class UnsupportedTransportError(TunnelError):
    """The transport is unknown, or this installation lacks it.

    - The name has a typing error. The message has the names that are known, and the nearest of them.
    - The transport is `noise`. It is not offered; use `tls`, or `websocket` with a relay of this library.
    - The transport is `process` on a system without process groups, such as Windows. Run the tunnel program as a
      service of its own.
    """

    kind = ErrorKind.UNSUPPORTED_TRANSPORT
    final = True


class TunnelAuthError(TunnelError):
    """The relay rejected the key.

    - The relay's registry has another key, or none. The `key` of the relay's entry has to be the second line that
      `pioneer-tunnel relay new-key` printed with this key; a relay takes up its corrected file by itself.
    - The key was revoked or rotated at the relay. Ask its operator for the new one, and save it.
    - With `tcp` or `tls`, `key_mode` does not fit the relay. See docs/relays.md for the modes.
    """

    kind = ErrorKind.TUNNEL_AUTH_FAILED
    final = True
    rejection = True


class RestartLimitError(TunnelError):
    """`max_restarts` is reached; the message has the last cause.

    - The relay or the network was away for longer than the restarts lasted. Remove the last cause, then apply the
      settings again; `max_restarts = 0` never gives up.
    """

    kind = ErrorKind.RESTART_LIMIT_REACHED
    final = True


class StorageError(TunnelError):
    """A file of ours cannot be read or written; the message names it.

    - The file or its folder belongs to another user, or the disk is full or read-only. Correct what the message names,
      then apply the settings again.
    - A file with secrets can be read by others. Run the `chmod` that the message shows.
    - Another program holds the file's lock. Stop that program, or let it finish.
    - The keystore or the disk hangs. Look at the system's log; calls give up after 20 seconds.
    """

    kind = ErrorKind.IO
    final = True


class LocalGatewayError(TunnelError):
    """Nothing listens at the local gateway's address.

    The tunnel itself is up. Visitors of HTTP get a 502 from the relay.

    - The local server is not running, or still starting. Start it; the error goes away within 5 seconds.
    - It listens at another address or port. Compare `local_addr` with what the server prints.
    - It listens at a Unix socket that this user may not open. Correct the permissions of the socket and its folders.
    - The address begins with `https://`, and TLS with the server fails. Trust its certificate with `local_ca_file`, or
      write the address without `https://` where it has no TLS.
    """

    kind = ErrorKind.LOCAL_GATEWAY_UNAVAILABLE
    final = False


class RelayResolveError(TunnelError):
    """The relay's host name does not resolve, or no name server answers in time.

    - This host is offline, or its name server does not answer. Nothing is to be done: the tunnel comes up with the
      network.
    - The name has a typing error, or its DNS record is missing. Look the name up with `getent hosts` or `nslookup`.
    - The network's own name server does not know outside names, and a proxy leads out. Name that proxy with `proxy`.
    """

    kind = ErrorKind.RELAY_RESOLVE_FAILED
    final = False


class RelayConnectError(TunnelError):
    """The relay refuses, times out, is not a relay, fails TLS, is busy, or speaks another protocol version.

    - Connection refused. The relay is not running, or the port is wrong; gateways dial its `control_addr`.
    - No answer within the timeout. A firewall drops the connection, or the address is wrong; try the port with
      `curl -v`.
    - The certificate is for another name, out of date, or not trusted. The message says which; dial a name that is in
      it, let the operator renew it, or name your own CA with `ca_file`.
    - A proxy on the way refuses, or does not reach the relay. The message names the proxy and what it said; see
      docs/relays.md for what to do.
    - TLS meets no TLS, or the reverse. Use `wss://` where the relay has TLS, and `ws://` only where it has none.
    - A redirect or a web page came instead of a WebSocket. The network has a sign-in page, or the address is not a
      relay's; sign in, or correct the address. Nothing secret was sent.
    - HTTP status 404. This is where the relay takes visitors; dial its `control_addr`.
    - The relay did not prove the pinned identity. Compare `relay_identity` with the second line of the relay's
      `pioneer-tunnel relay new-identity`; if it is right, this is another relay.
    - The relay is busy. It says when to come back; with `takeover = "first"` another gateway has the tunnel.
    - Another version of the protocol. Update the older of gateway and relay; until then it is retried only every
      `restart_max_ms`.
    """

    kind = ErrorKind.RELAY_CONNECT_FAILED
    final = False


class LinkLostError(RelayConnectError):
    """The tunnel was up, and lost its link to the relay.

    - The network changed or failed, or the relay was restarted. Nothing is to be done: the tunnel comes back. Visitors'
      connections go on if it does so in time and the relay was not restarted; else they are reset.
    - It happens again and again after the same idle time. A proxy or NAT on the way forgets idle connections; lower
      `heartbeat_ms` at the relay.
    - It happens with the first large answer. The path drops large packets; the tunnel sends smaller ones by itself
      from the next connection on.
    """


class ProcessExitedError(TunnelError):
    """The tunnel program of the `process` transport has ended.

    - The program rejected its configuration or its key, or lost its relay. The message has its last lines; correct what
      they name.
    - The program put itself into the background. Run it in the foreground, for example `ssh` without `-f`.
    """

    kind = ErrorKind.PROCESS_EXITED
    final = False


class UnknownError(TunnelError):
    """An unexpected exception, which is the `__cause__`. Its traceback is in the log.

    - A bug of this library, or of your own transport, dialer or key provider. Look at the traceback; report it if it
      ends in this library.
    - The key provider or the keystore does not answer. See what it waits for; `run` keeps waiting.
    """

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
