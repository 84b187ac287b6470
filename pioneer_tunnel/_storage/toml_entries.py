"""Add an entry to an array of tables in a TOML text, or remove one, and keep every other byte.

    [[relay.tunnels]]
    id = "office"

The array may also be written inline: `tunnels = [{ id = "office" }]`. As in `toml_edit`, the standard library's parser
reads the result, which is refused unless it is the document that was asked for.

Comments between an entry's lines belong to it, and so do those that touch its first or its last line. But a comment
that touches the next header belongs to the next entry.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import tomlkit

from .toml_statements import Statement, items_of, statements

__all__ = ["with_entry", "without_entry"]

_INDENT: Final = re.compile(r"[ \t]*")
_COMMENT: Final = re.compile(r"[ \t]*#")


def with_entry(text: str, array: Sequence[str], entry: Mapping[str, Any]) -> str:
    """`text` with `entry` as the last one of an array.

    Args:
        text: a valid TOML document.
        array: the key path of the array. If there is none, it is added at the end of the document.
        entry: its values are strings, and arrays of tables of strings.

    Raises:
        ValueError: the way the document is written does not allow this.
    """
    found = [*statements(text)]
    inline = _inline(found, array)
    if inline is not None:
        edited = _with_item(text, inline, _inline_table(entry))
    else:
        ours = _of_array(found, array)
        headers = [statement for statement in ours if statement.header and len(statement.path) == len(array) + 1]
        outer, inner = _indents(text, headers, ours)
        end = _end_of_block(text, ours[-1].end) if ours else len(text)
        edited = _insert(text, end, _block(array, entry, outer, inner))
    expected = tomllib.loads(text)
    _array_in(expected, array).append(dict(entry))
    return _checked(edited, expected, array)


def without_entry(text: str, array: Sequence[str], index: int) -> tuple[str, str]:
    """`text` without one entry of an array, and the text that was removed.

    Args:
        text: a valid TOML document.
        array: the key path of the array.
        index: of the entry, which exists.

    Raises:
        ValueError: the way the document is written does not allow this.
    """
    found = [*statements(text)]
    inline = _inline(found, array)
    if inline is not None:
        edited, removed = _without_item(text, inline, index)
    else:
        ours = [part for part in found if part.path[: len(array) + 1] == (*array, index)]
        if not ours or any(part not in ours for part in found if ours[0].start <= part.start <= ours[-1].start):
            raise ValueError("the lines of the entry do not stand together")
        start, end = _start_of_block(text, ours[0].start), _end_of_block(text, ours[-1].end)
        edited, removed = _cut(text, start, end), text[start:end]
    expected = tomllib.loads(text)
    del _array_in(expected, array)[index]
    return _checked(edited, expected, array), removed


def _checked(edited: str, expected: dict[str, Any], array: Sequence[str]) -> str:
    try:
        same = _normal(tomllib.loads(edited), array) == _normal(expected, array)
    except ValueError:
        same = False
    if not same:
        raise ValueError("something else would change")
    return edited


def _normal(document: dict[str, Any], array: Sequence[str]) -> str:
    """In a form that can be compared: two NaN are never equal, and an empty array is as good as none."""
    tables = [document]
    for name in array[:-1]:
        tables.append(tables[-1].get(name, {}))
    for table, name in zip(reversed(tables), reversed(array), strict=True):
        if not table.get(name):
            table.pop(name, None)
    return json.dumps(document, sort_keys=True, default=repr)


def _array_in(document: dict[str, Any], array: Sequence[str]) -> list[Any]:
    table = document
    for name in array[:-1]:
        table = table.setdefault(name, {})
    found: list[Any] = table.setdefault(array[-1], [])
    return found


def _inline(found: Sequence[Statement], array: Sequence[str]) -> Statement | None:
    return next((part for part in found if part.path == tuple(array) and not part.header), None)


def _of_array(found: Sequence[Statement], array: Sequence[str]) -> list[Statement]:
    """The statements up to the end of the last entry."""
    return [part for part in found if part.path[: len(array)] == tuple(array)]


def _newline(text: str) -> str:
    return "\r\n" if text.partition("\n")[0].endswith("\r") else "\n"


# Headers


def _indents(text: str, headers: Sequence[Statement], ours: Sequence[Statement]) -> tuple[str, str]:
    """The white space before the last header, and before the first value below it."""
    if not headers:
        return "", ""
    outer = _indent_at(text, headers[-1].start)
    first = next((part for part in ours if part.start > headers[-1].start and not part.header), None)
    return outer, outer if first is None else _indent_at(text, first.start)


def _indent_at(text: str, position: int) -> str:
    found = _INDENT.match(text, position)
    return "" if found is None else found[0]


def _block(array: Sequence[str], entry: Mapping[str, Any], outer: str, inner: str) -> list[str]:
    """The lines of an entry."""
    lines = [f"{outer}[[{'.'.join(array)}]]"]
    lines += [f"{inner}{name} = {_value(value)}" for name, value in entry.items() if not isinstance(value, list)]
    for name, tables in entry.items():
        if isinstance(tables, list):
            for table in tables:
                lines += ["", *_block([*array, name], table, outer, inner)]
    return lines


def _value(value: str) -> str:
    return tomlkit.item(value).as_string()


def _insert(text: str, position: int, lines: Sequence[str]) -> str:
    """`lines` at the beginning of a line, with a blank line before and after."""
    newline = _newline(text)
    before, after = text[:position], text[position:]
    if before and not before.endswith("\n"):
        before += newline
    if before[:-1].rpartition("\n")[2].strip():
        before += newline
    block = "".join(line + newline for line in lines)
    if after and after.partition("\n")[0].strip():
        block += newline
    return before + block + after


def _start_of_block(text: str, start: int) -> int:
    """Where the comments begin that touch the line at `start`."""
    while start:
        previous = text.rfind("\n", 0, start - 1) + 1
        if not _COMMENT.match(text, previous):
            break
        start = previous
    return start


def _end_of_block(text: str, end: int) -> int:
    """Where the comments end that touch the line before `end`, unless they touch what follows as well."""
    position = end
    while _COMMENT.match(text, position):
        line_feed = text.find("\n", position)
        position = len(text) if line_feed == -1 else line_feed + 1
    touches_next = position < len(text) and text[position:].partition("\n")[0].strip()
    return end if touches_next else position


def _cut(text: str, start: int, end: int) -> str:
    """The text without these lines, and without the blank lines below them."""
    while end < len(text) and not text[end:].partition("\n")[0].strip():
        line_feed = text.find("\n", end)
        end = len(text) if line_feed == -1 else line_feed + 1
    before = text[:start]
    if end == len(text):
        before = before.rstrip("\r\n \t")
        before += _newline(text) if before else ""
    return before + text[end:]


# Inline


def _inline_table(entry: Mapping[str, Any]) -> str:
    values = [
        f"{name} = [{', '.join(map(_inline_table, value))}]" if isinstance(value, list) else f"{name} = {_value(value)}"
        for name, value in entry.items()
    ]
    return f"{{ {', '.join(values)} }}"


def _with_item(text: str, array: Statement, item: str) -> str:
    items = items_of(text, array)
    if array.bracket is None:
        raise ValueError("it is not an array")
    if not items:
        return text[: array.bracket] + item + text[array.bracket :]
    start, end, comma = items[-1]
    line = text.rfind("\n", 0, array.bracket) + 1
    own_lines = line > end
    before = text[:end] + ("" if comma else ",")
    if not own_lines:
        return f"{before} {item}{text[end:]}" if not comma else f"{text[:comma]} {item}{text[comma:]}"
    indent = _indent_at(text, text.rfind("\n", 0, start) + 1)
    return f"{before}{text[end:line]}{indent}{item}{',' if comma else ''}{_newline(text)}{text[line:]}"


def _without_item(text: str, array: Statement, index: int) -> tuple[str, str]:
    items = items_of(text, array)
    start, end, comma = items[index]
    line = text.rfind("\n", 0, start) + 1
    line_feed = text.find("\n", end)
    rest = text[comma or end : line_feed].strip()
    if not text[line:start].strip() and line_feed != -1 and (not rest or rest.startswith("#")):
        return text[:line] + text[line_feed + 1 :], text[line : line_feed + 1]
    if comma is not None:
        after = comma + len(_indent_at(text, comma))
        return text[:start] + text[after:], text[start:end]
    before = items[index - 1][1] if index else start
    return text[:before] + text[end:], text[start:end]
