"""The extension `resume`: how both ends agree on a session secret, and prove it when they resume. No I/O.

    challenge      {"key":B64,"timeout_ms":N,"window_bytes":N}
    authenticate   the same of the gateway; to resume also {"session":ID,"sent":N,"received":N,"tag":B64}
    welcome        {"tag":B64}; when the session is resumed also {"sent":N,"received":N}, and `session` is the old one

Each `key` is an X25519 key that is made for this one handshake. With the first welcome, both ends derive the session
secret from them; it is never sent. A tag is an HMAC with the secret over both keys, the session and the counters. So an
old tag is worth nothing, and another process with the same relay key cannot resume the session. docs/protocol.md has
the exact bytes, and what this protects against.

A relay that cannot resume makes a new session in the same handshake.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any, Final, NoReturn, final

import attrs
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .._model.errors import RemoteProtocolError
from .messages import Message, encode, encode_binary
from .transcript import fields_bytes

__all__ = [
    "RESUME",
    "Confirmation",
    "Counters",
    "GatewayResumption",
    "RelayResumption",
    "ResumeChoice",
    "SessionSecret",
    "Suspended",
    "received_in",
    "received_text",
]

RESUME: Final = "resume"
"""The name of the extension."""

_KEY_SIZE: Final = 32
_TAG_SIZE: Final = 32
_SECRET_LABEL: Final = b"pioneer-tunnel/v1 resume secret"
_GATEWAY_LABEL: Final = b"pioneer-tunnel/v1 gateway resume"
_RELAY_LABEL: Final = b"pioneer-tunnel/v1 relay resume"
_RECEIVED: Final = "received"


@final
@attrs.frozen
class Counters:
    """How far an end is.

    Attributes:
        sent, received: bytes of the link since the session began.
    """

    sent: int = 0
    received: int = 0

    @classmethod
    def of(cls, message: Message) -> Counters:
        return cls(_count(message, "sent"), _count(message, "received"))

    @property
    def fields(self) -> dict[str, int]:
        return {"sent": self.sent, "received": self.received}


@final
class SessionSecret:
    """32 bytes that only both ends of one session have. They have no printable form."""

    __slots__ = ("_reveal",)

    def __init__(self, secret: bytes) -> None:
        self._reveal: Callable[[], bytes] = lambda: secret  # as in `RelayKey`

    def tag(self, label: bytes, *fields: bytes) -> bytes:
        """Proves the secret, for this label and these fields."""
        return hmac.digest(self._reveal(), fields_bytes(label, [*fields]), hashlib.sha256)

    def __repr__(self) -> str:
        return "SessionSecret(***)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a session secret is not pickled")


@final
@attrs.frozen(kw_only=True)
class _Keys:
    """The keys of one handshake."""

    relay: bytes
    gateway: bytes

    def gateway_tag(self, secret: SessionSecret, session: str, counters: Counters) -> bytes:
        return secret.tag(_GATEWAY_LABEL, self.relay, self.gateway, session.encode(), _packed(counters))

    def relay_tag(self, secret: SessionSecret, session: str, gateway: Counters, relay: Counters) -> bytes:
        counters = _packed(gateway) + _packed(relay)
        return secret.tag(_RELAY_LABEL, self.relay, self.gateway, session.encode(), counters)


@final
class _Offer:
    """One end's part of the extension: its key of this handshake, and what it says of itself."""

    def __init__(self, timeout: float, window: int, key: X25519PrivateKey | None) -> None:
        self._key: Final = key or X25519PrivateKey.generate()
        self.public: Final = self._key.public_key().public_bytes_raw()
        self.fields: Final[dict[str, Any]] = {
            "key": encode_binary(self.public),
            "timeout_ms": round(timeout * 1000),
            "window_bytes": window,
        }

    def secret(self, peer: bytes, keys: _Keys) -> SessionSecret:
        """The session secret.

        Raises:
            RemoteProtocolError: `peer` is a key with which every secret is the same.
        """
        try:
            shared = self._key.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:
            raise RemoteProtocolError("'key' is not a key to make a secret with") from None
        info = fields_bytes(_SECRET_LABEL, [keys.relay, keys.gateway])
        return SessionSecret(HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=info).derive(shared))


