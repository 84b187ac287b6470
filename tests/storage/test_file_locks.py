"""A lock of a file: who waits, when it ends, and what is no lock file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing_files import mode, names

from pioneer_tunnel._model.errors import StorageError
from pioneer_tunnel._storage import files


def test_a_lock_keeps_others_out_for_as_long_as_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with files.locked(path):
        started = time.monotonic()
        with (
            pytest.raises(StorageError, match=r"/f is being written by another program, .*/f\.lock for 0\.05 s"),
            files.locked(path, seconds=0.05),
        ):
            pytest.fail("two have the lock")
        assert time.monotonic() - started >= 0.05
    with files.locked(path, seconds=0):
        pass
    assert mode(tmp_path / "f.lock") == 0o600


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "f"
    order = []
    held = threading.Event()

    def hold() -> None:
        with files.locked(path):
            held.set()
            time.sleep(0.1)
            order.append("first")

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    with files.locked(path):
        order.append("second")
    holder.join()
    assert order == ["first", "second"]


def test_a_lock_ends_with_its_block_also_by_an_exception(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with pytest.raises(OSError, match="of the block"), files.locked(path):
        raise OSError("of the block, which is not ours to explain")
    with files.locked(path, seconds=0):
        pass


def test_a_lock_ends_with_the_process_that_held_it(tmp_path: Path) -> None:
    path = tmp_path / "f"
    program = (
        "import sys, time, fcntl; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, f"{path}.lock"], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(StorageError, match="by another program"), files.locked(path, seconds=0):
            pytest.fail("two have the lock")
        holder.send_signal(signal.SIGKILL)
        with files.locked(path):
            pass


def test_a_lock_file_that_is_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"f\.lock cannot be locked"), files.locked(tmp_path / "f"):
        pass
    assert names(tmp_path) == ["f.lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_lock_file_that_was_there_is_not_given_away(tmp_path: Path) -> None:
    theirs, precious = tmp_path / "theirs", tmp_path / "precious"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    precious.write_bytes(b"precious")
    (theirs / "f.lock").hardlink_to(precious)
    with files.locked(theirs / "f"):
        pass
    assert (precious.stat().st_uid, precious.stat().st_gid) == (0, 0)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.mkdir()], ids=["fifo", "folder"])
def test_a_lock_file_that_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "f.lock")
    with pytest.raises(StorageError, match=r"f\.lock cannot be locked"), files.locked(tmp_path / "f"):
        pass
