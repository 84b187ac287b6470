"""The keystore in encrypted files, and the sealed bytes in them."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from crashing_files import LEFTOVER, failing, mode, names
from fuzzing import examples
from hypothesis import given, settings, strategies as st
from keystores import CANARY, PASSPHRASE, attempts_on
from rig import HANG
from shown import everything_shown

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel._storage import files
from pioneer_tunnel.gateway.keystore import FileKeystore, envelope

pytestmark = pytest.mark.usefixtures("cheap_scrypt")


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
        assert go_on.wait(HANG)
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
