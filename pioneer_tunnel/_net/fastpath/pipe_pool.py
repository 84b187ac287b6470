"""Pipes that bytes are spliced through: a few, borrowed for as long as something is in them, so they serve any number.

Neighbour: `splice`, which closes them all when its last connection has ended.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Final, final

try:
    import fcntl
except ModuleNotFoundError:  # Windows has none
    CAN_PIPE = False
else:
    CAN_PIPE = sys.platform == "linux"

__all__ = ["CAN_PIPE", "Pipe", "Pipes"]

_PIPE_SIZE: Final = 1024 * 1024
_MOST_PIPES: Final = 32
"""An ordinary user's pipes may hold 64 MiB together before Linux makes new ones tiny: half of that."""


@final
class Pipe:
    """A pipe, empty unless somebody has borrowed it."""

    __slots__ = ("readable", "size", "writable")

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.fcntl(self.writable, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self.size: int = fcntl.fcntl(self.writable, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        """Let go of it, and of what is in it."""
        os.close(self.readable)
        os.close(self.writable)


@final
class Pipes:
    """The pipes of one Trio run."""

    def __init__(self) -> None:
        self._free: Final[list[Pipe]] = []
        self._lent = 0

    def borrow(self) -> Pipe | None:
        """An empty pipe; None when there is none to be had."""
        if self._lent == _MOST_PIPES:
            return None
        try:
            pipe = self._free.pop() if self._free else Pipe()
        except OSError:
            return None  # out of descriptors, and somebody else needs them more
        self._lent += 1
        return pipe

    def give_back(self, pipe: Pipe, *, empty: bool) -> None:
        """A pipe that is not empty is of no use to anybody."""
        self._lent -= 1
        if empty:
            self._free.append(pipe)
        else:
            pipe.close()

    def close(self) -> None:
        """Let go of all that are not lent."""
        while self._free:
            self._free.pop().close()
