"""What a request shows: its credentials, and whether it needs any. No I/O."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Final, final

import attrs

from .._http.forwarded import plain_name
from .._http.head import RequestHead
from .rules import Access

__all__ = ["AUTHORIZATION", "Password", "bearer_token", "is_exempt", "password"]

AUTHORIZATION: Final = b"authorization"

_SCHEME: Final = re.compile(rb"(?P<scheme>[A-Za-z]+)[ ]+(?P<value>[A-Za-z0-9._~+/-]+=*)")
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")

_NAMES_ANOTHER: Final = frozenset(
    {
        b"http2-settings",
        b"path-info",
        b"script-name",
        b"upgrade",
        b"x-http-method",
        b"x-http-method-override",
        b"x-method-override",
        b"x-script-name",
    }
)
"""Headers by which a server may take a request for one of another method, path or protocol; see `plain_name`."""
_NAMES_ANOTHER_PATH: Final = re.compile(rb"(?:x-|request-).*(?:path|prefix|uri|url)")


@final
@attrs.frozen
class Password:
    """A user with a password, as a request names them."""

    user: bytes = attrs.field(repr=False)
    password: bytes = attrs.field(repr=False)


def password(authorization: bytes) -> Password | None:
    """The user and the password of an Authorization header; None if it is of another scheme, or malformed.

    As RFC 7617 has it, neither has control characters, and the user has no colon.
    """
    encoded = _value(authorization, b"basic")
    if encoded is None:
        return None
    try:
        decoded = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        return None
    user, colon, secret = decoded.partition(b":")
    return Password(user, secret) if colon and not _CONTROL.search(decoded) else None


def bearer_token(authorization: bytes) -> bytes | None:
    """The token of an Authorization header; None if it is of another scheme, or malformed."""
    return _value(authorization, b"bearer")


def _value(authorization: bytes, scheme: bytes) -> bytes | None:
    match = _SCHEME.fullmatch(authorization)
    return match["value"] if match is not None and match["scheme"].lower() == scheme else None


def is_exempt(access: Access, head: RequestHead) -> bool:
    """Whether a request needs neither password nor token: it is for an open path, or a preflight that may pass.

    It must not have a body, nor a header by which a server may take it for another request.
    """
    if head.chunked or head.content_length or any(map(_names_another, (name for name, _ in head.headers))):
        return False
    if head.method in {b"GET", b"HEAD"}:
        # Byte for byte, since a server decodes and shortens a path in its own way. Paths that are the same to all are
        # the only ones that `Access` takes.
        return head.target.partition(b"?")[0].decode("latin-1") in access.open_paths
    return (
        access.preflights == "pass"
        and head.method == b"OPTIONS"
        and len(head.values(b"origin")) == 1
        and len(head.values(b"access-control-request-method")) == 1
    )


def _names_another(name: bytes) -> bool:
    plain = plain_name(name)
    return plain in _NAMES_ANOTHER or _NAMES_ANOTHER_PATH.fullmatch(plain) is not None
