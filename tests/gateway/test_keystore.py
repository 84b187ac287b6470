"""Keystores give back what was put there or nothing, whole, to nobody else, and show it nowhere."""

from __future__ import annotations

import base64
import contextlib
import copy
import errno
import importlib
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import types
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from crashing_files import LEFTOVER, Crash, crash_after, failing, mode, names
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from fuzzing import examples
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from shown import everything_shown

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel._storage import files
from pioneer_tunnel.gateway.keystore import (
    DEFAULT_SECRET_REF,
    EnvironmentKeystore,
    FileKeystore,
    KeyringKeystore,
    Keystore,
    MemoryKeystore,
    check_secret_ref,
    envelope,
)

CANARY: Final = "ptk1_canary-1a2b3c4d5e6f"
PASSPHRASE: Final = "canary-passphrase"
REFERENCES: Final = st.from_regex(r"(?!\.)[A-Za-z0-9_.-]{1,64}", fullmatch=True)
NO_REFERENCES: Final = ["", ".", "..", ".hidden", "a/b", "../a", "a\0", "a b", "ä", "a\n", "a" * 65]


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    def cheap(*, salt: bytes, length: int, n: int, r: int, p: int) -> Scrypt:
        return Scrypt(salt=salt, length=length, n=2, r=r, p=p)

    monkeypatch.setattr(envelope, "Scrypt", cheap)


def attempts_on(keystore: Keystore, reference: str = "a") -> dict[str, Callable[[], Awaitable[object]]]:
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        "get": lambda: keystore.get(reference),
        "put": lambda: keystore.put(reference, RelayKey(CANARY)),
        "delete": lambda: keystore.delete(reference),
        "exists": lambda: keystore.exists(reference),
    }
    if isinstance(keystore, FileKeystore):
        attempts["rotate"] = keystore.rotate
    return attempts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keystore"


