"""What becomes of the memory that a process which carries bulk data has freed."""

from __future__ import annotations

import ctypes
import sys
import time
from typing import Final

import trio

__all__ = ["keep_freed_memory", "manage_freed_memory"]

_LARGE: Final = 8 * 1024 * 1024
_INTERVAL: Final = 60.0
_QUIET: Final = 0.02
"""A process is quiet if it uses less than this part of a processor's time."""


def keep_freed_memory() -> None:
    """Let the process keep up to 16 MiB that it has freed, for what it reads next.

    Data that was sent is freed by the MiB, when the other end reports that it has come. glibc then returns the memory
    to the system, and each page that is read into after that is a page fault: a fifth of the processor time of a
    transfer. It returns what is more than twice the largest piece that was freed, if that had a mapping of its own, see
    M_MMAP_THRESHOLD in mallopt(3). So this frees one that is never touched. Other allocators do not notice.
    """
    bytes(_LARGE)


async def manage_freed_memory() -> None:
    """Keep freed memory while there is much to do, and return all of it after each quiet minute.

    By itself glibc returns memory at the end of its heap alone, and one small object there holds all that is free
    before it. So a process would stay as large as its largest burst. To return memory takes about 0.4 ms for each MiB,
    and less than 0.1 ms for each that was returned before. Nothing else runs meanwhile. Runs until cancelled; with
    another allocator there is nothing to do, and it ends.
    """
    keep_freed_memory()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    used = time.process_time()
    while trim is not None:
        await trio.sleep(_INTERVAL)
        before, used = used, time.process_time()
        if used - before < _QUIET * _INTERVAL:
            trim(0)