@final
@attrs.frozen(kw_only=True)
class ResumeChoice:
    """What a gateway chose.

    Attributes:
        timeout: seconds that it keeps a session without a connection.
        window: bytes that it keeps for the relay until they are reported.
        session: the session that it wants to resume; None for a new one.
        counters: how far it is in that session.
    """

    timeout: float
    window: int
    session: str | None
    counters: Counters
    _key: bytes = attrs.field(repr=False)
    _tag: bytes = attrs.field(repr=False)


@final
class RelayResumption:
    """The relay's side, in one handshake.

    Args:
        timeout: seconds that the relay keeps a session without a connection.
        window: bytes that it keeps for the gateway until they are reported.
        key: only tests pass it, for a replay.

    Attributes:
        offer: what the challenge says.
    """

    def __init__(self, *, timeout: float, window: int, key: X25519PrivateKey | None = None) -> None:
        self._own: Final = _Offer(timeout, window, key)
        self._timeout: Final = timeout
        self.offer: Final = self._own.fields

    def read(self, said: Message) -> ResumeChoice | None:
        """What the gateway chose; None if it chose another form of the extension, which this version ignores.

        Raises:
            RemoteProtocolError: it is malformed.
        """
        if not _is_this_form(said):
            return None
        resumes = "session" in said.fields
        return ResumeChoice(
            timeout=min(_timeout(said), self._timeout),
            window=_count(said, "window_bytes"),
            session=said.text("session") if resumes else None,
            counters=Counters.of(said) if resumes else Counters(),
            key=said.binary("key", _KEY_SIZE),
            tag=said.binary("tag", _TAG_SIZE) if resumes else b"",
        )

    def new_secret(self, choice: ResumeChoice) -> SessionSecret:
        """The secret of a new session.

        Raises:
            RemoteProtocolError: the gateway's key is not usable.
        """
        return self._own.secret(choice._key, self._keys(choice))

    def is_proved(self, choice: ResumeChoice, secret: SessionSecret) -> bool:
        """Whether the gateway has the secret of the session that it names."""
        if choice.session is None:
            return False
        tag = self._keys(choice).gateway_tag(secret, choice.session, choice.counters)
        return hmac.compare_digest(tag, choice._tag)

    def confirm(
        self, choice: ResumeChoice, secret: SessionSecret, session: str, counters: Counters | None = None
    ) -> dict[str, Any]:
        """What the welcome says.

        Args:
            session: the session's id.
            counters: how far this end is in a session that is resumed; None for a new one.
        """
        resumed = counters is not None
        tag = self._keys(choice).relay_tag(
            secret, session, choice.counters if resumed else Counters(), counters or Counters()
        )
        return {"tag": encode_binary(tag)} | (counters.fields if counters is not None else {})

    def _keys(self, choice: ResumeChoice) -> _Keys:
        return _Keys(relay=self._own.public, gateway=choice._key)


@final
@attrs.frozen(kw_only=True)
class Suspended:
    """A session that the gateway wants to resume.

    Attributes:
        session: its id.
        secret: its secret.
        counters: called when the relay can resume; returns how far this end is. From then on it may not receive from
            the old connection.
        node: the name of the node that has it, as of the extension `node`; None if that is not in force.
    """

    session: str
    secret: SessionSecret
    counters: Callable[[], Counters]
    node: str | None = None


@final
@attrs.frozen(kw_only=True)
class Confirmation:
    """The relay confirms the extension.

    Attributes:
        timeout: seconds that a session may be without a connection: the smaller of both ends' values.
        window: bytes that the relay keeps until they are reported.
        secret: of the session.
        counters: how far the relay is in the resumed session; None if the session is a new one.
    """

    timeout: float
    window: int
    secret: SessionSecret
    counters: Counters | None


