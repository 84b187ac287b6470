"""The settings file is changed in place: all other bytes stay."""

from __future__ import annotations

import os
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from crashing_files import crash_after, names
from fuzzing import examples
from hypothesis import example, given, settings as hypothesis_settings, strategies as st
from settings_files import CHANGES, EXAMPLE, changing, documents, identity_of, text_of, update_of

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel.gateway.settings import Settings, SettingsFile, SettingsUpdate


def test_a_missing_file_is_made_for_its_owner_alone(settings_path: Path) -> None:
    assert update_of(settings_path, enabled=True) == "[remote_access]\nenabled = true\n"
    assert settings_path.stat().st_mode & 0o777 == 0o600
    assert names(settings_path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


def test_an_update_that_changes_nothing_touches_nothing(settings_path: Path) -> None:
    file = SettingsFile(settings_path)
    assert file.update(changing(enabled=False)) == Settings()
    assert names(settings_path.parent) == []
    settings_path.write_text(EXAMPLE)
    before = identity_of(settings_path)
    with crash_after(1) as done:  # the one call opens the file for reading
        file.update(changing(enabled=False, server="relay.example.com:2333"))
    assert done == ["open"]
    assert identity_of(settings_path) == before


def test_the_mode_is_kept(settings_path: Path) -> None:
    settings_path.write_text(EXAMPLE)
    settings_path.chmod(0o640)
    update_of(settings_path, enabled=True)
    assert settings_path.stat().st_mode & 0o777 == 0o640


def test_only_what_was_changed_differs(settings_path: Path) -> None:
    settings_path.write_text(EXAMPLE)
    assert update_of(settings_path, enabled=True) == EXAMPLE.replace("enabled    = false ", "enabled    = true ")
    settings_path.write_text(EXAMPLE)
    assert update_of(settings_path, server="wss://b/") == EXAMPLE.replace('"relay.example.com:2333"', '"wss://b/"')


def test_a_field_that_is_removed_leaves_its_comment(settings_path: Path) -> None:
    settings_path.write_text(EXAMPLE)
    assert update_of(settings_path, server=None) == EXAMPLE.replace(
        '  server   = "relay.example.com:2333"  # ours', "  # ours"
    )
    settings_path.write_text("[remote_access]\r\nserver = 'x'\r\nenabled = true")
    assert update_of(settings_path, server=None) == "[remote_access]\r\nenabled = true"
    settings_path.write_text("[remote_access]\nserver = 'x'")
    assert update_of(settings_path, server=None) == "[remote_access]\n"


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
def test_a_new_field_goes_where_it_belongs(settings_path: Path, old: str, new: str, line_end: str) -> None:
    settings_path.write_bytes(old.replace("{{}}", "{}").replace("\n", line_end).encode())
    ends = line_end if "\n" in old else "\n"  # a file of one line does not say which it has
    assert update_of(settings_path, server="s") == new.format('server = "s"\n').replace("\n", ends)


def test_a_field_of_a_table_that_is_written_otherwise_is_changed_and_removed(settings_path: Path) -> None:
    settings_path.write_text("a = 1\nremote_access = { server = 's', enabled = true } # c\n[b]\n")
    assert update_of(settings_path, server="t") == 'a = 1\nremote_access = { server = "t", enabled = true } # c\n[b]\n'
    assert update_of(settings_path, server=None) == "a = 1\nremote_access = {  enabled = true } # c\n[b]\n"
    settings_path.write_text("a = 1\nremote_access.server = 's' # c\nremote_access.more.x = 1\nb = 2\n")
    assert (
        update_of(settings_path, server="t")
        == 'a = 1\nremote_access.server = "t" # c\nremote_access.more.x = 1\nb = 2\n'
    )
    assert update_of(settings_path, server=None) == "a = 1\n# c\nremote_access.more.x = 1\nb = 2\n"
    settings_path.write_text("remote_access.server = 's'\n")
    assert update_of(settings_path, server=None) == ""


def test_a_byte_order_mark_is_kept(settings_path: Path) -> None:
    settings_path.write_bytes(b"\xef\xbb\xbf[remote_access]\nenabled = false\n")
    update_of(settings_path, enabled=True)
    assert settings_path.read_bytes() == b"\xef\xbb\xbf[remote_access]\nenabled = true\n"


@given(server=st.text(max_size=100).map(str.strip))
@hypothesis_settings(max_examples=30, deadline=None)
def test_whatever_a_server_is_called_is_read_back(server: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = SettingsFile(Path(folder) / "s.toml")
        assert file.update(SettingsUpdate(server=server).apply_to) == Settings(server=server or None)
        assert file.read() == Settings(server=server or None)


def test_a_document_that_cannot_be_edited_stays(settings_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomlkit

    settings_path.write_text(EXAMPLE)
    for misbehave in (
        lambda _value: tomlkit.item("something else"),
        lambda _value: tomlkit.item([1]),
        lambda _value: 1 / 0,
    ):
        with monkeypatch.context() as patch:
            patch.setattr("pioneer_tunnel._storage.toml_edit.tomlkit.item", misbehave)
            with pytest.raises(StorageError, match=r"change remote_access\.service_name there by hand"):
                SettingsFile(settings_path).update(changing(service_name="s"))
        assert settings_path.read_text() == EXAMPLE


def test_a_document_of_which_something_else_would_change_stays(
    settings_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pioneer_tunnel._storage import toml_edit

    settings_path.write_text(EXAMPLE)
    start = EXAMPLE.index('"relay.example.com')
    end = EXAMPLE.index("\n\n[[windows]]")
    monkeypatch.setattr(toml_edit._Document, "_span", lambda _document, _name: (start, end))
    with pytest.raises(
        StorageError, match=r"\(something else would change\); change remote_access\.server there by hand"
    ):
        SettingsFile(settings_path).update(changing(server="s"))
    assert settings_path.read_text() == EXAMPLE


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
