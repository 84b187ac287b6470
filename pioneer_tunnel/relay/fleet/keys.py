"""The keys of a fleet: a node's, with a certificate that it signs itself, and the operator's.

A node's key is Ed25519. Its file has the private key and the certificate, both PEM, for the node alone. The certificate
alone is for the other nodes. The operator's file has the private seed on the first line and the public half on the
second, as `relay new-identity` prints them. The functions that read files block.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from ..._model.errors import InvalidSettingsError, StorageError
from ..._model.keys import PublicKey, SigningIdentity
from ..._storage import files
from ..identity import read_identity

__all__ = ["new_node_key", "node_identity", "node_public_key", "operator_identity"]

_LIMIT: Final = 64 * 1024
_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
_UNTIL: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)
"""RFC 5280, 4.1.2.5: no end is known. A node is removed by removing its certificate from the files of the others."""


def new_node_key(name: str) -> tuple[memoryview, bytes]:
    """A new key for the node `name`: the content of its file, and its certificate, PEM."""
    private = Ed25519PrivateKey.generate()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_FROM)
        .not_valid_after(_UNTIL)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, None)
    ).public_bytes(Encoding.PEM)
    secret = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return memoryview(secret + certificate), certificate


def node_identity(path: Path) -> SigningIdentity:
    """The identity in a node's key file, whose certificate has to be of the same key.

    Raises:
        StorageError: the file cannot be read, or the group or others may access it.
        InvalidSettingsError: it holds something else.
    """
    content = files.read(path, limit=_LIMIT, private=True)
    if content is None:
        raise StorageError(f"the key file of this node, {str(path)!r}, cannot be read: there is none")
    try:
        private = load_pem_private_key(content, None)
        certificate = _key_of(bytes(content))
    except (ValueError, TypeError):  # no text of the library: it may quote the content
        private, certificate = None, None
    if not isinstance(private, Ed25519PrivateKey) or certificate is None:
        raise InvalidSettingsError(
            f"the key file of this node, {str(path)!r}, does not hold an Ed25519 key and its certificate;"
            " 'pioneer-tunnel relay fleet key --node NAME' makes one"
        )
    identity = SigningIdentity(private)
    if identity.public_key != certificate:
        raise InvalidSettingsError(f"the key file of this node, {str(path)!r}, holds the certificate of another key")
    return identity


def node_public_key(path: Path) -> PublicKey:
    """The key in the certificate of a node.

    Raises:
        StorageError: the file cannot be read.
        InvalidSettingsError: it holds no certificate, or one of another kind of key.
    """
    content = files.read(path, limit=_LIMIT)
    if content is None:
        raise StorageError(f"the certificate of a node, {str(path)!r}, cannot be read: there is none")
    key = _key_of(bytes(content))
    if key is None:
        raise InvalidSettingsError(f"the certificate of a node, {str(path)!r}, is none of an Ed25519 key")
    return key


def operator_identity(path: Path) -> SigningIdentity:
    """The identity in an operator's key file.

    Raises:
        StorageError: the file cannot be read, or the group or others may access it.
        InvalidSettingsError: it holds something else.
    """
    return read_identity(path, "operator's key file", "'pioneer-tunnel relay fleet key --operator' makes one")


def _key_of(content: bytes) -> PublicKey | None:
    try:
        key = x509.load_pem_x509_certificate(content).public_key()
    except ValueError:
        return None
    return PublicKey(key.public_bytes_raw()) if isinstance(key, Ed25519PublicKey) else None
