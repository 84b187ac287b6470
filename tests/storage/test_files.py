"""Files are replaced whole or not at all, wherever a process is cut off; modes do what they say.

`crash_after` is also what the tests of settings and keystores cut their processes off with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from crashing_files import LEFTOVER, Crash, crash_after, failing, mode, names
from hypothesis import given, settings, strategies as st

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._model.status import ErrorKind
from pioneer_tunnel._storage import files


def content_of(path: Path, *, private: bool = False) -> bytes:
    content = files.read(path, limit=10, private=private)
    assert content is not None
    return bytes(content)


# Reading


def test_a_missing_file_reads_as_none(tmp_path: Path) -> None:
    assert files.read(tmp_path / "f", limit=10) is None
    assert files.read(tmp_path / "no" / "folder" / "f", limit=10) is None
    assert not files.exists(tmp_path / "f")


def test_content_is_read_whole_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * 10)
    assert content_of(path) == b"x" * 10
    with pytest.raises(StorageError, match=r"f is larger than 9 bytes"):
        files.read(path, limit=9)
    path.write_bytes(b"")
    assert content_of(path) == b""


def test_what_was_read_has_no_printable_form(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"canary")
    content = files.read(path, limit=10)
    assert content is not None
    assert "canary" not in repr(content)
    assert "canary" not in f"{content}"


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "f"
    make(path)
    with pytest.raises(StorageError, match="f is not a regular file"):
        files.read(path, limit=10)
    with pytest.raises(StorageError, match="f is not a regular file; it is not replaced"):
        files.replace(path, b"new")
    assert names(tmp_path) == ["f"]


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(StorageError, match="/dev/full is not a regular file"):
        files.replace(Path("/dev/full"), b"new")


def test_errors_name_the_file_and_the_cause_and_are_of_kind_io(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = tmp_path / "file" / "f"
    attempts: list[Callable[[], object]] = [
        lambda: files.read(below, limit=10),
        lambda: files.exists(below),
        lambda: files.replace(below, b"new"),
        lambda: files.remove(below),
        lambda: files.make_private_folder(below),
        lambda: files.refuse_exposed_folder(below),
        lambda: files.names_in(below),
        lambda: files.locked(below).__enter__(),
    ]
    for attempt in attempts:
        with pytest.raises(StorageError, match=r"file/f.* cannot be .*: Not a directory") as raised:
            attempt()
        assert raised.value.kind is ErrorKind.IO
        assert isinstance(raised.value.__cause__, NotADirectoryError)


@pytest.mark.parametrize("open_to", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o777])
def test_a_private_file_that_is_open_to_others_is_refused_with_the_way_to_mend_it(tmp_path: Path, open_to: int) -> None:
    path = tmp_path / "it's a key"
    path.write_bytes(b"secret")
    path.chmod(open_to)
    assert content_of(path) == b"secret"
    with pytest.raises(StorageError, match=rf"\(mode {open_to:04o}\); run: chmod 600 ") as raised:
        files.read(path, limit=10, private=True)
    command = str(raised.value).partition("run: ")[2]
    subprocess.run(["/bin/sh", "-c", command], check=True)
    assert mode(path) == 0o600
    assert content_of(path, private=True) == b"secret"


def test_a_private_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    files.refuse_exposed_folder(folder)  # not there yet
    files.make_private_folder(folder)
    files.make_private_folder(folder)
    assert mode(folder) == 0o700
    files.refuse_exposed_folder(folder)
    folder.chmod(0o710)
    with pytest.raises(StorageError, match=r"folder holds secrets .*\(mode 0710\); run: chmod 700 "):
        files.refuse_exposed_folder(folder)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file is not a folder"):
        files.refuse_exposed_folder(tmp_path / "file")


# Replacing


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    old_mask = os.umask(0)
    try:
        assert files.replace(path, b"new")
    finally:
        os.umask(old_mask)
    assert path.read_bytes() == b"new"
    assert mode(path) == 0o600
    assert names(tmp_path) == ["f"]


def test_a_replaced_file_keeps_its_mode_unless_it_is_private(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o664)
    files.replace(path, b"new")
    assert (path.read_bytes(), mode(path)) == (b"new", 0o664)
    files.replace(path, b"newer", private=True)
    assert (path.read_bytes(), mode(path)) == (b"newer", 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_writes_stays_the_gateways(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, 12345, 23456)
    path = folder / "f"
    with files.locked(path):
        files.replace(path, b"new")
    files.create(folder / "new", b"")
    files.make_private_folder(folder / "inner")
    for made in (path, folder / "f.lock", folder / "new", folder / "inner"):
        assert (made.stat().st_uid, made.stat().st_gid) == (12345, 23456)
    os.chown(path, 111, 222)
    files.replace(path, b"newer")
    assert (path.stat().st_uid, path.stat().st_gid) == (111, 222)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_the_old_group_might_do_is_not_given_to_another(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o664)
    os.chown(path, -1, 222)
    with failing("fchown", errno.EPERM):
        files.replace(path, b"new")
    assert mode(path) == 0o604


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "f")
    for content in (b"new", b"newer"):
        with files.locked(link):
            files.remove_temporaries(link)
            files.replace(link, content)
        assert link.is_symlink()
        assert (tmp_path / "real" / "f").read_bytes() == content
    assert names(tmp_path / "real") == ["f", "f.lock"]
    assert names(tmp_path) == ["link", "real"]


def test_nothing_is_replaced_when_asked_to_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    assert not files.replace(path, b"new", only_if=lambda: False)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_a_new_file_is_private_and_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert files.create(path, b"new")
    assert mode(path) == 0o600
    assert not files.create(path, b"newer")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_new_file_that_cannot_be_written_is_not_there(tmp_path: Path, step: str) -> None:
    with failing(step, errno.ENOSPC), pytest.raises(StorageError, match="No space left"):
        files.create(tmp_path / "f", b"new")
    assert names(tmp_path) == []
    assert files.create(tmp_path / "f", b"new")


def test_the_content_is_durable_before_the_name_and_the_name_before_the_return(tmp_path: Path) -> None:
    with crash_after(1000) as done:
        files.replace(tmp_path / "f", b"new")
    steps = [step for step in done if step not in {"open", "fchown"}]
    assert steps == ["fchmod", "write", "fsync", "replace", "fsync"]


@given(content=st.binary(max_size=300), step=st.integers(1, 50))
@settings(max_examples=25, deadline=None)
def test_short_writes_are_continued(tmp_path_factory: pytest.TempPathFactory, content: bytes, step: int) -> None:
    path = tmp_path_factory.mktemp("short") / "f"
    real = os.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:step]))
        files.replace(path, content)
    assert path.read_bytes() == content


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_crash_at_any_step_leaves_the_old_content_or_the_new(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "f"
    seen = set()
    for count in range(100):
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)
        crashed = True
        with contextlib.suppress(Crash), crash_after(count), files.locked(path):
            files.replace(path, b"new")
            crashed = False
        content = path.read_bytes() if path.exists() else None
        assert content in (old, b"new")
        seen.add(content)
        # The next writer is not hindered, and clears up.
        with files.locked(path, seconds=0):
            files.remove_temporaries(path)
            assert not any(name.endswith(LEFTOVER) for name in names(tmp_path))
            files.replace(path, b"next")
        assert path.read_bytes() == b"next"
        if not crashed:
            break
    else:
        pytest.fail("never came to an end")
    assert seen == {old, b"new"}


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("step", ["open", "fchmod", "write", "fsync", "replace"])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failure_at_any_step_leaves_the_old_content_and_no_temporary(
    tmp_path: Path, step: str, error: int, old: bytes | None
) -> None:
    path = tmp_path / "f"
    if old is not None:
        path.write_bytes(old)
    with (
        failing(step, error),
        pytest.raises(StorageError, match=rf"/f cannot be written: {os.strerror(error)}"),
    ):
        files.replace(path, b"new")
    assert (path.read_bytes() if path.exists() else None) == old
    assert names(tmp_path) == ([] if old is None else ["f"])


def test_a_folder_that_cannot_be_made_durable_is_told_though_the_content_is_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with failing("fsync", errno.EIO, after=1), pytest.raises(StorageError, match="cannot be written"):
        files.replace(path, b"new")
    assert path.read_bytes() == b"new"
    with failing("fsync", errno.EINVAL, after=1):  # a file system that has no such thing
        files.replace(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_full_disk(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    full = os.open("/dev/full", os.O_WRONLY)
    real = os.write
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", lambda _descriptor, data: real(full, data))
            with pytest.raises(StorageError, match=r"/f cannot be written: No space left on device"):
                files.replace(path, b"new")
    finally:
        os.close(full)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_secret_content_is_in_no_traceback(tmp_path: Path) -> None:
    import traceback

    path = tmp_path / "f"
    secret = memoryview(b"canary")
    for step in ("open", "write", "fsync", "replace"):
        with failing(step, errno.EIO), pytest.raises(StorageError) as raised:
            files.replace(path, secret)
        shown = "".join(traceback.TracebackException.from_exception(raised.value, capture_locals=True).format())
        assert "canary" not in shown.replace('b"canary"', "")  # the source line of this test itself


KILLED_AT_EACH_STEP: Final = """
    import os, signal, sys
    from pathlib import Path
    from pioneer_tunnel._storage import files

    path = Path(sys.argv[1])
    for count in range(100):
        path.write_bytes(b"old")
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
            for name in ("open", "fchmod", "write", "fsync", "replace"):
                setattr(os, name, dying(getattr(os, name)))
            with files.locked(path):
                files.remove_temporaries(path)
                files.replace(path, b"new")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(path.read_text(), flush=True)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))