class Backend:
    """What the package `keyring` would hand us."""

    def __init__(self) -> None:
        self.passwords: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        return self.passwords.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.passwords[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.passwords[service, username]


KINDS: Final[dict[str, Callable[[Path], Keystore]]] = {
    "memory": lambda _folder: MemoryKeystore(),
    "file": FileKeystore,
    "file with a passphrase": lambda folder: FileKeystore(folder, PASSPHRASE),
    "keyring": lambda _folder: KeyringKeystore(backend=Backend()),
}


@pytest.fixture(params=KINDS)
def keystore(request: pytest.FixtureRequest, folder: Path) -> Keystore:
    return KINDS[request.param](folder)


# What every keystore does


async def test_a_keystore_keeps_what_was_put_there(keystore: Keystore) -> None:
    assert isinstance(keystore, Keystore)
    first, second = new_relay_key(), new_relay_key()
    assert await keystore.get("a") is None
    assert not await keystore.exists("a")
    await keystore.delete("a")
    await keystore.put("a", first)
    await keystore.put("b.2_-", second)
    assert await keystore.get("a") == first
    assert await keystore.get("b.2_-") == second
    assert await keystore.exists("a")
    await keystore.put("a", second)
    assert await keystore.get("a") == second
    await keystore.delete("a")
    assert await keystore.get("a") is None
    assert not await keystore.exists("a")
    assert await keystore.get("b.2_-") == second


async def test_the_longest_and_strangest_keys_are_kept(keystore: Keystore) -> None:
    for text in ("k", "k" * 4096, "😀" * 4096, "schlüssel mit leerzeichen", "a\u2028b", "a=b;c"):
        await keystore.put("a", RelayKey(text))
        key = await keystore.get("a")
        assert key is not None
        assert key.reveal() == text.strip()


async def test_what_is_no_reference_is_refused(keystore: Keystore, tmp_path: Path) -> None:
    for reference in NO_REFERENCES:
        for name, attempt in attempts_on(keystore, reference).items():
            if name != "rotate":
                with pytest.raises(ValueError, match=r"the secret reference .* is not 1 to 64 of"):
                    await attempt()
    assert names(tmp_path) == []


async def test_what_is_no_relay_key_is_refused_without_showing_it(keystore: Keystore) -> None:
    text: Any = CANARY
    with pytest.raises(TypeError, match="a keystore stores a RelayKey, not str") as raised:
        await keystore.put("a", text)
    assert CANARY not in everything_shown(raised.value)
    assert not await keystore.exists("a")


async def test_every_method_is_a_checkpoint(keystore: Keystore) -> None:
    for attempt in attempts_on(keystore).values():
        with trio.testing.assert_checkpoints():
            await attempt()


async def test_cancelled_before_it_began_a_put_does_nothing(keystore: Keystore) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await keystore.put("a", new_relay_key())
    assert scope.cancelled_caught
    assert not await keystore.exists("a")


async def test_the_key_is_in_nothing_that_a_keystore_shows(
    keystore: Keystore, folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    await keystore.put("a", RelayKey(CANARY))
    await keystore.get("a")
    if isinstance(keystore, FileKeystore):
        await keystore.rotate()
    logging.getLogger("test").debug("%s %r", keystore, keystore)
    shown = [repr(keystore), str(keystore), f"{keystore}"]
    if not isinstance(keystore, KeyringKeystore):  # its backend is somebody else's
        shown += [repr(vars(keystore)), *map(repr, vars(keystore).values())]
        for serialise in (pickle.dumps, copy.deepcopy):
            with contextlib.suppress(TypeError):
                shown.append(repr(serialise(keystore)))
    await keystore.delete("a")
    await keystore.put("b", RelayKey(CANARY))
    shown += [caplog.text, *capfd.readouterr()]
    for text in shown:
        assert CANARY not in text
        assert PASSPHRASE not in text
    for path in folder.parent.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in (CANARY, PASSPHRASE):
                assert secret.encode() not in content
                assert base64.b64encode(secret.encode()).rstrip(b"=")[:-1] not in content
                assert secret.encode().hex().encode() not in content


@given(reference=REFERENCES)
@settings(max_examples=30, deadline=None)
def test_references_are_taken_as_they_are(reference: str) -> None:
    assert check_secret_ref(reference) == reference


def test_a_reference_that_may_be_the_key_itself_is_not_quoted() -> None:
    with pytest.raises(ValueError, match=r"the secret reference '\.\.' is not"):
        check_secret_ref("..")
    with pytest.raises(ValueError, match=r"the secret reference \(78 characters, not shown\) is not"):
        check_secret_ref(CANARY * 3 + "......")
    assert DEFAULT_SECRET_REF == "remote_access"


# Encrypted files


async def test_the_files_are_the_owners_alone(folder: Path) -> None:
    keystore = FileKeystore(folder)
    old_mask = os.umask(0)
    try:
        await keystore.put("a", new_relay_key())
    finally:
        os.umask(old_mask)
    assert mode(folder) == 0o700
    assert names(folder) == ["a.secret", "master.key", "master.key.lock"]
    assert {mode(path) for path in folder.iterdir()} == {0o600}
    assert keystore.folder == folder


async def test_reading_writes_nothing(folder: Path) -> None:
    keystore = FileKeystore(folder)
    await keystore.get("a")
    await keystore.exists("a")
    await keystore.delete("a")
    assert not folder.exists()
    await keystore.put("a", new_relay_key())
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "master.key.lock").unlink()
    await keystore.get("a")
    await keystore.exists("a")
    assert set(names(folder)) == set(before) - {"master.key.lock"}


@pytest.mark.parametrize("open_to", [0o770, 0o710, 0o701, 0o755])
async def test_a_folder_that_is_open_to_others_is_refused(folder: Path, open_to: int) -> None:
    keystore = FileKeystore(folder)
    await keystore.put("a", new_relay_key())
    folder.chmod(open_to)
    attempts = attempts_on(keystore)
    assert await attempts.pop("exists")()
    for attempt in attempts.values():
        with pytest.raises(StorageError, match=rf"keystore .* \(mode {open_to:04o}\); run: chmod 700 ") as raised:
            await attempt()
        assert raised.value.kind is ErrorKind.IO
    folder.chmod(0o700)
    assert await keystore.exists("a")


@pytest.mark.parametrize("name", ["a.secret", "master.key"])
@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o644, 0o660])
async def test_a_file_that_is_open_to_others_is_refused(folder: Path, name: str, open_to: int) -> None:
    keystore = FileKeystore(folder)
    await keystore.put("a", new_relay_key())
    (folder / name).chmod(open_to)
    for refused in ("get", "rotate"):
        with pytest.raises(StorageError, match=rf"{name} .* \(mode {open_to:04o}\); run: chmod 600 .*{name}"):
            await attempts_on(keystore)[refused]()
    (folder / name).chmod(0o600)
    assert await keystore.get("a") is not None


