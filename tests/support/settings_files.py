"""Settings files for tests: examples, broken ones, documents of all kinds, and another program that writes them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from hypothesis import strategies as st

from pioneer_tunnel.gateway.settings import Settings, SettingsFile

CANARY: Final = "ptk1_canary-9f8e7d6c5b4a"

EXAMPLE: Final = """\
# The gateway's own settings.
theme = "dark"   # keep

[remote_access]          # remote access
# switched by the app
enabled    = false       # on or off
  server   = "relay.example.com:2333"  # ours

future_key = { a = 1 }   # of a newer gateway

[[windows]]
size = [ 1,
         2, ]  # pixels
"""


def changing(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda settings: attrs.evolve(settings, **changes)


@pytest.fixture
def settings_path(tmp_path: Path) -> Path:
    return tmp_path / "gateway-settings.toml"


def identity_of(path: Path) -> tuple[int, int, int]:
    """What is another when a file was replaced or written."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_mode


def update_of(path: Path, **changes: Any) -> str:
    """The text that the file has after an update."""
    SettingsFile(path).update(changing(**changes))
    return path.read_bytes().decode()


BROKEN: Final = {
    "not TOML": b"[remote_access\nenabled = true\n",
    "cut short": b"[remote_access]\nenabled = tr",
    "not UTF-8": b"[remote_access]\nserver = '\xff'\n",
    "twice": b"[remote_access]\nenabled = true\nenabled = false\n",
    "nested too deeply": b"a = " + b"[" * 5000,
    "a number too long": b"a = " + b"1" * 5000,
    "no table": b"remote_access = 3\n",
    "tables": b"[[remote_access]]\nenabled = true\n",
    "a wrong type": b"[remote_access]\nenabled = 1\n",
}

_SPACE: Final = st.sampled_from(["", " ", "  ", "\t"])
_COMMENT: Final = st.sampled_from(["", "", "# c", " # [remote_access]", "  # é 😀 server = 1"])
_SCALARS: Final = ["true", "1", '"x"', '"""a\nserver = 1\n"""', "'''q\n\n[remote_access]\n'''", "nan", "-0.0", "0xff"]
_VALUES: Final = st.sampled_from([*_SCALARS, "[ 1,2]", "[\n 1, # c\n]", "{ a = 1 }", "1979-05-27T07:32:00Z", "[]"])
_OURS: Final = {
    "enabled": st.sampled_from(["true", "false"]),
    "server": st.sampled_from(['"a"', "'b'", '"""\\\n  c"""', '""', '"d # e"']),
    "service_name": st.sampled_from(['"s"', "'s'"]),
    "transport": st.sampled_from(['"tcp"', "'tls'"]),
    "future": _VALUES,
}


@st.composite
def statements(draw: st.DrawFn, values: dict[str, st.SearchStrategy[str]]) -> list[tuple[str, str, str, str]]:
    """Lines of a table as (name, up to the value, value, behind it); comments and blank lines have no name."""
    lines = []
    for name in draw(st.permutations(sorted(values)))[: draw(st.integers(0, len(values)))]:
        fillers = draw(st.lists(st.sampled_from(["", "  ", "# comment", "\t# enabled = true"]), max_size=2))
        lines += [("", filler, "", "") for filler in fillers]
        spelt = draw(st.sampled_from([name, f'"{name}"', f"'{name}'"]))
        start = draw(_SPACE) + spelt + draw(_SPACE) + "=" + draw(_SPACE)
        lines.append((name, start, draw(values[name]), draw(_SPACE) + draw(_COMMENT)))
    return lines


def text_of(lines: list[tuple[str, str, str, str]]) -> str:
    return "".join(f"{start}{value}{behind}\n" for _, start, value, behind in lines)


_FOREIGN: Final = dict.fromkeys(("a", "b", "c"), _VALUES)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, list[tuple[str, str, str, str]] | None, str]:
    """Text before our table, the lines of our table (None: there is none), text after it."""
    before = text_of(draw(statements(_FOREIGN)))
    if draw(st.booleans()):
        before += f"[t1{draw(_SPACE)}]{draw(_COMMENT)}\n" + text_of(draw(statements(_FOREIGN)))
    ours = draw(st.none() | statements(_OURS))
    after = ""
    if draw(st.booleans()):
        after += "[remote_access.sub]\n" + text_of(draw(statements(_FOREIGN))) if ours is not None else ""
        after += "".join(f"[[t2]]{draw(_COMMENT)}\n{text_of(draw(statements(_FOREIGN)))}" for _ in range(2))
    if draw(st.booleans()):
        after += f"  [ t3 . x ]{draw(_COMMENT)}\n" + text_of(draw(statements(_FOREIGN)))
    return before, ours, after


CHANGES: Final = st.one_of(
    st.fixed_dictionaries({"enabled": st.booleans()}),
    st.fixed_dictionaries({"server": st.sampled_from([None, "new", 'q"\\'])}),
    st.fixed_dictionaries({"transport": st.sampled_from([None, "noise"])}),
)


@contextlib.contextmanager
def another_program_writing(path: Path, *contents: bytes | None) -> Iterator[list[bytes | None]]:
    """Each time our new content has been made durable, and is about to take its place, something else is there."""
    pending = list(contents)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        real(descriptor)
        if pending:
            content = pending.pop(0)
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield pending