"""


def test_kill_9_at_each_step_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "f"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED_AT_EACH_STEP), str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    contents = done.stdout.split()
    changes = contents.index("new")
    assert changes >= 5
    assert set(contents[:changes]) == {"old"}
    assert set(contents[changes:]) == {"new"}
    assert len(contents) > changes + 1  # it was killed after the rename as well
    assert names(tmp_path) == ["f", "f.lock"]  # the last one was not killed, and cleared up


def test_readers_see_whole_contents_while_two_write(tmp_path: Path) -> None:
    path = tmp_path / "f"
    contents = [bytes([letter]) * 20_000 for letter in b"ab"]
    path.write_bytes(contents[0])
    stop = threading.Event()
    failures: list[StorageError] = []

    def write(content: bytes) -> None:
        try:
            while not stop.is_set():
                with files.locked(path, seconds=20):
                    files.remove_temporaries(path)
                    files.replace(path, content)
        except StorageError as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    try:
        for _ in range(300):
            read = files.read(path, limit=100_000)
            assert read is not None
            assert bytes(read) in contents
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not failures


# Removing


def test_removing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    with crash_after(1000) as done:
        files.remove(path)
        files.remove(path)
    assert not path.exists()
    assert [step for step in done if step != "open"] == ["unlink", "fsync", "unlink"]


def test_temporaries_of_other_files_are_left_alone(tmp_path: Path) -> None:
    ours = [f".f.0123456789abcdef{LEFTOVER}", f".f.fedcba9876543210{LEFTOVER}"]
    others = ["f", f".g.0123456789abcdef{LEFTOVER}", ".f.tmp", "f.bak"]
    for name in ours + others:
        (tmp_path / name).write_bytes(b"")
    files.remove_temporaries(tmp_path / "f")
    assert names(tmp_path) == sorted(others)
    files.remove_temporaries(tmp_path)
    assert names(tmp_path) == sorted(["f", ".f.tmp", "f.bak"])
    files.remove_temporaries(tmp_path / "no" / "such" / "file")


def test_a_pinned_file_is_the_one_that_was_checked(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"checked")
    with files.pinned(path, limit=10) as pinned:
        path.unlink()
        os.mkfifo(path)
        assert Path(pinned).read_bytes() == b"checked"
    with pytest.raises(StorageError, match="not a regular file"), files.pinned(path, limit=10):
        pass