async def test_a_secret_that_was_open_is_put_anew_for_its_owner_alone(folder: Path) -> None:
    keystore = FileKeystore(folder)
    await keystore.put("a", new_relay_key())
    (folder / "a.secret").chmod(0o644)
    await keystore.put("a", new_relay_key())
    assert mode(folder / "a.secret") == 0o600
    assert await keystore.get("a") is not None


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
async def test_each_write_has_a_nonce_of_its_own(folder: Path, passphrase: str | None) -> None:
    keystore, key = FileKeystore(folder, passphrase), new_relay_key()
    contents = set()
    for _ in range(3):
        await keystore.put("a", key)
        contents.add((folder / "a.secret").read_bytes())
    assert len(contents) == 3
    assert len({content.partition(b"\n")[2][:12] for content in contents}) == 3
    assert len({content.partition(b"\n")[0] for content in contents}) == 1


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
async def test_a_secret_that_was_changed_anywhere_is_an_error_and_never_another_key(
    folder: Path, passphrase: str | None
) -> None:
    keystore = FileKeystore(folder, passphrase)
    await keystore.put("a", RelayKey(CANARY))
    path = folder / "a.secret"
    content = path.read_bytes()
    for at in range(len(content)):
        for bit in (0x01, 0x20, 0x80):
            changed = bytearray(content)
            changed[at] ^= bit
            path.write_bytes(changed)
            with pytest.raises(StorageError, match=r"a\.secret ") as raised:
                keystore._get("a")
            assert CANARY not in str(raised.value)
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"a\.secret .*cut short"):
            keystore._get("a")
    path.write_bytes(content + b"\0")
    with pytest.raises(StorageError, match=r"a\.secret has grown"):
        await keystore.get("a")
    path.write_bytes(b"x" * 40_000)
    with pytest.raises(StorageError, match=r"a\.secret is larger than"):
        await keystore.get("a")
    path.write_bytes(content)
    assert await keystore.get("a") == RelayKey(CANARY)


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
async def test_a_master_key_that_was_changed_anywhere_is_an_error_that_names_it(
    folder: Path, passphrase: str | None
) -> None:
    await FileKeystore(folder, passphrase).put("a", RelayKey(CANARY))
    path = folder / "master.key"
    content = path.read_bytes()
    keystore = FileKeystore(folder, passphrase)  # one that has derived nothing yet
    for at in range(0, len(content), 1 if passphrase is None else 5):
        changed = bytearray(content)
        changed[at] ^= 0x01
        path.write_bytes(changed)
        with pytest.raises(StorageError, match=r"master\.key "):
            keystore._get("a")
    for length in range(0, len(content), 1 if passphrase is None else 5):
        path.write_bytes(content[:length])
        with pytest.raises(StorageError, match=r"master\.key .*cut short"):
            keystore._get("a")
    path.write_bytes(content)
    assert await keystore.get("a") == RelayKey(CANARY)


