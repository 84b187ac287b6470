"""A relay key and what is made of it: the gateway's Ed25519 identity, the proofs of both ends, and random secrets.

The key itself never leaves the gateway (transport `websocket`). An Ed25519 key pair is derived from it; the relay
keeps the public half; each side signs a transcript of what both have seen, so that a proof made for one relay, one
name or one moment is worth nothing anywhere else. The exact bytes are those of the protocol document, docs/protocol.md.

Neighbours: the handshake signs and verifies here; keystores and settings hold a `RelayKey`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from typing import Any, Final, NoReturn, final

import attrs
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

__all__ = ["PublicKey", "RelayKey", "SigningIdentity", "new_relay_key"]

MIN_NATIVE_KEY_LENGTH: Final = 20
MAX_KEY_LENGTH: Final = 4096
KEY_PREFIX: Final = "ptk1_"
_SEED_INFO: Final = b"pioneer-tunnel/v1 gateway identity"
_PUBLIC_PREFIX: Final = "ed25519:"


@final
class RelayKey:
    """A relay key: a secret that opens the whole gateway, so it has no printable form.

    `str`, `repr`, `format` and tracebacks show `RelayKey(***)`; pickling raises; comparison takes the same time
    wherever two keys differ. Outer white space is trimmed once.

    Raises:
        TypeError: the key is not a str.
        ValueError: it is empty, longer than 4096 characters, or holds a control character or half of a surrogate pair.
            The message does not quote it.
    """

    __slots__ = ("_reveal",)

    _reveal: Callable[[], str]

    def __init__(self, key: str) -> None:
        problem = _problem_with(key)
        if problem is not None:
            del key  # a traceback that shows local variables must not show it
            raise problem
        key = key.strip()
        # A closure, not an attribute: a debugger or a log that walks attributes and slots shows a function.
        self._reveal = lambda: key

    def reveal(self) -> str:
        """The key itself, for a keystore or for the wire of a transport that has to send it. Keep it nowhere."""
        return self._reveal()

    @property
    def is_weak(self) -> bool:
        """True when the key is under 20 characters, so that it could be guessed from its public half."""
        return len(self._reveal()) < MIN_NATIVE_KEY_LENGTH

    def why_unusable(self, *, native: bool) -> str | None:
        """What is wrong with this key that shows without a relay; None when nothing is. It does not quote the key.

        Args:
            native: True for transport `websocket`, whose relay knows the public half of the key.
        """
        if self._reveal().lower().startswith(_PUBLIC_PREFIX):
            return (
                f"the relay key begins with '{_PUBLIC_PREFIX}', so it is the public half, which is for the relay;"
                " the gateway needs the secret, the first line that 'pioneer-tunnel relay new-key' prints"
            )
        if native and self.is_weak:
            return (
                f"the relay key is shorter than {MIN_NATIVE_KEY_LENGTH} characters, so it could be guessed;"
                " 'pioneer-tunnel relay new-key' makes a good one"
            )
        return None

    def identity(self) -> SigningIdentity:
        """The Ed25519 identity derived from this key: HKDF-SHA256, no salt, `pioneer-tunnel/v1 gateway identity`."""
        hkdf = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=_SEED_INFO)
        return SigningIdentity.from_seed(hkdf.derive(self._reveal().encode()))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RelayKey):
            return NotImplemented
        return hmac.compare_digest(self._reveal().encode(), other._reveal().encode())

    def __hash__(self) -> int:
        return hash((RelayKey, self._reveal()))

    def __repr__(self) -> str:
        return "RelayKey(***)"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a RelayKey is not pickled or copied into bytes; keep it in a keystore")

    def __copy__(self) -> RelayKey:
        return self

    def __deepcopy__(self, memo: object) -> RelayKey:
        return self


def _problem_with(key: object) -> Exception | None:
    if not isinstance(key, str):
        return TypeError(f"a relay key is a str, not {type(key).__name__}")
    key = key.strip()
    if not key:
        return ValueError("the relay key is empty")
    if len(key) > MAX_KEY_LENGTH:
        return ValueError(f"the relay key is longer than {MAX_KEY_LENGTH} characters")
    if any(ord(char) < 32 or 127 <= ord(char) < 160 for char in key):
        return ValueError("the relay key holds a control character")
    if any("\ud800" <= char <= "\udfff" for char in key):
        # JSON can spell one. It has no UTF-8, and the UnicodeEncodeError that came of it would carry the key.
        return ValueError("the relay key holds half of a surrogate pair, which is no character")
    return None


def new_relay_key() -> RelayKey:
    """A fresh key from the operating system's randomness: `ptk1_` and 256 bits in URL-safe base64."""
    return RelayKey(KEY_PREFIX + secrets.token_urlsafe(32))


