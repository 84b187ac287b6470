"""The pipes that bytes are spliced through. A pipe is borrowed while it holds bytes, so a few serve any number."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Final, final

import trio

try:
    import fcntl
except ModuleNotFoundError:  # Windows has none
    CAN_PIPE = False
else:
    CAN_PIPE = sys.platform == "linux"

__all__ = ["CAN_PIPE", "Pipe", "Pipes"]

_PIPE_SIZE: Final = 1024 * 1024
_MOST_PIPES: Final = 32
"""Linux makes new pipes tiny once an ordinary user's pipes have 64 MiB together. These take half of that."""


@final
class Pipe:
    """A pipe, empty unless it is borrowed."""

    __slots__ = ("readable", "size", "writable")

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.fcntl(self.writable, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self.size: int = fcntl.fcntl(self.writable, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        """Close both ends; what is in it is lost."""
        os.close(self.readable)
        os.close(self.writable)


@final
class Pipes:
    """The pipes of one Trio run.

    Attributes:
        users: how many may borrow one. Each calls `leave` when it needs no more.
    """

    def __init__(self) -> None:
        self.users: int = 0
        self._free: Final[list[Pipe]] = []
        self._lent = 0

    @staticmethod
    def current() -> Pipes:
        """The pipes of this Trio run."""
        try:
            return _pipes.get()
        except LookupError:
            pipes = Pipes()
            _pipes.set(pipes)
            return pipes

    def borrow(self) -> Pipe | None:
        """An empty pipe; None if 32 are lent, or there are no descriptors left."""
        if self._lent == _MOST_PIPES:
            return None
        try:
            pipe = self._free.pop() if self._free else Pipe()
        except OSError:
            return None  # out of descriptors
        self._lent += 1
        return pipe

    def give_back(self, pipe: Pipe, *, empty: bool) -> None:
        """Return a pipe. One that is not empty is closed."""
        self._lent -= 1
        if empty:
            self._free.append(pipe)
        else:
            pipe.close()

    def leave(self) -> None:
        """Count one user less. The last one closes the pipes."""
        self.users -= 1
        while not self.users and self._free:
            self._free.pop().close()


_pipes: Final[trio.lowlevel.RunVar[Pipes]] = trio.lowlevel.RunVar("pioneer_tunnel.pipes")