async def test_secrets_that_were_swapped_are_an_error(folder: Path) -> None:
    keystore = FileKeystore(folder)
    await keystore.put("a", new_relay_key())
    await keystore.put("b", new_relay_key())
    a, b = folder / "a.secret", folder / "b.secret"
    contents = a.read_bytes(), b.read_bytes()
    b.write_bytes(contents[0])
    a.write_bytes(contents[1])
    for reference, other in ("ab", "ba"):
        with pytest.raises(StorageError, match=rf"{reference}\.secret holds the secret of '{other}', not of"):
            await keystore.get(reference)
    # Also when the first line was made to fit.
    a.write_bytes(contents[1].replace(b" b ", b" a ", 1))
    with pytest.raises(StorageError, match=r"a\.secret was changed since it was written; store the key again"):
        await keystore.get("a")


async def test_a_secret_of_another_keystore_is_an_error(folder: Path, tmp_path: Path) -> None:
    other = FileKeystore(tmp_path / "other")
    await other.put("a", new_relay_key())
    keystore = FileKeystore(folder)
    await keystore.put("b", new_relay_key())
    shutil.copy(tmp_path / "other" / "a.secret", folder / "a.secret")
    with pytest.raises(StorageError, match=r"a\.secret was sealed with a master key that this keystore does not hold"):
        await keystore.get("a")


async def test_files_of_a_newer_version_are_named_so(folder: Path) -> None:
    keystore = FileKeystore(folder)
    await keystore.put("a", new_relay_key())
    for name in ("a.secret", "master.key"):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content.replace(b" 1 ", b" 2 ", 1))
        with pytest.raises(StorageError, match=rf"{name} has format version 2; this version .* knows only 1"):
            await keystore.get("a")
        path.write_bytes(content)


async def test_a_wrong_passphrase_opens_nothing_and_breaks_nothing(folder: Path) -> None:
    key = new_relay_key()
    await FileKeystore(folder, PASSPHRASE).put("a", key)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for passphrase, told in (
        ("wrong", "does not open: the passphrase is wrong"),
        (None, "is protected by a passphrase, and none was given"),
    ):
        keystore = FileKeystore(folder, passphrase)
        attempts = [attempts_on(keystore)[name] for name in ("get", "put", "rotate")]
        for attempt in [*attempts, attempts_on(keystore, "b")["put"]]:
            with pytest.raises(StorageError, match=rf"master\.key {told}"):
                await attempt()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert await FileKeystore(folder, PASSPHRASE).get("a") == key


async def test_a_passphrase_for_a_keystore_that_has_none_is_told(folder: Path) -> None:
    await FileKeystore(folder).put("a", new_relay_key())
    with pytest.raises(StorageError, match=r"master\.key is not protected by a passphrase, and one was given"):
        await FileKeystore(folder, PASSPHRASE).get("a")


@pytest.mark.parametrize(
    "cost", ["13 8 1", "21 8 2", "20 8 1", "16 99 1", "14 8 99", "14 0 1", "14 8 0", "99 8 1", "0 8 1"]
)
async def test_what_a_file_asks_of_scrypt_is_bounded(folder: Path, cost: str) -> None:
    await FileKeystore(folder, PASSPHRASE).put("a", new_relay_key())
    path = folder / "master.key"
    path.write_bytes(path.read_bytes().replace(b" scrypt 16 8 2 ", f" scrypt {cost} ".encode(), 1))
    assert f" scrypt {cost} ".encode() in path.read_bytes()
    with pytest.raises(StorageError, match=r"master\.key asks for scrypt with N = 2\*\*.*: out of bounds"):
        await FileKeystore(folder, PASSPHRASE).get("a")


def test_what_new_keystores_ask_of_scrypt_is_within_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cost = envelope.ScryptCost.fresh()
    assert envelope.Passphrase(PASSPHRASE).cipher(cost) is not None
    assert cost.is_sane
    assert cost.log2_n >= 16
    assert len(cost.salt) == 16
    assert envelope.ScryptCost.fresh().salt != cost.salt


@pytest.mark.parametrize("passphrase", ["", "\ud800" + PASSPHRASE])
async def test_what_is_no_passphrase_is_refused_without_showing_it(folder: Path, passphrase: str) -> None:
    keystore = FileKeystore(folder)
    with pytest.raises(ValueError, match="a keystore's passphrase is text") as made:
        FileKeystore(folder, passphrase)
    with pytest.raises(ValueError, match="a keystore's passphrase is text") as rotated:
        await keystore.rotate(passphrase)
    for raised in (made, rotated):
        assert PASSPHRASE not in everything_shown(raised.value)
    assert not folder.exists()


