"""What a server's certificate tells: who issued it, and whether that authority was added to this host.

A company's proxy, or a virus scanner, that opens TLS shows a certificate of its own authority, which was added to the
host. Systems do not say which of their authorities came with them. But most keep those that an administrator adds in
a folder of its own, and there they can be found. An authority that is not found proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final, final

import attrs
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import NameOID

from .._model.errors import StorageError
from .._model.text import clean_message
from .._storage import files

__all__ = ["Facts", "added_authority", "knows_added", "read"]

ADDED_AUTHORITIES: Final = (
    Path("/usr/local/share/ca-certificates"),  # Debian, Ubuntu, Alpine
    Path("/etc/pki/ca-trust/source/anchors"),  # Fedora, RHEL
    Path("/etc/ca-certificates/trust-source/anchors"),  # Arch
    Path("/etc/pki/trust/anchors"),  # SUSE
)
"""Where administrators put authorities of their own."""

_FILE_LIMIT: Final = 1024 * 1024
_MOST_FILES: Final = 1000


@final
@attrs.frozen(kw_only=True)
class Facts:
    """Of a server's own certificate.

    Attributes:
        subject, issuer: their names, made printable.
        not_before, not_after: when it is valid.
    """

    subject: str
    issuer: str
    not_before: datetime
    not_after: datetime


def read(certificate: bytes) -> Facts | None:
    """The facts of a certificate, DER; None if it cannot be read."""
    with suppress(ValueError):
        parsed = x509.load_der_x509_certificate(certificate)
        return Facts(
            subject=_shown(parsed.subject),
            issuer=_shown(parsed.issuer),
            not_before=parsed.not_valid_before_utc,
            not_after=parsed.not_valid_after_utc,
        )
    return None


def knows_added() -> bool:
    """Whether this system keeps added authorities in one of the known folders."""
    return any(folder.is_dir() for folder in ADDED_AUTHORITIES)


def added_authority(chain: Sequence[bytes], places: Iterable[Path] | None = None) -> Path | None:
    """The file whose authority stands in `chain`, or issued a certificate of it; None if there is none. Blocks.

    Args:
        chain: certificates, DER; the server's own first.
        places: files of authorities, and folders of such files; by default those of added authorities.
    """
    with suppress(ValueError):
        parsed = [x509.load_der_x509_certificate(certificate) for certificate in chain]
        for file in _files_in(ADDED_AUTHORITIES if places is None else places):
            for authority in _authorities(file):
                if any(authority == one or _issued(authority, one) for one in parsed):
                    return file
    return None


def _files_in(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        with suppress(OSError):
            files_here = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
            yield from sorted(files_here)[:_MOST_FILES]


def _authorities(file: Path) -> list[x509.Certificate]:
    with suppress(StorageError, ValueError):
        content = files.read(file, limit=_FILE_LIMIT)
        return x509.load_pem_x509_certificates(bytes(content or b""))
    return []


def _issued(authority: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _shown(name: x509.Name) -> str:
    """The common name and the organisation; the whole name where there is neither."""
    parts = [
        str(attribute.value)
        for oid in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
        for attribute in name.get_attributes_for_oid(oid)
    ]
    return clean_message(", ".join(dict.fromkeys(parts)) or name.rfc4514_string())
