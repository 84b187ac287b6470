"""The settings file is neither lost nor overwritten blindly, whoever else writes it, and wherever we are killed."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, Final

import attrs
import pytest
from crashing_files import LEFTOVER, Crash, crash_after, names
from fuzzing import examples
from hypothesis import settings as hypothesis_settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from settings_files import BROKEN, CHANGES, EXAMPLE, another_program_writing, changing, documents, text_of

from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._storage import files
from pioneer_tunnel.gateway.settings import Settings, SettingsFile


def test_a_change_by_another_program_while_we_write_is_kept_and_ours_made_on_top(
    settings_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings_path.write_text("[remote_access]\nenabled = false\n")
    caplog.set_level(logging.INFO, "pioneer_tunnel")
    with another_program_writing(settings_path, b"[remote_access]\nenabled = false\nserver = 's' # theirs\n"):
        assert SettingsFile(settings_path).update(changing(enabled=True)) == Settings(enabled=True, server="s")
    assert settings_path.read_text() == "[remote_access]\nenabled = true\nserver = 's' # theirs\n"
    assert "was changed by another program" in caplog.text
    assert names(settings_path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


def test_a_change_by_another_program_since_we_read_is_kept_and_told(
    settings_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pioneer_tunnel")
    file = SettingsFile(settings_path)
    file.update(changing(enabled=True))
    file.read()
    assert caplog.text == ""
    settings_path.write_text("[remote_access]\nserver = 's'\n[b]\n")
    assert file.update(changing(enabled=True)) == Settings(enabled=True, server="s")
    assert settings_path.read_text() == "[remote_access]\nserver = 's'\nenabled = true\n[b]\n"
    assert caplog.text.count("was changed by another program") == 1


def test_a_file_that_another_program_removes_or_breaks_meanwhile(settings_path: Path) -> None:
    settings_path.write_text("[remote_access]\nserver = 's'\n")
    with another_program_writing(settings_path, None):
        assert SettingsFile(settings_path).update(changing(enabled=True)) == Settings(enabled=True)
    assert settings_path.read_text() == "[remote_access]\nenabled = true\n"
    with another_program_writing(settings_path, b"[broken"), pytest.raises(InvalidSettingsError, match="is not TOML"):
        SettingsFile(settings_path).update(changing(enabled=False))
    assert settings_path.read_bytes() == b"[broken"
    assert names(settings_path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


def test_what_another_program_has_done_already_is_not_done_again(settings_path: Path) -> None:
    theirs = b"[remote_access]\nenabled=true\n"
    settings_path.write_text("[remote_access]\nenabled = false\n")
    with another_program_writing(settings_path, theirs):
        assert SettingsFile(settings_path).update(changing(enabled=True)) == Settings(enabled=True)
    assert settings_path.read_bytes() == theirs


def test_a_file_that_changes_all_the_time_is_given_up_on(settings_path: Path) -> None:
    contents = [f"# {number}\n".encode() for number in range(100)]
    with (
        another_program_writing(settings_path, *contents) as pending,
        pytest.raises(StorageError, match=r"gateway-settings\.toml keeps being changed by another program"),
    ):
        SettingsFile(settings_path).update(changing(enabled=True))
    assert settings_path.read_bytes() == contents[len(contents) - len(pending) - 1]


def test_a_second_writer_waits_and_then_says_so(settings_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.locked
    monkeypatch.setattr(files, "locked", functools.partial(real, seconds=0.02))
    with (
        real(settings_path),
        pytest.raises(StorageError, match=r"gateway-settings\.toml is being written by another program"),
    ):
        SettingsFile(settings_path).update(changing(enabled=True))
    assert not settings_path.exists()


def test_an_update_through_a_function_that_fails_changes_nothing(settings_path: Path) -> None:
    settings_path.write_text(EXAMPLE)
    calls = 0

    def fail_at_the_second(settings: Settings) -> Settings:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise LookupError("of the caller")
        return attrs.evolve(settings, enabled=True)

    with pytest.raises(LookupError, match="of the caller"):
        SettingsFile(settings_path).update(fail_at_the_second)
    assert settings_path.read_text() == EXAMPLE
    with files.locked(settings_path, seconds=0):
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


def test_kill_9_while_writing(settings_path: Path) -> None:
    foreign = "# theirs\n[other]\nx = [1, 2]  # kept\n"
    settings_path.write_text("[remote_access]\nenabled = false\n" + foreign)
    for delay in (0.005, 0.031):
        with subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITING_UNTIL_KILLED), str(settings_path)], stdout=subprocess.PIPE
        ) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                writer.wait(delay)
            writer.kill()
        settings = SettingsFile(settings_path).read()
        number = int((settings.server or "server-0").rpartition("-")[2])
        assert settings.enabled == (number % 2 == 0 and number > 0)
        assert settings_path.read_text().endswith(foreign)
    SettingsFile(settings_path).update(changing(server="last"))
    assert names(settings_path.parent) == ["gateway-settings.toml", "gateway-settings.toml.lock"]


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
