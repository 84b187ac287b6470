"""The settings file: read strictly, changed in place byte for byte, never lost, never overwritten blindly."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from crashing_files import LEFTOVER, Crash, crash_after, failing, names
from fuzzing import examples
from hypothesis import example, given, settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from shown import everything_shown

from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._model.keys import RelayKey
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel._storage import files
from pioneer_tunnel.gateway.settings import Settings, SettingsFile, SettingsUpdate

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
def path(tmp_path: Path) -> Path:
    return tmp_path / "gateway-settings.toml"


def identity_of(path: Path) -> tuple[int, int, int]:
    """What is another when a file was replaced or written."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_mode


def update_of(path: Path, **changes: Any) -> str:
    """The text that the file has after an update."""
    SettingsFile(path).update(changing(**changes))
    return path.read_bytes().decode()


# Reading


def test_a_missing_file_says_the_defaults(path: Path) -> None:
    assert SettingsFile(path).read() == Settings()
    assert Settings() == Settings(
        enabled=False, server=None, service_name=None, transport=None, secret_ref="remote_access"
    )
    assert not path.exists()


def test_a_file_is_read(path: Path) -> None:
    path.write_text(EXAMPLE)
    assert SettingsFile(path).read() == Settings(enabled=False, server="relay.example.com:2333")
    path.write_text("[remote_access]\nservice_name='s'\ntransport=\"tls\"\nsecret_ref='other'\nserver='  '\n")
    assert SettingsFile(path).read() == Settings(service_name="s", transport="tls", secret_ref="other")


def test_every_value_that_is_not_allowed_is_told_with_file_key_path_value_and_what_is_allowed(path: Path) -> None:
    text = (
        '[remote_access]\nenabled = "yes"\nserver = 3\nservice_name = "a\\nb"\ntransport = [1]\nsecret_ref = "../x"\n'
    )
    path.write_text(text)
    with pytest.raises(InvalidSettingsError) as raised:
        SettingsFile(path).read()
    problems = {problem.key: problem for problem in raised.value.problems}
    assert {key: problem.value for key, problem in problems.items()} == {
        "remote_access.enabled": "'yes'",
        "remote_access.server": "3",
        "remote_access.service_name": r"'a\nb'",
        "remote_access.transport": "an array",
        "remote_access.secret_ref": "'../x'",
    }
    for problem in problems.values():
        assert problem.source == str(path)
        assert problem.message.startswith("allowed is ")
        assert str(problem) in str(raised.value)
    with pytest.raises(InvalidSettingsError):
        SettingsFile(path).update(changing(enabled=True))
    assert path.read_text() == text


@pytest.mark.parametrize("name", [".hidden", "", "a/b", "a" * 65, "ä", "a b"])
def test_what_is_no_reference_is_refused(path: Path, name: str) -> None:
    path.write_text(f'[remote_access]\nsecret_ref = "{name}"\n')
    with pytest.raises(InvalidSettingsError, match=r"remote_access\.secret_ref.*allowed is 1 to 64 of"):
        SettingsFile(path).read()
    with pytest.raises(ValueError, match="secret_ref"):
        Settings(secret_ref=name)


