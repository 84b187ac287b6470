"""A TLS certificate with its private key, as two PEM files that may be replaced while they are in use.

Whoever renews a certificate writes two files, one after the other, and tells nobody. So at a handshake, once a second
at the most, the files are looked at, and when one is another than before both are read anew. What cannot be used, half
of a new pair among it, leaves the certificate that is in use in its place, is told in the log once, and is tried again
when a file changes again. A pair is used whole or not at all: OpenSSL takes no key that is not the certificate's.

Neighbours: the relay ends its visitors' and gateways' TLS with one, a gateway (`visitor_tls`) that of visitors whom the
relay has passed through.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Final, TypeAlias, final

import trio

from ..._model.errors import InvalidSettingsError, StorageError
from ..._storage import files

__all__ = ["Certificate"]

LOOK_INTERVAL: Final = 1.0
"""Seconds between two looks at the files."""

_FILE_LIMIT: Final = 1024 * 1024

LOOK_TIMEOUT: Final = 2.0
"""Seconds that a handshake waits for a look. A file system may hang; there is one thread that looks at most."""

_Stamp: TypeAlias = tuple[tuple[int, ...] | None, ...]

_log: Final = logging.getLogger("pioneer_tunnel.certificate")


@final
class Certificate:
    """A server's certificate, as new as its files.

    A server that ends TLS with it speaks TLS 1.2 or newer, and offers `http/1.1` to clients that ask by ALPN.

    Args:
        certificate: the certificate, and the chain up to its authority, PEM.
        private_key: its private key, PEM, without a passphrase.

    Raises:
        InvalidSettingsError: they cannot be used; the message names the files.
    """

    def __init__(self, certificate: Path | str, private_key: Path | str) -> None:
        self._files: Final = (Path(certificate), Path(private_key))
        self._stamp = self._look()
        self._context = self._load()
        self._looked_at: float | None = None
        self._looking = False

    @property
    def files(self) -> tuple[Path, Path]:
        """The certificate's file and the private key's."""
        return self._files

    async def context(self) -> ssl.SSLContext:
        """What the next handshake is made with, from files that were looked at within the last second.

        The look is in a thread. While it is under way, and when it takes longer than 2 seconds, the certificate in use
        stays.
        """
        now = trio.current_time()
        if not self._looking and (self._looked_at is None or now - self._looked_at >= LOOK_INTERVAL):
            self._looked_at = now
            with trio.move_on_after(LOOK_TIMEOUT):
                await trio.to_thread.run_sync(self._reload_if_changed, abandon_on_cancel=True)
        return self._context

    def _reload_if_changed(self) -> None:
        self._looking = True
        try:
            self._take_up_changes()
        finally:
            self._looking = False

    def _take_up_changes(self) -> None:
        # The look comes before the reading: what changes in between is seen at the next look.
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._context = self._load()
            _log.info("the TLS certificate %s was renewed", self._files[0])
        except InvalidSettingsError as error:
            _log.warning("%s; the one in use stays, until the files change again", error)

    def _look(self) -> _Stamp:
        """What tells the files' content from an earlier one, without reading it."""
        return tuple(_stamp_of(file) for file in self._files)

    def _load(self) -> ssl.SSLContext:
        certificate, private_key = self._files
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(["http/1.1"])
        encrypted = False

        def no_passphrase() -> str:
            # Without this OpenSSL would ask at the terminal, and wait.
            nonlocal encrypted
            encrypted = True
            return ""

        try:
            with (
                files.pinned(certificate, limit=_FILE_LIMIT) as chain_path,
                files.pinned(private_key, limit=_FILE_LIMIT) as key_path,
            ):
                context.load_cert_chain(chain_path, key_path, password=no_passphrase)
        except (StorageError, OSError) as error:
            why = "the key is encrypted with a passphrase" if encrypted else _why(error)
            raise InvalidSettingsError(
                f"the TLS certificate {str(certificate)!r} with the private key {str(private_key)!r} cannot be used:"
                f" {why}"
            ) from error
        return context

    def __repr__(self) -> str:
        return f"<Certificate {str(self._files[0])!r}>"


def _stamp_of(file: Path) -> tuple[int, ...] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _why(error: StorageError | OSError) -> str:
    """What is wrong, for a person; OpenSSL does not say with which file."""
    if not isinstance(error, ssl.SSLError):
        return str(error)
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key is not the certificate's"
    return error.reason.replace("_", " ").lower() if error.reason else "one of them is not PEM, or holds something else"
