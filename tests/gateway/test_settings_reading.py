"""The settings file is read strictly: what is wrong is told, and the file stays as it is."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from crashing_files import failing
from settings_files import BROKEN, CANARY, EXAMPLE, changing, identity_of
from shown import everything_shown

from pioneer_tunnel._model.errors import InvalidSettingsError, StorageError
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel.gateway.settings import Settings, SettingsFile


def test_a_missing_file_says_the_defaults(settings_path: Path) -> None:
    assert SettingsFile(settings_path).read() == Settings()
    assert Settings() == Settings(
        enabled=False, server=None, service_name=None, transport=None, secret_ref="remote_access"
    )
    assert not settings_path.exists()


def test_a_file_is_read(settings_path: Path) -> None:
    settings_path.write_text(EXAMPLE)
    assert SettingsFile(settings_path).read() == Settings(enabled=False, server="relay.example.com:2333")
    settings_path.write_text("[remote_access]\nservice_name='s'\ntransport=\"tls\"\nsecret_ref='other'\nserver='  '\n")
    assert SettingsFile(settings_path).read() == Settings(service_name="s", transport="tls", secret_ref="other")


def test_every_value_that_is_not_allowed_is_told_with_file_key_path_value_and_what_is_allowed(
    settings_path: Path,
) -> None:
    text = (
        '[remote_access]\nenabled = "yes"\nserver = 3\nservice_name = "a\\nb"\ntransport = [1]\nsecret_ref = "../x"\n'
    )
    settings_path.write_text(text)
    with pytest.raises(InvalidSettingsError) as raised:
        SettingsFile(settings_path).read()
    problems = {problem.key: problem for problem in raised.value.problems}
    assert {key: problem.value for key, problem in problems.items()} == {
        "remote_access.enabled": "'yes'",
        "remote_access.server": "3",
        "remote_access.service_name": r"'a\nb'",
        "remote_access.transport": "an array",
        "remote_access.secret_ref": "'../x'",
    }
    for problem in problems.values():
        assert problem.source == str(settings_path)
        assert problem.message.startswith("allowed is ")
        assert str(problem) in str(raised.value)
    with pytest.raises(InvalidSettingsError):
        SettingsFile(settings_path).update(changing(enabled=True))
    assert settings_path.read_text() == text


@pytest.mark.parametrize("name", [".hidden", "", "a/b", "a" * 65, "ä", "a b"])
def test_what_is_no_reference_is_refused(settings_path: Path, name: str) -> None:
    settings_path.write_text(f'[remote_access]\nsecret_ref = "{name}"\n')
    with pytest.raises(InvalidSettingsError, match=r"remote_access\.secret_ref.*allowed is 1 to 64 of"):
        SettingsFile(settings_path).read()
    with pytest.raises(ValueError, match="secret_ref"):
        Settings(secret_ref=name)


def test_a_key_in_the_place_of_its_reference_is_not_quoted(settings_path: Path) -> None:
    settings_path.write_text(f'[remote_access]\nsecret_ref = "{CANARY * 4}"\n')
    with pytest.raises(InvalidSettingsError) as raised:
        SettingsFile(settings_path).read()
    assert CANARY not in everything_shown(raised.value)


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_an_error_that_names_it_and_stays(settings_path: Path, content: bytes) -> None:
    settings_path.write_bytes(content)
    before = identity_of(settings_path)
    for attempt in (
        SettingsFile(settings_path).read,
        lambda: SettingsFile(settings_path).update(changing(enabled=True)),
    ):
        with pytest.raises(InvalidSettingsError, match=r"gateway-settings\.toml: ") as raised:
            attempt()
        assert raised.value.kind is ErrorKind.INVALID_SETTINGS
    assert settings_path.read_bytes() == content
    assert identity_of(settings_path) == before


def test_what_others_keep_in_the_file_is_in_no_error(settings_path: Path) -> None:
    others = f'[mail]\npassword = "{CANARY}"\n'
    for broken in ("[remote_access]\nenabled = 1\n", "x = \n", "remote_access = 1\n", "[remote_access]\nenabled = [\n"):
        settings_path.write_text(broken + others if "1" in broken.partition("\n")[0] else others + broken)
        with pytest.raises(InvalidSettingsError) as raised:
            SettingsFile(settings_path).update(changing(enabled=True))
        assert CANARY not in everything_shown(raised.value)
    settings_path.write_text(others)
    for step in ("open", "write", "fsync", "replace"):
        with failing(step, errno.EIO), pytest.raises(StorageError) as failed:
            SettingsFile(settings_path).update(changing(enabled=True))
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