@final
@attrs.frozen
class PublicKey:
    """The public half of an identity, as a relay's registry holds it: `ed25519:` and 64 hexadecimal digits."""

    raw: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read a registry entry.

        Raises:
            ValueError: it is not `ed25519:` and 64 hexadecimal digits, not a point of the curve, or a point of small
                order. The message does not quote the text, since what stands there by mistake is most often the
                secret key.
        """
        digits = text.removeprefix(_PUBLIC_PREFIX)
        try:
            raw = bytes.fromhex(digits)
        except ValueError:
            raw = b""
        well_formed = text.startswith(_PUBLIC_PREFIX) and len(digits) == 64 and len(raw) == 32
        del text, digits  # a traceback that shows local variables must not show a secret key put here by mistake
        if not well_formed:
            del raw
            raise ValueError("a public key is 'ed25519:' and 64 hexadecimal digits")
        if not _is_on_curve(raw):
            del raw
            raise ValueError("a public key is a point of the curve Ed25519, and these 64 hexadecimal digits are none")
        if _has_small_order(raw):
            raise ValueError(
                "a public key is a point of large order: for the one in these 64 hexadecimal digits anybody can sign"
            )
        return cls(raw)

    @property
    def key_id(self) -> str:
        """Hex of the first 16 bytes of SHA-256 of the public key: what a gateway names itself by."""
        return hashlib.sha256(self.raw).digest()[:16].hex()

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` over `message` was made by this key's private half. Never raises for bad input."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def __str__(self) -> str:
        return _PUBLIC_PREFIX + self.raw.hex()


_FIELD_PRIME: Final = 2**255 - 19
_CURVE_D: Final = -121665 * pow(121666, -1, _FIELD_PRIME) % _FIELD_PRIME


def _is_on_curve(raw: bytes) -> bool:
    """Whether 32 bytes encode a point (RFC 8032, 5.1.3), which the library finds out only when it verifies."""
    encoded = int.from_bytes(raw, "little")
    y, sign = encoded & (2**255 - 1), encoded >> 255
    if y >= _FIELD_PRIME:
        return False
    x_squared = (y * y - 1) * pow(_CURVE_D * y * y + 1, -1, _FIELD_PRIME) % _FIELD_PRIME
    if x_squared == 0:
        return sign == 0
    return pow(x_squared, (_FIELD_PRIME - 1) // 2, _FIELD_PRIME) == 1


def _has_small_order(raw: bytes) -> bool:
    """Whether a point of the curve is one of the eight whose order divides 8.

    A signature by such a key can be made without a private half. The points are the neutral one (y = 1), that of order
    2 (y = -1), two of order 4 (y = 0), and the four that give those when they are doubled.
    """
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    return y * (y * y - 1) * (_CURVE_D * y**4 + 2 * y * y - 1) % _FIELD_PRIME == 0


@final
class SigningIdentity:
    """An Ed25519 key pair that can sign. Its private half has no printable form."""

    __slots__ = ("_private", "public_key")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key: Final = PublicKey(private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    @classmethod
    def from_seed(cls, seed: bytes) -> SigningIdentity:
        """The identity of a 32-byte private seed (RFC 8032).

        Raises:
            ValueError: the seed is not 32 bytes. The message does not quote it.
        """
        if len(seed) != 32:
            length = len(seed)
            del seed
            raise ValueError(f"a private seed has 32 bytes, not {length}")
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def generate(cls) -> SigningIdentity:
        """A fresh identity from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @property
    def key_id(self) -> str:
        """The public half's `key_id`."""
        return self.public_key.key_id

    def sign(self, message: bytes) -> bytes:
        """A 64-byte Ed25519 signature over `message`."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"SigningIdentity({self.key_id})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a SigningIdentity is not pickled")
