"""The folder of a control socket: who may serve it, and the address of the socket.

The process that serves it holds the lock of `control.lock`. The kernel releases that when the process ends, however it
ends. So a socket that is there while no process holds the lock was left by one that was killed, and can be replaced.

The functions block: call them in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from .._model.errors import StorageError
from .._storage import files

__all__ = ["SOCKET_NAME", "AlreadyServedError", "address_in", "hold"]

SOCKET_NAME: Final = "control.sock"
_LOCKED: Final = "control"

LONGEST_ADDRESS: Final = 103
"""Bytes of the path of a Unix socket: 103 on macOS, 107 on Linux."""


class AlreadyServedError(StorageError):
    """Another process serves the folder, or prepares to."""


@contextmanager
def hold(folder: Path, *, seconds: float = 0) -> Iterator[None]:
    """Be the only process that serves `folder`, while the block runs. The folder is made when it does not exist.

    Args:
        folder: the folder. Its parent must exist.
        seconds: how long to wait for another process to end.

    Raises:
        AlreadyServedError: another process is.
        StorageError: the folder cannot be made or locked, or others may enter it.
    """
    files.make_private_folder(folder)
    files.refuse_exposed_folder(folder)
    lock = files.locked(folder / _LOCKED, seconds=seconds)
    try:
        lock.__enter__()
    except files.LockHeldError:
        raise AlreadyServedError(
            f"another process already runs with {folder}; stop it first, or name another runtime_dir"
        ) from None
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextmanager
def address_in(folder: Path) -> Iterator[tuple[str, int]]:
    """The address of the socket in `folder`, good while the block runs, and the uid of the folder's owner.

    Where the system has `/proc`, the address goes by the descriptor of the open folder: it is short, and leads nowhere
    else when another folder replaces this one.

    Raises:
        FileNotFoundError: there is no such folder.
        StorageError: it cannot be opened, others may enter it, or the address is too long for this system.
    """
    with files.opened_private_folder(folder) as descriptor:
        by_descriptor = f"/proc/self/fd/{descriptor}"
        above = by_descriptor if os.path.exists(by_descriptor) else str(folder.absolute())  # noqa: PTH110
        address = f"{above}/{SOCKET_NAME}"
        if len(os.fsencode(address)) > LONGEST_ADDRESS:
            raise StorageError(
                f"{address} is too long for a Unix socket, which may have {LONGEST_ADDRESS} bytes;"
                " choose a folder with a shorter path"
            )
        yield address, os.fstat(descriptor).st_uid