async def test_a_missing_master_key_is_not_made_anew_while_there_are_secrets(folder: Path) -> None:
    keystore, key = FileKeystore(folder), new_relay_key()
    await keystore.put("a", key)
    master = (folder / "master.key").read_bytes()
    (folder / "master.key").unlink()
    attempts = [attempts_on(keystore)[name] for name in ("get", "put", "rotate")]
    for attempt in [*attempts, attempts_on(keystore, "b")["put"]]:
        with pytest.raises(StorageError, match=r"master\.key is missing.*restore it from a backup"):
            await attempt()
    (folder / "master.key").write_bytes(master)
    (folder / "master.key").chmod(0o600)
    assert await keystore.get("a") == key
    (folder / "master.key").unlink()
    await keystore.delete("a")  # the way out, without a backup
    await keystore.put("a", key)
    assert await keystore.get("a") == key


async def test_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for keystore in (FileKeystore(tmp_path / "file"), FileKeystore(tmp_path / "file" / "below")):
        for attempt in attempts_on(keystore).values():
            with pytest.raises(StorageError, match=r"/file.*( is not a folder|: Not a directory)"):
                await attempt()
    with pytest.raises(StorageError, match=r"missing/keystore cannot be made: No such file or directory"):
        await FileKeystore(tmp_path / "missing" / "keystore").put("a", new_relay_key())


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
def test_no_failure_of_the_disk_shows_a_key(folder: Path, passphrase: str | None) -> None:
    keystore = FileKeystore(folder, passphrase)
    failures = 0
    for name in attempts_on(keystore):
        for step in ("open", "readv", "write", "fsync", "replace", "unlink"):
            for after in range(4):
                keystore._put("a", RelayKey(CANARY))
                master = repr((folder / "master.key").read_bytes().partition(b"\n")[2])[2:20]
                try:
                    with failing(step, errno.EIO, after=after):
                        trio.run(attempts_on(keystore)[name])
                except StorageError as error:
                    failures += 1
                    shown = everything_shown(error)
                    assert not any(secret in shown for secret in (CANARY, PASSPHRASE, master))
    assert failures > 20


async def test_a_failed_put_leaves_the_old_key(folder: Path) -> None:
    keystore, old = FileKeystore(folder), new_relay_key()
    await keystore.put("a", old)
    for step in ("open", "write", "fsync", "replace"):
        with failing(step, errno.ENOSPC), pytest.raises(StorageError, match="No space left on device"):
            await keystore.put("a", new_relay_key())
        assert await keystore.get("a") == old
        assert not any(name.endswith(LEFTOVER) for name in names(folder))


async def test_a_put_that_was_begun_is_finished_when_cancelled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keystore, key = FileKeystore(folder), new_relay_key()
    begun = trio.Event()
    go_on = threading.Event()
    real = files.replace

    def slow(*args: Any, **kwargs: Any) -> bool:
        trio.from_thread.run_sync(begun.set)
        assert go_on.wait(10)
        return real(*args, **kwargs)

    monkeypatch.setattr(files, "replace", slow)
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keystore.put, "a", key)
            await begun.wait()
            scope.cancel()
            go_on.set()
    monkeypatch.undo()
    assert await keystore.get("a") == key


async def test_writers_of_one_folder_wait_for_each_other(folder: Path) -> None:
    keystores = [FileKeystore(folder) for _ in range(3)]
    keys = [new_relay_key() for _ in range(12)]
    async with trio.open_nursery() as nursery:
        for number, key in enumerate(keys):
            nursery.start_soon(keystores[number % 3].put, f"key-{number}", key)
        nursery.start_soon(keystores[0].rotate)
    for number, key in enumerate(keys):
        assert await keystores[0].get(f"key-{number}") == key


