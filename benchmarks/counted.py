"""The `pioneer-tunnel` command, with counters: `python -m benchmarks.counted FOLDER ARGUMENTS…`.

At each SIGRTMIN, which the command itself does not use, it writes to FOLDER what it has done since it started, as JSON
in a file named by its process id. Bytes that it copied are in it if the library of copied.c was preloaded.
Profiling makes it slow; it changes no count.
"""

from __future__ import annotations

import cProfile
import ctypes
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Final, final

import trio

from pioneer_tunnel.cli import main

# What Python names the built-in functions that move bytes, or ask the kernel whether some came.
_SYSTEM_CALL: Final = re.compile(
    r"<built-in method posix\.(read|readv|write|writev|splice)>"
    r"|<method '(send|sendall|sendmsg|recv(msg)?(_into)?|accept|_accept)' of '_socket\.socket' objects>"
    r"|<method 'poll' of 'select\.epoll' objects>"
)


@final
class Steps(trio.abc.Instrument):
    """Counts what Trio does."""

    def __init__(self) -> None:
        self.tasks = 0
        self.waits = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002  # the interface is Trio's
        self.tasks += 1

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # as above
        self.waits += 1


def run(folder: Path) -> None:
    steps, profile, copied = Steps(), cProfile.Profile(), _copied_bytes()

    def write(*_: object) -> None:
        entries = profile.getstats()
        counts = {
            "task steps": steps.tasks,
            "I/O waits": steps.waits,
            "function calls": sum(entry.callcount for entry in entries),
            "system calls": sum(entry.callcount for entry in entries if _SYSTEM_CALL.fullmatch(str(entry.code))),
        }
        if copied is not None:
            counts["copied bytes"] = copied.value
        unfinished = folder / f"{os.getpid()}.new"
        unfinished.write_text(json.dumps(counts))
        unfinished.rename(folder / f"{os.getpid()}.json")

    signal.signal(signal.SIGRTMIN, write)
    trio.run = functools.partial(trio.run, instruments=[steps])  # type: ignore[assignment]  # it takes the same
    profile.enable()
    main()


def _copied_bytes() -> ctypes.c_ulonglong | None:
    try:
        return ctypes.c_ulonglong.in_dll(ctypes.CDLL(None), "copied_bytes")
    except ValueError:
        return None  # the library was not preloaded


if __name__ == "__main__":
    run(Path(sys.argv.pop(1)))
