"""How the memory of a process that carries bulk data is allocated, and when it goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

import trio

__all__ = ["give_back_freed_memory", "keep_freed_memory"]

_LARGE: Final = 8 * 1024 * 1024
_INTERVAL: Final = 60.0


def keep_freed_memory() -> None:
    """Let the process keep up to 16 MiB that it has freed, for what it reads next.

    Data that was sent is freed by the MiB, when the other end reports that it has come. glibc then returns the memory
    to the system, and each page that is read into after that is a page fault: a fifth of the processor time of a
    transfer. It returns what is more than twice the largest piece that was freed, if that had a mapping of its own, see
    M_MMAP_THRESHOLD in mallopt(3). So this frees one that is never touched. Other allocators do not notice.
    """
    bytes(_LARGE)


async def give_back_freed_memory() -> None:
    """Return once a minute to the system what is free. Runs until cancelled.

    By itself glibc returns memory at the end of its heap alone, and one small object there holds all that is free
    before it. So a process stayed as large as its largest burst. To return memory takes about 0.4 ms for each MiB, and
    nothing else runs meanwhile. Returns at once where the allocator is another one.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    while trim is not None:
        await trio.sleep(_INTERVAL)
        trim(0)
