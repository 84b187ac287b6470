"""The native opening: who are you, here is my proof, welcome. Text messages in, text messages out, no I/O.

    relay    challenge     its id and a nonce
    gateway  authenticate  its key id, a nonce, and a signature over all that both have seen
    relay    welcome       the session and the public address, or `rejected` and why

`GatewayHandshake` and `RelayHandshake` are the two sides. The message texts themselves are part of what is signed,
so they are kept as they were sent. Unknown keys are ignored; texts of an unknown type are ignored too.

Source: docs/protocol.md. Neighbours: `identity` signs; the websocket transport and the relay's control side carry
the texts, each under a deadline.
"""

from __future__ import annotations

import base64
import binascii
import json
import secrets
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeAlias, final

import attrs

from .._model.addresses import normal_audience
from .._model.errors import InvalidSettingsError, RelayConnectError, RemoteProtocolError, TunnelAuthError, TunnelError
from .._model.keys import PublicKey, SigningIdentity, Transcript
from .._model.text import clean_message, cut
from .._version import __version__

__all__ = [
    "AGENT",
    "SUBPROTOCOL",
    "Claim",
    "Draining",
    "GatewayHandshake",
    "Rejection",
    "RelayHandshake",
    "Replaced",
    "Welcome",
    "instance_shown",
    "parse_notice",
    "replaced_text",
]

SUBPROTOCOL: Final = "pioneer-tunnel.v1"
VERSION: Final = 1
AGENT: Final = f"pioneer-tunnel/{__version__}"
NONCE_SIZE: Final = 32
DEFAULT_HEARTBEAT_MS: Final = 15_000
MIN_HEARTBEAT_MS: Final = 1_000
MAX_HEARTBEAT_MS: Final = 60_000
MAX_TEXTS: Final = 4
"""Texts that an end reads in an opening. One or two are the protocol's; extensions may add others."""
_MAX_NAME: Final = 1024
_MAX_INSTANCE_SHOWN: Final = 64
_MAX_NUMBER: Final = 2**53
"""Beyond that a number means one thing to one reader of JSON and another thing to another."""


@final
@attrs.frozen(kw_only=True)
class Welcome:
    """The relay's last word of the opening.

    Attributes:
        session: the relay's name for this session.
        public_url: where visitors reach the gateway; the relay's word, made printable.
        heartbeat: seconds of silence after which an end pings, clamped to 1 to 60.
    """

    session: str
    public_url: str
    heartbeat: float


@final
@attrs.frozen(kw_only=True)
class Draining:
    """The relay is about to go away; `reconnect_within` is in seconds."""

    reconnect_within: float


@final
@attrs.frozen(kw_only=True)
class Replaced:
    """Another session of the same key has taken the tunnel over; `by` is its instance, if it told one."""

    by: str
    message: str


Notice: TypeAlias = Draining | Replaced


