"""New master keys for the keystore in files, also when a rotation is killed or others write meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Final

import pytest
import trio
from crashing_files import LEFTOVER, Crash, crash_after, names
from fuzzing import examples
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from keystores import PASSPHRASE

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.keys import RelayKey, new_relay_key
from pioneer_tunnel.gateway.keystore import FileKeystore

pytestmark = pytest.mark.usefixtures("cheap_scrypt")


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
