"""A TLS certificate with its private key, as two PEM files that may be replaced while they are in use.

Tools that renew certificates write two files, one after the other, and do not notify us. So before a handshake, at most
once a second, the files' status is checked, and if one has changed both are read. If the new files cannot be loaded
(for example, only one was replaced), the current certificate stays in use, the log says so once, and the next change is
tried again. OpenSSL refuses a key that does not match its certificate, so a pair is used whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import re
import ssl
from pathlib import Path
from typing import Final, TypeAlias, final

import trio

from ..._model.errors import InvalidSettingsError, StorageError
from ..._model.log_fields import about
from ..._storage import files

__all__ = ["Certificate", "certificate_hash"]

CHECK_INTERVAL: Final = 1.0
"""Seconds between two checks of the files."""

_FILE_LIMIT: Final = 1024 * 1024

CHECK_TIMEOUT: Final = 2.0
"""Seconds that a handshake waits for a check. A file system may hang. At most one thread checks at a time."""

_HASH: Final = "_pioneer_tunnel_certificate_hash"
"""The attribute of a context that holds the hash of its certificate."""

_PEM: Final = re.compile(rb"-----BEGIN ([A-Z0-9 ]*CERTIFICATE)-----(.+?)-----END \1-----", re.DOTALL)

_Stamp: TypeAlias = tuple[tuple[int, ...] | None, ...]

_log: Final = logging.getLogger("pioneer_tunnel.certificate")


@final
class Certificate:
    """A server's certificate that follows its files.

    A server that ends TLS with it speaks TLS 1.2 or newer, and offers `http/1.1` to clients that ask by ALPN.

    Args:
        certificate: the certificate, and the chain up to its authority, PEM.
        private_key: its private key, PEM, without a passphrase.

    Raises:
        InvalidSettingsError: they cannot be loaded; the message names the files.
    """

    def __init__(self, certificate: Path | str, private_key: Path | str) -> None:
        self._files: Final = (Path(certificate), Path(private_key))
        self._stamp = self._stamps()
        self._context = self._load()
        self._checked_at: float | None = None
        self._checking = False

    @property
    def files(self) -> tuple[Path, Path]:
        """The certificate's file and the private key's."""
        return self._files

    async def context(self) -> ssl.SSLContext:
        """The context for the next handshake. Checks the files if the last check is at least a second ago.

        A thread checks. While it runs, and if it takes longer than 2 seconds, the current certificate is returned.
        """
        now = trio.current_time()
        if not self._checking and (self._checked_at is None or now - self._checked_at >= CHECK_INTERVAL):
            self._checked_at = now
            with trio.move_on_after(CHECK_TIMEOUT):
                await trio.to_thread.run_sync(self._reload_if_changed, abandon_on_cancel=True)
        return self._context

    def _reload_if_changed(self) -> None:
        self._checking = True
        try:
            self._reload()
        finally:
            self._checking = False

    def _reload(self) -> None:
        # The status is taken before the files are read, so a change in between is seen by the next check.
        stamp = self._stamps()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._context = self._load()
            fields = about("certificate_renewed", file=self._files[0])
            _log.info("the TLS certificate %s was renewed", self._files[0], extra=fields)
        except InvalidSettingsError as error:
            fields = about("file_refused", file=self._files[0], reason=error)
            _log.warning("%s; the one in use stays, until the files change again", error, extra=fields)

    def _stamps(self) -> _Stamp:
        """The files' status, which differs when their content may."""
        return tuple(_stamp_of(file) for file in self._files)

    def _load(self) -> ssl.SSLContext:
        certificate, private_key = self._files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        encrypted = False

        def no_passphrase() -> str:
            # Without this OpenSSL would prompt at the terminal and block.
            nonlocal encrypted
            encrypted = True
            return ""

        try:
            with (
                files.pinned(certificate, limit=_FILE_LIMIT) as chain_path,
                files.pinned(private_key, limit=_FILE_LIMIT) as key_path,
            ):
                context.load_cert_chain(chain_path, key_path, password=no_passphrase)
                setattr(context, _HASH, _hash_of(Path(chain_path).read_bytes()))
        except (StorageError, OSError) as error:
            why = "the key is encrypted with a passphrase" if encrypted else _why(error)
            raise InvalidSettingsError(
                f"the TLS certificate {str(certificate)!r} with the private key {str(private_key)!r} cannot be used:"
                f" {why}"
            ) from error
        return context

    def __repr__(self) -> str:
        return f"<Certificate {str(self._files[0])!r}>"


def certificate_hash(context: ssl.SSLContext) -> bytes | None:
    """The SHA-256 of the certificate (DER) of a context that a `Certificate` has made; None if it is not known."""
    found: bytes | None = getattr(context, _HASH, None)
    return found


def _hash_of(chain: bytes) -> bytes | None:
    first = _PEM.search(chain)
    if first is None or first[1] == b"TRUSTED CERTIFICATE":  # that one holds more than the certificate
        return None
    return hashlib.sha256(base64.b64decode(first[2])).digest()


def _stamp_of(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _why(error: StorageError | OSError) -> str:
    """What is wrong, as a text. OpenSSL does not say in which file."""
    if not isinstance(error, ssl.SSLError):
        return str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return error.reason.replace("_", " ").lower() if error.reason else "one of them is not PEM, or holds something else"
