"""The status of a tunnel, as host applications see it: a frozen value and its form on the wire."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, final

import attrs

from .certificate_status import CertificateStatus
from .text import clean_message

__all__ = ["ErrorKind", "LinkStatus", "State", "Status"]


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
    """`services` as a status holds it: a copy that cannot change."""
    return None if services is None else MappingProxyType(dict(services))


def _certificates(by_host: Mapping[str, CertificateStatus] | None) -> Mapping[str, CertificateStatus] | None:
    """`by_host` as a status holds it: a copy that cannot change."""
    return None if by_host is None else MappingProxyType(dict(by_host))


def _on_wire(value: object) -> object:
    match value:
        case enum.StrEnum():
            return str(value)
        case Mapping():
            return {name: _on_wire(item) for name, item in value.items()}
        case tuple():
            return [link.to_wire() for link in value]
        case CertificateStatus():
            return value.to_wire()
    return value


def _fields_on_wire(value: attrs.AttrsInstance) -> dict[str, Any]:
    """The fields of `value` that are not None."""
    return {
        field.name: _on_wire(held)
        for field in attrs.fields(type(value))
        if (held := getattr(value, field.name)) is not None
    }


@final
@attrs.frozen(kw_only=True)
class LinkStatus:
    """One of a tunnel's links at one moment.

    Attributes:
        up: whether it carries visitors.
        relay: the relay's address; None while there is none for this link.
        public_url: where visitors reach the gateway through this link, as the relay sent it; None unless it is up.
        error_kind: why it is down; None while it makes its first attempt.
        message: the same for a person, as in `Status`.
    """

    up: bool
    relay: str | None = None
    public_url: str | None = None
    error_kind: ErrorKind | None = None
    message: str | None = attrs.field(default=None, converter=_message)

    def to_wire(self) -> dict[str, Any]:
        """Its form in the gateway contract; a field that is None is absent."""
        return _fields_on_wire(self)

    @classmethod
    def from_wire(cls, wire: object) -> LinkStatus:
        """Read the form of the gateway contract. Unknown keys are ignored.

        Raises:
            ValueError: naming the field, when one has a value that is not allowed.
        """
        if not isinstance(wire, Mapping) or not isinstance(wire.get("up"), bool):
            raise ValueError("status: 'links' is not an array of objects with 'up'")  # noqa: TRY004  # what it promises
        known = {field.name for field in attrs.fields(LinkStatus)}
        texts = {name: wire[name] for name in known - {"up"} if wire.get(name) is not None}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise ValueError(f"status: {name!r} of 'links' is {value!r}, no text")  # noqa: TRY004  # as above
        if "error_kind" in texts:
            texts["error_kind"] = _error_kind(texts["error_kind"])
        return cls(up=wire["up"], **texts)


def _error_kind(word: object) -> ErrorKind:
    try:
        return ErrorKind(word)  # type: ignore[arg-type]  # whatever it is, it may be wrong
    except ValueError:
        kinds = [*map(str, ErrorKind)]
        raise ValueError(f"status: 'error_kind' is {word!r}, not one of {kinds}") from None


def _links(links: Iterable[LinkStatus] | None) -> tuple[LinkStatus, ...] | None:
    return None if links is None else tuple(links)


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
        attempt: the number of the attempt in this generation, from 1. The first attempts of all links count as one.
        retry_at_unix: wall time of the next attempt, in seconds; None unless one is planned.
        relay_rtt_ms: the last round trip to the relay, in milliseconds; with several links, of the first one that is
            up, as are `public_url` and `services`.
        services: where visitors reach each service that the gateway offers, by name, as the relay sent it; None for a
            gateway that offers no named ones.
        links_up: how many links are up; None for a tunnel with one link.
        links_wanted: how many it has; None for a tunnel with one link.
        links: each of them; None for a tunnel with one link.
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
    links_up: int | None = None
    links_wanted: int | None = None
    links: tuple[LinkStatus, ...] | None = attrs.field(default=None, converter=_links)
    certificates: Mapping[str, CertificateStatus] | None = attrs.field(
        default=None, converter=_certificates, hash=False
    )

    def says_the_same_as(self, other: Status) -> bool:
        """True when state, error kind and message are equal. Then `updated_at_unix` stays."""
        return (self.state, self.error_kind, self.message) == (other.state, other.error_kind, other.message)

    def is_news_after(self, other: Status) -> bool:
        """True when a client that has been notified of `other` must be notified of this.

        That is so when state, error kind, message, public URL, services or certificates change, when a link comes up or
        goes down, or when there is a new retry time. A new round trip, and a retry time that is over, are no news.
        """
        return (
            not self.says_the_same_as(other)
            or self.public_url != other.public_url
            or self.services != other.services
            or _which_are_up(self) != _which_are_up(other)
            or self.certificates != other.certificates
            or (self.retry_at_unix is not None and self.retry_at_unix != other.retry_at_unix)
        )

    def to_wire(self) -> dict[str, Any]:
        """The `STATUS` object of the gateway contract; a field that is None is absent."""
        return _fields_on_wire(self)

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
            fields["error_kind"] = _error_kind(fields["error_kind"])
        if "links" in fields:
            if not isinstance(fields["links"], list | tuple):
                raise ValueError("status: 'links' is not an array of objects with 'up'")
            fields["links"] = [LinkStatus.from_wire(link) for link in fields["links"]]
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
    "links_up": (int,),
    "links_wanted": (int,),
}


def _which_are_up(status: Status) -> list[tuple[int, str | None]]:
    return [(index, link.public_url) for index, link in enumerate(status.links or ()) if link.up]
