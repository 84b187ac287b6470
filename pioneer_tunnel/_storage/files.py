"""Read, lock and atomically replace files, and protect them from other users.

To replace a file, we write a temporary file beside it, fsync it, and rename it over the old one. Readers see the old
content or the new one, also after a power cut. A writer that is killed leaves at most a temporary file, which the next
writer removes (`remove_temporaries`). Writers exclude each other with `flock` on a lock file beside the file. The
kernel releases that lock when the process ends.

All functions block: call them in a thread. An `OSError` becomes a `StorageError` that names the file. Contents are
memoryviews, whose repr does not show the content: a traceback with local variables cannot print a key.

To write, remove, lock or make a file, we walk to it by descriptors and refuse links of other users, see `folders`.
Reading follows any link, but only opens a regular file of a bounded size: it never blocks on a FIFO or a device.

`filelock` (4.3, tried) cannot replace `locked`: it opens the lock file by path and so follows any user's link on the
way there, it locks a FIFO, and it does not give a new lock file the owner of the folder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import operator
import os
import secrets
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from .._model.errors import StorageError
from .folders import IS_POSIX, listable, open_folder, resolved, sync_folder

if IS_POSIX:
    import fcntl

# O_NONBLOCK: opening a FIFO that has no other end would block. Of these, Windows has O_BINARY alone, and POSIX not.
OPENING: Final[int] = functools.reduce(
    operator.or_, (getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
)
"""The flags of `os.open` for any file: it opens at once or fails, and its descriptor is ours alone."""

_TO_READ: Final = os.O_RDONLY | OPENING

LOCK_SECONDS: Final = 5.0
_LOCK_POLL_SECONDS: Final = 0.01
_TEMPORARY_SUFFIX: Final = ".pioneer-tmp"


class LockHeldError(StorageError):
    """Another writer has held a lock until the timeout."""


def read(path: Path, *, limit: int, private: bool = False) -> memoryview | None:
    """The content of `path`, or None when there is no such file.

    Args:
        path: the file.
        limit: the maximum size, in bytes.
        private: refuse a file that the group or others may access.

    Raises:
        StorageError: it cannot be read, is not a regular file, has more than `limit` bytes, or others may access it.
    """
    with _errors_name(path, "read"):
        try:
            descriptor = _open_to_read(path, limit=limit, private=private)
        except FileNotFoundError:
            return None
        try:
            # One byte more, to notice that the file has grown. Some file systems report a size of 0.
            content = memoryview(bytearray((os.fstat(descriptor).st_size or limit) + 1))
            length = 0
            while got := _read_into(descriptor, content[length:]):
                length += got
        finally:
            os.close(descriptor)
    if length == len(content):
        raise StorageError(f"{path} was written while it was read")
    return content[:length].toreadonly()


@contextlib.contextmanager
def pinned(path: Path, *, limit: int) -> Iterator[str]:
    """A path to the file that `path` is now, for a library that opens files by name, such as OpenSSL.

    Where the system has `/dev/fd`, the library reads this file even when another one replaces `path` meanwhile.

    Args:
        path: the file.
        limit: the maximum size, in bytes.

    Raises:
        StorageError: it does not exist, cannot be read, is not a regular file, or has more than `limit` bytes.
    """
    with _errors_name(path, "read"):
        descriptor = _open_to_read(path, limit=limit, private=False)
    try:
        by_descriptor = f"/dev/fd/{descriptor}"
        yield by_descriptor if os.path.exists(by_descriptor) else str(path)  # noqa: PTH110  # it is no Path
    finally:
        os.close(descriptor)


def _read_into(descriptor: int, buffer: memoryview) -> int:
    if hasattr(os, "readv"):
        return os.readv(descriptor, [buffer])
    data = os.read(descriptor, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _open_to_read(path: Path, *, limit: int, private: bool) -> int:
    descriptor = os.open(path, _TO_READ)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StorageError(f"{path} is not a regular file")
        if status.st_size > limit:
            raise StorageError(f"{path} is larger than {limit} bytes")
        if private:
            _refuse_exposed(path, status)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def exists(path: Path) -> bool:
    """Whether `path` exists.

    Raises:
        StorageError: that cannot be determined.
    """
    with _errors_name(path, "read"):
        try:
            path.stat()
        except FileNotFoundError:
            return False
        return True


def names_in(folder: Path) -> list[str]:
    """The names of the entries of `folder`.

    Raises:
        StorageError: it cannot be read.
    """
    with _errors_name(folder, "read"):
        return [entry.name for entry in folder.iterdir()]


def replace(
    path: Path, content: bytes | memoryview, *, private: bool = False, only_if: Callable[[], bool] | None = None
) -> bool:
    """Replace the whole content of `path` atomically. The new content is durable when this returns.

    The file keeps its mode and, where we may set it, its owner. A new file gets mode 0600 and the owner of its folder,
    so that a file which root writes for a gateway belongs to the gateway. A symbolic link is followed, not replaced.

    Args:
        path: the file; its folder must exist.
        content: what to write; a memoryview when it is secret.
        private: set mode 0600, whatever mode the file had.
        only_if: called right before the rename; when it returns False, the file stays as it is.

    Returns:
        Whether the file was replaced: False only when `only_if` returned False.

    Raises:
        StorageError: it cannot be written, or a link of another user leads to it. Then the old content is still there,
            and no temporary file. Exception: when the last step, the fsync of the folder, fails, the new content is
            there, and a power cut may undo it.
    """
    with _errors_name(path, "written"), resolved(path) as (folder, name):
        temporary = f".{name}.{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
        old = _status(name, folder)
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise StorageError(f"{path} is not a regular file; it is not replaced")
        mode = 0o600 if private or old is None else stat.S_IMODE(old.st_mode) & 0o777
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            try:
                _copy_owner(descriptor, old or os.fstat(folder), mode)
                left = memoryview(content)
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if only_if is not None and not only_if():
                os.unlink(temporary, dir_fd=folder)
                return False
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        sync_folder(folder)
    return True


def create(path: Path, content: bytes | memoryview) -> bool:
    """Write a new file, for the owner of its folder alone. The content is durable when this returns.

    Of two writers at the same moment, one makes the file. A writer that is killed may leave it empty.

    Args:
        path: the file; its folder must exist.
        content: what to write; a memoryview when it is secret.

    Returns:
        Whether the file was made: False when there was one, which stays as it is.

    Raises:
        StorageError: it cannot be written, or a link of another user leads to it. Then there is no file.
    """
    with _errors_name(path, "written"), resolved(path) as (folder, name):
        # Not a link from a temporary file, which would be exclusive too: some file systems have no hard links.
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        except FileExistsError:
            return False
        try:
            try:
                _copy_owner(descriptor, os.fstat(folder), None)
            finally:
                os.close(descriptor)
            return replace(path, content, private=True)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise


def remove(path: Path) -> None:
    """Remove `path` durably. Does nothing when it does not exist. Of a symbolic link, the link is removed.

    Raises:
        StorageError: it cannot be removed, or a link of another user leads to its folder.
    """
    with _errors_name(path, "removed"):
        try:
            with resolved(path, follow=False) as (folder, name):
                os.unlink(name, dir_fd=folder)
                sync_folder(folder)
        except FileNotFoundError:
            return


def remove_temporaries(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left; for a folder, those of all files in it.

    The caller must hold the writers' lock, so that no writer is still using them. A file that cannot be removed stays;
    it does no harm.
    """
    with contextlib.suppress(OSError, StorageError), contextlib.ExitStack() as stack:
        folder, name = stack.enter_context(resolved(path))
        start = f".{name}."
        status = _status(name, folder)
        if status is not None and stat.S_ISDIR(status.st_mode):
            folder, start = stack.enter_context(listable(name, folder)), "."
        else:
            folder = stack.enter_context(listable(".", folder))
        for entry in os.listdir(folder):  # noqa: PTH208  # a descriptor is no Path
            if entry.startswith(start) and entry.endswith(_TEMPORARY_SUFFIX):
                os.unlink(entry, dir_fd=folder)


