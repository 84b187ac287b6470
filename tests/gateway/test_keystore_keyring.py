"""The keystore in the keyring of the operating system."""

from __future__ import annotations

import importlib
import re
import sys
import threading
import types

import pytest
from keystores import CANARY, Backend, attempts_on
from shown import everything_shown

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel.gateway.keystore import KeyringKeystore


@pytest.fixture
def fake_keyring(monkeypatch: pytest.MonkeyPatch) -> Backend:
    backend = Backend()
    module = types.ModuleType("keyring")
    module.get_keyring = lambda: backend  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "keyring", module)
    return backend


async def test_the_keyring_is_the_packages_choice_and_asked_for_when_needed(fake_keyring: Backend) -> None:
    keystore, key = KeyringKeystore("my-gateway"), new_relay_key()
    assert repr(keystore) == "KeyringKeystore('my-gateway')"
    await keystore.put("a", key)
    assert fake_keyring.passwords == {("my-gateway", "a"): key.reveal()}
    assert await KeyringKeystore("my-gateway").get("a") == key
    assert await KeyringKeystore().get("a") is None


async def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    keystore = KeyringKeystore()
    for attempt in (keystore.get, keystore.exists, keystore.delete):
        with pytest.raises(StorageError, match=r"pip install 'pioneer-tunnel\[keyring\]'"):
            await attempt("a")


async def test_the_keyring_is_asked_in_a_thread(fake_keyring: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    here = threading.current_thread()
    threads = []
    real = importlib.import_module

    def import_module(name: str) -> types.ModuleType:
        threads.append(threading.current_thread())
        return real(name)

    def get_password(_service: str, _username: str) -> None:
        threads.append(threading.current_thread())

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(fake_keyring, "get_password", get_password)
    assert await KeyringKeystore().get("a") is None
    assert len(threads) == 2
    assert here not in threads


class NoKeyringError(RuntimeError):
    """As the package names it."""


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoKeyringError("none"), "there is no keyring on this machine; a FileKeystore needs none"),
        (RuntimeError(f"cannot store {CANARY}"), "cannot be .*: RuntimeError$"),
    ],
)
async def test_whatever_a_keyring_raises_is_told_by_name_and_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    backend = Backend()
    keystore = KeyringKeystore(backend=backend)

    def refuse(*_arguments: str) -> None:
        raise error

    for name in ("get_password", "set_password", "delete_password"):
        with monkeypatch.context() as patch:
            await keystore.put("a", RelayKey(CANARY))
            patch.setattr(backend, name, refuse)
            failures = []
            for attempt in attempts_on(keystore).values():
                try:
                    await attempt()
                except StorageError as failure:
                    failures.append(failure)
            assert failures
            for failed in failures:
                assert re.search(told, str(failed))
                assert "'a' of 'pioneer-tunnel' in the operating system's keyring" in str(failed)
                assert CANARY not in everything_shown(failed)


async def test_a_keyring_that_keeps_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    monkeypatch.setattr(backend, "set_password", lambda *_arguments: None)
    with pytest.raises(StorageError, match="it was stored, and then was not there"):
        await KeyringKeystore(backend=backend).put("a", new_relay_key())


async def test_what_somebody_else_stored_in_the_keyring_is_not_shown() -> None:
    backend = Backend()
    backend.set_password("pioneer-tunnel", "a", f"{CANARY}\nand more")
    with pytest.raises(StorageError, match="what is stored there is not a relay key") as raised:
        await KeyringKeystore(backend=backend).get("a")
    assert CANARY not in everything_shown(raised.value)


async def test_the_real_package_is_used_as_it_is() -> None:
    keyring = importlib.import_module("keyring")
    fail = importlib.import_module("keyring.backends.fail")
    null = importlib.import_module("keyring.backends.null")
    assert hasattr(keyring, "get_keyring")
    with pytest.raises(StorageError, match="there is no keyring on this machine"):
        await KeyringKeystore(backend=fail.Keyring()).put("a", new_relay_key())
    with pytest.raises(StorageError, match="it was stored, and then was not there"):
        await KeyringKeystore(backend=null.Keyring()).put("a", new_relay_key())
    assert await KeyringKeystore(backend=null.Keyring()).get("a") is None
