"""The workers of one machine reach each other over Unix sockets in a private folder.

The kernel says which process is at the other end (SO_PEERCRED), and the parent process says which processes are
workers. So nobody else is served, and no worker can pretend to be another one.

A worker's socket goes by the number of the worker. A successor puts its own in the place of its predecessor's, which
then gets no new connections.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

import trio

from ..._control.credentials import process_of_peer
from ..._net.adopted import watch
from ..._storage import files
from .networks import Network, Reached, machine_of

__all__ = ["WorkerNetwork"]

_BACKLOG: Final = 64
LINKS: Final = "links"
VISITORS: Final = "visitors"
"""The kinds of sockets of a worker."""


@final
class WorkerNetwork(Network):
    """The Unix sockets of the workers of this machine.

    Args:
        node: the name of this worker.
        folder: where the sockets are. It is private: mode 0700.
        who: the name of the worker that a process is; None if it is none. It may change.

    It works within `opened`.
    """

    def __init__(self, node: str, folder: Path, who: Callable[[int], str | None]) -> None:
        self.node: Final = node
        self._folder: Final = folder
        self._who: Final = who
        self._descriptor: int | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Use the folder while the block runs.

        Raises:
            StorageError: it cannot be opened, or others may access it.
        """
        with files.opened_private_folder(self._folder) as descriptor:
            self._descriptor = descriptor
            try:
                yield
            finally:
                self._descriptor = None

    def reaches(self, node: str) -> bool:
        return "/" in node and node != self.node and machine_of(node) == machine_of(self.node)

    async def dial(self, node: str) -> Reached:
        connected = await self.connect(node, LINKS, socket.SOCK_STREAM)
        return Reached(watched := watch(trio.SocketStream(connected)), watched, node)

    async def accept(self, stream: trio.SocketStream) -> Reached:
        node = self.name_of(stream.socket)
        return Reached(watched := watch(stream), watched, node)

    async def connect(self, node: str, kind: str, socket_type: int) -> trio.socket.SocketType:
        """Connect to a socket of another worker.

        Raises:
            OSError: nobody listens there.
            trio.BrokenResourceError: somebody else does.
        """
        connected = trio.socket.socket(socket.AF_UNIX, socket_type)
        try:
            await connected.connect(self._path(node, kind))
            if self.name_of(connected) != node:
                raise trio.BrokenResourceError("another process is there")
        except BaseException:
            connected.close()
            raise
        return connected

    def listen(self, kind: str, socket_type: int) -> socket.socket:
        """Listen, in the place of a predecessor.

        Raises:
            OSError: the system refused.
        """
        path = self._path(self.node, kind)
        temporary = f"{path}.{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX, socket_type)
        try:
            with suppress(FileNotFoundError):
                os.unlink(temporary)  # noqa: PTH108  # it goes by a descriptor
            listener.bind(temporary)
            os.chmod(temporary, 0o600)  # noqa: PTH101  # as above; until now the folder alone kept others out
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            os.replace(temporary, path)  # noqa: PTH105  # as above
        except BaseException:
            listener.close()
            raise
        return listener

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

    def _path(self, node: str, kind: str) -> str:
        assert self._descriptor is not None
        return f"/proc/self/fd/{self._descriptor}/{kind}-{node.rpartition('/')[2]}"
