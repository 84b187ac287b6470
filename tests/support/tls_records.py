"""TLS records that Python's `ssl` cannot send: key updates, empty records, alerts, and attempts to renegotiate.

A handshake is made by `ssl`, which writes its secrets to a key log. From them the records of one direction are made
here, for AES-GCM.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final, final

import trio
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

ALERT: Final = 21
HANDSHAKE: Final = 22
DATA: Final = 23
CLIENT_HELLO: Final = b"\x01\x00\x00\x29\x03\x03" + bytes(32) + b"\x00\x00\x02\x00\x9c\x01\x00"
KEY_UPDATE_SIZE: Final = 27
"""Bytes of a record with a key update."""


def secrets_of(key_log: Path) -> dict[str, bytes]:
    """The secrets that `ssl` wrote, by label."""
    lines = (line.split() for line in key_log.read_text().splitlines() if not line.startswith("#"))
    return {label: bytes.fromhex(secret) for label, _, secret in lines}


def expand_label(secret: bytes, label: str, length: int, algorithm: hashes.HashAlgorithm) -> bytes:
    """HKDF-Expand-Label of RFC 8446, without a context."""
    name = b"tls13 " + label.encode()
    info = length.to_bytes(2, "big") + bytes([len(name)]) + name + b"\x00"
    return HKDFExpand(algorithm, length, info).derive(secret)


@final
class Tls13Records:
    """Records of TLS 1.3 in one direction, from the first one after the handshake.

    Args:
        secret: the first application traffic secret of the direction.
        cipher: what `ssl` calls the cipher.
    """

    def __init__(self, secret: bytes, cipher: str) -> None:
        self._algorithm: Final = hashes.SHA384() if "SHA384" in cipher else hashes.SHA256()
        self._key_size: Final = 32 if "AES_256" in cipher else 16
        self._use(secret)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._aead = AESGCM(expand_label(secret, "key", self._key_size, self._algorithm))
        self._iv = int.from_bytes(expand_label(secret, "iv", 12, self._algorithm), "big")
        self._number = 0

    def record(self, content: bytes, kind: int = DATA) -> bytes:
        """One record."""
        header = bytes([DATA, 3, 3]) + (len(content) + 1 + 16).to_bytes(2, "big")
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        self._number += 1
        return header + self._aead.encrypt(nonce, content + bytes([kind]), header)

    def key_update(self, *, requested: bool = True) -> bytes:
        """A key update, after which the next record has the next key."""
        record = self.record(bytes([24, 0, 0, 1, requested]), HANDSHAKE)
        self._use(expand_label(self._secret, "traffic upd", self._algorithm.digest_size, self._algorithm))
        return record


@final
class Tls12Records:
    """Records of TLS 1.2 that a client sends after the handshake, with AES128-GCM-SHA256 of any key exchange.

    Args:
        master: the master secret.
        client_random: of the ClientHello.
        server_random: of the ServerHello.
    """

    def __init__(self, master: bytes, client_random: bytes, server_random: bytes) -> None:
        block = _prf_sha256(master, b"key expansion" + server_random + client_random, 16 + 16 + 4 + 4)
        self._aead: Final = AESGCM(block[:16])
        self._salt: Final = block[32:36]
        self._number = 1  # the Finished message was the record before

    def record(self, content: bytes, kind: int = DATA) -> bytes:
        """One record."""
        number = self._number.to_bytes(8, "big")
        self._number += 1
        header = bytes([kind, 3, 3])
        sealed = self._aead.encrypt(self._salt + number, content, number + header + len(content).to_bytes(2, "big"))
        return header + (len(number) + len(sealed)).to_bytes(2, "big") + number + sealed


def _prf_sha256(secret: bytes, seed: bytes, length: int) -> bytes:
    def mac(data: bytes) -> bytes:
        made = hmac.HMAC(secret, hashes.SHA256())
        made.update(data)
        return made.finalize()

    made, link = b"", seed
    while len(made) < length:
        link = mac(link)
        made += mac(link + seed)
    return made[:length]


@final
class Handshake:
    """`ssl` at one end of `stream`, for as long as the handshake takes.

    Attributes:
        tls: what agreed. It may go on to read.
        sent, received: all that went over the stream.
    """

    def __init__(self, stream: trio.abc.Stream, context: ssl.SSLContext, *, server_hostname: str | None = None) -> None:
        self._stream: Final = stream
        self._incoming: Final = ssl.MemoryBIO()
        self._outgoing: Final = ssl.MemoryBIO()
        self.tls: Final = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self.sent = b""
        self.received = b""

    async def run(self) -> None:
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._send()
                await self.receive()
            else:
                await self._send()
                return

    async def receive(self) -> bytes:
        """Give `tls` what comes next, and return it."""
        data = bytes(await self._stream.receive_some())
        self.received += data
        self._incoming.write(data)
        return data

    async def _send(self) -> None:
        data = self._outgoing.read()
        self.sent += data
        await self._stream.send_all(data)
