"""The workers of one machine reach each other over Unix sockets in a private folder.

The kernel says which process is at the other end (SO_PEERCRED), and the parent process says which processes are
workers. So no other process is served, and no worker can pretend to be another one.

While a worker is restarted it has two processes, and each of them is reached by the id of the process. The number of
the worker leads to the process that began last.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, final

import trio

from ..._control.credentials import process_of_peer
from ..._net.adopted import watch
from ..._storage import files
from .networks import Network, Reached
from .node_names import machine_of, worker_name

__all__ = ["WorkerNetwork"]

_BACKLOG: Final = 64
_NAME: Final = re.compile(r"[0-9a-f]{1,16}")
LINKS: Final = "links"
"""The kind of socket where a worker takes links of the others. Other kinds are named by the modules that use them."""


@final
class WorkerNetwork(Network):
    """The Unix sockets of the workers of this machine.

    Args:
        node: the name of this worker.
        process: the id of this process, see `Holding`.
        folder: where the sockets are. It is private: mode 0700.
        who: the name of the worker that a process is; None if it is none. It may change.
        workers: how many there are. Their names end with numbers from 0.

    Attributes:
        has_others: whether there is another worker. One that has no other may have another process, see above.
    """

    def __init__(
        self, node: str, process: str, folder: Path, who: Callable[[int], str | None], *, workers: int
    ) -> None:
        machine = machine_of(node)
        self.has_others: Final = workers > 1
        self._nodes: Final = frozenset(worker_name(machine, index) for index in range(workers))
        self._node: Final = node
        self._process: Final = process
        self._folder: Final = folder
        self._who: Final = who

    def reaches(self, node: str) -> bool:
        return node in self._nodes

    async def dial(self, node: str, process: str | None) -> Reached:
        connected = await self.connect(node, process, LINKS, socket.SOCK_STREAM)
        return Reached(watched := watch(trio.SocketStream(connected)), watched, node)

    async def accept(self, stream: trio.SocketStream) -> Reached:
        node = self.name_of(stream.socket)
        return Reached(watched := watch(stream), watched, node)

    async def connect(self, node: str, process: str | None, kind: str, socket_type: int) -> trio.socket.SocketType:
        """Connect to a socket of another worker.

        Raises:
            OSError: no process listens there.
            StorageError: the folder cannot be used, or others may access it.
            trio.BrokenResourceError: another process does.
        """
        name = process or node.rpartition("/")[2]
        if not _NAME.fullmatch(name):  # it may come from another machine
            raise trio.BrokenResourceError("no process has such a name")
        connected = trio.socket.socket(socket.AF_UNIX, socket_type)
        try:
            with files.opened_private_folder(self._folder) as folder:
                await connected.connect(_path(folder, kind, name))
            if self.name_of(connected) != node:
                raise trio.BrokenResourceError("another process is there")
        except BaseException:
            connected.close()
            raise
        return connected

    @contextmanager
    def listening(self, kind: str, socket_type: int) -> Iterator[socket.socket]:
        """Listen while the block runs.

        Raises:
            OSError: the system refused.
            StorageError: the folder cannot be used, or others may access it.
        """
        with (
            files.opened_private_folder(self._folder) as folder,
            socket.socket(socket.AF_UNIX, socket_type) as listener,
        ):
            path = _path(folder, kind, self._process)
            latest = _path(folder, kind, self._node.rpartition("/")[2])
            listener.bind(path)
            try:
                os.chmod(path, 0o600)  # noqa: PTH101  # it goes by a descriptor; the folder alone keeps others out, too
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                os.link(path, f"{path}.new")
                os.replace(f"{path}.new", latest)  # noqa: PTH105  # as above
                yield listener
            finally:
                os.unlink(path)  # noqa: PTH108  # as above

    def name_of(self, connected: trio.socket.SocketType) -> str:
        """The name of the worker at the other end.

        Raises:
            trio.BrokenResourceError: it is no worker of this machine.
        """
        try:
            user, pid = process_of_peer(connected)
        except OSError as error:
            raise trio.BrokenResourceError(f"the system cannot tell who is at the other end: {error}") from error
        name = self._who(pid) if user == os.getuid() else None
        if name is None:
            raise trio.BrokenResourceError(f"process {pid} is no worker of this relay")
        return name


def _path(folder: int, kind: str, name: str) -> str:
    """The path of a socket, by the descriptor of its folder: it is short."""
    return f"/proc/self/fd/{folder}/{kind}-{name}"
