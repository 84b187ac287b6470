"""The statements of a TOML text: where each header and each value stands.

The standard library's parser says what a document holds, and not where. tomlkit keeps a document's form, and does not
say either. So the text is split here, along strings, comments and brackets. Keys are read by the standard library.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias, final

import attrs

__all__ = ["Statement", "items_of", "lines_of_keys", "statements"]

KeyPath: TypeAlias = tuple[str | int, ...]
"""The names on the way to a value. A number is the index in an array of tables."""

_TOKEN: Final = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|\#[^\n]*|\n|[][{}=]|[^"'\#\n\[\]{}=]+''',
    re.DOTALL,
)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


@final
@attrs.frozen
class Statement:
    """A header or a value, with its lines.

    Attributes:
        path: of the table that a header opens, or of the value.
        header: whether it is a header.
        line: the number of its first line, from 1.
        start, end: of its lines in the text; the last line feed is a part of it.
        bracket: where the last bracket of the value closes, if it is an array or an inline table; else None.
    """

    path: KeyPath
    header: bool
    line: int
    start: int
    end: int
    bracket: int | None


def statements(text: str) -> Iterator[Statement]:
    """The statements of a valid document without a byte order mark, in the order of the text."""
    arrays: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for line, start, end, equals, bracket in _split(text):
        names = _names(text[start:end] if equals is None else f"{text[start:equals]}=0")
        header = equals is None
        is_array = header and text[start:end].lstrip().startswith("[[")
        if header:
            table = ()
        path: list[str | int] = [*table]
        for index, name in enumerate(names):
            path.append(name)
            here = tuple(path)
            if is_array and index == len(names) - 1:
                arrays[here] = arrays.get(here, -1) + 1
            if here in arrays:
                path.append(arrays[here])
        if header:
            table = tuple(path)
        yield Statement(tuple(path), header, line, start, end, bracket)


def _split(text: str) -> Iterator[tuple[int, int, int, int | None, int | None]]:
    """For each statement: its line, start, end, the place of its equals sign, and that of its last bracket."""
    line = first_line = 1
    start = depth = 0
    equals = bracket = None
    empty = True
    for token in _TOKEN.finditer(text):
        match token[0]:
            case "\n" if depth == 0:
                if not empty:
                    yield first_line, start, token.end(), equals, bracket
                start, first_line, equals, bracket, empty = token.end(), line + 1, None, None, True
            case "[" | "{":
                depth += 1
                empty = False
            case "]" | "}":
                depth -= 1
                bracket = token.start()
            case "=" if depth == 0 and equals is None:
                equals = token.start()
            case part if not part.startswith("#") and part.strip(" \t\r\n"):
                empty = False
        line += token[0].count("\n")
    if not empty:
        yield first_line, start, len(text), equals, bracket


def _names(statement: str) -> list[str]:
    value: Any = tomllib.loads(statement)
    names = []
    while value:
        if isinstance(value, list):
            (value,) = value
        else:
            ((name, value),) = value.items()
            names.append(name)
    return names


def items_of(text: str, array: Statement) -> list[tuple[int, int, int | None]]:
    """The tables in an array that is written inline: start, end, and the end of the comma, if there is one."""
    items: list[tuple[int, int, int | None]] = []
    depth = start = 0
    for token in _TOKEN.finditer(text, text.index("=", array.start), array.end):
        match token[0]:
            case "[" | "{":
                depth += 1
                if depth == 2:
                    start = token.start()
            case "]" | "}":
                depth -= 1
                if depth == 1:
                    items.append((start, token.end(), None))
            case part if depth == 1 and items and part.lstrip().startswith(","):
                items[-1] = (*items[-1][:2], token.start() + part.index(",") + 1)
    return items


def lines_of_keys(text: str) -> Mapping[str, int]:
    """The line of each key path, as problems name it: `relay.tunnels[2].url`. Of an array of tables, the first one."""
    lines: dict[str, int] = {}
    for statement in statements(text):
        parts: list[str] = []
        for part in statement.path:
            if isinstance(part, int):
                lines.setdefault("".join(parts), statement.line)
                parts.append(f"[{part}]")
            else:
                parts.append(("." if parts else "") + (part if _BARE_KEY.fullmatch(part) else repr(part)))
        lines.setdefault("".join(parts), statement.line)
    return lines
