"""The claim of a name below a wildcard, signed by the node that took it. Sans I/O.

    NODE SIGNATURE JSON                     {"host":"blog.box.example.com","keys":["…"],"since":1792000000000}

The signature is Ed25519 by the node's key over a prefix of our own, the node's name, a space and the JSON text. `since`
is the time of the first claim in milliseconds. Of two claims of one name by different keys, the earlier one counts: so
all nodes agree, also when Redis has lost one of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Final, final

import attrs

from ..._model.keys import PublicKey, SigningIdentity
from .signed import Forged

__all__ = ["Claim", "UnknownNode", "read_claim", "sign_claim"]

_MOST_BYTES: Final = 8 * 1024
_PREFIX: Final = b"pioneer-tunnel/v1 fleet name\0"
_TEXT: Final = re.compile(rb"([a-z0-9.-]{1,63}) ([0-9a-f]{128}) (\{.*\})", re.DOTALL)


class UnknownNode(Forged):
    """A claim of a node that the configuration does not name: perhaps one that was removed."""


@final
@attrs.frozen(kw_only=True)
class Claim:
    """To whom a name belongs.

    Attributes:
        host: the name.
        keys: the ids of the keys that it belongs to.
        since: when it was claimed first, in milliseconds since 1970.
        text: what was signed, with the signature.
    """

    host: str
    keys: frozenset[str]
    since: int
    text: bytes = attrs.field(repr=False)

    def yields_to(self, other: Claim) -> bool:
        """Whether `other`, about the same name, counts in place of this one.

        Of two claims with a key in common the one with more keys counts: its owner has changed keys.
        """
        if self.keys & other.keys and len(self.keys) != len(other.keys):
            return len(self.keys) < len(other.keys)
        return (other.since, other.text) < (self.since, self.text)


def sign_claim(node: str, identity: SigningIdentity, *, host: str, keys: frozenset[str], since: int) -> Claim:
    """Sign a claim, as the node `node`."""
    said = {"host": host, "keys": sorted(keys), "since": since}
    content = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
    signature = identity.sign(_message(node.encode(), content))
    text = b"%s %s %s" % (node.encode(), signature.hex().encode(), content)
    return Claim(host=host, keys=keys, since=since, text=text)


def read_claim(text: bytes, nodes: Mapping[str, PublicKey] | None) -> Claim:
    """Check a text, and read it. It may come from anybody.

    Args:
        text: the text.
        nodes: the keys of the nodes of the fleet, by name; None for a text that was checked before.

    Raises:
        Forged: none of these nodes has signed it.
    """
    found = _TEXT.fullmatch(text) if len(text) <= _MOST_BYTES else None
    if found is None:
        raise Forged("it is not a signed claim")
    node, signature, content = found.groups()
    if nodes is not None:
        key = nodes.get(node.decode())
        if key is None:
            raise UnknownNode(f"it is of the node {node.decode()!r}, which the configuration does not name")
        if not key.verify(bytes.fromhex(signature.decode()), _message(node, content)):
            raise Forged(f"the key of the node {node.decode()!r} has not signed it")
    try:
        said = json.loads(content)
        return Claim(
            host=str(said["host"]), keys=frozenset(map(str, said["keys"])), since=int(said["since"]), text=text
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Forged("it is signed, and not understood") from None


def _message(node: bytes, content: bytes) -> bytes:
    return _PREFIX + node + b" " + content
