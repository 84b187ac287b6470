"""The handshake of the native protocol: both sides, without I/O. docs/protocol.md specifies it.

    relay    challenge     its id and a nonce
    gateway  authenticate  its key id, a nonce, and a signature over the transcript
    relay    welcome       the session and the public URL, or `rejected` and the reason

Extensions: the relay offers them in the challenge, the gateway chooses in its answer, and the relay confirms in the
welcome. One is in force only if all three name it. This module carries what they say; each extension reads its own.

Texts come in and texts go out. The texts themselves are part of what is signed, so both sides keep them byte for byte.
Messages of an unknown type are ignored. The caller sets the deadline.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from typing import Any, Final, TypeAlias, final

import attrs

from .._model.addresses import normal_audience
from .._model.errors import InvalidSettingsError, RelayConnectError, RemoteProtocolError, TunnelAuthError, TunnelError
from .._model.keys import PublicKey, SigningIdentity
from .._model.text import clean_message
from .._version import __version__
from .heartbeat import DEFAULT_HEARTBEAT_MS, MAX_HEARTBEAT_MS, MIN_HEARTBEAT_MS
from .messages import Choose, Message, encode, encode_binary
from .transcript import Transcript

__all__ = [
    "AGENT",
    "SUBPROTOCOL",
    "Claim",
    "Extensions",
    "GatewayHandshake",
    "Rejection",
    "RelayHandshake",
    "Welcome",
]

SUBPROTOCOL: Final = "pioneer-tunnel.v1"
VERSION: Final = 1
AGENT: Final = f"pioneer-tunnel/{__version__}"
NONCE_SIZE: Final = 32
PROOF_SIZE: Final = 64
MAX_TEXTS: Final = 4
"""Texts that an end reads in a handshake. The protocol has one or two; an extension may add others."""

Extensions: TypeAlias = Mapping[str, Mapping[str, Any]]
"""What an end says about extensions, by their names. The values are JSON."""


@final
@attrs.frozen(kw_only=True)
class Welcome:
    """The relay accepts the gateway.

    Attributes:
        session: the relay's name for this session.
        public_url: where visitors reach the gateway, as the relay sent it, made printable.
        heartbeat: seconds of silence after which an end pings, clamped to 1 to 60.
        extensions: what the relay confirms, by name. Each of these is in force.
    """

    session: str
    public_url: str
    heartbeat: float
    extensions: Mapping[str, Message] = attrs.field(factory=dict)


@final
class GatewayHandshake:
    """The gateway's side.

    Args:
        identity: derived from the relay key.
        audience: the name that was dialled, as `RelayAddress.audience`.
        service: the service label.
        instance: distinguishes this gateway, when it reconnects, from another one with the same key.
        pinned_relay: the only relay identity that is accepted; None accepts any (TLS alone identifies the relay).
        choices: decides about each extension that this gateway knows, by name, when the relay offers it.
        nonce: 32 random bytes; only tests pass it, for a replay.
    """

    def __init__(
        self,
        identity: SigningIdentity,
        *,
        audience: str,
        service: str,
        instance: str | None = None,
        pinned_relay: PublicKey | None = None,
        choices: Mapping[str, Choose] | None = None,
        nonce: bytes | None = None,
    ) -> None:
        self._identity: Final = identity
        self._audience: Final = audience
        self._service: Final = service
        self._instance: Final = instance
        self._pinned_relay: Final = pinned_relay
        self._choices: Final = choices or {}
        self._chosen: dict[str, Mapping[str, Any]] = {}
        self._nonce: Final = secrets.token_bytes(NONCE_SIZE) if nonce is None else nonce
        self._transcript: Transcript | None = None
        self._authenticate = b""
        self._texts = 0

    def receive(self, text: str) -> str | Welcome | None:
        """Process a text of the relay.

        Returns:
            A str to send; the `Welcome` that ends the handshake; or None when another text has to come.

        Raises:
            TunnelError: the handshake failed; its kind says why.
        """
        kind = "first word" if self._transcript is None else "answer"
        try:
            self._texts = _count_text(self._texts)
            message = Message.parse(text)
            kind = message.type
            return self._receive(message, text)
        except RemoteProtocolError as error:
            raise RelayConnectError(f"the relay's {clean_message(kind)!r} is not valid: {error}") from error

    def _receive(self, message: Message, text: str) -> str | Welcome | None:
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

    def _answer(self, message: Message, text: str) -> str:
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
            "nonce": encode_binary(self._nonce),
            "proof": encode_binary(self._identity.sign(transcript.gateway_bytes())),
            "agent": AGENT,
        }
        if self._instance is not None:
            answer["instance"] = self._instance
        for name, offer in message.extensions().items():
            choose = self._choices.get(name)
            chosen = None if choose is None else choose(offer)
            if chosen is not None:
                self._chosen[name] = chosen
        encoded = encode(answer | _naming(self._chosen))
        self._authenticate = encoded.encode()
        return encoded

    def _welcome(self, message: Message) -> Welcome:
        assert self._transcript is not None
        if self._pinned_relay is not None:
            proof = message.binary("relay_proof", PROOF_SIZE) if "relay_proof" in message.fields else b""
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
            extensions={name: said for name, said in message.extensions().items() if name in self._chosen},
        )

    def _rejected(self, message: Message) -> TunnelError:
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
    """What a gateway claims in its authenticate message. None of it is proved before `RelayHandshake.verify` returns.

    Attributes:
        key_id: names the key that it claims to have.
        service: the service label.
        audience: the name that it dialled.
        instance: distinguishes gateways that have the same key; None if the gateway sent none.
        agent: its software, made printable for a log.
        proof: the signature.
        nonce: the gateway's nonce.
        text: the authenticate message, byte for byte as it was sent.
        extensions: what the gateway chooses, by name. The relay has offered each of these.
    """

    key_id: str
    service: str
    audience: str
    instance: str | None
    agent: str
    proof: bytes
    nonce: bytes
    text: bytes
    extensions: Mapping[str, Message] = attrs.field(factory=dict)


@final
class Rejection(Exception):
    """The relay rejects the gateway: send `text`, then close with code 1008.

    Attributes:
        reason: one of the protocol's words, such as `auth_failed`.
        text: the message to send.
    """

    def __init__(self, reason: str, message: str, *, retry_after_ms: int | None = None) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        answer: dict[str, Any] = {"type": "rejected", "reason": reason, "message": message}
        if retry_after_ms is not None:
            answer["retry_after_ms"] = retry_after_ms
        self.text = encode(answer)


@final
class RelayHandshake:
    """The relay's side.

    Args:
        relay: the relay's id.
        public_names: the normal forms of the names that gateways may dial.
        identity: signs the `relay_proof`, if the relay has one.
        offers: the extensions that it offers, and what it says of each.
        nonce: 32 random bytes; only tests pass it, for a replay.
    """

    def __init__(
        self,
        relay: str,
        *,
        public_names: Collection[str],
        identity: SigningIdentity | None = None,
        offers: Extensions | None = None,
        nonce: bytes | None = None,
    ) -> None:
        self._relay: Final = relay
        self._public_names: Final = frozenset(public_names)
        self._identity: Final = identity
        self._nonce: Final = secrets.token_bytes(NONCE_SIZE) if nonce is None else nonce
        self._texts = 0
        self._offers: Final = offers or {}
        challenge = {"type": "challenge", "version": VERSION, "relay": relay, "nonce": encode_binary(self._nonce)}
        self.challenge: Final = encode(challenge | _naming(self._offers))
        """The first text to send."""

    def receive(self, text: str) -> Claim | None:
        """Process a text of the gateway; None when its type is unknown, so that another text has to come.

        Raises:
            RemoteProtocolError: the text is malformed, or it is the fifth one.
        """
        self._texts = _count_text(self._texts)
        message = Message.parse(text)
        if message.type != "authenticate":
            return None
        return Claim(
            key_id=message.text("key_id"),
            service=message.text("service"),
            audience=message.text("audience"),
            instance=message.text("instance", default="") or None,
            agent=clean_message(message.text("agent", default="")),
            proof=message.binary("proof", PROOF_SIZE),
            nonce=message.binary("nonce", NONCE_SIZE),
            text=text.encode(),
            extensions={name: said for name, said in message.extensions().items() if name in self._offers},
        )

    def verify(self, claim: Claim, key: PublicKey | None, *, service: str | None = None) -> None:
        """Check the proof of `claim`, and only then the name that it dialled and its service.

        Args:
            claim: what `receive` returned.
            key: what the registry has for `claim.key_id`; None when it has nothing.
            service: the label that the registry's entry sets; None accepts any.

        Raises:
            Rejection: the claim is rejected. An unknown key and a wrong proof get the same answer, after the same work.
        """
        proved = (key or _UNREGISTERED_KEY).verify(claim.proof, self._transcript(claim).gateway_bytes())
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

    def welcome(
        self, claim: Claim, *, session: str, public_url: str, heartbeat_ms: int, confirmed: Extensions | None = None
    ) -> str:
        """The text that accepts the gateway, once `verify` has accepted `claim`.

        Args:
            confirmed: what the relay confirms of `claim.extensions`, by name.
        """
        answer: dict[str, Any] = {
            "type": "welcome",
            "session": session,
            "public_url": public_url,
            "heartbeat_ms": heartbeat_ms,
        }
        if self._identity is not None:
            answer["relay_proof"] = encode_binary(self._identity.sign(self._transcript(claim).relay_bytes(claim.text)))
        return encode(answer | _naming(confirmed or {}))


_UNREGISTERED_KEY: Final = SigningIdentity.generate().public_key
"""Verified in place of a key that is not registered, so that an unknown key takes as long as a wrong proof."""


def _naming(extensions: Extensions) -> dict[str, Extensions]:
    """The field of a message. It is absent when there is nothing to say, as in messages of older versions."""
    return {"extensions": extensions} if extensions else {}


def _count_text(before: int) -> int:
    """One more than `before`.

    Raises:
        RemoteProtocolError: too many texts. Parsing costs us more than sending costs a peer that has proved nothing.
    """
    if before >= MAX_TEXTS:
        raise RemoteProtocolError(f"more than {MAX_TEXTS} texts in an opening")
    return before + 1
