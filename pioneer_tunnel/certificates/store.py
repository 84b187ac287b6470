"""Keeps the account, the keys and the certificates on disk, in a folder that only its owner may access.

    FOLDER/HOST-1a2b3c4d/account.json        the account at one authority, and its key
    FOLDER/HOST-1a2b3c4d/orders.json         what `Schedule.records` keeps
    FOLDER/HOST-1a2b3c4d/certificates/NAME.pem   a certificate: its private key, itself, and its chain

HOST is that of the authority's directory; the digits are of its URL. So a change from staging to production orders
anew, and the way back finds what was there. Key and certificate are one file, which is replaced atomically: they always
belong together. All methods block: call them in a thread.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, final
from urllib.parse import urlsplit

from cryptography import x509

from .._model.errors import StorageError
from .._storage import files

__all__ = ["Store", "lifetime_of"]

FILE_LIMIT: Final = 1024 * 1024
_NAME: Final = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_SUFFIX: Final = ".pem"


@final
class Store:
    """The files of one authority.

    Args:
        folder: of all authorities; it is made.
        directory: the URL of the authority's directory.

    Raises:
        StorageError: the folders cannot be made, or the group or others may access them.
    """

    def __init__(self, folder: Path, directory: str) -> None:
        self._directory: Final = directory
        digest = hashlib.sha256(directory.encode()).hexdigest()[:8]
        self._folder: Final = folder / f"{urlsplit(directory).hostname}-{digest}"
        self._certificates: Final = self._folder / "certificates"
        for each in (folder, self._folder, self._certificates):
            files.make_private_folder(each)
            files.refuse_exposed_folder(each)

    def path_of(self, name: str) -> Path:
        """The file of a name's certificate.

        Raises:
            ValueError: it is no name of a host.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a certificate")
        return self._certificates / (name + _SUFFIX)

    def certificate(self, name: str) -> bytes | None:
        """The certificate of `name` with its chain, PEM; None if there is none that is whole and of this name."""
        content = files.read(self.path_of(name), limit=FILE_LIMIT, private=True)
        if content is None:
            return None
        chain = bytes(content)
        try:
            leaf = x509.load_pem_x509_certificate(chain)
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except (ValueError, x509.ExtensionNotFound):
            return None
        return (
            chain[chain.index(b"-----BEGIN CERTIFICATE") :] if name in names.get_values_for_type(x509.DNSName) else None
        )

    def keep_certificate(self, name: str, private_key: bytes, chain: bytes) -> None:
        """Replace the certificate of `name`.

        Raises:
            StorageError: it cannot be written. The one before is still there.
        """
        files.replace(self.path_of(name), private_key.rstrip() + b"\n" + chain, private=True)

    def account(self) -> dict[str, Any] | None:
        """The account; None if there is none.

        Raises:
            StorageError: it cannot be read, or is damaged.
        """
        return self._read("account.json")

    def keep_account(self, account: dict[str, Any]) -> None:
        """Replace the account."""
        self._write("account.json", account | {"directory": self._directory})

    def records(self) -> dict[str, Any]:
        """What `keep_records` has kept."""
        return self._read("orders.json") or {}

    def keep_records(self, records: dict[str, Any]) -> None:
        """Keep what `Schedule.records` returns."""
        self._write("orders.json", records)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who orders.

        Raises:
            StorageError: another process does, or the lock cannot be taken.
        """
        with files.locked(self._folder / "orders.json", seconds=0):
            files.remove_temporaries(self._folder)
            files.remove_temporaries(self._certificates)
            yield

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self._folder / name
        content = files.read(path, limit=FILE_LIMIT, private=True)
        if content is None:
            return None
        try:
            document = json.loads(bytes(content))
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise StorageError(f"{path} is damaged; restore or remove it")
        return document

    def _write(self, name: str, document: dict[str, Any]) -> None:
        content = memoryview(json.dumps(document, indent=1).encode() + b"\n")
        files.replace(self._folder / name, content, private=True)


def lifetime_of(chain: bytes) -> tuple[float, float]:
    """When the first certificate of a PEM chain is valid: from, and until, in seconds since 1970."""
    leaf = x509.load_pem_x509_certificate(chain)
    return leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