async def test_readers_read_while_the_master_key_is_rotated_again_and_again(folder: Path) -> None:
    key = new_relay_key()
    await FileKeystore(folder).put("a", key)
    reads = 0
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            nonlocal reads
            while True:
                assert await FileKeystore(folder).get("a") == key
                reads += 1

        nursery.start_soon(read)
        nursery.start_soon(read)
        for _ in range(30):
            await FileKeystore(folder).rotate()
        nursery.cancel_scope.cancel()
    assert reads


async def test_a_secret_is_read_again_when_the_master_key_was_rotated_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keystore, key = FileKeystore(folder), new_relay_key()
    await keystore.put("a", key)
    real = files.read
    rotations = 3

    def read(path: Path, **arguments: Any) -> memoryview | None:
        nonlocal rotations
        content = real(path, **arguments)
        if path.name == "a.secret" and rotations:
            rotations -= 1
            with monkeypatch.context() as patch:
                patch.setattr(files, "read", real)
                FileKeystore(folder)._rotate(None)
        return content

    monkeypatch.setattr(files, "read", read)
    assert await keystore.get("a") == key
    assert rotations == 0


# Rotation


@pytest.mark.parametrize("passphrase", [None, PASSPHRASE])
async def test_rotation_renews_everything_and_keeps_every_key(folder: Path, passphrase: str | None) -> None:
    keystore = FileKeystore(folder, passphrase)
    keys = {f"key-{number}": new_relay_key() for number in range(3)}
    for reference, key in keys.items():
        await keystore.put(reference, key)
    (folder / "notes.txt").write_text("not ours")
    (folder / ".hidden.secret").write_text("not ours either")
    before = {name: (folder / name).read_bytes() for name in names(folder) if name.endswith((".secret", ".key"))}
    await keystore.rotate()
    for name, content in before.items():
        assert ((folder / name).read_bytes() == content) == name.startswith(".")
    for store in (keystore, FileKeystore(folder, passphrase)):
        for reference, key in keys.items():
            assert await store.get(reference) == key
    # What the old master key had sealed, it opens no more.
    (folder / "key-0.secret").write_bytes(before["key-0.secret"])
    with pytest.raises(StorageError, match="was sealed with a master key that this keystore does not hold"):
        await keystore.get("key-0")


async def test_rotation_changes_the_passphrase(folder: Path) -> None:
    key = new_relay_key()
    keystore = FileKeystore(folder)
    await keystore.put("a", key)
    await keystore.rotate("first")
    assert await keystore.get("a") == key
    assert await FileKeystore(folder, "first").get("a") == key
    await FileKeystore(folder, "first").rotate("second")
    assert await FileKeystore(folder, "second").get("a") == key
    for passphrase in (None, "first"):
        with pytest.raises(StorageError, match="passphrase"):
            await FileKeystore(folder, passphrase).get("a")


async def test_rotation_of_an_empty_keystore(folder: Path) -> None:
    await FileKeystore(folder).rotate("first")
    assert names(folder) == ["master.key", "master.key.lock"]
    with pytest.raises(StorageError, match="passphrase"):
        await FileKeystore(folder).put("a", new_relay_key())


async def test_a_secret_that_does_not_open_stops_a_rotation_before_it_begins(folder: Path) -> None:
    keystore = FileKeystore(folder)
    keys = {reference: new_relay_key() for reference in "abc"}
    for reference, key in keys.items():
        await keystore.put(reference, key)
    (folder / "b.secret").write_bytes((folder / "b.secret").read_bytes()[:-1])
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    with pytest.raises(StorageError, match=r"b\.secret was cut short.*; the master key was not rotated"):
        await keystore.rotate()
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


