"""The relay key, and the Ed25519 identity that is derived from it.

With transport `websocket` the key never leaves the gateway. The gateway signs with the derived private key, and the
relay's registry holds the public key. docs/protocol.md specifies the derivation.
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

__all__ = ["PublicKey", "RelayKey", "SigningIdentity", "new_relay_key"]

MIN_NATIVE_KEY_LENGTH: Final = 20
MAX_KEY_LENGTH: Final = 4096
KEY_PREFIX: Final = "ptk1_"
_SEED_INFO: Final = b"pioneer-tunnel/v1 gateway identity"
_PUBLIC_PREFIX: Final = "ed25519:"


@final
class RelayKey:
    """A relay key: the secret that authenticates the gateway to the relay. It has no printable form.

    `str`, `repr`, `format` and tracebacks show `RelayKey(***)`. Pickling raises. Comparison takes constant time. Outer
    white space is trimmed once.

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
        # A closure and not an attribute: a debugger or log that prints attributes and slots shows a function.
        self._reveal = lambda: key

    def reveal(self) -> str:
        """The key as text, for a keystore, or for a transport that has to send it. Do not store it elsewhere."""
        return self._reveal()

    @property
    def is_weak(self) -> bool:
        """True when the key is under 20 characters, so that it could be guessed from its public half."""
        return len(self._reveal()) < MIN_NATIVE_KEY_LENGTH

    def why_unusable(self, *, native: bool) -> str | None:
        """What is wrong with this key, as far as that shows without asking a relay; None when nothing is.

        The text does not quote the key.

        Args:
            native: True for transport `websocket`, where a weak key could be guessed from its public half.
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
        # JSON can contain one. It has no UTF-8 form, and the UnicodeEncodeError would hold the key.
        return ValueError("the relay key holds half of a surrogate pair, which is no character")
    return None


def new_relay_key() -> RelayKey:
    """A new random key: `ptk1_` and 256 bits in URL-safe base64."""
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
                order. The message does not quote the text: the most likely mistake is to put the secret key there.
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
        """Hex of the first 16 bytes of SHA-256 of the public key. A gateway names its key by it."""
        return hashlib.sha256(self.raw).digest()[:16].hex()

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Whether `signature` over `message` was made with the private half. False for malformed signatures, too."""
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
    """Whether 32 bytes encode a point (RFC 8032, 5.1.3). `cryptography` checks that only when it verifies."""
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

    A signature for such a key can be made without a private half. The points are the neutral one (y = 1), the one of
    order 2 (y = -1), two of order 4 (y = 0), and four of order 8, whose doubles are those of order 4.
    """
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    return y * (y * y - 1) * (_CURVE_D * y**4 + 2 * y * y - 1) % _FIELD_PRIME == 0


@final
class SigningIdentity:
    """An Ed25519 key pair that can sign. Its private half has no printable form."""

    __slots__ = ("_private", "public_key")

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        self.public_key: Final = PublicKey(private.public_key().public_bytes_raw())

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
        """A new random identity."""
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
