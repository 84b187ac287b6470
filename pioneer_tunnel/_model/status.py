"""The status of a tunnel, as host applications see it: a frozen value and its form on the wire."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, final

import attrs

from .certificate_status import CertificateStatus
from .text import clean_message

__all__ = ["ErrorKind", "State", "Status"]


class State(enum.StrEnum):
    """The state of a tunnel. The gateway contract fixes the values: members are never added."""

    DISABLED = "disabled"
    STARTING = "starting"
    CONNECTED = "connected"
    RECONNECTING = "reconnecting"
    FAILED = "failed"
    STOPPED = "stopped"


class ErrorKind(enum.StrEnum):
    """What is wrong with a tunnel. The gateway contract fixes the values: members are never added."""

    INVALID_SETTINGS = "invalid_settings"
    MISSING_KEY = "missing_key"
    MISSING_BINARY = "missing_binary"
    LOCAL_GATEWAY_UNAVAILABLE = "local_gateway_unavailable"
    RELAY_RESOLVE_FAILED = "relay_resolve_failed"
    RELAY_CONNECT_FAILED = "relay_connect_failed"
    TUNNEL_AUTH_FAILED = "tunnel_auth_failed"
    PROCESS_EXITED = "process_exited"
    UNSUPPORTED_TRANSPORT = "unsupported_transport"
    RESTART_LIMIT_REACHED = "restart_limit_reached"
    IO = "io"
    UNKNOWN = "unknown"


def _message(text: str | None) -> str | None:
    """`text` as a status holds it; None when nothing printable is left of it."""
    return None if text is None else clean_message(text) or None


def _mapping(services: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """`services` as a status holds it: a copy that nobody changes."""
    return None if services is None else MappingProxyType(dict(services))


def _certificates(by_host: Mapping[str, CertificateStatus] | None) -> Mapping[str, CertificateStatus] | None:
    """`by_host` as a status holds it: a copy that nobody changes."""
    return None if by_host is None else MappingProxyType(dict(by_host))


def _on_wire(value: object) -> object:
    match value:
        case enum.StrEnum():
            return str(value)
        case Mapping():
            return {name: _on_wire(item) for name, item in value.items()}
        case CertificateStatus():
            return value.to_wire()
    return value


@final
@attrs.frozen(kw_only=True)
class Status:
    """The status of a tunnel at one moment.

    Attributes:
        state: the state.
        error_kind: what is wrong; None when nothing is.
        message: for a person; at most 300 characters on one line, without secrets.
        updated_at_unix: wall time of the last change of state, error_kind or message, in seconds.
        public_url: where visitors reach the gateway, as the relay sent it; kept while reconnecting.
        attempt: the number of the attempt in this generation, from 1.
        retry_at_unix: wall time of the next attempt, in seconds; None unless one is planned.
        relay_rtt_ms: the last round trip to the relay, in milliseconds.
        services: where visitors reach each service that the gateway offers, by name, as the relay sent it; None for a
            gateway that offers no named ones.
        certificates: the status of each certificate that this gateway orders by `acme`, by host; None without `acme`.
    """

    state: State
    error_kind: ErrorKind | None = None
    message: str | None = attrs.field(default=None, converter=_message)
    updated_at_unix: int | None = None
    public_url: str | None = None
    attempt: int | None = None
    retry_at_unix: int | None = None
    relay_rtt_ms: float | None = None
    services: Mapping[str, str] | None = attrs.field(default=None, converter=_mapping, hash=False)
    certificates: Mapping[str, CertificateStatus] | None = attrs.field(
        default=None, converter=_certificates, hash=False
    )

    def says_the_same_as(self, other: Status) -> bool:
        """True when state, error kind and message are equal. Then `updated_at_unix` stays."""
        return (self.state, self.error_kind, self.message) == (other.state, other.error_kind, other.message)

    def is_news_after(self, other: Status) -> bool:
        """True when a client that has been notified of `other` must be notified of this.

        That is so when state, error kind, message, public URL, services or certificates change, or when there is a new
        retry time. A new round trip, and a retry time that is over, are no news.
        """
        return (
            not self.says_the_same_as(other)
            or self.public_url != other.public_url
            or self.services != other.services
            or self.certificates != other.certificates
            or (self.retry_at_unix is not None and self.retry_at_unix != other.retry_at_unix)
        )

    def to_wire(self) -> dict[str, Any]:
        """The `STATUS` object of the gateway contract; a field that is None is absent."""
        return {
            field.name: _on_wire(value)
            for field in attrs.fields(Status)
            if (value := getattr(self, field.name)) is not None
        }

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Status:
        """Read a `STATUS` object of the gateway contract. Unknown keys are ignored: a newer gateway may send them.

        Raises:
            ValueError: naming the field, when one has a value that the contract does not allow.
        """
        fields = {field.name: wire[field.name] for field in attrs.fields(Status) if wire.get(field.name) is not None}
        if "state" not in fields:
            raise ValueError("status: 'state' is missing")
        try:
            fields["state"] = State(fields["state"])
        except ValueError:
            raise ValueError(f"status: 'state' is {fields['state']!r}, not one of {[*map(str, State)]}") from None
        if "error_kind" in fields:
            try:
                fields["error_kind"] = ErrorKind(fields["error_kind"])
            except ValueError:
                kinds = [*map(str, ErrorKind)]
                raise ValueError(f"status: 'error_kind' is {fields['error_kind']!r}, not one of {kinds}") from None
        services = fields.get("services")
        if services is not None and not (
            isinstance(services, Mapping)
            and all(isinstance(text, str) for service in services.items() for text in service)
        ):
            raise ValueError("status: 'services' is not an object of texts")
        if "certificates" in fields:
            try:
                fields["certificates"] = {
                    host: CertificateStatus.from_wire(item) for host, item in fields["certificates"].items()
                }
            except (AttributeError, TypeError):
                raise ValueError("status: 'certificates' is not an object of objects with the right fields") from None
        for name, kinds_of in _WIRE_TYPES.items():
            value = fields.get(name)
            if value is not None and (not isinstance(value, kinds_of) or isinstance(value, bool)):
                raise ValueError(
                    f"status: {name!r} is {value!r}, not of type {' or '.join(k.__name__ for k in kinds_of)}"
                )
        return cls(**fields)


_WIRE_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "message": (str,),
    "updated_at_unix": (int,),
    "public_url": (str,),
    "attempt": (int,),
    "retry_at_unix": (int,),
    "relay_rtt_ms": (int, float),
}
