"""The content of an htpasswd file: users, and the bcrypt hashes of their passwords. No I/O.

Other hashes are refused: MD5 and SHA-1 are computed so fast that a stolen file gives the passwords away, and crypt uses
8 characters alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, final

import attrs

from .._model.errors import InvalidSettingsError

try:
    import bcrypt
except ModuleNotFoundError:
    _CAN_CHECK = False
else:
    _CAN_CHECK = True

__all__ = ["FILE_LIMIT", "Htpasswd"]

FILE_LIMIT: Final = 1024 * 1024

MOST_COST: Final = 14
"""The highest cost of a hash: 2^14 rounds take about a second. Each further one doubles that."""

_LONGEST_PASSWORD: Final = 72
"""Bytes that bcrypt uses. A longer password would be equal to its beginning."""

_HASH: Final = re.compile(rb"\$2[yb]\$(\d\d)\$[./A-Za-z0-9]{53}")
_USER: Final = re.compile(rb"[^\x00-\x1f\x7f:]{1,255}")
_WORK_FOR_NOBODY: Final = b"." * 53


@final
@attrs.frozen
class Htpasswd:
    """The users of a file.

    Attributes:
        hashes: the hash of each user's password.
        dummy: a hash of no password, which takes as long as the slowest hash of the file.
    """

    hashes: Mapping[bytes, bytes] = attrs.field(repr=False)
    dummy: bytes = attrs.field(repr=False)

    @classmethod
    def parse(cls, content: bytes) -> Htpasswd:
        """Read a file: `user:hash` on each line; empty lines and those that begin with `#` do not count.

        Raises:
            InvalidSettingsError: a line is something else, a hash is not bcrypt or costs too much, a user is there
                twice, there is none, or the extra `access` is not installed. It quotes nothing of the file.
        """
        if not _CAN_CHECK:
            raise InvalidSettingsError("basic_auth takes the package bcrypt: pip install 'pioneer-tunnel[access]'")
        hashes: dict[bytes, bytes] = {}
        highest = 4
        for number, line in enumerate(content.splitlines(), 1):
            if not line.strip() or line.startswith(b"#"):
                continue
            user, colon, hashed = line.strip().partition(b":")
            match = _HASH.fullmatch(hashed)
            if not colon or not _USER.fullmatch(user):
                raise InvalidSettingsError(f"line {number} is not user:hash")
            if match is None:
                raise InvalidSettingsError(
                    f"line {number} has another hash than bcrypt ($2y$ or $2b$); make it with: htpasswd -B"
                )
            cost = int(match[1])
            if not 4 <= cost <= MOST_COST:
                raise InvalidSettingsError(f"line {number} has a bcrypt cost of {cost}; allowed are 4 to {MOST_COST}")
            if user in hashes:
                raise InvalidSettingsError(f"line {number} has a user that an earlier line has too")
            hashes[user] = hashed
            highest = max(highest, cost)
        if not hashes:
            raise InvalidSettingsError("it has no user")
        return cls(MappingProxyType(hashes), b"$2b$%02d$" % highest + _WORK_FOR_NOBODY)

    def verify(self, user: bytes, password: bytes) -> bool:
        """Whether `password` is the user's. Takes the time of one hash, whether the user exists or not. Blocks.

        Raises nothing.
        """
        hashed = self.hashes.get(user)
        fits = len(password) <= _LONGEST_PASSWORD and b"\0" not in password
        matches = bcrypt.checkpw(password if fits else b"", self.dummy if hashed is None else hashed)
        return matches and fits and hashed is not None
