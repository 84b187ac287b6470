"""Read a TOML file, take one table of it, and report where a file is not TOML.

No error quotes the file. It may be a gateway's whole configuration, whose other tables may hold secrets.
"""

from __future__ import annotations

import errno
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from .._model.errors import Problem, StorageError
from .._model.text import hide_secrets, shown
from . import files
from .validation import refusal

__all__ = ["FILE_LIMIT", "parse_toml", "read_content", "read_toml", "subtable"]

FILE_LIMIT: Final = 64 * 1024 * 1024
"""Bytes that a TOML file may have."""

_TOML_ERROR: Final = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", re.DOTALL)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file: UTF-8 with or without a byte order mark, at most 64 MiB.

    Raises:
        StorageError: it cannot be read.
        InvalidSettingsError: it is not TOML; the message has line and column.
    """
    return parse_toml(read_content(path), path)


def read_content(path: Path) -> bytes:
    """Read a file that `parse_toml` takes, at most 64 MiB.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        content = files.read(path, limit=FILE_LIMIT)
    except ValueError as error:  # the path holds a null character
        raise StorageError(f"{path} cannot be read: {error}") from error
    if content is None:
        raise StorageError(f"{path} cannot be read: {os.strerror(errno.ENOENT)}")
    return bytes(content)


def parse_toml(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the content of a TOML file, as `read_toml` does.

    Raises:
        InvalidSettingsError: it is not TOML; the message has line and column.
    """
    document = _parse(content)
    if isinstance(document, str):
        raise refusal([Problem(source=str(path), message=document)])
    return document


def _parse(data: bytes) -> dict[str, Any] | str:
    """The document, or the error text. It does not raise: an exception's frames would hold the file's content."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return f"{_position(data[: error.start].decode(errors='replace'))}: not UTF-8"
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _TOML_ERROR.fullmatch(str(error))
        if match is None:
            return f"not TOML: {hide_secrets(str(error))}"
        what, line, column = match.groups()
        position = f"line {line}, column {column}" if line is not None else _position(text)
        return f"{position}: not TOML: {hide_secrets(what)}"
    except RecursionError:
        return "not TOML that can be read: nested too deeply"
    except ValueError:
        # Python's limit on the digits of an int; tomllib does not translate this error.
        return "not TOML that can be read: a number with too many digits"


def _position(before: str) -> str:
    """The position in the text right after `before`."""
    return f"line {before.count(chr(10)) + 1}, column {len(before.rpartition(chr(10))[2]) + 1}"


def subtable(document: Mapping[str, Any], where: str, *, source: str | None = None) -> Mapping[str, Any] | None:
    """The table at the key path `where`; None when there is none.

    Raises:
        InvalidSettingsError: the value there, or on the way, is not a table.
    """
    table: object = document
    path: list[str] = []
    for name in where.split("."):
        if not isinstance(table, Mapping):
            break
        if name not in table:
            return None
        table = table[name]
        path.append(name)
    if not isinstance(table, Mapping):
        key = ".".join(path)
        raise refusal([Problem(source=source, key=key, value=shown(key, table), message="allowed is a table")])
    return table
