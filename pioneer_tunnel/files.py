"""Files that must never be seen half written: read, replaced as a whole, locked, and kept from other people's eyes.

A file is replaced by writing a temporary beside it, making that durable, and renaming it over the old one. Whoever
reads sees the old content or the new, also after a power cut at any moment; a writer that is killed leaves at most a
temporary behind, which the next writer removes (`remove_temporaries`). Two writers keep apart by a lock on a file that
lies beside the one they write: the lock is the kernel's, so it ends with the process that held it.

Everything here blocks and is called in a thread. What the operating system refuses becomes a `StorageError` that names
the file. Contents are handed over as memoryviews, since the repr of one does not show what is in it: a traceback with
local variables cannot print a key that was being read or written.

Neighbours: settings and keystores keep their files here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from .errors import StorageError

try:
    import fcntl
except ModuleNotFoundError:  # Windows has none
    _CAN_LOCK = False
else:
    _CAN_LOCK = True

LOCK_SECONDS: Final = 5.0
_LOCK_POLL_SECONDS: Final = 0.01
_MOST_LINKS: Final = 40
_TEMPORARY_SUFFIX: Final = ".pioneer-tmp"


def read(path: Path, *, limit: int, private: bool = False) -> memoryview | None:
    """The content of `path`, or None when there is no such file.

    Args:
        path: the file.
        limit: how many bytes it may have at most.
        private: refuse a file that the group or others may read or write.

    Raises:
        StorageError: it cannot be read, is no regular file, has more than `limit` bytes, or is open to others.
    """
    with _naming(path, "read"):
        try:
            # Not blocking: a FIFO in the place of the file is refused below, not waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise StorageError(f"{path} is not a regular file")
            if private:
                _refuse_exposed(path, status)
            content = memoryview(bytearray(limit + 1))
            length = 0
            while length <= limit and (got := os.readv(descriptor, [content[length:]])):
                length += got
        finally:
            os.close(descriptor)
    if length > limit:
        raise StorageError(f"{path} is larger than {limit} bytes, so it is not a file of ours")
    return content[:length].toreadonly()


def exists(path: Path) -> bool:
    """Whether there is a `path`.

    Raises:
        StorageError: that cannot be told.
    """
    with _naming(path, "read"):
        return _status(path) is not None


def names_in(folder: Path) -> list[str]:
    """The names of what is in `folder`.

    Raises:
        StorageError: it cannot be read.
    """
    with _naming(folder, "read"):
        return [entry.name for entry in folder.iterdir()]


def replace(
    path: Path, content: bytes | memoryview, *, private: bool = False, still: Callable[[], bool] | None = None
) -> bool:
    """Make `content` the whole content of `path`, in one step; it is durable when this returns.

    The file keeps its mode and, where we may, its owner; a new one gets mode 0600 and the owner of its folder (so that
    what root writes for a gateway stays the gateway's). A symbolic link is followed, not replaced, unless it is another
    user's: he would choose which file of ours is overwritten.

    Args:
        path: the file; its folder must be there.
        content: what to write; a memoryview when it is secret.
        private: give it mode 0600 whatever it had.
        still: asked when nothing but the rename is left to do; False means: leave all as it is.

    Returns:
        Whether the file was replaced: False only when `still` said so.

    Raises:
        StorageError: it cannot be written. The old content is there, and no temporary; only when the last step, the
            `fsync` of the folder, failed is the new content there, and a power cut may undo it.
    """
    with _naming(path, "written"):
        target = _target(path)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}")
        old = _status(target)
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise StorageError(f"{path} is not a regular file; it is not replaced")
        mode = 0o600 if private or old is None else stat.S_IMODE(old.st_mode) & 0o777
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                _take_after(descriptor, old or target.parent.stat(), mode)
                left = memoryview(content)
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if still is not None and not still():
                temporary.unlink()
                return False
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(target.parent)
    return True


def remove(path: Path) -> None:
    """Remove `path` durably. One that is not there is removed already.

    Raises:
        StorageError: it cannot be removed.
    """
    with _naming(path, "removed"):
        try:
            path.unlink()
        except FileNotFoundError:
            return
        _sync_folder(path.parent)


def remove_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` (of all that is in it, when it is a folder) left behind.

    Only under the lock that those writers took, when none of them can be alive. What cannot be removed stays: it is
    in nobody's way.
    """
    target = Path(os.path.realpath(path))
    with contextlib.suppress(OSError):
        folder, start = (target, ".") if target.is_dir() else (target.parent, f".{target.name}.")
        for entry in folder.iterdir():
            if entry.name.startswith(start) and entry.name.endswith(_TEMPORARY_SUFFIX):
                entry.unlink()


@contextlib.contextmanager
def locked(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Keep every other writer of `path` out, in this process and in others, while the block runs.

    The lock is on a file `NAME.lock` beside it, which stays: were it removed, two writers could each lock another file
    of that name. Readers need no lock.

    Args:
        path: the file that is going to be written; it need not exist.
        seconds: how long to wait for another writer.

    Raises:
        StorageError: the lock cannot be had, or was not free in time.
    """
    _refuse_without_locks(path)
    with _naming(path, "locked"):
        target = _target(path)
    sidecar = target.with_name(target.name + ".lock")
    with _naming(sidecar, "locked"):
        descriptor = os.open(sidecar, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    # Closing the descriptor is what unlocks.
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, descriptor)
        with _naming(sidecar, "locked"):
            _take_after(descriptor, target.parent.stat(), None)
            # The kernel's wait has no deadline, and a signal would be needed to end it: so we ask again and again.
            deadline = time.monotonic() + seconds
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise StorageError(
                        f"{path} is being written by another program, which has held {sidecar} for {seconds:g} s"
                    )
                time.sleep(_LOCK_POLL_SECONDS)
        yield


def make_private_folder(folder: Path) -> None:
    """Make `folder` with mode 0700, unless it is there. The folder above it must exist.

    Raises:
        StorageError: it cannot be made.
    """
    _refuse_without_locks(folder)
    with _naming(folder, "made"):
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            return
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _take_after(descriptor, folder.parent.stat(), None)
        finally:
            os.close(descriptor)
        _sync_folder(folder.parent)


def refuse_exposed_folder(folder: Path) -> None:
    """Do nothing when `folder` is its owner's alone, or not there.

    Raises:
        StorageError: the group or others may enter it, or it is not a folder; the message says how to mend that.
    """
    with _naming(folder, "read"):
        status = _status(folder)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{folder} is not a folder")
    _refuse_exposed(folder, status)


def _refuse_exposed(path: Path, status: os.stat_result) -> None:
    # Writing counts as well as reading: whoever may write a key may put his own there.
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        mended = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
        raise StorageError(
            f"{path} holds secrets and is open to others (mode {mode:04o}); "
            f"run: chmod {mended:o} {shlex.quote(str(path))}"
        )


def _target(path: Path) -> Path:
    """The file that `path` stands for, whatever links of ours lead to it.

    Raises:
        StorageError: a link on the way is neither ours nor root's.
    """
    place = path
    for _ in range(_MOST_LINKS):
        place = Path(os.path.realpath(place.parent)) / place.name
        if not place.is_symlink():
            return place
        owner = place.lstat().st_uid
        if owner not in {0, os.geteuid()}:
            raise StorageError(
                f"{place} is a symbolic link of another user (uid {owner}), so it is not followed; "
                f"remove it, or name the file that it leads to"
            )
        place = place.parent / place.readlink()
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _take_after(descriptor: int, model: os.stat_result, mode: int | None) -> None:
    """Give an open file the owner and group of `model` where we may, and `mode`, unless that is None."""
    made = os.fstat(descriptor)
    # One by one: the owner of a file may give it to another group of his, but not to another owner.
    if made.st_gid != model.st_gid:
        with contextlib.suppress(OSError):
            os.fchown(descriptor, -1, model.st_gid)
    if made.st_uid != model.st_uid:
        with contextlib.suppress(OSError):
            os.fchown(descriptor, model.st_uid, -1)
    if mode is not None:
        if os.fstat(descriptor).st_gid != model.st_gid:
            mode &= ~0o070  # what the old group might do is not for the new one
        os.fchmod(descriptor, mode)


def _refuse_without_locks(path: Path) -> None:
    """Do nothing where this system has the locks, owners and modes that files of ours need.

    Raises:
        StorageError: it has not.
    """
    if not _CAN_LOCK:
        raise StorageError(
            f"{path} cannot be written: settings and keys are kept in files on Linux, macOS and other POSIX systems"
            " alone, and this system has no fcntl; open_tunnel takes the key itself"
        )


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    """Make durable what was renamed, made or removed in `folder`."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot, and say so with EINVAL; they have nothing better to offer.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(path: Path, done: str) -> Iterator[None]:
    """Turn what the operating system refuses into a `StorageError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be {done}: {error.strerror or error}") from error
