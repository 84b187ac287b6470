"""Trio's wait for I/O, which a descriptor of ours ends without a task.

When a task waits for a descriptor, each event takes a step of that task, which asks for the next event. That costs
more than most callbacks of our event loop. So after the first event the descriptor stays in the epoll that Trio waits
on, and an instrument is called after each wait.

Trio's interface lacks two things for this. Which epoll it waits on, the kernel tells (`proc_pid_fdinfo(5)`). That Trio
ignores an event for which no task waits is tried, once in a process, in a run of its own. Where either fails, a task
waits for each event.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Final, final

import trio

__all__ = ["IoWait"]

_PATIENCE: Final = 1.0
"""Seconds after which the trial has failed. It takes a millisecond."""


@final
class IoWait(trio.abc.Instrument):
    """Lets a descriptor end this Trio run's waits for I/O, and calls back after each of them, until `stop`.

    Args:
        descriptor: a task must have waited for it, and been woken by an event.
        after: called after each wait. It must not raise.

    Raises:
        OSError: this is not possible here.
    """

    def __init__(self, descriptor: int, after: Callable[[], object]) -> None:
        self._descriptor: Final = descriptor
        self._after: Final = after
        self._epoll: Final = _epoll_with(descriptor)
        trio.lowlevel.add_instrument(self)

    @staticmethod
    def begin(descriptor: int, after: Callable[[], object]) -> IoWait | None:
        """Make one; None where it is not possible."""
        with suppress(OSError):
            if _is_possible():
                return IoWait(descriptor, after)
        return None

    def stop(self) -> None:
        """To be called before the descriptor is closed."""
        trio.lowlevel.remove_instrument(self)
        self._epoll.unregister(self._descriptor)
        self._epoll.close()

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # the interface is Trio's
        """Trio calls this."""
        self._after()


def _epoll_with(descriptor: int) -> select.epoll:
    """The epoll of this process that has a descriptor. It gives all events of it from now on, and not one alone.

    Raises:
        OSError: it is not found: there is no /proc, or no descriptor is left to read it.
    """
    entry = re.compile(rf"^tfd: *{descriptor} ", re.MULTILINE)
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread has closed it
            is_epoll = str(link.readlink()) == "anon_inode:[eventpoll]"
            if is_epoll and entry.search(Path("/proc/self/fdinfo", link.name).read_text()):
                epoll = select.epoll.fromfd(os.dup(int(link.name)))  # a copy: the object closes it
                try:
                    epoll.modify(descriptor, select.EPOLLIN)
                except FileNotFoundError:
                    epoll.close()  # its entry is of a file that had this number before
                    raise
                return epoll
    raise FileNotFoundError("no epoll has this descriptor")


@cache
def _is_possible() -> bool:
    """Whether the Trio that is installed, and this system, allow it."""
    woken = False

    async def wait() -> None:
        nonlocal woken
        readable = os.eventfd(1)
        try:
            await trio.lowlevel.wait_readable(readable)
            with trio.move_on_after(_PATIENCE) as scope:
                io_wait = IoWait(readable, scope.cancel)
                try:
                    await trio.sleep_forever()
                finally:
                    io_wait.stop()
            woken = trio.current_time() < scope.deadline
        finally:
            os.close(readable)

    def run() -> None:
        with suppress(OSError, trio.TrioInternalError):
            trio.run(wait)

    # In a thread, since this one is in a run. The run waits for it, so that no clock of a test jumps meanwhile.
    thread = Thread(target=run, name="pioneer-tunnel-trial")
    with suppress(RuntimeError):  # the system has no thread left
        thread.start()
        thread.join()
    return woken