@contextlib.contextmanager
def locked(path: Path, *, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Hold the lock for writing `path`, against other writers in this process and in others, while the block runs.

    The lock file is `NAME.lock` beside `path`. It is never removed: otherwise two writers could lock two different
    files of that name. Readers need no lock.

    Args:
        path: the file that will be written; it need not exist.
        seconds: the timeout.

    Raises:
        LockHeldError: another writer held the lock until the timeout.
        StorageError: it cannot be taken.
    """
    # Closing the descriptor releases the lock.
    with contextlib.ExitStack() as stack:
        sidecar = path.with_name(path.name + ".lock")
        with _errors_name(sidecar, "locked"):
            with resolved(path) as (folder, name):
                descriptor = _open_lock(name + ".lock", folder)
            stack.callback(os.close, descriptor)
            # `flock` has no timeout (only a signal would end its wait), so poll.
            deadline = time.monotonic() + seconds
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise LockHeldError(
                        f"{path} is being written by another program, which has held {sidecar} for {seconds:g} s"
                    )
                time.sleep(_LOCK_POLL_SECONDS)
        yield


def _open_lock(name: str, folder: int) -> int:
    """Open a lock file; create it when it does not exist."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        except FileExistsError:
            pass
        else:
            _copy_owner(descriptor, os.fstat(folder), None)  # only of a new file: an existing one may be a user's
            return descriptor
        try:
            descriptor = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            continue  # it was removed meanwhile
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")


def make_private_folder(folder: Path) -> None:
    """Make `folder` with mode 0700, unless it exists. Its parent must exist.

    Raises:
        StorageError: it cannot be made, or a link of another user leads to its place.
    """
    with _errors_name(folder, "made"), resolved(folder, follow=False) as (above, name):
        try:
            os.mkdir(name, 0o700, dir_fd=above)
        except FileExistsError:
            return
        with listable(name, above) as made:
            # Another user with write access to the parent may have replaced it by another folder of ours.
            status = os.fstat(made)
            is_empty = not os.listdir(made)  # noqa: PTH208  # as above
            if is_empty and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                _copy_owner(made, os.fstat(above), None)
        sync_folder(above)


def refuse_exposed_folder(folder: Path) -> None:
    """Check that only the owner of `folder` may access it. A folder that does not exist is fine.

    Raises:
        StorageError: the group or others may access it, or it is not a folder; the message says how to fix the mode.
    """
    with _errors_name(folder, "read"):
        try:
            status = folder.stat()
        except FileNotFoundError:
            return
    if not stat.S_ISDIR(status.st_mode):
        raise StorageError(f"{folder} is not a folder")
    _refuse_exposed(folder, status)


def refuse_writable(path: Path) -> None:
    """Check that only its owner, who is us or root, may write `path`. A file that does not exist is fine.

    Raises:
        StorageError: others may; the message says how to fix that.
    """
    if not IS_POSIX:
        return  # files of a user's profile are the user's
    with _errors_name(path, "read"):
        try:
            status = path.stat()
        except FileNotFoundError:
            return
    if status.st_uid not in {0, os.geteuid()}:
        raise StorageError(
            f"{path} belongs to another user (uid {status.st_uid}), who may change it; use one of your own"
        )
    if status.st_mode & 0o022:
        raise StorageError(f"{path} can be written by others; run: chmod go-w {shlex.quote(str(path))}")


@contextlib.contextmanager
def opened_private_folder(folder: Path) -> Iterator[int]:
    """The descriptor of `folder`, to reach its entries, while the block runs.

    Raises:
        FileNotFoundError: it does not exist.
        StorageError: it cannot be opened, a link of another user leads to it, or the group or others may access it.
    """
    with contextlib.ExitStack() as stack:
        with _errors_name(folder, "opened", missing_too=False):
            above, name = stack.enter_context(resolved(folder))
            descriptor = open_folder(name, above)
        stack.callback(os.close, descriptor)
        _refuse_exposed(folder, os.fstat(descriptor))
        yield descriptor


def _refuse_exposed(path: Path, status: os.stat_result) -> None:
    if not IS_POSIX:
        return  # modes say nothing; who may read a file of a user's profile is for its access list
    # Write access counts, too: a user who may write the file could store his own key there.
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        right_mode = 0o700 if stat.S_ISDIR(status.st_mode) else 0o600
        raise StorageError(
            f"{path} holds secrets and is open to others (mode {mode:04o}); "
            f"run: chmod {right_mode:o} {shlex.quote(str(path))}"
        )


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _copy_owner(descriptor: int, model: os.stat_result, mode: int | None) -> None:
    """Give an open file the owner and group of `model` where we may; and set `mode`, unless it is None."""
    current = os.fstat(descriptor)
    # One by one: a file's owner may change its group to another one of his, but not its owner.
    if current.st_gid != model.st_gid:
        with contextlib.suppress(OSError):
            os.fchown(descriptor, -1, model.st_gid)
    if current.st_uid != model.st_uid:
        with contextlib.suppress(OSError):
            os.fchown(descriptor, model.st_uid, -1)
    if mode is not None:
        if os.fstat(descriptor).st_gid != model.st_gid:
            mode &= ~0o070  # the new group must not get the old group's rights
        os.fchmod(descriptor, mode)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _errors_name(path: Path, done: str, *, missing_too: bool = True) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that names `path`; a `FileNotFoundError` only with `missing_too`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not missing_too:
            raise
        raise StorageError(f"{path} cannot be {done}: {error.strerror or error}") from error
