"""Which certificates TLS to a relay trusts, and what to report when a handshake fails.

The name and the chain are always checked. No setting switches that off.

    ca_file             authorities that are trusted in addition to the system's
    system_trust        openssl: the files that Python's OpenSSL was built to read, which `SSL_CERT_FILE` and
                        `SSL_CERT_DIR` replace; on Windows the system's stores as far as Python reads them.
                        os: what the operating system trusts, by its own rules, including what an administrator added
                        or removed. It needs truststore, the extra of that name

`system_trust` is explicit: an installed truststore package alone changes nothing.
"""

from __future__ import annotations

import hashlib
import ssl
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from ..._model.errors import InvalidSettingsError, StorageError
from ..._storage import files
from .alerts import advice_on, alert_in, is_tls

__all__ = ["SYSTEM_TRUSTS", "SystemTrust", "blocks", "client_tls", "trust_alike", "why_alerted", "why_tls_failed"]

SystemTrust: TypeAlias = Literal["openssl", "os"]
SYSTEM_TRUSTS: Final[tuple[SystemTrust, ...]] = get_args(SystemTrust)

_FILE_LIMIT: Final = 16 * 1024 * 1024

# OpenSSL's numbers for what is wrong with a certificate (x509_vfy.h).
_NOT_YET_VALID: Final = 9
_EXPIRED: Final = 10
_OTHER_NAME: Final = frozenset({62, 64})
_UNKNOWN_AUTHORITY: Final = frozenset({2, 18, 19, 20, 21})
_CA_FILE: Final = "_pioneer_tunnel_ca_file"
"""The attribute of a context that holds the path of its CA file."""

_TRUST: Final = "_pioneer_tunnel_trust"
"""The attribute of a context that holds what it trusts, in a form that can be compared."""

_HTTP: Final = b"HTTP/"


def client_tls(ca_file: Path | None = None, *, system_trust: SystemTrust = "openssl") -> ssl.SSLContext:
    """A context for TLS 1.2 or newer with the trust that the module describes. Blocks: it reads files.

    The checks are the same under each version of Python. From 3.13 on, Python's own default refuses certificates that
    break a formal rule of RFC 5280, as those of many private CAs do (one without an Authority Key Identifier, say). An
    operator who names such a CA trusts it, and an upgrade of Python must not cut the gateway off. So these rules are
    not enforced; signatures, dates, names and the CA flag are. An authority in `ca_file` is trusted also if another one
    issued it, which is Python's default from 3.13 on.

    Raises:
        InvalidSettingsError: `ca_file` cannot be read or holds no certificate, or truststore is not installed.
    """
    context = ssl.create_default_context() if system_trust == "openssl" else _operating_system()
    context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    system = ssl.get_default_verify_paths().capath  # a folder, of which OpenSSL reads the files that it needs
    trust = [_state_of(system)]
    if ca_file is not None:
        try:
            with files.pinned(ca_file, limit=_FILE_LIMIT) as path:
                context.load_verify_locations(path)
                trust.append(_state_of(path))
        except (StorageError, ssl.SSLError) as error:
            why = "it holds no certificate" if isinstance(error, ssl.SSLError) else str(error)
            raise InvalidSettingsError(f"the CA file {str(ca_file)!r} cannot be used: {why}") from error
        setattr(context, _CA_FILE, ca_file)
    if not blocks(context):
        loaded = hashlib.sha256(b"".join(context.get_ca_certs(binary_form=True))).digest()
        setattr(context, _TRUST, (loaded, trust))
    return context


def _state_of(path: str | None) -> object:
    """Differs when the file or folder has changed, or another one is there."""
    try:
        found = None if path is None else Path(path).stat()
    except OSError:
        return None
    return found and (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def trust_alike(first: ssl.SSLContext, second: ssl.SSLContext) -> bool:
    """Whether both trusted the same when `client_tls` made them. False with the trust of the operating system."""
    trust: object = getattr(first, _TRUST, None)
    return trust is not None and trust == getattr(second, _TRUST, None)


def _operating_system() -> ssl.SSLContext:
    try:
        import truststore  # noqa: PLC0415  # an extra
    except ImportError:
        raise InvalidSettingsError(
            "system_trust is 'os', which needs the package truststore: pip install 'pioneer-tunnel[truststore]'"
        ) from None
    return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def blocks(context: ssl.SSLContext) -> bool:
    """Whether a handshake with `context` may block, so that it has to run in a thread.

    truststore reads the system's certificates for each connection. On macOS and Windows a handshake also asks the
    operating system about the peer's certificate, which may use the network.
    """
    return type(context).__module__.partition(".")[0] == "truststore"


def why_tls_failed(
    cause: BaseException | None,
    context: ssl.SSLContext | None = None,
    *,
    host: str = "",
    beginning: bytes = b"",
    without_tls: str = "",
) -> str:
    """What the exception `cause` of a failed handshake means, and what to do about it, as a text.

    Args:
        context: of the handshake.
        host: the name or IP address that was dialled.
        beginning: the first bytes that came; b"" if they are not known, or none came.
        without_tls: what to do if the other end has no TLS.
    """
    if isinstance(cause, ssl.SSLCertVerificationError):
        return _why_not_trusted(cause, context)
    if not isinstance(cause, ssl.SSLError) or isinstance(cause, ssl.SSLEOFError):
        return "the connection was closed during the handshake"
    if (alert := alert_in(cause)) is not None:
        return _demand(alert, host)
    if beginning.startswith(_HTTP):
        return f"it answers in plain HTTP; does it speak TLS at all? {without_tls}".strip()
    reason = (cause.reason or "handshake failed").replace("_", " ").lower()
    if beginning and not is_tls(beginning):
        return f"{reason}; does it speak TLS at all?"
    if cause.reason == "UNSUPPORTED_PROTOCOL":
        return f"{reason}; does it speak TLS 1.2 or newer? Anything older is refused"
    return reason


def why_alerted(error: BaseException, host: str) -> str | None:
    """What the alert means that broke a stream, as `why_tls_failed` says it; None if no alert did.

    Args:
        error: what the stream raised.
        host: the name or IP address that was dialled.
    """
    cause = error.__cause__
    alert = alert_in(cause) if isinstance(cause, ssl.SSLError) else None
    return None if alert is None else _demand(alert, host)


def _demand(alert: str, host: str) -> str:
    return f"it sent the TLS alert {alert}: {advice_on(alert, host)}"


def _why_not_trusted(cause: ssl.SSLCertVerificationError, context: ssl.SSLContext | None) -> str:
    text = cause.verify_message
    if cause.verify_code in _OTHER_NAME:
        return f"its certificate is for another name ({text}); dial it by a name that stands in the certificate"
    if cause.verify_code == _EXPIRED:
        return f"its certificate is out of date ({text}); its operator has to renew it, or this host's clock is wrong"
    if cause.verify_code == _NOT_YET_VALID:
        return f"its certificate is not valid yet ({text}); is this host's clock right?"
    if cause.verify_code not in _UNKNOWN_AUTHORITY:
        return f"its certificate, or its CA's, is not acceptable ({text}); its operator has to issue it anew"
    ca_file: Path | None = getattr(context, _CA_FILE, None)
    if ca_file is None:
        return f"its certificate is not trusted ({text}); a CA of your own is named by ca_file"
    return (
        f"its certificate is not trusted ({text}): neither the system nor the ca_file {str(ca_file)!r} has the"
        " authority that issued it"
    )
