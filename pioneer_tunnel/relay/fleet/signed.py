"""What an operator signs: a tunnel, or that there is none any more (a tombstone). Sans I/O.

    SERIAL SIGNATURE JSON                   serial: decimal; signature: 128 hexadecimal digits; one space between them

The signature is Ed25519 over a prefix of our own, the serial, a space and the JSON text as it is written here. So it is
checked before anything is parsed, and a signature that the key has made for something else is none of ours. The JSON
text:

    {"not_after":1792000000,"tunnel":{"id":"office","key":"ed25519:…","url":"https://office.example.com"}}
    {"not_after":1792000000,"revoked":"office"}

The serial is the time of signing in milliseconds since 1970, or one more than the one before, if that is higher. So an
operator needs no record of it. Of two texts about a tunnel the higher serial counts. No text is valid for longer than
`MOST_VALID` from its signing. So a tombstone, or the memory of one, that is kept as long outlives all that it revokes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, final

import attrs

from ..._model.errors import InvalidSettingsError, Problem, TunnelError
from ..._model.keys import PublicKey, SigningIdentity
from ..._storage.validation import refusal, structure
from ..tunnels import LABEL_LIMIT, TunnelEntry

__all__ = ["MOST_BYTES", "MOST_VALID", "Forged", "SignedEntry", "publishable", "read_entry", "serial_of", "sign"]

MOST_BYTES: Final = 64 * 1024
"""Bytes of a text. A tunnel with 64 services has some 10 KiB."""

MOST_VALID: Final = 400 * 86_400
"""Seconds from the signing after which nothing is valid any more."""

_PREFIX: Final = b"pioneer-tunnel/v1 fleet entry\0"
_TEXT: Final = re.compile(rb"([0-9]{1,16}) ([0-9a-f]{128}) (\{.*\})", re.DOTALL)
_SERIAL: Final = re.compile(rb"([0-9]{1,16}) ")


class Forged(ValueError):
    """A text that the operator has not signed, or that is not valid. The message says why, for a log."""


@final
@attrs.frozen(kw_only=True)
class SignedEntry:
    """What an operator has said about a tunnel.

    Attributes:
        id: the tunnel's.
        serial: the higher one of two counts.
        not_after: when it ends to be valid, in seconds since 1970.
        tunnel: the tunnel; None if it was revoked.
        text: what was signed, with the signature.
    """

    id: str
    serial: int
    not_after: int
    tunnel: TunnelEntry | None
    text: bytes = attrs.field(repr=False)

    @property
    def memorable_until(self) -> float:
        """When every text that this one replaces is invalid, so that it may be forgotten, in seconds since 1970."""
        return self.serial / 1000 + MOST_VALID

    @property
    def ways(self) -> tuple[str, ...]:
        """How it is found: `key:` and the id of a key, `host:` and a host. No wildcards; nothing finds a tombstone."""
        if self.tunnel is None:
            return ()
        hosts = [
            route.host
            for route in self.tunnel.routes
            if route.host is not None and route.url is not None and not route.url.wildcard
        ]
        return (*(f"key:{key_id}" for key_id in self.tunnel.keys_by_id), *(f"host:{host}" for host in hosts))


def publishable(tunnel: Mapping[str, Any]) -> TunnelEntry:
    """The tunnel of a table, if an operator may publish it.

    Raises:
        InvalidSettingsError: it is no valid tunnel, or names what belongs to one machine: an address to listen at, or a
            file.
    """
    entry = structure(TunnelEntry, tunnel)
    problems = []
    for index, route in enumerate(entry.routes):
        path = f"services[{index}]." if entry.services else ""
        if route.bind_addr is not None:
            message = "is an address of one node; leave it out, or put the tunnel into the files of the nodes"
            problems.append(Problem(key=f"{path}bind_addr", message=message))
        for key in ("basic_auth", "bearer_tokens"):
            if route.access is not None and getattr(route.access, key) is not None:
                message = "is a file, and a signed tunnel has none; put the tunnel into the files of the nodes"
                problems.append(Problem(key=f"{path}access.{key}", message=message))
    if problems:
        raise refusal(problems)
    return entry


def sign(operator: SigningIdentity, tunnel: Mapping[str, Any] | str, *, serial: int, not_after: int) -> SignedEntry:
    """Sign a tunnel, or a tombstone.

    Args:
        operator: the private key.
        tunnel: the table of the tunnel; or for a tombstone, the id.
        serial: above every other one of this tunnel.
        not_after: see `SignedEntry`.

    Raises:
        InvalidSettingsError: see `publishable`; or the text is too long, or valid for too long.
    """
    said: dict[str, Any] = {"not_after": not_after}
    if isinstance(tunnel, str):
        said["revoked"] = tunnel
    else:
        publishable(tunnel)
        said["tunnel"] = tunnel
    content = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    signature = operator.sign(_message(b"%d" % serial, content))
    try:
        return read_entry(b"%d %s %s" % (serial, signature.hex().encode(), content), operator.public_key)
    except Forged as error:
        raise InvalidSettingsError(str(error)) from None


def read_entry(text: bytes, operator: PublicKey) -> SignedEntry:
    """Check a text, and read it. It may come from anybody.

    Raises:
        Forged: the operator has not signed it, or it is not valid at any time.
    """
    found = _TEXT.fullmatch(text) if len(text) <= MOST_BYTES else None
    if found is None:
        raise Forged(f"it is not a signed entry of at most {MOST_BYTES} bytes")
    serial, signature, content = found.groups()
    if not operator.verify(bytes.fromhex(signature.decode()), _message(serial, content)):
        raise Forged("the operator's key has not signed it")
    # From here on it is what the operator has signed. It may be of a newer version, or a mistake.
    try:
        said = json.loads(content)
        not_after, revoked = said["not_after"], said.get("revoked")
        tunnel = None if revoked is not None else publishable(said["tunnel"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Forged("it is signed, and not understood") from None
    except TunnelError as error:
        raise Forged(f"it is signed, and its tunnel is not valid: {error}") from None
    tunnel_id = revoked if tunnel is None else tunnel.id
    if not isinstance(tunnel_id, str) or not 1 <= len(tunnel_id) <= LABEL_LIMIT:
        raise Forged("it is signed, and names no tunnel")
    if not isinstance(not_after, int) or not 0 <= not_after <= int(serial) / 1000 + MOST_VALID:
        raise Forged(f"it is signed, and valid for more than {MOST_VALID // 86_400} days")
    return SignedEntry(id=tunnel_id, serial=int(serial), not_after=not_after, tunnel=tunnel, text=text)


def serial_of(text: bytes) -> int:
    """The serial that a text claims; -1 if it claims none. Nothing is checked."""
    found = _SERIAL.match(text)
    return -1 if found is None else int(found[1])


def _message(serial: bytes, content: bytes) -> bytes:
    return _PREFIX + serial + b" " + content