def test_a_key_in_the_place_of_its_reference_is_not_quoted(path: Path) -> None:
    path.write_text(f'[remote_access]\nsecret_ref = "{CANARY * 4}"\n')
    with pytest.raises(InvalidSettingsError) as raised:
        SettingsFile(path).read()
    assert CANARY not in everything_shown(raised.value)


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


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_an_error_that_names_it_and_stays(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    before = identity_of(path)
    for attempt in (SettingsFile(path).read, lambda: SettingsFile(path).update(changing(enabled=True))):
        with pytest.raises(InvalidSettingsError, match=r"gateway-settings\.toml: ") as raised:
            attempt()
        assert raised.value.kind is ErrorKind.INVALID_SETTINGS
    assert path.read_bytes() == content
    assert identity_of(path) == before


def test_what_others_keep_in_the_file_is_in_no_error(path: Path) -> None:
    others = f'[mail]\npassword = "{CANARY}"\n'
    for broken in ("[remote_access]\nenabled = 1\n", "x = \n", "remote_access = 1\n", "[remote_access]\nenabled = [\n"):
        path.write_text(broken + others if "1" in broken.partition("\n")[0] else others + broken)
        with pytest.raises(InvalidSettingsError) as raised:
            SettingsFile(path).update(changing(enabled=True))
        assert CANARY not in everything_shown(raised.value)
    path.write_text(others)
    for step in ("open", "write", "fsync", "replace"):
        with failing(step, errno.EIO), pytest.raises(StorageError) as failed:
            SettingsFile(path).update(changing(enabled=True))
        assert CANARY not in everything_shown(failed.value)


def test_errors_of_the_disk_are_of_kind_io_and_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = SettingsFile(tmp_path / "file" / "settings.toml")
    missing = SettingsFile(tmp_path / "missing" / "settings.toml")
    assert missing.read() == Settings()
    for attempt in (below.read, lambda: below.update(changing(enabled=True))):
        with pytest.raises(StorageError, match=r"file/settings\.toml.*: Not a directory") as raised:
            attempt()
        assert raised.value.kind is ErrorKind.IO
    with pytest.raises(StorageError, match=r"missing/settings\.toml.*: No such file or directory"):
        missing.update(changing(enabled=True))


# Writing


def test_a_missing_file_is_made_for_its_owner_alone(path: Path) -> None:
    assert update_of(path, enabled=True) == "[remote_access]\nenabled = true\n"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


def test_an_update_that_changes_nothing_touches_nothing(path: Path) -> None:
    file = SettingsFile(path)
    assert file.update(changing(enabled=False)) == Settings()
    assert names(path.parent) == []
    path.write_text(EXAMPLE)
    before = identity_of(path)
    with crash_after(1) as done:  # the one call opens the file for reading
        file.update(changing(enabled=False, server="relay.example.com:2333"))
    assert done == ["open"]
    assert identity_of(path) == before


def test_the_mode_is_kept(path: Path) -> None:
    path.write_text(EXAMPLE)
    path.chmod(0o640)
    update_of(path, enabled=True)
    assert path.stat().st_mode & 0o777 == 0o640


def test_only_what_was_changed_differs(path: Path) -> None:
    path.write_text(EXAMPLE)
    assert update_of(path, enabled=True) == EXAMPLE.replace("enabled    = false ", "enabled    = true ")
    path.write_text(EXAMPLE)
    assert update_of(path, server="wss://b/") == EXAMPLE.replace('"relay.example.com:2333"', '"wss://b/"')


def test_a_field_that_is_removed_leaves_its_comment(path: Path) -> None:
    path.write_text(EXAMPLE)
    assert update_of(path, server=None) == EXAMPLE.replace('  server   = "relay.example.com:2333"  # ours', "  # ours")
    path.write_text("[remote_access]\r\nserver = 'x'\r\nenabled = true")
    assert update_of(path, server=None) == "[remote_access]\r\nenabled = true"
    path.write_text("[remote_access]\nserver = 'x'")
    assert update_of(path, server=None) == "[remote_access]\n"


ADDITIONS: Final = {
    "to a table": ("[remote_access]\nenabled = true\n\n[b]\n", "[remote_access]\nenabled = true\n{}\n[b]\n"),
    "above what is about the next table": (
        "[remote_access]\n\tenabled = true # c\n\n# about b\n[b]\n",
        "[remote_access]\n\tenabled = true # c\n\t{}\n# about b\n[b]\n",
    ),
    "right below a header": ("[remote_access] # c\n# about b\n[b]\n", "[remote_access] # c\n{}# about b\n[b]\n"),
    "below several lines": ("[remote_access]\nx = [\n1]\ny = 1\n#\n", "[remote_access]\nx = [\n1]\ny = 1\n{}#\n"),
    "to an empty table": ("[remote_access]\n", "[remote_access]\n{}"),
    "to a header that ends the file": ("[remote_access]", "[remote_access]\n{}"),
    "to a file without the table": ("a = 1\n", "a = 1\n\n[remote_access]\n{}"),
    "to a file that does not end its line": ("a = 1", "a = 1\n\n[remote_access]\n{}"),
    "to a file with a part of the table": (
        "[remote_access.more]\nx = 1\n",
        "[remote_access.more]\nx = 1\n\n[remote_access]\n{}",
    ),
    "to a table written inline": (
        "remote_access = { enabled = true } # c\n",
        'remote_access = {{ enabled = true, server = "s" }} # c\n',
    ),
    "to an empty table written inline": ("remote_access = {}\n", 'remote_access = {{ server = "s" }}\n'),
    "to a table in two places": (
        "[remote_access]\nenabled = true\n[b]\n[remote_access.more]\nx = 1\n",
        "[remote_access]\nenabled = true\n{}[b]\n[remote_access.more]\nx = 1\n",
    ),
    "to an empty table in two places": (
        "x = '''\n[remote_access]\n'''\n[remote_access.more]\nx = 1\n[b]\n[ 'remote_access' ] # c\n# d\n[e]\n",
        "x = '''\n[remote_access]\n'''\n[remote_access.more]\nx = 1\n[b]\n[ 'remote_access' ] # c\n{}# d\n[e]\n",
    ),
    "below an inline table": ("[remote_access]\nx = {{}}\n#\n", "[remote_access]\nx = {{}}\n{}#\n"),
    "below an array": ("[remote_access]\nx = [\n1]\n#\n", "[remote_access]\nx = [\n1]\n{}#\n"),
    "to dotted keys of dotted keys": (
        "# c\nremote_access.more.x = 1\n",
        'remote_access.server = "s"\n# c\nremote_access.more.x = 1\n',
    ),
    "among dotted keys": (
        " remote_access . enabled = true # c\n\nb = 1\n[c]\n",
        ' remote_access . enabled = true # c\n remote_access.server = "s"\n\nb = 1\n[c]\n',
    ),
    "to dotted keys": (
        "remote_access.enabled = true\n",
        'remote_access.enabled = true\nremote_access.server = "s"\n',
    ),
}


@pytest.mark.parametrize("line_end", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize(("old", "new"), ADDITIONS.values(), ids=ADDITIONS)
def test_a_new_field_goes_where_it_belongs(path: Path, old: str, new: str, line_end: str) -> None:
    path.write_bytes(old.replace("{{}}", "{}").replace("\n", line_end).encode())
    ends = line_end if "\n" in old else "\n"  # a file of one line does not say which it has
    assert update_of(path, server="s") == new.format('server = "s"\n').replace("\n", ends)


def test_a_field_of_a_table_that_is_written_otherwise_is_changed_and_removed(path: Path) -> None:
    path.write_text("a = 1\nremote_access = { server = 's', enabled = true } # c\n[b]\n")
    assert update_of(path, server="t") == 'a = 1\nremote_access = { server = "t", enabled = true } # c\n[b]\n'
    assert update_of(path, server=None) == "a = 1\nremote_access = {  enabled = true } # c\n[b]\n"
    path.write_text("a = 1\nremote_access.server = 's' # c\nremote_access.more.x = 1\nb = 2\n")
    assert update_of(path, server="t") == 'a = 1\nremote_access.server = "t" # c\nremote_access.more.x = 1\nb = 2\n'
    assert update_of(path, server=None) == "a = 1\n# c\nremote_access.more.x = 1\nb = 2\n"
    path.write_text("remote_access.server = 's'\n")
    assert update_of(path, server=None) == ""


def test_a_byte_order_mark_is_kept(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf[remote_access]\nenabled = false\n")
    update_of(path, enabled=True)
    assert path.read_bytes() == b"\xef\xbb\xbf[remote_access]\nenabled = true\n"


@given(server=st.text(max_size=100).map(str.strip))
@hypothesis_settings(max_examples=30, deadline=None)
def test_whatever_a_server_is_called_is_read_back(server: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = SettingsFile(Path(folder) / "s.toml")
        assert file.update(SettingsUpdate(server=server).apply_to) == Settings(server=server or None)
        assert file.read() == Settings(server=server or None)


def test_a_document_that_cannot_be_edited_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomlkit

    path.write_text(EXAMPLE)
    for misbehave in (
        lambda _value: tomlkit.item("something else"),
        lambda _value: tomlkit.item([1]),
        lambda _value: 1 / 0,
    ):
        with monkeypatch.context() as patch:
            patch.setattr("pioneer_tunnel._storage.toml_edit.tomlkit.item", misbehave)
            with pytest.raises(StorageError, match=r"change remote_access\.service_name there by hand"):
                SettingsFile(path).update(changing(service_name="s"))
        assert path.read_text() == EXAMPLE


def test_a_document_of_which_something_else_would_change_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pioneer_tunnel._storage import toml_edit

    path.write_text(EXAMPLE)
    start = EXAMPLE.index('"relay.example.com')
    end = EXAMPLE.index("\n\n[[windows]]")
    monkeypatch.setattr(toml_edit._Document, "_span", lambda _document, _name: (start, end))
    with pytest.raises(
        StorageError, match=r"\(something else would change\); change remote_access\.server there by hand"
    ):
        SettingsFile(path).update(changing(server="s"))
    assert path.read_text() == EXAMPLE


# Documents of all kinds

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


@given(document=documents(), changes=CHANGES, line_end=st.sampled_from(["\n", "\r\n"]))
@example(document=("", None, ""), changes={"enabled": True}, line_end="\r\n")
@hypothesis_settings(max_examples=examples(150), deadline=None)
def test_all_other_bytes_of_any_document_survive(
    document: tuple[str, list[tuple[str, str, str, str]] | None, str], changes: dict[str, Any], line_end: str
) -> None:
    before, ours, after = document
    header = "" if ours is None else " [remote_access] # ours\n"
    old = (before + header + text_of(ours or []) + after).replace("\n", line_end)
    ((name, value),) = changes.items()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.toml"
        path.write_bytes(old.encode())
        was = SettingsFile(path).read()
        now = SettingsFile(path).update(changing(**changes))
        new = path.read_bytes().decode()
    assert getattr(now, name) == value
    if now == was:
        assert new == old
        return
    at = next((index for index, line in enumerate(ours or []) if line[0] == name), None)
    if ours is None or at is None:
        # One piece was put in: a line of its own, and a header where there was none.
        start = len(os.path.commonprefix([old, new]))  # noqa: RUF071 (characters are what is meant)
        length = len(new) - len(old)
        assert new[start + length :] == old[start:]
        assert new.replace(line_end, "").count(f"{name} = ") >= 1
        # An empty document does not tell how its lines end.
        assert "\n" not in new.replace("\r\n", "") or line_end == "\n" or not old
        return
    # Exactly that value was exchanged, or exactly that line went, but for its comment.
    _, start_of_line, _, behind = ours[at]
    if value is None:
        comment = behind.lstrip(" \t")
        indent = start_of_line[: len(start_of_line) - len(start_of_line.lstrip(" \t"))]
        kept = [("", indent + comment, "", "")] if comment else []
        expected = [*ours[:at], *kept, *ours[at + 1 :]]
    else:
        written = new.replace(line_end, "\n")[len(before + header + text_of(ours[:at]) + start_of_line) :]
        written = written[: len(written) - len(f"{behind}\n" + text_of(ours[at + 1 :]) + after)]
        assert tomllib.loads(f"x = {written}")["x"] == value
        expected = [*ours[:at], (name, start_of_line, written, behind), *ours[at + 1 :]]
    assert new == (before + header + text_of(expected) + after).replace("\n", line_end)


# Other writers


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


def test_a_change_by_another_program_while_we_write_is_kept_and_ours_made_on_top(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.write_text("[remote_access]\nenabled = false\n")
    caplog.set_level(logging.INFO, "pioneer_tunnel")
    with another_program_writing(path, b"[remote_access]\nenabled = false\nserver = 's' # theirs\n"):
        assert SettingsFile(path).update(changing(enabled=True)) == Settings(enabled=True, server="s")
    assert path.read_text() == "[remote_access]\nenabled = true\nserver = 's' # theirs\n"
    assert "was changed by another program" in caplog.text
    assert names(path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


def test_a_change_by_another_program_since_we_read_is_kept_and_told(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pioneer_tunnel")
    file = SettingsFile(path)
    file.update(changing(enabled=True))
    file.read()
    assert caplog.text == ""
    path.write_text("[remote_access]\nserver = 's'\n[b]\n")
    assert file.update(changing(enabled=True)) == Settings(enabled=True, server="s")
    assert path.read_text() == "[remote_access]\nserver = 's'\nenabled = true\n[b]\n"
    assert caplog.text.count("was changed by another program") == 1


def test_a_file_that_another_program_removes_or_breaks_meanwhile(path: Path) -> None:
    path.write_text("[remote_access]\nserver = 's'\n")
    with another_program_writing(path, None):
        assert SettingsFile(path).update(changing(enabled=True)) == Settings(enabled=True)
    assert path.read_text() == "[remote_access]\nenabled = true\n"
    with another_program_writing(path, b"[broken"), pytest.raises(InvalidSettingsError, match="is not TOML"):
        SettingsFile(path).update(changing(enabled=False))
    assert path.read_bytes() == b"[broken"
    assert names(path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


def test_what_another_program_has_done_already_is_not_done_again(path: Path) -> None:
    theirs = b"[remote_access]\nenabled=true\n"
    path.write_text("[remote_access]\nenabled = false\n")
    with another_program_writing(path, theirs):
        assert SettingsFile(path).update(changing(enabled=True)) == Settings(enabled=True)
    assert path.read_bytes() == theirs


def test_a_file_that_changes_all_the_time_is_given_up_on(path: Path) -> None:
    contents = [f"# {number}\n".encode() for number in range(100)]
    with (
        another_program_writing(path, *contents) as pending,
        pytest.raises(StorageError, match=r"gateway-settings\.toml keeps being changed by another program"),
    ):
        SettingsFile(path).update(changing(enabled=True))
    assert path.read_bytes() == contents[len(contents) - len(pending) - 1]


def test_a_second_writer_waits_and_then_says_so(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.locked
    monkeypatch.setattr(files, "locked", functools.partial(real, seconds=0.02))
    with real(path), pytest.raises(StorageError, match=r"gateway-settings\.toml is being written by another program"):
        SettingsFile(path).update(changing(enabled=True))
    assert not path.exists()


def test_an_update_through_a_function_that_fails_changes_nothing(path: Path) -> None:
    path.write_text(EXAMPLE)
    calls = 0

    def fail_at_the_second(settings: Settings) -> Settings:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise LookupError("of the caller")
        return attrs.evolve(settings, enabled=True)

    with pytest.raises(LookupError, match="of the caller"):
        SettingsFile(path).update(fail_at_the_second)
    assert path.read_text() == EXAMPLE
    with files.locked(path, seconds=0):
        pass


WRITING_UNTIL_KILLED: Final = """
    import sys
    import attrs
    from pioneer_tunnel.gateway.settings import SettingsFile

    file = SettingsFile(sys.argv[1])
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        file.update(lambda settings: attrs.evolve(settings, server=f"server-{number}", enabled=number % 2 == 0))
"""


def test_kill_9_while_writing(path: Path) -> None:
    foreign = "# theirs\n[other]\nx = [1, 2]  # kept\n"
    path.write_text("[remote_access]\nenabled = false\n" + foreign)
    for delay in (0.005, 0.031):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITING_UNTIL_KILLED), str(path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(delay)
            writer.kill()
        settings = SettingsFile(path).read()
        number = int((settings.server or "server-0").rpartition("-")[2])
        assert settings.enabled == (number % 2 == 0 and number > 0)
        assert path.read_text().endswith(foreign)
    SettingsFile(path).update(changing(server="last"))
    assert names(path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


class InterleavedWriters(RuleBasedStateMachine):
    """Two of us, another program that knows no lock, and a crash at any step: the old content or the new, always."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "s.toml"
        self.files = [SettingsFile(self.path), SettingsFile(self.path)]
        self.content: bytes | None = None
        self.crashed = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def expected(self, content: bytes | None, changes: dict[str, Any]) -> bytes | None:
        """What an undisturbed update makes of `content`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "s.toml"
            if content is not None:
                path.write_bytes(content)
            SettingsFile(path).update(changing(**changes))
            return path.read_bytes() if path.exists() else None

    def is_broken(self) -> bool:
        return self.content in BROKEN.values()

    @rule(writer=st.integers(0, 1), changes=CHANGES)
    @precondition(lambda self: not self.is_broken())
    def update(self, writer: int, changes: dict[str, Any]) -> None:
        expected = self.expected(self.content, changes)
        before = self.content
        settings = self.files[writer].update(changing(**changes))
        ((name, value),) = changes.items()
        assert getattr(settings, name) == value
        self.content = expected
        if expected != before:
            assert not any(entry.endswith(LEFTOVER) for entry in names(self.folder))

    @rule(writer=st.integers(0, 1), changes=CHANGES, count=st.integers(0, 12))
    @precondition(lambda self: not self.is_broken())
    def update_and_crash(self, writer: int, changes: dict[str, Any], count: int) -> None:
        expected = self.expected(self.content, changes)
        with contextlib.suppress(Crash), crash_after(count):
            self.files[writer].update(changing(**changes))
        self.files[writer] = SettingsFile(self.path)  # the next process
        found = self.path.read_bytes() if self.path.exists() else None
        assert found in (self.content, expected)
        self.content = found

    @rule(writer=st.integers(0, 1), changes=CHANGES, number=st.integers(0, 99))
    @precondition(lambda self: not self.is_broken())
    def update_while_another_program_writes(self, writer: int, changes: dict[str, Any], number: int) -> None:
        theirs = (self.content or b"") + f"# {number}\n".encode()
        if self.expected(self.content, changes) == self.content:
            return  # nothing is written, so there is no meanwhile
        with another_program_writing(self.path, theirs):
            self.files[writer].update(changing(**changes))
        self.content = self.expected(theirs, changes)

    @rule(document=documents())
    def another_program_replaces_the_file(
        self, document: tuple[str, list[tuple[str, str, str, str]] | None, str]
    ) -> None:
        before, ours, after = document
        header = "" if ours is None else "[remote_access]\n"
        self.content = (before + header + text_of(ours or []) + after).encode()
        self.path.write_bytes(self.content)

    @rule()
    def another_program_removes_the_file(self) -> None:
        self.path.unlink(missing_ok=True)
        self.content = None

    @rule(content=st.sampled_from([*BROKEN.values()]))
    def the_file_is_broken(self, content: bytes) -> None:
        self.path.write_bytes(content)
        self.content = content

    @rule(writer=st.integers(0, 1), changes=CHANGES)
    @precondition(lambda self: self.is_broken())
    def a_broken_file_is_not_updated(self, writer: int, changes: dict[str, Any]) -> None:
        with pytest.raises(InvalidSettingsError):
            self.files[writer].update(changing(**changes))

    @invariant()
    def the_file_is_what_the_model_says(self) -> None:
        assert (self.path.read_bytes() if self.path.exists() else None) == self.content

    @invariant()
    def it_can_be_read_unless_somebody_else_broke_it(self) -> None:
        if not self.is_broken():
            assert SettingsFile(self.path).read() == self.files[0].read()


TestInterleavedWriters = InterleavedWriters.TestCase
TestInterleavedWriters.settings = hypothesis_settings(max_examples=examples(25), stateful_step_count=15, deadline=None)


# Updates from the wire


def test_an_update_says_what_it_says() -> None:
    assert SettingsUpdate.from_wire({}) == SettingsUpdate()
    nothing = {"enabled": None, "server": None, "key": None, "clear_key": None}
    assert SettingsUpdate.from_wire(nothing) == SettingsUpdate()
    update = SettingsUpdate.from_wire(
        {"enabled": True, "server": " wss://r/ ", "key": f" {CANARY}\n", "clear_key": True, "later": [1]}
    )
    assert update == SettingsUpdate(enabled=True, server="wss://r/", key=RelayKey(CANARY), clear_key=True)
    assert not update.deletes_key
    assert SettingsUpdate.from_wire({"clear_key": True}).deletes_key
    assert not SettingsUpdate.from_wire({"clear_key": False}).deletes_key


def test_an_update_is_applied_to_what_is_there() -> None:
    here = Settings(enabled=True, server="s", service_name="n", secret_ref="r")
    assert SettingsUpdate().apply_to(here) == here
    assert SettingsUpdate(key=RelayKey(CANARY), clear_key=True).apply_to(here) == here
    assert SettingsUpdate(enabled=False).apply_to(here) == attrs.evolve(here, enabled=False)
    assert SettingsUpdate(server="t").apply_to(here) == attrs.evolve(here, server="t")
    for empty in ("", "  \n"):
        assert SettingsUpdate.from_wire({"server": empty}).apply_to(here) == attrs.evolve(here, server=None)


@pytest.mark.parametrize(
    ("wire", "told"),
    [
        ({"enabled": 1}, "remote_access.enabled is not true or false"),
        ({"enabled": "true"}, "remote_access.enabled is not true or false"),
        ({"server": 3}, "remote_access.server is not text of at most 512 characters"),
        ({"server": "s" * 513}, "remote_access.server is not text of at most 512 characters"),
        ({"server": "\ud800"}, "remote_access.server is not text of at most 512 characters"),
        ({"clear_key": 0}, "remote_access.clear_key is not true or false"),
        ({"key": 3}, "remote_access.key: a relay key is a str, not int"),
        ({"key": [CANARY]}, "remote_access.key: a relay key is a str, not list"),
        ({"key": ""}, "remote_access.key: the relay key is empty"),
        ({"key": " \t "}, "remote_access.key: the relay key is empty"),
        ({"key": "k" * 4097}, "remote_access.key: the relay key is longer than 4096 characters"),
        ({"key": f"{CANARY}\x00x"}, "remote_access.key: the relay key holds a control character"),
        ({"key": f"{CANARY}\ud800"}, "remote_access.key: the relay key holds half of a surrogate pair"),
        ({"server": 3, "key": ""}, "remote_access.server is not text of at most 512 characters; remote_access.key: "),
        ([], "remote_access is not an object"),
        (None, "remote_access is not an object"),
        (CANARY, "remote_access is not an object"),
    ],
)
def test_what_is_malformed_is_named_and_nothing_is_quoted(wire: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"^remote_access") as raised:
        SettingsUpdate.from_wire(wire)
    assert str(raised.value).startswith(told)
    assert CANARY not in str(raised.value)


def test_the_longest_of_all_is_taken() -> None:
    update = SettingsUpdate.from_wire({"server": f" {'s' * 512} ", "key": f" {'k' * 4096} "})
    assert update.server == "s" * 512
    assert update.key == RelayKey("k" * 4096)


@pytest.mark.parametrize("name", ["enabled", "server", "clear_key", "key"])
@given(value=st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers()) | st.just({}))
@hypothesis_settings(max_examples=30, deadline=None)
def test_any_json_is_an_update_or_a_value_error(name: str, value: Any) -> None:
    try:
        update = SettingsUpdate.from_wire({name: value})
    except ValueError as error:
        if name not in str(error):
            raise
    else:
        assert value is None or isinstance(value, bool | str)
        assert isinstance(update, SettingsUpdate)


def test_an_update_made_by_a_program_is_checked_as_well() -> None:
    assert SettingsUpdate(server=" s ").server == "s"
    wrong: list[dict[str, Any]] = [{"enabled": 1}, {"server": "s" * 513}, {"clear_key": None}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="allowed is"):
            SettingsUpdate(**arguments)
    text: Any = CANARY
    with pytest.raises(TypeError, match="key is a RelayKey, not str"):
        SettingsUpdate(key=text)


# The key


def test_the_search_for_the_key_finds_one(path: Path) -> None:
    leaky: dict[str, Any] = {}
    code = (
        "def leak(key):\n    try:\n        {}[key]\n    except KeyError:\n        pass\n    raise ValueError('wrong')"
    )
    exec(compile(code, "elsewhere.py", "exec"), leaky)
    with pytest.raises(ValueError, match="wrong") as raised:
        leaky["leak"](CANARY)
    assert CANARY in everything_shown(raised.value)


def test_the_key_is_in_nothing_that_an_update_shows(caplog: pytest.LogCaptureFixture, path: Path) -> None:
    caplog.set_level(logging.DEBUG)
    update = SettingsUpdate.from_wire({"enabled": True, "key": CANARY})
    logging.getLogger("test").debug("%s %r %s", update, update, attrs.asdict(update))
    shown = [repr(update), str(update), f"{update}", f"{update.key!s:>30}", caplog.text]
    with pytest.raises(TypeError) as unpickled:
        pickle.dumps(update)
    shown.append(everything_shown(unpickled.value))
    SettingsFile(path).update(update.apply_to)
    assert path.exists()
    shown += [caplog.text, *(entry.read_text() for entry in path.parent.iterdir())]
    for wire in ({"key": CANARY, "enabled": 1}, {"key": f"{CANARY}\x07"}, {"key": {"key": CANARY}}, [CANARY]):
        with pytest.raises(ValueError, match=r"^remote_access") as malformed:
            SettingsUpdate.from_wire(wire)  # type: ignore[arg-type]
        shown.append(everything_shown(malformed.value))
    assert all(CANARY not in text for text in shown)
