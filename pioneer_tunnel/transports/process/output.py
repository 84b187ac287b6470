"""The output of a tunnel program: its lines, without secrets, in bounded memory. No I/O and no clock.

The output is untrusted text. It may have no end, no line ends, colours and control characters. It may hold the key,
whole, in pieces or encoded. `Output` splits it into lines, looks for the line that says that the tunnel is up, and
keeps the last few. `Secrets` hides the key. `Budget` limits what is logged.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
import urllib.parse
from collections import deque
from typing import Final, final

from ..._model.keys import RelayKey
from ..._model.proxies import ProxyCredentials
from ..._model.text import hide_secrets

__all__ = ["Budget", "Output", "Secrets"]

LINE_LIMIT: Final = 4096
"""Bytes of a line that are used; the rest of the line is dropped."""
_LOGGED_LIMIT: Final = 1000
_LAST_LINES: Final = 10
_LAST_WORDS_LIMIT: Final = 160
_PIECE: Final = 8
"""Characters in a row that also stand in the key count as a piece of it."""
_ESCAPE_SEQUENCE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_HIDDEN: Final = "…"


@final
class Secrets:
    """Hides one relay key, in all forms in which a program may print it, and what looks like a generated key.

    Pieces of the key of 8 characters or more are hidden too: a program may wrap its lines, and long lines are cut.

    Args:
        key: the relay key.
        credentials: those for a proxy, whose password is hidden in the same way.
    """

    def __init__(self, key: RelayKey, credentials: ProxyCredentials | None = None) -> None:
        secrets = [key.reveal()] if credentials is None else [key.reveal(), credentials.reveal()[1]]
        forms = {_folded(_printable(form)) for secret in secrets for form in _forms_of(secret)} - {""}
        self._forms: Final = sorted(forms, key=len, reverse=True)
        self._pieces: Final = {form[i : i + _PIECE] for form in forms for i in range(len(form) - _PIECE + 1)}

    def hide(self, text: str) -> str:
        """`text`, which is printable, with `…` in place of what could be secret."""
        folded = _folded(text)
        hidden = bytearray(len(text))
        for form in self._forms:
            start = folded.find(form)
            while start >= 0:
                hidden[start : start + len(form)] = b"\1" * len(form)
                start = folded.find(form, start + 1)
        for start in range(len(folded) - _PIECE + 1):
            if folded[start : start + _PIECE] in self._pieces:
                hidden[start : start + _PIECE] = b"\1" * _PIECE
        shown = [
            _HIDDEN if hidden[i] else char for i, char in enumerate(text) if not (hidden[i] and i and hidden[i - 1])
        ]
        return hide_secrets("".join(shown))

    def are_in(self, text: str) -> bool:
        """Whether `text` holds the whole key, in any form."""
        folded = _folded(text)
        return any(form in folded for form in self._forms)

    def __repr__(self) -> str:
        return "Secrets(***)"


def _forms_of(key: str) -> list[str]:
    """The key as programs and protocols write it: plain, escaped, encoded, and hashed (as rathole does)."""
    raw = key.encode()
    digests = [hashlib.new(name, raw, usedforsecurity=False).digest() for name in ("sha256", "sha1", "md5", "sha512")]
    forms = [
        key,
        repr(key)[1:-1],
        json.dumps(key)[1:-1],
        urllib.parse.quote(key, safe=""),
        urllib.parse.quote_plus(key),
    ]
    # The Base64 of the key depends on its offset in the encoded text ("user:key").
    for data in (raw, raw[1:], raw[2:], *digests):
        forms += [data.hex(), base64.b64encode(data).decode().rstrip("="), base64.b32encode(data).decode().rstrip("=")]
        forms.append(base64.urlsafe_b64encode(data).decode().rstrip("="))
    return forms


def _folded(text: str) -> str:
    """`text` in lower case, character by character, so that indices stay the same."""
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)


def _printable(text: str) -> str:
    """`text` without colours, control and format characters, as a terminal shows it.

    They are removed, not replaced: what they separate is one word to a reader, and may be a key.
    """
    if text.isprintable():
        return text
    return "".join(
        " " if char == "\t" else char
        for char in _ESCAPE_SEQUENCE.sub("", text)
        if char == "\t" or (unicodedata.category(char)[0] != "C" and char not in "\u2028\u2029")
    )


@final
class Output:
    """The output of one program.

    Args:
        pattern: matches a line when the tunnel is up; None when no line says so.
        secrets: hides the key.

    Attributes:
        matched: whether a line has matched.
    """

    def __init__(self, pattern: re.Pattern[str] | None, secrets: Secrets) -> None:
        self._pattern: Final = pattern
        self._secrets: Final = secrets
        self._unfinished = b""
        self._last: Final[deque[bytes]] = deque(maxlen=_LAST_LINES)
        self.matched: bool = False

    def receive(self, data: bytes | bytearray, *, every_line: bool = False) -> list[bytes]:
        """Take bytes of the output; returns the lines that they complete, for `shown`.

        Args:
            data: the bytes, any number of them.
            every_line: return every line. Otherwise, when no line has to match, old ones of many may be left out.
        """
        text = bytes(data).replace(b"\r", b"\n")
        if every_line or (self._pattern is not None and not self.matched):
            *ended, rest = text.split(b"\n")
        else:
            *ended, rest = text.rsplit(b"\n", _LAST_LINES + 1)
            if len(ended) > _LAST_LINES:
                ended[0] = b""  # many old lines, which are not needed
                self._unfinished = b""
        lines = []
        for piece in ended:
            line, self._unfinished = self._longer(piece), b""
            if line.strip():
                lines.append(line)
        self._unfinished = self._longer(rest)
        self._take(lines)
        return lines

    def end(self) -> list[bytes]:
        """Take EOF; returns the unfinished line, if there is one."""
        line, self._unfinished = self._unfinished, b""
        lines = [line] if line.strip() else []
        self._take(lines)
        return lines

    def shown(self, line: bytes) -> str:
        """`line` as printable text without secrets, at most 1000 characters, for a log."""
        text = " ".join(_text(line).split())
        if len(text) <= _LOGGED_LIMIT and len(line) < LINE_LIMIT:
            return self._secrets.hide(text)
        # The cut may leave fewer characters of a key than count as a piece, so remove so many more.
        return self._secrets.hide(text[:_LOGGED_LIMIT])[: 1 - _PIECE] + _HIDDEN

    @property
    def last_words(self) -> str:
        """The newest lines in one text, for an error; empty when there are none."""
        words = " | ".join(filter(None, (self.shown(line) for line in self._last)))
        return words if len(words) <= _LAST_WORDS_LIMIT else _HIDDEN + words[1 - _LAST_WORDS_LIMIT :]

    def _longer(self, piece: bytes) -> bytes:
        return self._unfinished + piece[: LINE_LIMIT - len(self._unfinished)]

    def _take(self, lines: list[bytes]) -> None:
        self._last.extend(lines[-_LAST_LINES:])
        if self._pattern is not None and not self.matched:
            self.matched = any(self._pattern.search(_text(line)) for line in lines)

    def __repr__(self) -> str:
        return f"Output(matched={self.matched})"


def _text(line: bytes) -> str:
    return _printable(line.decode("utf-8", "replace"))


@final
class Budget:
    """A limit per second.

    Args:
        allowed: how many per second.
        now: when the first second begins.
    """

    def __init__(self, allowed: int, now: float) -> None:
        self._allowed: Final = allowed
        self._since = now
        self._spent = 0

    def spend(self, now: float) -> bool:
        """Spend one; returns whether it is within the limit."""
        if now - self._since >= 1:
            self._since, self._spent = now, 0
        self._spent += 1
        return self._spent <= self._allowed

    @property
    def is_over(self) -> bool:
        """Whether the last one was the first over the limit."""
        return self._spent == self._allowed + 1