@final
class GatewayResumption:
    """The gateway's side, in one handshake. `choose` is for `GatewayHandshake`.

    Args:
        timeout: seconds that the gateway keeps a session without a connection.
        window: bytes that it keeps for the relay until they are reported.
        suspended: the session to resume; None for a new one.
        key: only tests pass it, for a replay.
    """

    def __init__(
        self,
        *,
        timeout: float,
        window: int,
        suspended: Suspended | None = None,
        key: X25519PrivateKey | None = None,
    ) -> None:
        self._timeout: Final = timeout
        self._suspended: Final = suspended
        self._own: Final = _Offer(timeout, window, key)
        self._offer: Message | None = None
        self._keys: _Keys | None = None
        self._counters = Counters()

    @property
    def node(self) -> str | None:
        """See `Suspended.node`; None for a new session."""
        return None if self._suspended is None else self._suspended.node

    def choose(self, offer: Message) -> dict[str, Any] | None:
        """What authenticate says; None if the relay offers another form of the extension, which this version ignores.

        Raises:
            RemoteProtocolError: the offer is malformed.
        """
        if not _is_this_form(offer):
            return None
        keys = self._keys = _Keys(relay=offer.binary("key", _KEY_SIZE), gateway=self._own.public)
        self._timeout_of(offer)
        self._offer = offer
        fields = dict(self._own.fields)
        old = self._suspended
        if old is not None:
            self._counters = old.counters()
            tag = keys.gateway_tag(old.secret, old.session, self._counters)
            fields |= {"session": old.session, **self._counters.fields, "tag": encode_binary(tag)}
        return fields

    def confirmed(self, session: str, said: Message | None) -> Confirmation | None:
        """Check what the welcome says of the extension, in a welcome to `session`; None if it is not in force.

        Raises:
            RemoteProtocolError: it is malformed, or the tag is wrong: this is not the relay that got our key.
        """
        if said is None or self._offer is None or self._keys is None:
            return None
        old = self._suspended
        resumed = old is not None and session == old.session
        counters = Counters.of(said) if resumed else None
        secret = old.secret if old is not None and resumed else self._own.secret(self._keys.relay, self._keys)
        wanted = self._keys.relay_tag(
            secret, session, self._counters if resumed else Counters(), counters or Counters()
        )
        if not hmac.compare_digest(wanted, said.binary("tag", _TAG_SIZE)):
            raise RemoteProtocolError("'tag' is wrong: the handshake was altered on its way")
        return Confirmation(
            timeout=self._timeout_of(self._offer),
            window=_count(self._offer, "window_bytes"),
            secret=secret,
            counters=counters,
        )

    def _timeout_of(self, offer: Message) -> float:
        return min(_timeout(offer), self._timeout)


def received_text(total: int) -> str:
    """The text that reports how many bytes of the link were received."""
    return encode({"type": _RECEIVED, "bytes": total})


def received_in(text: str) -> int | None:
    """The number in such a text; None if it is another text.

    Raises:
        RemoteProtocolError: it is malformed.
    """
    if f'"{_RECEIVED}"' not in text:
        return None
    message = Message.parse(text)
    return _count(message, "bytes") if message.type == _RECEIVED else None


def _is_this_form(said: Message) -> bool:
    return "key" in said.fields


def _count(message: Message, name: str) -> int:
    value = message.whole_number(name)
    if not 0 <= value < 2**63:
        raise RemoteProtocolError(f"{name!r} is not a number of bytes")
    return value


def _timeout(message: Message) -> float:
    return max(message.number("timeout_ms"), 0) / 1000


def _packed(counters: Counters) -> bytes:
    return counters.sent.to_bytes(8, "big") + counters.received.to_bytes(8, "big")
