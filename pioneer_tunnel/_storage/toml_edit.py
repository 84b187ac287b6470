"""Change values in one table of a TOML text, and keep every other byte.

tomlkit finds the position of a value, and we replace the text there. Then the standard library's parser reads the
result. The result is refused unless the changed values are as requested and all others are as before.
"""

from __future__ import annotations

import contextlib
import functools
import re
import secrets
import tomllib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, TypeAlias, final

import attrs
import tomlkit
import tomlkit.items

__all__ = ["TomlValue", "edit_table"]

TomlValue: TypeAlias = bool | str | None
"""The new value of a field; None removes it."""


def edit_table(text: str, table: str, changes: Mapping[str, TomlValue]) -> str:
    """Return `text` with the fields of `table` changed, and every other byte unchanged.

    Args:
        text: a valid TOML document.
        table: the table's name, a bare key; it is added when it does not exist.
        changes: field → value.

    Raises:
        ValueError: the way the document is written does not allow this; the message does not quote the document.
    """
    edited = text
    try:
        document = before = _Document.read(text, table)
        for name, value in changes.items():
            document = document.with_value(name, value)
        edited = document.text
        same = document.all_but(changes) == before.all_but(changes)
    except Exception as error:  # noqa: BLE001  # tomlkit may raise anything for a strange document
        # Raised below, without context: its frames would show the document, which may hold other programs' secrets.
        problem = type(error).__name__
    else:
        problem = "" if same else "something else would change"
    if problem:
        del text, edited, document, before
        raise ValueError(problem)
    return edited


@final
@attrs.define(repr=False)
class _Document:
    """A TOML text, its content as the standard library's parser reads it, and the name of the edited table."""

    text: str
    table: str
    data: dict[str, Any]
    _parsed_by_tomlkit: Any = None

    @classmethod
    def read(cls, text: str, table: str) -> _Document:
        return cls(text, table, tomllib.loads(text))

    def all_but(self, names: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """What must not change, in a form that can be compared: the other tables, and our table without `names`.

        It compares by repr, since two NaN are never equal. The order of keys within a table may differ.
        """
        rest = {name: repr(value) for name, value in self.data.items() if name != self.table}
        ours = {name: repr(value) for name, value in self.data.get(self.table, {}).items() if name not in names}
        return rest, ours

    def with_value(self, name: str, value: TomlValue) -> _Document:
        """The document with one field set; removed when `value` is None."""
        table = self._parsed()
        if value is not None and name not in table and not isinstance(table, tomlkit.items.InlineTable):
            return self._with_new_field(name, tomlkit.item(value).as_string(), value)
        return self.read(self._text_with_value(name, value), self.table)

    def _text_with_value(self, name: str, value: TomlValue) -> str:
        if value is None:
            return self._without(name)
        text, table = self.text, self._parsed()
        rendered = tomlkit.item(value).as_string()
        if name in table:
            start, end = self._span(name)
            return text[:start] + rendered + text[end:]
        if not table:
            start, end = self._span()
            return f"{text[:start]}{{ {name} = {rendered} }}{text[end:]}"
        _, end = self._span(list(table)[-1])
        return f"{text[:end]}, {name} = {rendered}{text[end:]}"

    def _with_new_field(self, name: str, rendered: str, value: TomlValue) -> _Document:
        statement, dotted = f"{name} = {rendered}", f"{self.table}.{name} = {rendered}"
        header: Final = re.compile(rf"""^[ \t]*\[[ \t]*(["']?){self.table}\1[ \t]*\]""", re.MULTILINE)
        places: list[Callable[[], str]] = [
            functools.partial(self._after_last_field, statement),
            *(functools.partial(self._on_line_after, match.end(), statement) for match in header.finditer(self.text)),
            functools.partial(self._at_end, statement),
            functools.partial(self._after_last_field, dotted),
            functools.partial(self._on_line_after, -1, dotted),
        ]
        # The right place depends on how the table is written. A wrong one gives invalid TOML or another document.
        for place in places:
            with contextlib.suppress(Exception):
                candidate = self.read(place(), self.table)
                if candidate.data[self.table][name] == value and candidate.all_but({name}) == self.all_but({name}):
                    return candidate
        raise ValueError("no place for a new field")

    def _after_last_field(self, statement: str) -> str:
        """Below the last field and indented like it. Comments and blank lines below it belong to what follows."""
        spans = []
        for field in self._parsed():
            with contextlib.suppress(Exception):  # a table within this one has no span
                spans.append(self._span(field))
        start, end = max(spans)
        line = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        indent = line[: len(line) - len(line.lstrip(" \t"))]
        return self._on_line_after(end, indent + statement)

    def _at_end(self, statement: str) -> str:
        """Under a new header. TOML refuses a second header, and one for a table that is written in dotted keys."""
        newline = self._newline
        ended = self.text if not self.text or self.text.endswith("\n") else self.text + newline
        return f"{ended}{newline if ended else ''}[{self.table}]{newline}{statement}{newline}"

    def _on_line_after(self, position: int, statement: str) -> str:
        """With `statement` on a new line after the line of `position`; for -1, on the first line."""
        text, newline = self.text, self._newline
        line_end = text.find("\n", position) + 1 if position >= 0 else 0
        if line_end == 0 and position >= 0:
            return f"{text}{newline}{statement}{newline}"
        return f"{text[:line_end]}{statement}{newline}{text[line_end:]}"

    def _without(self, name: str) -> str:
        """The text without one field. A comment after the value stays, on a line of its own."""
        text, table = self.text, self._parsed()
        if isinstance(table, tomlkit.items.InlineTable):
            start, end = self._span()
            table.remove(name)
            self._parsed_by_tomlkit = None  # it was changed
            return text[:start] + table.as_string() + text[end:]
        start, end = self._span(name)
        line = text.rfind("\n", 0, start) + 1
        newline = text.find("\n", end)
        next_line = len(text) if newline == -1 else newline + 1
        indent = text[line : line + len(text[line:]) - len(text[line:].lstrip(" \t"))]
        comment = text[end:next_line].lstrip(" \t")
        return text[:line] + (indent + comment if comment.startswith("#") else "") + text[next_line:]

    def _span(self, name: str | None = None) -> tuple[int, int]:
        """Start and end of one field's value in the text; without `name`, of a table that is written inline."""
        document = tomlkit.parse(self.text)
        mark = f"mark-{secrets.token_hex(16)}"
        if name is None:
            document[self.table] = mark
        else:
            table: Any = document[self.table]
            table[name] = mark
        before, _, after = document.as_string().partition(tomlkit.item(mark).as_string())
        start, end = len(before), len(self.text) - len(after)
        if start > end or not self.text.startswith(before) or not self.text.endswith(after):
            raise ValueError("the text around the value is not kept")
        return start, end

    def _parsed(self) -> Any:
        """Our table as tomlkit parsed it. Do not change it."""
        if self._parsed_by_tomlkit is None:
            self._parsed_by_tomlkit = tomlkit.parse(self.text).get(self.table, {})
        return self._parsed_by_tomlkit

    @property
    def _newline(self) -> str:
        return "\r\n" if self.text.partition("\n")[0].endswith("\r") else "\n"
