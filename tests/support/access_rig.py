"""Files of passwords and tokens, for tests of access rules."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Final

import bcrypt

TOKEN: Final = "a-token-of-the-tests"
OPEN: Final = "/healthz"


def htpasswd_file(folder: Path, **users: str) -> Path:
    """A file in which `ann` has the password `right`, or with other users."""
    lines = [
        f"{user}:{bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode()}\n"
        for user, password in (users or {"ann": "right"}).items()
    ]
    return _private_file(folder / "visitors.htpasswd", "".join(lines))


def tokens_file(folder: Path) -> Path:
    return _private_file(folder / "tokens", TOKEN)


def basic(password: str = "right", user: str = "ann") -> str:
    """The header with a user and a password."""
    return "Authorization: Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _private_file(path: Path, content: str) -> Path:
    path.touch(0o600)
    path.write_text(content)
    return path
