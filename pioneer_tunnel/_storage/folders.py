"""Walk to the folder of a file by descriptors, so that no other user can lead us elsewhere.

A symbolic link on the way is followed when we or root own it. A link of another user is refused, because it could lead
us to any file. All functions block: call them in a thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from .._model.errors import StorageError

__all__ = ["IS_POSIX", "listable", "open_folder", "resolved", "sync_folder"]

IS_POSIX: Final = find_spec("fcntl") is not None
"""Whether this system has the locks, owners and modes that our files need. Windows has not."""

_MAX_LINKS: Final = 40


@contextlib.contextmanager
def resolved(path: Path, *, follow: bool = True) -> Iterator[tuple[int, str]]:
    """The folder of the file that `path` leads to, as a descriptor, and the file's name in it, which is not a link.

    Args:
        path: links on the way that we or root own are followed.
        follow: follow also a link at the end of `path`.

    Raises:
        StorageError: a link on the way belongs to another user.
    """
    _require_posix(path)
    walked = Path(path.absolute().anchor)
    left = deque(path.absolute().parts[1:])
    folder, links = open_folder(str(walked)), 0
    try:
        while True:
            name = left.popleft() if left else "."
            if name != ".." and (left or follow):
                status, target = _read_link(name, folder)
            else:
                status, target = None, ""
            if target:
                links += 1
                if links > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                if status is not None and status.st_uid not in {0, os.geteuid()}:
                    raise StorageError(
                        f"{walked / name} is a symbolic link of another user (uid {status.st_uid}), so it is not "
                        f"followed; remove it, or name the file that it leads to"
                    )
                left.extendleft(reversed(Path(target).parts))
                if Path(target).is_absolute():
                    walked = Path(left.popleft())
                    folder = _switch_folder(folder, str(walked), None)
            elif left:
                folder = _switch_folder(folder, name, folder)
                walked /= name
            else:
                break
        yield folder, name
    finally:
        os.close(folder)


def _read_link(name: str, folder: int) -> tuple[os.stat_result | None, str]:
    """The status of `name`, None when it does not exist; and the target, if it is a link, else an empty string."""
    try:
        if not hasattr(os, "O_PATH"):  # the link may be replaced between these two calls
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


def open_folder(name: str, above: int | None = None, *, readable: bool = False) -> int:
    """Open a folder that is not a link: to look up names in it; with `readable`, also to list and sync it."""
    access = os.O_RDONLY if readable or not hasattr(os, "O_PATH") else os.O_PATH
    return os.open(name, access | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)


def _switch_folder(folder: int, name: str, above: int | None) -> int:
    """Open another folder and close `folder`."""
    opened = open_folder(name, above)
    os.close(folder)
    return opened


@contextlib.contextmanager
def listable(name: str, above: int) -> Iterator[int]:
    """The folder `name`, open to list and sync it."""
    descriptor = open_folder(name, above, readable=True)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_folder(folder: int) -> None:
    """Make renamed, new and removed entries of `folder` durable."""
    with listable(".", folder) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a folder and return EINVAL. They offer nothing better.
            if error.errno != errno.EINVAL:
                raise


def _require_posix(path: Path) -> None:
    """Check that this system has the locks, owners and modes that our files need.

    Raises:
        StorageError: it does not.
    """
    if not IS_POSIX:
        raise StorageError(
            f"{path} cannot be written: settings and keys are kept in files on Linux, macOS and other POSIX systems"
            " alone, and this system has no fcntl; open_tunnel takes the key itself"
        )