@pytest.mark.parametrize(("old", "new"), [(None, None), (PASSPHRASE, None), (None, "new"), (PASSPHRASE, "new")])
def test_a_rotation_that_crashes_at_any_step_leaves_every_key_to_be_opened(
    folder: Path, old: str | None, new: str | None
) -> None:
    keys = {f"key-{number}": new_relay_key() for number in range(2)}
    origin = FileKeystore(folder.with_name("origin"), old)
    for reference, key in keys.items():
        origin._put(reference, key)
    for count in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(origin.folder, folder)
        crashed = True
        with contextlib.suppress(Crash), crash_after(count):
            trio.run(FileKeystore(folder, old).rotate, new)
            crashed = False
        keystore = FileKeystore(folder, old)
        try:
            keystore._get("key-0")
        except StorageError:
            assert new is not None
            keystore = FileKeystore(folder, new)
        for reference, key in keys.items():
            assert keystore._get(reference) == key
        # It can be written and rotated, and then nothing of the crash is left.
        keystore._put("later", keys["key-0"])
        trio.run(keystore.rotate)
        assert {reference: keystore._get(reference) for reference in keys} == keys
        assert keystore._get("later") == keys["key-0"]
        assert not any(name.endswith(LEFTOVER) for name in names(folder))
        length = len((folder / "master.key").read_bytes().partition(b"\n")[2])
        assert length == (32 if keystore._passphrase is None else 12 + 32 + 16)
        if not crashed:
            break
    else:
        pytest.fail("never came to an end")
    assert count > 20


KILLED_AT_EACH_STEP: Final = """
    import os, signal, sys
    from pioneer_tunnel._model.keys import RelayKey
    from pioneer_tunnel.gateway.keystore import FileKeystore

    keystore = FileKeystore(sys.argv[1])
    keystore._put("other", RelayKey("other"))
    for count in range(100):
        keystore._put("a", RelayKey("old"))
        child = os.fork()
        if child == 0:
            done = 0
            def dying(real):
                def call(*args, **kwargs):
                    global done
                    if done == count:
                        os.kill(os.getpid(), signal.SIGKILL)
                    done += 1
                    return real(*args, **kwargs)
                return call
            for name in ("open", "fchmod", "write", "fsync", "replace", "unlink"):
                setattr(os, name, dying(getattr(os, name)))
            if sys.argv[2] == "put":
                keystore._put("a", RelayKey("new"))
            else:
                keystore._rotate(None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(keystore._get("a").reveal(), keystore._get("other").reveal(), flush=True)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
"""


@pytest.mark.parametrize("done", [pytest.param("put", marks=pytest.mark.slow), "rotate"])
def test_kill_9_at_each_step(folder: Path, done: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_AT_EACH_STEP), str(folder), done],
        check=True,
        capture_output=True,
        text=True,
    )
    found = [line.split() for line in killed.stdout.splitlines()]
    assert len(found) >= (8 if done == "put" else 20)
    assert {other for _, other in found} == {"other"}
    keys = [key for key, _ in found]
    if done == "put":
        changes = keys.index("new")
        assert set(keys[:changes]) == {"old"}
        assert set(keys[changes:]) == {"new"}
    else:
        assert set(keys) == {"old"}


