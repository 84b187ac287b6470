"""Answers to an authority that looks whether a name leads to us, while an order for it is under way.

HTTP-01 (RFC 8555, 8.3) asks for a path, TLS-ALPN-01 (RFC 8737) for a certificate that says the same. Only what an order
of ours has announced is answered, so no other account gets a certificate by it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ssl
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from .._net.tls.by_name import ACME_TLS
from .authority import CHALLENGE_PATH, Challenge, ChallengeKind

__all__ = ["Answers", "challenge_context"]

_ACME_IDENTIFIER: Final = x509.ObjectIdentifier("1.3.6.1.5.5.7.1.31")
_OCTET_STRING: Final = b"\x04\x20"
"""The tag of DER, and the length of a SHA-256."""


@final
class Answers:
    """What is answered now. Between orders it is empty."""

    def __init__(self) -> None:
        self._texts: Final[dict[tuple[str, bytes], bytes]] = {}
        self._contexts: Final[dict[str, ssl.SSLContext]] = {}

    @contextmanager
    def offered(self, challenges: Sequence[Challenge], contexts: Sequence[ssl.SSLContext]) -> Iterator[None]:
        """Answer these challenges while the block runs.

        Args:
            contexts: for those of TLS-ALPN-01, in their order, from `challenge_context`.
        """
        by_tls = [challenge for challenge in challenges if challenge.kind is ChallengeKind.TLS_ALPN_01]
        texts = {
            (challenge.name, CHALLENGE_PATH + challenge.token.encode("ascii")): challenge.key_authorization.encode()
            for challenge in challenges
            if challenge.kind is ChallengeKind.HTTP_01
        }
        self._texts.update(texts)
        self._contexts.update(zip((challenge.name for challenge in by_tls), contexts, strict=True))
        try:
            yield
        finally:
            for key in texts:
                del self._texts[key]
            for challenge in by_tls:
                del self._contexts[challenge.name]

    def http(self, host: str, target: bytes) -> bytes | None:
        """The body for a GET of `target` at `host`; None if it is not ours."""
        return self._texts.get((host, target))

    def tls(self, name: str | None) -> ssl.SSLContext | None:
        """The context for a handshake with `acme-tls/1`; None if there is nothing to answer."""
        return None if name is None else self._contexts.get(name)


def challenge_context(challenge: Challenge) -> ssl.SSLContext:
    """The context that answers a challenge of TLS-ALPN-01. Blocks."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ACME challenge")])
    now = dt.datetime.now(dt.UTC)
    digest = hashlib.sha256(challenge.key_authorization.encode()).digest()
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(challenge.name)]), critical=False)
        .add_extension(x509.UnrecognizedExtension(_ACME_IDENTIFIER, _OCTET_STRING + digest), critical=True)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([ACME_TLS.decode("ascii")])
    # OpenSSL reads from files alone. The key is of no use to anybody: it is worth something for one handshake.
    with tempfile.TemporaryDirectory(prefix="pioneer-tunnel-") as folder:
        pem = Path(folder) / "challenge.pem"
        pem.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context.load_cert_chain(pem)
    return context
