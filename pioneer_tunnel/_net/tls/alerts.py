"""What a peer says when it breaks off TLS: the name of its alert, and what a gateway's user can do about it.

A peer that sends an alert speaks TLS. Python has no attribute for the alert. Only OpenSSL's text holds its name:
`sslv3 alert handshake failure`, `tlsv1 unrecognized name` or, from OpenSSL 3.2 on, `ssl/tls alert handshake failure`.
"""

from __future__ import annotations

import re
import ssl
from typing import Final

__all__ = ["advice_on", "alert_in", "describe", "is_tls"]

_ALERT: Final = re.compile(r"\] (?:sslv3|ssl/tls|tlsv1|tlsv13) (?:alert )?([a-z ]+) \(")

_FIRST_RECORDS: Final = frozenset({21, 22})

# A server that gets no client certificate sends one of these, depending on its library and on the version of TLS.
_OF_A_CERTIFICATE: Final = frozenset(
    {"certificate_required", "bad_certificate", "unsupported_certificate", "certificate_unknown"}
)


def alert_in(error: ssl.SSLError) -> str | None:
    """The alert that the peer sent, by its name in RFC 8446, 6.2; None if `error` is something else."""
    found = _ALERT.search(str(error))
    return None if found is None else found[1].replace(" ", "_")


def is_tls(beginning: bytes) -> bool:
    """Whether the first bytes of a connection, at least one, may be those of TLS: an alert or a handshake."""
    return beginning[0] in _FIRST_RECORDS


def describe(error: ssl.SSLError) -> str:
    """`error` as a text, from either end's view."""
    alert = alert_in(error)
    return f"the other end sent the alert {alert}" if alert is not None else error.reason or str(error)


def advice_on(alert: str, host: str) -> str:
    """What a server that sends `alert` to a client demands, and what to do. The client dialled `host`."""
    if alert in _OF_A_CERTIFICATE:
        return (
            "it demands a client certificate. A gateway has none: it proves itself by its key. The relay's operator has"
            " to switch this demand off"
        )
    if alert == "unrecognized_name":
        return f"it has no certificate for the name {host!r}; dial the name, and the port for gateways, of the relay"
    if alert == "missing_extension":
        return f"it wants to be dialled by a name, not as {host!r}"
    if alert == "protocol_version":
        return "it offers no version that is accepted here: TLS 1.2 or newer"
    if alert in {"handshake_failure", "insufficient_security"}:
        return "it accepts none of the versions and ciphers offered here, or demands a client certificate"
    if alert == "no_application_protocol":
        return "it does not offer HTTP/1.1, which a WebSocket needs; is this the relay's port for gateways?"
    if alert == "internal_error":
        return "its own log says why; is this the relay's port for gateways, and not that for visitors?"
    return "its own log says more"
