"""TLS between nodes: each one has a self-signed certificate, and trusts exactly those of the others.

There is no authority and no host name. A certificate is compared byte for byte with the one in the configuration, so a
node whose certificate may sign others, by mistake, adds no node to the fleet.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, final

import trio

from ..._model.errors import InvalidSettingsError, StorageError
from ..._net.tls.stream import TlsStream
from ..._storage import files

__all__ = ["NodeTls"]

_FILE_LIMIT: Final = 64 * 1024


@final
class NodeTls:
    """The certificates of a fleet, as one machine knows them. Blocks when it is made: it reads files.

    Args:
        certificate: this machine's own, PEM.
        private_key: its key, PEM. It may stand in the same file. Its mode is for the caller to check.
        others: the certificates of the other machines, PEM, by their names.

    Raises:
        InvalidSettingsError: a file cannot be used, or two machines have the same certificate.
    """

    def __init__(self, certificate: Path, private_key: Path, others: Mapping[str, Path]) -> None:
        own = _der_of(certificate)
        names = {own: "this node"}
        self._ders: Final[dict[str, bytes]] = {}
        for name, path in others.items():
            der = _der_of(path)
            taken_by = names.setdefault(der, name)
            if taken_by != name:
                raise InvalidSettingsError(
                    f"the certificate {str(path)!r} of the node {name!r} is that of {taken_by} too; each has its own"
                )
            self._ders[name] = der
        self._names: Final = {der: name for name, der in self._ders.items()}
        self._server: Final = _context(ssl.PROTOCOL_TLS_SERVER, certificate, private_key, self._ders.values())
        self._server.num_tickets = 0  # a link is kept, and never resumed
        self._clients: Final = {
            name: _context(ssl.PROTOCOL_TLS_CLIENT, certificate, private_key, [der]) for name, der in self._ders.items()
        }

    async def accept(self, stream: trio.abc.Stream) -> tuple[TlsStream, str]:
        """Do the handshake with a node that has dialled. The caller sets the deadline.

        Returns:
            The stream in clear, and the name of the machine at its other end.

        Raises:
            trio.BrokenResourceError: it has no certificate that the configuration names.
        """
        secured = TlsStream(stream, self._server, server_side=True)
        await secured.do_handshake()
        name = self._names.get(_shown_by(secured))
        if name is None:
            raise trio.BrokenResourceError("its certificate is none that the configuration names")
        return secured, name

    async def connect(self, stream: trio.abc.Stream, name: str) -> TlsStream:
        """Do the handshake with the machine `name`. The caller sets the deadline.

        Raises:
            trio.BrokenResourceError: it has another certificate, or refuses this one.
        """
        secured = TlsStream(stream, self._clients[name])
        await secured.do_handshake()
        if _shown_by(secured) != self._ders[name]:
            raise trio.BrokenResourceError("it has another certificate than the configuration names")
        return secured


def _shown_by(secured: TlsStream) -> bytes:
    certificates = secured.peer_certificates
    return certificates[0] if certificates else b""


def _none() -> bytes:
    """The password of a key file. Without it, OpenSSL would ask at the terminal."""
    return b""


def _context(kind: int, certificate: Path, private_key: Path, trusted: Iterable[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    # A certificate that is trusted by itself, as `NodeTls` compares the whole of it. Not `VERIFY_X509_STRICT`, which
    # is Python's default from 3.13 on, and asks for what a self-signed certificate need not have.
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
    try:
        with (
            files.pinned(certificate, limit=_FILE_LIMIT) as certificate_path,
            files.pinned(private_key, limit=_FILE_LIMIT) as key_path,
        ):
            context.load_cert_chain(certificate_path, key_path, password=_none)
        for der in trusted:
            context.load_verify_locations(cadata=der)
    except (StorageError, OSError) as error:
        raise InvalidSettingsError(
            f"the certificate {str(certificate)!r} of this node with the private key {str(private_key)!r} cannot be"
            f" used: {error}"
        ) from error
    return context


def _der_of(path: Path) -> bytes:
    """The first certificate in a file."""
    try:
        content = files.read(path, limit=_FILE_LIMIT)
        if content is None:
            raise StorageError("there is no such file")
        text = bytes(content).decode("ascii")
        start = text.index(ssl.PEM_HEADER)
        end = text.index(ssl.PEM_FOOTER, start) + len(ssl.PEM_FOOTER)
        return ssl.PEM_cert_to_DER_cert(text[start:end])
    except (StorageError, ValueError) as error:
        why = str(error) if isinstance(error, StorageError) else "it holds no certificate"
        raise InvalidSettingsError(f"the certificate of a node, {str(path)!r}, cannot be used: {why}") from error
