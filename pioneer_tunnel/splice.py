"""From one socket to another, past everything: for `pump`, when nothing stands between it and two plain sockets.

    little at a time      read into a buffer that all share, write from it at once: two system calls
    much at a time        `splice` through a pipe (Linux): the bytes never come into this process
    much, no splice       the shared buffer again, which is large

Nothing is set up for one connection alone. The buffer is empty again before another task can run, since a task that
has to wait for its sink first copies what is left; and a pipe is borrowed for as long as bytes are in it. So a few
pipes serve any number of connections, a connection that says little never sees one, and when all are taken the buffer
does. The last `carry` that ends closes the pipes.

Neighbours: `pump` decides when to come here, and what a break means; `streams.plain_socket` finds the sockets.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

import trio

from .streams import descriptor_of

if sys.platform == "linux":
    import fcntl

__all__ = ["CAN_SPLICE", "SourceBroken", "carry"]

CAN_SPLICE: Final = sys.platform == "linux" and hasattr(os, "splice")
"""Whether this system has what it takes."""

_BUFFER_SIZE: Final = 256 * 1024
_PIPE_SIZE: Final = 1024 * 1024
_MOST_PIPES: Final = 32
"""An ordinary user's pipes may hold 64 MiB together before Linux makes new ones tiny: half of that."""

_WORTH_A_PIPE: Final = 64 * 1024
_NOT_WORTH_IT: Final = 16 * 1024
_NOT_SPLICEABLE: Final = errno.EINVAL
_FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE if CAN_SPLICE else 0


@final
class SourceBroken(trio.BrokenResourceError):
    """It was the source that broke, not the sink."""


@final
class _Pipe:
    """A pipe, empty unless somebody has borrowed it."""

    __slots__ = ("readable", "size", "writable")

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        with suppress(OSError):
            fcntl.fcntl(self.writable, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        self.size: int = fcntl.fcntl(self.writable, fcntl.F_GETPIPE_SZ)

    def close(self) -> None:
        os.close(self.readable)
        os.close(self.writable)


@final
class _Shared:
    """What all connections of one Trio run share."""

    def __init__(self) -> None:
        self.buffer: Final = memoryview(bytearray(_BUFFER_SIZE))
        self.users = 0
        self._free: Final[list[_Pipe]] = []
        self._pipes = 0

    def borrow_pipe(self) -> _Pipe | None:
        """An empty pipe; None when there is none to be had."""
        if self._free:
            return self._free.pop()
        if self._pipes == _MOST_PIPES:
            return None
        try:
            pipe = _Pipe()
        except OSError:
            return None  # out of descriptors, and somebody else needs them more
        self._pipes += 1
        return pipe

    def give_back(self, pipe: _Pipe, *, empty: bool) -> None:
        """A pipe that is not empty is of no use to anybody."""
        if empty and self.users:
            self._free.append(pipe)
        else:
            pipe.close()
            self._pipes -= 1

    def leave(self) -> None:
        """A connection ends."""
        self.users -= 1
        if not self.users:
            for pipe in self._free:
                pipe.close()
            self._pipes -= len(self._free)
            self._free.clear()


_shared: Final[trio.lowlevel.RunVar[_Shared]] = trio.lowlevel.RunVar("pioneer_tunnel.splice")


async def carry(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    *,
    on_first: Callable[[], None],
    splice: bool = CAN_SPLICE,
) -> None:
    """Carry bytes until `source` has ended; how to tell `sink` is the caller's business.

    Args:
        on_first: called when the first bytes have come.
        splice: whether it may be used.

    Raises:
        SourceBroken: the connection of `source` broke.
        trio.BrokenResourceError: `sink` takes no more.
        trio.ClosedResourceError: one of them was closed at this end.
    """
    try:
        shared = _shared.get()
    except LookupError:
        shared = _Shared()
        _shared.set(shared)
    shared.users += 1
    try:
        await _carry(source, sink, shared, on_first, splice)
    finally:
        shared.leave()


async def _carry(
    source: trio.socket.SocketType,
    sink: trio.socket.SocketType,
    shared: _Shared,
    on_first: Callable[[], None] | None,
    splice: bool,
) -> None:
    buffer, into = shared.buffer, [shared.buffer]
    while True:
        try:
            amount = os.readv(descriptor_of(source), into)
        except BlockingIOError:
            # No deadline: a visitor may be silent for as long as it likes.
            await trio.lowlevel.wait_readable(source)
            continue
        except OSError as error:
            raise SourceBroken(f"the connection is broken: {error.strerror}") from error
        if not amount:
            return
        if on_first is not None:
            on_first()
            on_first = None
        await _write(sink, buffer, amount)
        if amount < _WORTH_A_PIPE:
            # Most likely there is no more. To ask the system for it would cost as much as to wait for it.
            await trio.lowlevel.wait_readable(source)
            continue
        await trio.lowlevel.checkpoint()
        if splice and (pipe := shared.borrow_pipe()) is not None:
            drained = _Drained()
            try:
                splice = await _splice(source, sink, pipe, drained)
            finally:
                shared.give_back(pipe, empty=drained.yes)


async def _write(sink: trio.socket.SocketType, buffer: memoryview, amount: int) -> None:
    """Write the buffer's first bytes. When that needs patience, the buffer is free before anybody else runs."""
    try:
        written = os.write(descriptor_of(sink), buffer[:amount])
    except BlockingIOError:
        written = 0
    except OSError as error:
        raise trio.BrokenResourceError(f"the connection is broken: {error.strerror}") from error
    if written == amount:
        return
    rest = memoryview(bytes(buffer[written:amount]))
    while rest:
        # No deadline: the other end may read as slowly as it likes.
        await trio.lowlevel.wait_writable(sink)
        try:
            rest = rest[os.write(descriptor_of(sink), rest) :]
        except BlockingIOError:
            continue
        except OSError as error:
            raise trio.BrokenResourceError(f"the connection is broken: {error.strerror}") from error


@final
class _Drained:
    """Whether a borrowed pipe is empty, however its use ended."""

    __slots__ = ("yes",)

    def __init__(self) -> None:
        self.yes = True


async def _splice(source: trio.socket.SocketType, sink: trio.socket.SocketType, pipe: _Pipe, drained: _Drained) -> bool:
    """Move bytes while there are many; False when these sockets turn out not to be made for it."""
    while True:
        try:
            amount = os.splice(descriptor_of(source), pipe.writable, pipe.size, flags=_FLAGS)
        except BlockingIOError:
            return True  # the pipe is empty, so somebody else may have it while we wait
        except OSError as error:
            if error.errno == _NOT_SPLICEABLE:
                return False
            raise SourceBroken(f"the connection is broken: {error.strerror}") from error
        if not amount:
            return True  # the end, which a read will find again
        left = amount
        drained.yes = False
        while left:
            try:
                left -= os.splice(pipe.readable, descriptor_of(sink), left, flags=_FLAGS)
            except BlockingIOError:
                # No deadline, as above.
                await trio.lowlevel.wait_writable(sink)
            except OSError as error:
                raise trio.BrokenResourceError(f"the connection is broken: {error.strerror}") from error
        drained.yes = True
        await trio.lowlevel.checkpoint()
        if amount < _NOT_WORTH_IT:
            return True