@final
class GatewayHandshake:
    """The gateway's side.

    Args:
        identity: derived from the relay key.
        audience: the name that was dialled, as `RelayAddress.audience`.
        service: the service label.
        instance: tells a gateway that comes back from another one with the same key.
        pinned_relay: the only relay identity that is accepted; None accepts any, on TLS's word.
        nonce: 32 random bytes; given in by tests that replay.
    """

    def __init__(
        self,
        identity: SigningIdentity,
        *,
        audience: str,
        service: str,
        instance: str | None = None,
        pinned_relay: PublicKey | None = None,
        nonce: bytes | None = None,
    ) -> None:
        self._identity: Final = identity
        self._audience: Final = audience
        self._service: Final = service
        self._instance: Final = instance
        self._pinned_relay: Final = pinned_relay
        self._nonce: Final = secrets.token_bytes(NONCE_SIZE) if nonce is None else nonce
        self._transcript: Transcript | None = None
        self._authenticate = b""
        self._texts = 0

    def receive(self, text: str) -> str | Welcome | None:
        """Take a message of the relay: a str is to be sent, `Welcome` ends the opening, None means go on.

        Raises:
            TunnelError: as its kind says; the opening has failed.
        """
        kind = "first word" if self._transcript is None else "answer"
        try:
            self._texts = _count_text(self._texts)
            message = _Message.parse(text)
            kind = message.type
            return self._receive(message, text)
        except RemoteProtocolError as error:
            raise RelayConnectError(f"the relay's {clean_message(kind)!r} is not valid: {error}") from error

    def _receive(self, message: _Message, text: str) -> str | Welcome | None:
        match message.type:
            case "challenge" if self._transcript is None:
                return self._answer(message, text)
            case "welcome" if self._transcript is not None:
                return self._welcome(message)
            case "rejected":
                raise self._rejected(message)
            case "challenge" | "welcome":
                raise RelayConnectError(f"the relay sent {message.type!r} out of turn")
        return None

    def _answer(self, message: _Message, text: str) -> str:
        version = message.whole_number("version")
        if version != VERSION:
            raise RelayConnectError(
                f"the relay speaks version {version} of the tunnel protocol, this gateway version {VERSION}",
                retry_slowly=True,
            )
        transcript = self._transcript = Transcript(
            relay=message.text("relay"),
            audience=self._audience,
            service=self._service,
            relay_nonce=message.binary("nonce", NONCE_SIZE),
            gateway_nonce=self._nonce,
            challenge=text.encode(),
        )
        answer: dict[str, Any] = {
            "type": "authenticate",
            "key_id": self._identity.key_id,
            "service": self._service,
            "audience": self._audience,
            "nonce": _b64(self._nonce),
            "proof": _b64(self._identity.sign(transcript.gateway_bytes())),
            "agent": AGENT,
        }
        if self._instance is not None:
            answer["instance"] = self._instance
        encoded = _encode(answer)
        self._authenticate = encoded.encode()
        return encoded

    def _welcome(self, message: _Message) -> Welcome:
        assert self._transcript is not None
        if self._pinned_relay is not None:
            proof = message.binary("relay_proof", 64) if "relay_proof" in message.fields else b""
            if not self._pinned_relay.verify(proof, self._transcript.relay_bytes(self._authenticate)):
                raise RelayConnectError(
                    f"the relay {clean_message(self._transcript.relay)!r} did not prove the identity that is pinned"
                    f" ({self._pinned_relay}); is this the right relay?"
                )
        heartbeat_ms = message.number("heartbeat_ms", default=DEFAULT_HEARTBEAT_MS)
        return Welcome(
            session=message.text("session"),
            public_url=clean_message(message.text("public_url")),
            heartbeat=min(max(heartbeat_ms, MIN_HEARTBEAT_MS), MAX_HEARTBEAT_MS) / 1000,
        )

    def _rejected(self, message: _Message) -> TunnelError:
        reason = message.text("reason")
        said = clean_message(message.text("message", default=""))
        quoted = f": {said!r}" if said else ""
        retry_after_ms = message.number("retry_after_ms", default=0)
        match reason:
            case "auth_failed":
                return TunnelAuthError(
                    f"the relay rejected the key{quoted}; its registry has to have the ed25519:... line of this key"
                )
            case "service_unknown":
                return InvalidSettingsError(
                    f"the relay does not know the service {self._service!r} for this key{quoted}", rejection=True
                )
            case "wrong_audience":
                return InvalidSettingsError(
                    f"the relay does not go by the name {self._audience!r} that we dialled{quoted}", rejection=True
                )
            case "version":
                return RelayConnectError(f"the relay speaks another version of the protocol{quoted}", retry_slowly=True)
            case "busy":
                wait = max(retry_after_ms, 0) / 1000
                return RelayConnectError(f"the relay is busy{quoted}", retry_after=wait or None)
        return RelayConnectError(
            f"the relay refused, for the reason {clean_message(reason)!r}{quoted}", retry_slowly=True
        )


@final
@attrs.frozen(kw_only=True)
class Claim:
    """What a gateway says of itself. Nothing of it is proved until `RelayHandshake.verify` has returned.

    Attributes:
        key_id: names the key that it claims to have.
        service: the service label.
        audience: the name that it dialled.
        instance: tells gateways with one key apart; None if it told none.
        agent: its software, cleaned for a log.
    """

    key_id: str
    service: str
    audience: str
    instance: str | None
    agent: str
    proof: bytes
    nonce: bytes
    text: bytes


