"""Files that must never be seen half written: read, replaced as a whole, locked, and kept from other people's eyes.

A file is replaced by writing a temporary beside it, making that durable, and renaming it over the old one. Whoever
reads sees the old content or the new, also after a power cut at any moment; a writer that is killed leaves at most a
temporary behind, which the next writer removes (`remove_temporaries`). Two writers keep apart by a lock on a file that
lies beside the one they write: the lock is the kernel's, so it ends with the process that held it.

Everything here blocks and is called in a thread. What the operating system refuses becomes a `StorageError` that names
the file. Contents are handed over as memoryviews, since the repr of one does not show what is in it: a traceback with
local variables cannot print a key that was being read or written.

What is written, removed, locked or made is reached folder by folder, by descriptors. A symbolic link on the way is
followed when it is ours or root's, and refused when it is another user's, who could lead us to a file of his choice.
What is only read may be reached by any link. It has to be a regular file of a bounded size: anything else is refused
without waiting for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shlex
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from .._model.errors import StorageError

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
            descriptor = _open_to_read(path, limit=limit, private=private)
        except FileNotFoundError:
            return None
        try:
            # One byte more, to see that it has grown. Some file systems tell no size.
            content = memoryview(bytearray((os.fstat(descriptor).st_size or limit) + 1))
            length = 0
            while got := os.readv(descriptor, [content[length:]]):
                length += got
        finally:
            os.close(descriptor)
    if length == len(content):
        raise StorageError(f"{path} was written while it was read")
    return content[:length].toreadonly()


@contextlib.contextmanager
def pinned(path: Path, *, limit: int) -> Iterator[str]:
    """A path that leads to what `path` is now, for a library that reads files by their names, such as OpenSSL.

    Where the system has `/dev/fd`, nothing that takes the place of `path` meanwhile is read.

    Args:
        path: the file.
        limit: how many bytes it may have at most.

    Raises:
        StorageError: it is not there, cannot be read, is no regular file, or has more than `limit` bytes.
    """
    with _naming(path, "read"):
        descriptor = _open_to_read(path, limit=limit, private=False)
    try:
        by_descriptor = f"/dev/fd/{descriptor}"
        yield by_descriptor if os.path.exists(by_descriptor) else str(path)  # noqa: PTH110  # it is no Path
    finally:
        os.close(descriptor)


def _open_to_read(path: Path, *, limit: int, private: bool) -> int:
    # Not blocking: a FIFO in the place of the file is refused below, not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
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
    """Whether there is a `path`.

    Raises:
        StorageError: that cannot be told.
    """
    with _naming(path, "read"):
        try:
            path.stat()
        except FileNotFoundError:
            return False
        return True


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
    what root writes for a gateway stays the gateway's). A symbolic link is followed, not replaced.

    Args:
        path: the file; its folder must be there.
        content: what to write; a memoryview when it is secret.
        private: give it mode 0600 whatever it had.
        still: asked when nothing but the rename is left to do; False means: leave all as it is.

    Returns:
        Whether the file was replaced: False only when `still` said so.

    Raises:
        StorageError: it cannot be written, or a link of another user leads to it. The old content is there, and no
            temporary; only when the last step, the `fsync` of the folder, failed is the new content there, and a power
            cut may undo it.
    """
    with _naming(path, "written"), _place(path) as (folder, name):
        temporary = f".{name}.{secrets.token_hex(8)}{_TEMPORARY_SUFFIX}"
        old = _status(name, folder)
        if old is not None and not stat.S_ISREG(old.st_mode):
            raise StorageError(f"{path} is not a regular file; it is not replaced")
        mode = 0o600 if private or old is None else stat.S_IMODE(old.st_mode) & 0o777
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            try:
                _take_after(descriptor, old or os.fstat(folder), mode)
                left = memoryview(content)
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if still is not None and not still():
                os.unlink(temporary, dir_fd=folder)
                return False
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        _sync_folder(folder)
    return True


def remove(path: Path) -> None:
    """Remove `path` durably. One that is not there is removed already. Of a symbolic link, the link is removed.

    Raises:
        StorageError: it cannot be removed, or a link of another user leads to its folder.
    """
    with _naming(path, "removed"):
        try:
            with _place(path, follow=False) as (folder, name):
                os.unlink(name, dir_fd=folder)
                _sync_folder(folder)
        except FileNotFoundError:
            return


def remove_temporaries(path: Path) -> None:
    """Remove what killed writers of `path` (of all that is in it, when it is a folder) left behind.

    Only under the lock that those writers took, when none of them can be alive. What cannot be removed stays: it is
    in nobody's way.
    """
    with contextlib.suppress(OSError, StorageError), contextlib.ExitStack() as stack:
        folder, name = stack.enter_context(_place(path))
        start = f".{name}."
        status = _status(name, folder)
        if status is not None and stat.S_ISDIR(status.st_mode):
            folder, start = stack.enter_context(_folder(name, folder)), "."
        else:
            folder = stack.enter_context(_folder(".", folder))
        for entry in os.listdir(folder):  # noqa: PTH208  # a descriptor is no Path
            if entry.startswith(start) and entry.endswith(_TEMPORARY_SUFFIX):
                os.unlink(entry, dir_fd=folder)


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
    # Closing the descriptor is what unlocks.
    with contextlib.ExitStack() as stack:
        sidecar = path.with_name(path.name + ".lock")
        with _naming(sidecar, "locked"):
            with _place(path) as (folder, name):
                descriptor = _open_lock(name + ".lock", folder)
            stack.callback(os.close, descriptor)
            # The kernel's wait has no deadline, and a signal would be needed to end it: so we ask again and again.
            deadline = time.monotonic() + seconds
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    raise StorageError(
                        f"{path} is being written by another program, which has held {sidecar} for {seconds:g} s"
                    )
                time.sleep(_LOCK_POLL_SECONDS)
        yield


