"""The file formats of `FileKeystore`: an encrypted secret, and the master keys. No I/O.

Both are a head, one line of ASCII text, and binary data. The head is authenticated together with the data. So neither
can be changed, moved to another reference, or combined with another version:

    pioneer-tunnel-secret 1 REFERENCE KEY-ID LENGTH          nonce (12), AES-256-GCM of the relay key
    pioneer-tunnel-master 1 plain COUNT CHECKSUM             COUNT master keys of 32 bytes, newest first
    pioneer-tunnel-master 1 scrypt LOG2N R P SALT COUNT      nonce (12), AES-256-GCM of the same, under a passphrase

There are several master keys only during a rotation. The newest encrypts; each decrypts the secrets that it encrypted.
A secret names its master key by an id, which is a hash of the key.

An `EnvelopeError` says what is wrong; the keystore adds the name of the file. Key material is held in memoryviews and
closures, whose repr does not show it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection
from typing import Any, Final, NoReturn, final

import attrs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ..._model.keys import RelayKey

SECRET_LIMIT: Final = 32 * 1024
MASTER_LIMIT: Final = 4 * 1024
_KEY_SIZE: Final = 32
_NONCE_SIZE: Final = 12
_TAG_SIZE: Final = 16
_MAX_KEYS: Final = 64
_LOG2_N: Final = 16
_KEY_ID_LABEL: Final = b"pioneer-tunnel keystore key id\0"

_HEAD: Final = re.compile(rb"pioneer-tunnel-(secret|master) ([0-9]{1,4}) ")
_SECRET_HEAD: Final = re.compile(rb"pioneer-tunnel-secret 1 ([A-Za-z0-9_.-]{1,64}) ([0-9a-f]{32}) ([0-9]{1,5})\n")
_PLAIN_HEAD: Final = re.compile(rb"pioneer-tunnel-master 1 plain ([0-9]{1,3}) ([0-9a-f]{64})\n")
_SEALED_HEAD: Final = re.compile(
    rb"pioneer-tunnel-master 1 scrypt ([0-9]{1,2}) ([0-9]{1,2}) ([0-9]{1,2}) ([0-9a-f]{32}) ([0-9]{1,3})\n"
)


class EnvelopeError(Exception):
    """The content is invalid or cannot be decrypted. The message continues a sentence that starts with the file."""


class UnknownMasterKeyError(EnvelopeError):
    """The secret was encrypted with a master key that we do not have."""


@final
@attrs.frozen
class ScryptCost:
    """The parameters of scrypt: the cost of trying a passphrase, and the salt.

    Attributes:
        log2_n: the binary logarithm of scrypt's N.
        r, p: scrypt's block size and parallelism.
        salt: 16 random bytes.
    """

    log2_n: int
    r: int
    p: int
    salt: bytes

    @classmethod
    def fresh(cls) -> ScryptCost:
        """The cost for a new master file, with a new salt: 64 MiB and about a third of a second."""
        return cls(_LOG2_N, 8, 2, secrets.token_bytes(16))

    @property
    def is_sane(self) -> bool:
        """Whether parameters from a file are acceptable: N >= 2**14, at most 256 MiB of memory and 1 GiB of work."""
        memory = 128 * self.r << self.log2_n
        return self.log2_n >= 14 and self.r >= 1 and self.p >= 1 and memory <= 1 << 28 and memory * self.p <= 1 << 30


@final
class Passphrase:
    """A passphrase, without a printable form, and the cipher that was last derived from it.

    Raises:
        ValueError: it is empty, or has no UTF-8 form. The message does not quote it.
    """

    __slots__ = ("_last", "_reveal")

    _reveal: Callable[[], str]

    def __init__(self, passphrase: str) -> None:
        usable = bool(passphrase) and not any("\ud800" <= char <= "\udfff" for char in passphrase)
        if not usable:
            del passphrase
            raise ValueError("a keystore's passphrase is text of at least one character")
        self._reveal = lambda: passphrase
        self._last: tuple[ScryptCost, AESGCM] | None = None

    def cipher(self, cost: ScryptCost) -> AESGCM:
        """The cipher derived from this passphrase and `cost`. The last one is cached, because scrypt is slow."""
        last = self._last
        if last is None or last[0] != cost:
            scrypt = Scrypt(salt=cost.salt, length=_KEY_SIZE, n=1 << cost.log2_n, r=cost.r, p=cost.p)
            last = self._last = cost, AESGCM(scrypt.derive(self._reveal().encode()))
        return last[1]

    def __repr__(self) -> str:
        return "Passphrase(***)"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Passphrase is not pickled")


@final
class _MasterKey:
    """One master key: 32 bytes without a printable form, and an id that is not secret."""

    __slots__ = ("_reveal", "cipher", "key_id")

    _reveal: Callable[[], memoryview]

    def __init__(self, raw: memoryview) -> None:
        self._reveal = lambda: raw
        self.cipher: Final = AESGCM(raw)
        self.key_id: Final = hashlib.sha256(b"".join((_KEY_ID_LABEL, raw))).hexdigest()[:32]

    def reveal(self) -> memoryview:
        return self._reveal()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a master key is not pickled")


@final
class MasterKeys:
    """The master keys of a keystore, newest first. Immutable."""

    __slots__ = ("_keys",)

    def __init__(self, keys: tuple[_MasterKey, ...]) -> None:
        self._keys = keys

    @classmethod
    def generate(cls) -> MasterKeys:
        """A new random master key."""
        return cls((_MasterKey(memoryview(secrets.token_bytes(_KEY_SIZE))),))

    def with_new_key(self, in_use: Collection[str]) -> MasterKeys:
        """A new key, followed by those of these keys whose ids are `in_use`."""
        return MasterKeys((*MasterKeys.generate()._keys, *(key for key in self._keys if key.key_id in in_use)))

    def newest_only(self) -> MasterKeys:
        """Only the newest key."""
        return MasterKeys(self._keys[:1])

    def seal(self, reference: str, key: RelayKey) -> bytes:
        """The content of a secret's file for `key`, encrypted with the newest master key."""
        newest = self._keys[0]
        length = _NONCE_SIZE + len(key.reveal().encode()) + _TAG_SIZE
        head = f"pioneer-tunnel-secret 1 {reference} {newest.key_id} {length}\n".encode()
        nonce = secrets.token_bytes(_NONCE_SIZE)
        return head + nonce + newest.cipher.encrypt(nonce, key.reveal().encode(), head)

    def open(self, reference: str, content: memoryview) -> RelayKey:
        """Decrypt the content of a secret's file.

        Raises:
            UnknownMasterKeyError: none of these master keys encrypted it.
            EnvelopeError: it was truncated or changed, or belongs to another reference.
        """
        head = _match(_SECRET_HEAD, content, "secret")
        sealed_for, length = head[1].decode(), int(head[3])
        if sealed_for != reference:
            raise EnvelopeError(
                f"holds the secret of {sealed_for!r}, not of {reference!r}; it was put there by mistake"
            )
        body = content[head.end() :]
        _check_length(body, length)
        master = next((key for key in self._keys if key.key_id == key_id_of(content)), None)
        if master is None:
            raise UnknownMasterKeyError("was sealed with a master key that this keystore does not hold")
        key = None
        # Raise below, without a context: the frames of these exceptions may hold the decrypted bytes.
        with contextlib.suppress(InvalidTag, ValueError):
            key = RelayKey(
                str(master.cipher.decrypt(body[:_NONCE_SIZE], body[_NONCE_SIZE:], content[: head.end()]), "utf-8")
            )
        if key is None:
            raise EnvelopeError("was changed since it was written; store the key again")
        return key

    def to_bytes(self, passphrase: Passphrase | None) -> memoryview:
        """The content of the master key's file."""
        count = len(self._keys)
        if passphrase is None:
            head = f"pioneer-tunnel-master 1 plain {count} {_checksum(self._joined())}\n".encode()
            return memoryview(head + self._joined())
        cost = ScryptCost.fresh()
        head = f"pioneer-tunnel-master 1 scrypt {cost.log2_n} {cost.r} {cost.p} {cost.salt.hex()} {count}\n".encode()
        nonce = secrets.token_bytes(_NONCE_SIZE)
        return memoryview(head + nonce + passphrase.cipher(cost).encrypt(nonce, self._joined(), head))

    @classmethod
    def from_bytes(cls, content: memoryview, passphrase: Passphrase | None) -> MasterKeys:
        """Read the content of the master key's file.

        Raises:
            EnvelopeError: it was truncated or changed, or the passphrase is wrong, missing, or not needed.
        """
        plain = _PLAIN_HEAD.match(content)
        if plain is not None:
            if passphrase is not None:
                raise EnvelopeError(
                    "is not protected by a passphrase, and one was given; "
                    "open the keystore without it and rotate it to one"
                )
            body = content[plain.end() :]
            _check_length(body, _KEY_SIZE * int(plain[1]))
            if not hmac.compare_digest(_checksum(body), plain[2].decode()):
                raise EnvelopeError("was changed since it was written; restore it from a backup")
            return cls._split(body)
        head = _match(_SEALED_HEAD, content, "master")
        if passphrase is None:
            raise EnvelopeError("is protected by a passphrase, and none was given")
        cost = ScryptCost(int(head[1]), int(head[2]), int(head[3]), bytes.fromhex(head[4].decode()))
        if not cost.is_sane:
            raise EnvelopeError(f"asks for scrypt with N = 2**{cost.log2_n}, r = {cost.r}, p = {cost.p}: out of bounds")
        body = content[head.end() :]
        _check_length(body, _NONCE_SIZE + _KEY_SIZE * int(head[5]) + _TAG_SIZE)
        keys = None
        with contextlib.suppress(InvalidTag):
            keys = cls._split(
                memoryview(
                    passphrase.cipher(cost).decrypt(body[:_NONCE_SIZE], body[_NONCE_SIZE:], content[: head.end()])
                )
            )
        if keys is None:
            raise EnvelopeError("does not open: the passphrase is wrong, or the file was changed since it was written")
        return keys

    @classmethod
    def _split(cls, raw: memoryview) -> MasterKeys:
        if not raw or len(raw) > _MAX_KEYS * _KEY_SIZE:
            raise EnvelopeError(f"holds {len(raw) // _KEY_SIZE} master keys; 1 to {_MAX_KEYS} are allowed")
        return cls(tuple(_MasterKey(raw[at : at + _KEY_SIZE]) for at in range(0, len(raw), _KEY_SIZE)))

    def _joined(self) -> bytes:
        return b"".join(key.reveal() for key in self._keys)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("master keys are not pickled")


def key_id_of(content: memoryview) -> str:
    """The id of the master key that encrypted a secret's file.

    Raises:
        EnvelopeError: this is not the content of a secret's file.
    """
    return _match(_SECRET_HEAD, content, "secret")[2].decode()


def _match(pattern: re.Pattern[bytes], content: memoryview, kind: str) -> re.Match[bytes]:
    match = pattern.match(content)
    if match is not None:
        return match
    start = _HEAD.match(content)
    if start is not None and start[1].decode() == kind and int(start[2]) > 1:
        raise EnvelopeError(f"has format version {int(start[2])}; this version of the library knows only 1")
    what = "sealed secret" if kind == "secret" else "master key"
    raise EnvelopeError(f"is not a {what} of ours, or was changed or cut short since it was written")


def _check_length(body: memoryview, expected: int) -> None:
    if len(body) != expected:
        what = "was cut short" if len(body) < expected else "has grown"
        raise EnvelopeError(f"{what}: {len(body)} bytes follow its first line, which says {expected}")


def _checksum(raw: bytes | memoryview) -> str:
    return hashlib.sha256(raw).hexdigest()