class InterleavedWriters(RuleBasedStateMachine):
    """Two keystores on one folder, and a crash at any step: every key is the old one or the new one, and opens."""

    def __init__(self) -> None:
        super().__init__()
        self.parent = Path(tempfile.mkdtemp())
        self.keystores = [FileKeystore(self.parent / "keystore") for _ in range(2)]
        self.keys: dict[str, RelayKey] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.parent)

    @rule(writer=st.integers(0, 1), reference=st.sampled_from("abc"), number=st.integers(0, 999))
    def put(self, writer: int, reference: str, number: int) -> None:
        self.keys[reference] = RelayKey(f"key-{number}")
        trio.run(self.keystores[writer].put, reference, self.keys[reference])

    @rule(writer=st.integers(0, 1), reference=st.sampled_from("abc"))
    def delete(self, writer: int, reference: str) -> None:
        self.keys.pop(reference, None)
        trio.run(self.keystores[writer].delete, reference)

    @rule(writer=st.integers(0, 1))
    def rotate(self, writer: int) -> None:
        trio.run(self.keystores[writer].rotate)

    @rule(
        writer=st.integers(0, 1),
        reference=st.sampled_from("abc"),
        number=st.integers(0, 999),
        count=st.integers(0, 24),
    )
    def put_and_crash(self, writer: int, reference: str, number: int, count: int) -> None:
        new = RelayKey(f"key-{number}")
        with contextlib.suppress(Crash), crash_after(count):
            trio.run(self.keystores[writer].put, reference, new)
        self.settle(reference, new)

    @rule(writer=st.integers(0, 1), reference=st.sampled_from("abc"), count=st.integers(0, 8))
    def delete_and_crash(self, writer: int, reference: str, count: int) -> None:
        with contextlib.suppress(Crash), crash_after(count):
            trio.run(self.keystores[writer].delete, reference)
        self.settle(reference, None)

    @rule(writer=st.integers(0, 1), count=st.integers(0, 60))
    def rotate_and_crash(self, writer: int, count: int) -> None:
        with contextlib.suppress(Crash), crash_after(count):
            trio.run(self.keystores[writer].rotate)

    def settle(self, reference: str, new: RelayKey | None) -> None:
        """The process is gone: the key is what it was, or what it was to be."""
        found = self.keystores[0]._get(reference)
        assert found in (self.keys.get(reference), new)
        if found is None:
            self.keys.pop(reference, None)
        else:
            self.keys[reference] = found

    @invariant()
    def every_key_opens(self) -> None:
        for keystore in self.keystores:
            for reference in "abc":
                assert keystore._get(reference) == self.keys.get(reference)


TestInterleavedWriters = InterleavedWriters.TestCase
TestInterleavedWriters.settings = settings(max_examples=examples(25), stateful_step_count=15, deadline=None)


# Sealed bytes


def test_what_holds_key_material_has_no_printable_form() -> None:
    passphrase = envelope.Passphrase(PASSPHRASE)
    masters = envelope.MasterKeys.generate()
    raw = bytes(masters._keys[0].reveal())
    for holder in (passphrase, masters, masters._keys[0]):
        shown = [repr(holder), str(holder), f"{holder}"]
        shown += [repr(getattr(holder, name)) for name in type(holder).__slots__]
        with pytest.raises(TypeError, match="not pickled") as raised:
            pickle.dumps(holder)
        shown.append(everything_shown(raised.value))
        for text in shown:
            assert PASSPHRASE not in text
            assert repr(raw)[2:-1] not in text
            assert raw.hex() not in text


def test_what_opens_and_is_no_relay_key_is_an_error_that_does_not_show_it() -> None:
    masters = envelope.MasterKeys.generate()
    sealed = masters.seal("a", RelayKey(CANARY))
    head = sealed.partition(b"\n")[0] + b"\n"
    body = CANARY.encode()[:-1] + b"\xff"
    nonce = b"n" * 12
    forged = head + nonce + masters._keys[0].cipher.encrypt(nonce, body, head)
    with pytest.raises(envelope.EnvelopeError, match="was changed since it was written") as raised:
        masters.open("a", memoryview(forged))
    assert CANARY[:-1] not in everything_shown(raised.value)


@pytest.mark.parametrize("count", [0, 65, 999])
def test_how_many_master_keys_there_are_is_bounded(count: int) -> None:
    import hashlib

    raw = bytes(32 * count)
    content = f"pioneer-tunnel-master 1 plain {count} {hashlib.sha256(raw).hexdigest()}\n".encode() + raw
    with pytest.raises(envelope.EnvelopeError, match="1 to 64 are allowed"):
        envelope.MasterKeys.from_bytes(memoryview(content), None)


@given(content=st.binary(max_size=200), prefix=st.sampled_from([b"", b"pioneer-tunnel-secret 1 ", b"pioneer-tunnel-"]))
@settings(max_examples=examples(200), deadline=None)
def test_any_bytes_are_an_error_of_ours(content: bytes, prefix: bytes) -> None:
    masters = envelope.MasterKeys.generate()
    with pytest.raises(envelope.EnvelopeError):
        masters.open("a", memoryview(prefix + content))
    with pytest.raises(envelope.EnvelopeError):
        envelope.MasterKeys.from_bytes(memoryview(prefix + content), None)


# The keyring


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


# The environment


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