def _open_lock(name: str, folder: int) -> int:
    """Open a lock file, made if need be."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=folder)
        except FileExistsError:
            pass
        else:
            _take_after(descriptor, os.fstat(folder), None)  # only of what was made here: it may be anybody's file
            return descriptor
        try:
            descriptor = os.open(name, flags, dir_fd=folder)
        except FileNotFoundError:
            continue  # somebody has removed it just now
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file")


def make_private_folder(folder: Path) -> None:
    """Make `folder` with mode 0700, unless it is there. The folder above it must exist.

    Raises:
        StorageError: it cannot be made, or a link of another user leads to its place.
    """
    _refuse_without_locks(folder)
    with _naming(folder, "made"), _place(folder, follow=False) as (above, name):
        try:
            os.mkdir(name, 0o700, dir_fd=above)
        except FileExistsError:
            return
        with _folder(name, above) as made:
            # Another user who may write in the folder above can have put another folder of ours in its place.
            status = os.fstat(made)
            is_empty = not os.listdir(made)  # noqa: PTH208  # as above
            if is_empty and status.st_uid == os.geteuid() and not status.st_mode & 0o077:
                _take_after(made, os.fstat(above), None)
        _sync_folder(above)


def refuse_exposed_folder(folder: Path) -> None:
    """Do nothing when `folder` is its owner's alone, or not there.

    Raises:
        StorageError: the group or others may enter it, or it is not a folder; the message says how to mend that.
    """
    with _naming(folder, "read"):
        try:
            status = folder.stat()
        except FileNotFoundError:
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


@contextlib.contextmanager
def _place(path: Path, *, follow: bool = True) -> Iterator[tuple[int, str]]:
    """The folder of the file that `path` stands for, as a descriptor, and the file's name there, which is no link.

    Args:
        path: links of ours and of root on the way are followed.
        follow: whether a link that `path` itself is, is followed, too.

    Raises:
        StorageError: a link on the way is neither ours nor root's.
    """
    walked = Path(path.absolute().anchor)
    left = deque(path.absolute().parts[1:])
    folder, links = _open_folder(str(walked)), 0
    try:
        while True:
            name = left.popleft() if left else "."
            if name != ".." and (left or follow):
                status, target = _look(name, folder)
            else:
                status, target = None, ""
            if target:
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if status is not None and status.st_uid not in {0, os.geteuid()}:
                    raise StorageError(
                        f"{walked / name} is a symbolic link of another user (uid {status.st_uid}), so it is not "
                        f"followed; remove it, or name the file that it leads to"
                    )
                left.extendleft(reversed(Path(target).parts))
                if Path(target).is_absolute():
                    walked = Path(left.popleft())
                    folder = _exchange(folder, str(walked), None)
            elif left:
                folder = _exchange(folder, name, folder)
                walked /= name
            else:
                break
        yield folder, name
    finally:
        os.close(folder)


def _look(name: str, folder: int) -> tuple[os.stat_result | None, str]:
    """What `name` is, None when it is not there; and where it leads, if it is a link."""
    try:
        if not hasattr(os, "O_PATH"):  # between these two, another link may take the place of the first
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            return status, os.readlink(name, dir_fd=folder) if stat.S_ISLNK(status.st_mode) else ""
        entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None, ""
    try:
        status = os.fstat(entry)
        return status, os.readlink("", dir_fd=entry) if stat.S_ISLNK(status.st_mode) else ""
    finally:
        os.close(entry)


def _open_folder(name: str, above: int | None = None, *, readable: bool = False) -> int:
    """Open a folder that is no link: to go through it, or to read and change it, too."""
    way = os.O_RDONLY if readable or not hasattr(os, "O_PATH") else os.O_PATH
    return os.open(name, way | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)


def _exchange(folder: int, name: str, above: int | None) -> int:
    """Open another folder in the place of `folder`."""
    opened = _open_folder(name, above)
    os.close(folder)
    return opened


@contextlib.contextmanager
def _folder(name: str, above: int) -> Iterator[int]:
    """The folder `name`, to read and change it."""
    descriptor = _open_folder(name, above, readable=True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _status(name: str, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
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


def _sync_folder(folder: int) -> None:
    """Make durable what was renamed, made or removed in `folder`."""
    with _folder(".", folder) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot, and say so with EINVAL; they have nothing better to offer.
            if error.errno != errno.EINVAL:
                raise


@contextlib.contextmanager
def _naming(path: Path, done: str) -> Iterator[None]:
    """Turn what the operating system refuses into a `StorageError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be {done}: {error.strerror or error}") from error
