"""The content of a file of bearer tokens. No I/O."""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final, final

import attrs

from .._model.errors import InvalidSettingsError

__all__ = ["FILE_LIMIT", "Tokens"]

FILE_LIMIT: Final = 64 * 1024

SHORTEST_TOKEN: Final = 16
"""Characters of a token in the file. Tokens are random texts: guessing them is not slowed down."""

_LINE: Final = re.compile(
    rb"(?:[A-Za-z0-9_.@-]{1,64}[ \t]*=[ \t]*)?(?:sha256:(?P<digest>[0-9a-f]{64})|(?P<token>[A-Za-z0-9._~+/-]+=*))"
)


@final
@attrs.frozen
class Tokens:
    """The SHA-256 digests of the tokens of a file."""

    _digests: frozenset[bytes] = attrs.field(repr=False)

    @classmethod
    def parse(cls, content: bytes) -> Tokens:
        """Read a file: on each line a token, or `sha256:` and its digest; either after `name =`.

        Empty lines and those that begin with `#` do not count. A name is for people alone.

        Raises:
            InvalidSettingsError: a line is something else, a token is too short, or there is none. It quotes nothing.
        """
        digests: set[bytes] = set()
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip() or line.startswith(b"#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise InvalidSettingsError(
                    f"line {number} is neither a token nor name = token; a token has letters, digits and -._~+/ alone"
                )
            token = match["token"]
            if token is not None and len(token) < SHORTEST_TOKEN:
                raise InvalidSettingsError(
                    f"line {number} has a token of less than {SHORTEST_TOKEN} characters, which could be guessed"
                )
            digests.add(bytes.fromhex(match["digest"].decode()) if token is None else hashlib.sha256(token).digest())
        if not digests:
            raise InvalidSettingsError("it has no token")
        return cls(frozenset(digests))

    def holds(self, token: bytes) -> bool:
        """Whether `token` is one of them. The time does not depend on which."""
        digest = hashlib.sha256(token).digest()
        return bool(sum([hmac.compare_digest(digest, known) for known in self._digests]))
