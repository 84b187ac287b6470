"""What an authority's refusal means, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from .authority import ChallengeKind

__all__ = ["explain"]

_PORTS: Final = {ChallengeKind.HTTP_01: 80, ChallengeKind.TLS_ALPN_01: 443}

_CURES: Final[Mapping[str, str]] = {
    "dns": "give {name} an A or AAAA record in the DNS that leads to the relay",
    "dnssec": "repair DNSSEC of the domain of {name}",
    "connection": "let port {port} of {name} be reached from the Internet, and lead to the relay",
    "caa": "add this authority to the CAA records of the domain of {name}, or name another directory",
    "rateLimited": "it is tried again when the authority allows it",
    "rejectedIdentifier": "the authority makes no certificates for {name}; name another directory, or use files",
    "invalidContact": "correct email of the acme table",
    "unsupportedContact": "correct email of the acme table",
    "userActionRequired": "read the authority's new terms of service, then remove account.json of its folder",
}
_CURE_ELSEWHERE: Final = (
    "something else answers at port {port} of {name}; its DNS records, all of them, have to lead to the relay"
)
_CURE_AT_GATEWAY: Final = "; if a gateway orders, the relay needs tls = 'passthrough' for it"


def explain(code: str, said: str, *, name: str | None, kind: ChallengeKind | None) -> str:
    """A text for a person: what the authority has said, and what to do.

    Args:
        code: of RFC 8555, 6.7, without the beginning that all of them have.
        said: what the authority has said.
        name: the name that was ordered.
        kind: how the authority checks it.
    """
    cure = _CURES.get(code)
    if code in {"unauthorized", "incorrectResponse", "tls"} and kind is not None:
        cure = _CURE_ELSEWHERE + (_CURE_AT_GATEWAY if kind is ChallengeKind.TLS_ALPN_01 else "")
    if cure is None:
        return said
    cure = cure.format(name=name or "the name", port=_PORTS.get(kind, 443) if kind is not None else 443)
    limit = 295 - len(cure)
    return f"{said if len(said) <= limit else said[: limit - 1] + '…'}; {cure}"
