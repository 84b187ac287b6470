"""The text messages of the native protocol: JSON objects with a `type`. docs/protocol.md specifies them.

`Message` reads one strictly: a missing field or a field of the wrong type is an error that names the field. Fields that
this version does not know are ignored. `encode` writes one.

After the handshake the relay may send notices: `Draining`, `Replaced` and, as an extension, `Spread`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, final

import attrs

from .._model.errors import RemoteProtocolError
from .._model.text import clean_message, cut

__all__ = [
    "DRAINING",
    "LONGEST_WAIT",
    "SPREAD",
    "Choose",
    "Draining",
    "Message",
    "Notice",
    "Replaced",
    "draining_text",
    "Spread",
    "encode",
    "encode_binary",
    "instance_shown",
    "parse_notice",
    "replaced_text",
    "spread_text",
]

DRAINING: Final = "draining"
"""The extension with which a gateway promises another session when its relay drains, and the type of that text."""

LONGEST_WAIT: Final = 15 * 60.0
"""Seconds: the longest that a gateway waits because a relay asks it to."""

SPREAD: Final = "spread"
"""The name of the extension, and the type of its notice."""

_MAX_TEXT: Final = 1024
_MAX_INSTANCE_SHOWN: Final = 64
_MAX_NUMBER: Final = 2**53
"""JSON parsers disagree about larger whole numbers."""


@final
@attrs.frozen
class Message:
    """One message.

    Attributes:
        type: the value of its field `type`.
        fields: all fields, `type` included.

    The methods that return a field raise `RemoteProtocolError`, naming the field, when it is not what is asked for, or
    when it is absent or null and there is no default.
    """

    type: str
    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Message:
        """Read a message.

        Raises:
            RemoteProtocolError: it is not a JSON object with a string `type`, or a key occurs twice.
        """
        try:
            fields = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError("a text message that is not JSON") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
            raise RemoteProtocolError("a text message that is not an object with a 'type'")
        return cls(fields["type"], fields)

    def text(self, name: str, *, default: str | None = None) -> str:
        """A string of at most 1024 characters that has a UTF-8 form."""
        value = self._get(name, default)
        if not isinstance(value, str) or len(value) > _MAX_TEXT:
            raise RemoteProtocolError(f"{name!r} is not a text of at most {_MAX_TEXT} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RemoteProtocolError(f"{name!r} holds half a character") from None
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        """A number from -2**53 to 2**53."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise RemoteProtocolError(f"{name!r} is not a number that makes sense")
        return value

    def whole_number(self, name: str) -> int:
        """A whole number."""
        value = self._get(name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RemoteProtocolError(f"{name!r} is not a whole number")
        return value

    def binary(self, name: str, size: int) -> bytes:
        """`size` bytes in base64."""
        value = self.text(name)
        try:
            decoded = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            decoded = b""
        if len(decoded) != size:
            raise RemoteProtocolError(f"{name!r} is not the base64 of {size} bytes")
        return decoded

    def extensions(self) -> dict[str, Message]:
        """The extensions that it names, each as a message whose type is the name; empty when there is no such field."""
        value = self._get("extensions", {})
        if not isinstance(value, dict) or not all(isinstance(fields, dict) for fields in value.values()):
            raise RemoteProtocolError("'extensions' is not an object of objects")
        return {name: Message(name, fields) for name, fields in value.items()}

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            if default is None:
                raise RemoteProtocolError(f"{name!r} is missing")
            return default
        return value


Choose: TypeAlias = Callable[[Message], Mapping[str, Any] | None]
"""Takes what the relay offers of an extension; returns what the gateway chooses, or None to do without it.

It may raise `RemoteProtocolError`.
"""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Parsers disagree about a key that occurs twice, so it is refused."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def encode(message: Mapping[str, Any]) -> str:
    """The text of a message."""
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False)


def encode_binary(data: bytes) -> str:
    """Bytes as a field of a message."""
    return base64.b64encode(data).decode("ascii")


@final
@attrs.frozen(kw_only=True)
class Draining:
    """The relay is stopping; the gateway should make another session within `reconnect_within` seconds."""

    reconnect_within: float


@final
@attrs.frozen(kw_only=True)
class Replaced:
    """Another session took the tunnel over.

    Attributes:
        by: the instance of the gateway that has it now; empty if it did not send one.
        message: for a person, made printable.
    """

    by: str
    message: str


@final
@attrs.frozen(kw_only=True)
class Spread:
    """How the relay wants its gateways to come back after a loss, so that they do not come all at once.

    Attributes:
        span: seconds. The first attempt comes at a random time within it.
        longest: seconds. The longest backoff is at least this, also where the gateway's own is shorter.
    """

    span: float
    longest: float

    @classmethod
    def parse(cls, message: Message) -> Spread:
        """Read `span_ms` and `longest_ms`. Each counts as 0 to 15 minutes.

        Raises:
            RemoteProtocolError: one of them is missing or not a number.
        """
        return cls(span=_wait(message, "span_ms"), longest=_wait(message, "longest_ms"))

    def fields(self) -> dict[str, int]:
        """The fields that `parse` reads."""
        return {"span_ms": round(self.span * 1000), "longest_ms": round(self.longest * 1000)}


def _wait(message: Message, name: str) -> float:
    return min(max(message.number(name) / 1000, 0.0), LONGEST_WAIT)


Notice: TypeAlias = Draining | Replaced | Spread


def parse_notice(text: str) -> Notice | None:
    """Read a message that a relay sends after the handshake; None when this version does not know its type.

    Raises:
        RemoteProtocolError: the message is malformed.
    """
    message = Message.parse(text)
    match message.type:
        case "draining":
            return Draining(reconnect_within=max(message.number("reconnect_within_ms", default=0), 0) / 1000)
        case "replaced":
            return Replaced(
                by=message.text("by", default=""), message=clean_message(message.text("message", default=""))
            )
        case "spread":
            return Spread.parse(message)
    return None


def draining_text(reconnect_within: float) -> str:
    """The text that a relay which stops sends to its sessions. See `Draining`."""
    return encode({"type": DRAINING, "reconnect_within_ms": round(reconnect_within * 1000)})


def replaced_text(by: str, message: str) -> str:
    """The text that a relay sends to a session when another one takes its tunnel over. See `Replaced`."""
    return encode({"type": "replaced", "by": by, "message": message})


def spread_text(spread: Spread) -> str:
    """The text that a relay sends to a session with the extension when its advice has changed much."""
    return encode({"type": SPREAD} | spread.fields())


def instance_shown(instance: str) -> str:
    """How an error or a log line names a gateway's instance, which comes from outside and may be long."""
    return f"instance {cut(clean_message(instance), _MAX_INSTANCE_SHOWN)!r}" if instance else "an instance without name"
