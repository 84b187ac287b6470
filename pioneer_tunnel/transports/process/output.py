"""What a tunnel program says: its lines, without what it must not have said, in bounded memory however much it is.

Pure; no I/O and no clock here. A program's output is a stranger's text: it may have no end, no line ends, colours and
control characters, and it may hold the key, whole, in pieces, or in another form. `Output` parts it into lines, looks
for the one that says that the tunnel is up, and keeps the last few; `Secrets` hides; `Budget` says how much is logged.

Neighbour: `process` reads the program's output into here.
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
from ..._model.text import hide_secrets

__all__ = ["Budget", "Output", "Secrets"]

LINE_LIMIT: Final = 4096
"""How many bytes of a line are looked at; the rest of it is dropped."""
_LOGGED_LIMIT: Final = 1000
_LAST_LINES: Final = 10
_LAST_WORDS_LIMIT: Final = 160
_PIECE: Final = 8
"""So many characters in a row that stand in the key too are taken for a piece of it."""
_ESCAPE_SEQUENCE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_HIDDEN: Final = "…"


@final
class Secrets:
    """Hides one relay key, in the forms that a program may print it in, and all that looks like a generated key.

    Pieces of the key are hidden too, from 8 characters on: a program may wrap its lines, and long ones are cut.
    """

    def __init__(self, key: RelayKey) -> None:
        forms = {_folded(_printable(form)) for form in _forms_of(key.reveal())} - {""}
        self._forms: Final = sorted(forms, key=len, reverse=True)
        self._pieces: Final = {form[i : i + _PIECE] for form in forms for i in range(len(form) - _PIECE + 1)}

    def hide(self, text: str) -> str:
        """`text`, which is printable, with `…` for what could be secret."""
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
        """Whether `text` holds the whole key, in any of its forms."""
        folded = _folded(text)
        return any(form in folded for form in self._forms)

    def __repr__(self) -> str:
        return "Secrets(***)"


def _forms_of(key: str) -> list[str]:
    """The key as programs and protocols write it: as it is, escaped, encoded, and hashed (rathole, for one)."""
    raw = key.encode()
    digests = [hashlib.new(name, raw, usedforsecurity=False).digest() for name in ("sha256", "sha1", "md5", "sha512")]
    forms = [
        key,
        repr(key)[1:-1],
        json.dumps(key)[1:-1],
        urllib.parse.quote(key, safe=""),
        urllib.parse.quote_plus(key),
    ]
    # Base64 looks different by where in its text the key begins ("user:key").
    for data in (raw, raw[1:], raw[2:], *digests):
        forms += [data.hex(), base64.b64encode(data).decode().rstrip("="), base64.b32encode(data).decode().rstrip("=")]
        forms.append(base64.urlsafe_b64encode(data).decode().rstrip("="))
    return forms


def _folded(text: str) -> str:
    """`text` without the difference between cases, character by character, so that places stay what they are."""
    return "".join(low if len(low := char.lower()) == 1 else char for char in text)


def _printable(text: str) -> str:
    """`text` without colours, control and format characters: what somebody sees of it on a terminal.

    They are left out, not replaced: what they part is one word to a reader, and may be a key.
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
    """The output of one program, from its first byte to its last.

    Args:
        pattern: what a line holds when the tunnel is up; None when no line says so.
        secrets: what has to be hidden.

    Attributes:
        matched: whether there was such a line.
    """

    def __init__(self, pattern: re.Pattern[str] | None, secrets: Secrets) -> None:
        self._pattern: Final = pattern
        self._secrets: Final = secrets
        self._unfinished = b""
        self._last: Final[deque[bytes]] = deque(maxlen=_LAST_LINES)
        self.matched: bool = False

    def receive(self, data: bytes | bytearray, *, every_line: bool = False) -> list[bytes]:
        """Take what was read; returns the lines that it has ended, as `shown` takes them.

        Args:
            data: any amount of it.
            every_line: None may be left out. Otherwise, of many that nobody waits for, these are the last ones only.
        """
        text = bytes(data).replace(b"\r", b"\n")
        if every_line or (self._pattern is not None and not self.matched):
            *ended, rest = text.split(b"\n")
        else:
            *ended, rest = text.rsplit(b"\n", _LAST_LINES + 1)
            if len(ended) > _LAST_LINES:
                ended[0] = b""  # many lines in one, and too old for anybody
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
        """No more will come; returns the line that nobody has ended, if there is one."""
        line, self._unfinished = self._unfinished, b""
        lines = [line] if line.strip() else []
        self._take(lines)
        return lines

    def shown(self, line: bytes) -> str:
        """`line` as a log may have it."""
        text = " ".join(_text(line).split())
        if len(text) <= _LOGGED_LIMIT and len(line) < LINE_LIMIT:
            return self._secrets.hide(text)
        # What is left of a key that the cut goes through may be too little to be seen as a piece of it.
        return self._secrets.hide(text[:_LOGGED_LIMIT])[: 1 - _PIECE] + _HIDDEN

    @property
    def last_words(self) -> str:
        """The newest lines in one, as an error may quote them; empty when there are none."""
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
    """So many a second, and a count of those that were too many.

    Args:
        allowed: how many.
        now: when the first second begins.
    """

    def __init__(self, allowed: int, now: float) -> None:
        self._allowed: Final = allowed
        self._since = now
        self._spent = 0

    def spend(self, now: float) -> bool:
        """Whether one more is within the budget."""
        if now - self._since >= 1:
            self._since, self._spent = now, 0
        self._spent += 1
        return self._spent <= self._allowed

    @property
    def is_over(self) -> bool:
        """Whether the last one was the first that was too many."""
        return self._spent == self._allowed + 1