@final
class Rejection(Exception):
    """The relay says no: send `text`, then close with code 1008.

    Attributes:
        reason: one of the protocol's words.
    """

    def __init__(self, reason: str, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        answer: dict[str, Any] = {"type": "rejected", "reason": reason, "message": message}
        if retry_after_ms is not None:
            answer["retry_after_ms"] = retry_after_ms
        self.text = _encode(answer)


@final
class RelayHandshake:
    """The relay's side.

    Args:
        relay: the relay's id.
        public_names: the normal forms of the names that gateways may dial.
        identity: signs the `relay_proof`, if the relay has one.
        nonce: 32 random bytes; given in by tests that replay.
    """

    def __init__(
        self,
        relay: str,
        *,
        public_names: Collection[str],
        identity: SigningIdentity | None = None,
        nonce: bytes | None = None,
    ) -> None:
        self._relay: Final = relay
        self._public_names: Final = frozenset(public_names)
        self._identity: Final = identity
        self._nonce: Final = secrets.token_bytes(NONCE_SIZE) if nonce is None else nonce
        self._texts = 0
        self.challenge: Final = _encode(
            {"type": "challenge", "version": VERSION, "relay": relay, "nonce": _b64(self._nonce)}
        )
        """The first text to send."""

    def receive(self, text: str) -> Claim | None:
        """Read a message of the gateway; None means that it was none of ours, go on.

        Raises:
            RemoteProtocolError: the message is not what the protocol has, or the fifth one.
        """
        self._texts = _count_text(self._texts)
        message = _Message.parse(text)
        if message.type != "authenticate":
            return None
        return Claim(
            key_id=message.text("key_id"),
            service=message.text("service"),
            audience=message.text("audience"),
            instance=message.text("instance", default="") or None,
            agent=clean_message(message.text("agent", default="")),
            proof=message.binary("proof", 64),
            nonce=message.binary("nonce", NONCE_SIZE),
            text=text.encode(),
        )

    def verify(self, claim: Claim, key: PublicKey | None, *, service: str | None = None) -> None:
        """Check the proof of `claim`, and only then whether the gateway is at the right door.

        Args:
            key: what the registry has for `claim.key_id`; None when it has nothing.
            service: the label that the registry's entry sets; None takes any.

        Raises:
            Rejection: the gateway does not come in. An unknown key and a wrong proof get the same answer, after the
                same work.
        """
        proved = (key or _NOBODY).verify(claim.proof, self._transcript(claim).gateway_bytes())
        if key is None or not proved:
            raise Rejection("auth_failed", "unknown key or wrong proof")
        try:
            recognised = normal_audience(claim.audience) in self._public_names
        except ValueError:
            recognised = False
        if not recognised:
            raise Rejection("wrong_audience", f"this relay goes by {', '.join(sorted(self._public_names))}")
        if service is not None and claim.service != service:
            raise Rejection("service_unknown", f"this key is for the service {service!r}")

    def _transcript(self, claim: Claim) -> Transcript:
        return Transcript(
            relay=self._relay,
            audience=claim.audience,
            service=claim.service,
            relay_nonce=self._nonce,
            gateway_nonce=claim.nonce,
            challenge=self.challenge.encode(),
        )

    def welcome(self, claim: Claim, *, session: str, public_url: str, heartbeat_ms: int) -> str:
        """The text that lets in the gateway whose `claim` was verified."""
        answer: dict[str, Any] = {
            "type": "welcome",
            "session": session,
            "public_url": public_url,
            "heartbeat_ms": heartbeat_ms,
        }
        if self._identity is not None:
            answer["relay_proof"] = _b64(self._identity.sign(self._transcript(claim).relay_bytes(claim.text)))
        return _encode(answer)


_NOBODY: Final = SigningIdentity.generate().public_key
"""Stands in for a key that is not registered, so that refusing it takes as long as refusing a wrong proof."""


def parse_notice(text: str) -> Notice | None:
    """What a relay says after the welcome; None for what this version does not know.

    Raises:
        RemoteProtocolError: the text is not what the protocol has.
    """
    message = _Message.parse(text)
    match message.type:
        case "draining":
            return Draining(reconnect_within=max(message.number("reconnect_within_ms", default=0), 0) / 1000)
        case "replaced":
            return Replaced(
                by=message.text("by", default=""), message=clean_message(message.text("message", default=""))
            )
    return None


def instance_shown(instance: str) -> str:
    """How a message names the gateway of that instance, which is somebody else's text and may be long."""
    return f"instance {cut(clean_message(instance), _MAX_INSTANCE_SHOWN)!r}" if instance else "an instance without name"


def replaced_text(by: str, message: str) -> str:
    """What a relay tells a session that another one takes the place of."""
    return _encode({"type": "replaced", "by": by, "message": message})


@final
@attrs.frozen
class _Message:
    """One JSON object, read strictly: a field that has the wrong type is named."""

    type: str
    fields: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> _Message:
        try:
            fields = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError("a text message that is not JSON") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("type"), str):
            raise RemoteProtocolError("a text message that is not an object with a 'type'")
        return cls(fields["type"], fields)

    def text(self, name: str, *, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or len(value) > _MAX_NAME:
            raise RemoteProtocolError(f"{name!r} is not a text of at most {_MAX_NAME} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RemoteProtocolError(f"{name!r} holds half a character") from None
        return value

    def number(self, name: str, *, default: float | None = None) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            raise RemoteProtocolError(f"{name!r} is not a number that makes sense")
        return value

    def whole_number(self, name: str) -> int:
        value = self._get(name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise RemoteProtocolError(f"{name!r} is not a whole number")
        return value

    def binary(self, name: str, size: int) -> bytes:
        value = self.text(name)
        try:
            decoded = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            decoded = b""
        if len(decoded) != size:
            raise RemoteProtocolError(f"{name!r} is not the base64 of {size} bytes")
        return decoded

    def _get(self, name: str, default: Any) -> Any:
        value = self.fields.get(name)
        if value is None:
            if default is None:
                raise RemoteProtocolError(f"{name!r} is missing")
            return default
        return value


def _count_text(before: int) -> int:
    """One more than `before`.

    Raises:
        RemoteProtocolError: that is too many. Without a bound, parsing them would cost a stranger little and us much.
    """
    if before >= MAX_TEXTS:
        raise RemoteProtocolError(f"more than {MAX_TEXTS} texts in an opening")
    return before + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. A key that is there twice means different things to different parsers, so it is refused."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is there twice")
    return fields


def _encode(message: Mapping[str, Any]) -> str:
    return json.dumps(message, separators=(",", ":"), ensure_ascii=False)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
