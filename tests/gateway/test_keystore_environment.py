"""The keystore in the environment: a variable, or a mounted file."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from keystores import CANARY
from shown import everything_shown

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel.gateway.keystore import EnvironmentKeystore, Keystore


@pytest.fixture
def variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from pioneer_tunnel.gateway.keystore import environment

    monkeypatch.setenv("TEST_RELAY_KEY", f" {CANARY}\n")
    yield "TEST_RELAY_KEY"
    environment._taken.pop("TEST_RELAY_KEY", None)


async def test_a_key_in_a_variable_is_taken_out_of_the_environment(variable: str) -> None:
    keystore = EnvironmentKeystore(variable=variable)
    assert isinstance(keystore, Keystore)
    assert variable not in os.environ
    child = subprocess.run(["/usr/bin/env"], check=True, capture_output=True, text=True)
    assert CANARY not in child.stdout
    for store in (keystore, EnvironmentKeystore(variable=variable)):
        assert await store.exists("remote_access")
        assert await store.get("remote_access") == RelayKey(CANARY)
    os.environ[variable] = "another"
    assert await EnvironmentKeystore(variable=variable).get("remote_access") == RelayKey("another")
    assert CANARY not in f"{keystore!r}{keystore}{vars(keystore)}"
    assert repr(keystore) == "EnvironmentKeystore(the environment variable TEST_RELAY_KEY)"


async def test_a_variable_that_is_not_set() -> None:
    keystore = EnvironmentKeystore(variable="TEST_NO_SUCH_KEY")
    assert not await keystore.exists("remote_access")
    assert await keystore.get("remote_access") is None


async def test_a_variable_that_holds_no_key(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", f"{CANARY}\n{CANARY}", f"{CANARY}\udcff"):
        monkeypatch.setenv(variable, value)
        keystore = EnvironmentKeystore(variable=variable)
        assert variable not in os.environ
        with pytest.raises(StorageError, match="variable TEST_RELAY_KEY does not hold a relay key") as raised:
            await keystore.get("remote_access")
        assert CANARY not in everything_shown(raised.value)


async def test_a_mounted_file_is_read_each_time(tmp_path: Path) -> None:
    path = tmp_path / "key"
    keystore = EnvironmentKeystore(file=path, reference="mine")
    assert not await keystore.exists("mine")
    assert await keystore.get("mine") is None
    path.write_text(f"{CANARY}\n")
    path.chmod(0o400)
    assert await keystore.exists("mine")
    assert await keystore.get("mine") == RelayKey(CANARY)
    path.chmod(0o600)
    path.write_text("renewed")
    assert await keystore.get("mine") == RelayKey("renewed")
    for content in (b"", b"a\nb", CANARY.encode() + b"\xff"):
        path.write_bytes(content)
        with pytest.raises(StorageError, match=r"/key does not hold a relay key") as raised:
            await keystore.get("mine")
        assert CANARY not in everything_shown(raised.value)


async def test_a_mounted_file_that_others_can_read(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(CANARY)
    path.chmod(0o444)
    with pytest.raises(StorageError, match=r"/key holds secrets .*run: chmod 600"):
        await EnvironmentKeystore(file=path).get("remote_access")
    keystore = EnvironmentKeystore(file=path, readable_by_others=True)
    assert await keystore.get("remote_access") == RelayKey(CANARY)


async def test_the_environment_answers_to_one_reference_and_is_only_read(variable: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(CANARY)
    path.chmod(0o600)
    for keystore, place in (
        (EnvironmentKeystore(variable=variable), "the environment variable TEST_RELAY_KEY"),
        (EnvironmentKeystore(file=path), str(path)),
    ):
        assert await keystore.get("other") is None
        assert not await keystore.exists("other")
        await keystore.delete("other")
        told = f"comes from {place}, which is only read; change it there"
        with pytest.raises(StorageError, match=told):
            await keystore.put("remote_access", new_relay_key())
        with pytest.raises(StorageError, match=told):
            await keystore.delete("remote_access")
        with pytest.raises(ValueError, match="secret reference"):
            await keystore.put("..", new_relay_key())
        text: Any = CANARY
        with pytest.raises(TypeError, match="stores a RelayKey") as raised:
            await keystore.put("remote_access", text)
        assert CANARY not in everything_shown(raised.value)
        for attempt in (keystore.get, keystore.exists, keystore.delete):
            for reference in ("remote_access", "other"):
                with trio.testing.assert_checkpoints(), contextlib.suppress(StorageError):
                    await attempt(reference)


def test_one_of_variable_and_file_is_given() -> None:
    with pytest.raises(ValueError, match="give one of the two"):
        EnvironmentKeystore()
    with pytest.raises(ValueError, match="give one of the two"):
        EnvironmentKeystore(variable="A", file="b")
    with pytest.raises(ValueError, match="secret reference"):
        EnvironmentKeystore(variable="A", reference="..")
