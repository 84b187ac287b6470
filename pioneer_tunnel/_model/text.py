"""Text from outside, made safe to show: cleaned for one line, and redacted.

People paste keys in wrong places: a relay key as the address, a password in a URL, a token under a misspelt name. No
such secret may reach an error, a status or a log. When in doubt, these functions hide the value. An error still names
the configuration key that holds the value.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

from .addresses import Address, PublicUrl, RelayAddress, quotable
from .keys import KEY_PREFIX
from .proxies import Proxy

__all__ = ["MESSAGE_LIMIT", "clean_message", "cut", "hide_secrets", "redact_reason", "shown"]

MESSAGE_LIMIT: Final = 300
"""Characters of a status message."""

_VALUE_LIMIT: Final = 120
_REASON_LIMIT: Final = 400
# Longer runs of mixed characters look like a generated key; beyond the second length, any run does.
_MIXED_LENGTH: Final = 20
_ANY_LENGTH: Final = 32
_SECRET_NAME: Final = re.compile(r"key|token|pass|secret|credential|identity", re.IGNORECASE)
_RELAY_KEY: Final = re.compile(rf"{KEY_PREFIX}[A-Za-z0-9_-]*")
_RUN: Final = re.compile(rf"[A-Za-z0-9_+/=~-]{{{_MIXED_LENGTH},}}")
_QUOTED: Final = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


def clean_message(text: str) -> str:
    """`text` for a status, a log line or a terminal: one line, printable, at most 300 characters.

    Control, format and line-separating characters (Unicode categories C*, Zl, Zp) become spaces, so that text from a
    relay cannot forge a log line or send control sequences to a terminal. Runs of white space become one space.
    """
    printable = "".join(
        " " if unicodedata.category(char)[0] == "C" or char in "\u2028\u2029" else char for char in text
    )
    folded = " ".join(printable.split())
    return folded if len(folded) <= MESSAGE_LIMIT else folded[: MESSAGE_LIMIT - 1] + "…"


def shown(key: str, value: object) -> str | None:
    """`value` as an error may quote it; None when it is None or may be a secret.

    Args:
        key: the name of the configuration key. When it sounds like a secret, the value is never quoted.
        value: the value of the key.
    """
    if value is None or _SECRET_NAME.search(key):
        return None
    match value:
        case bool():
            return str(value).lower()
        case int():
            return str(value) if abs(value) < 10**18 else "a number of more than 18 digits"
        case float():
            return str(value)
        case str() | PurePath() | Address() | RelayAddress() | PublicUrl() | Proxy():
            text = str(value)
            return None if _may_be_secret(text) else cut(hide_secrets(repr(quotable(text))), _VALUE_LIMIT)
        case Mapping():
            return "a table"
        case list() | tuple():
            return "an array"
        case _:
            return f"a value of type {type(value).__name__}"


def redact_reason(reason: str, value: object) -> str:
    """`reason`, which says what is wrong with `value` and may quote it, without what may be a secret."""
    if isinstance(value, str) and _may_be_secret(value):
        # Hide quotes of the value, whole or with a part replaced by "…". Short quotes say what is allowed: keep them.
        reason = _QUOTED.sub(
            lambda match: "'…'" if len(match[0]) > _MIXED_LENGTH or "…" in match[0] else match[0], reason
        )
    return cut(hide_secrets(reason), _REASON_LIMIT)


def hide_secrets(text: str) -> str:
    """`text` with `…` for each part that may be a generated key: `ptk1_…`, or a long run of key characters."""
    return _RELAY_KEY.sub("…", _RUN.sub(lambda match: _run_shown(match[0]), text))


def cut(text: str, limit: int) -> str:
    """`text`, cut to `limit` characters, the last one `…`, when it is longer."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _run_shown(run: str) -> str:
    """`run` (characters of hex, base64 and relay keys), or `…` when it looks generated."""
    kinds = {"digit" if char.isdigit() else "upper" if char.isupper() else "lower" for char in run if char.isalnum()}
    if "/" in run:
        # Base64 has slashes, too. Padding, or a mix of characters that paths rarely have, distinguishes it from a path.
        if run.endswith("=") or len(kinds) == 3:
            return "…"
        return "/".join(_run_shown(part) for part in run.split("/"))
    return "…" if len(run) >= (_MIXED_LENGTH if len(kinds) > 1 else _ANY_LENGTH) else run


def _may_be_secret(text: str) -> bool:
    """True for a long string without '.' and ':', which is not an address, URL or file name."""
    return len(text) >= _MIXED_LENGTH and "." not in text and ":" not in text
