"""How the memory of a process that carries bulk data is allocated."""

from __future__ import annotations

from typing import Final

__all__ = ["keep_freed_memory"]

_LARGE: Final = 8 * 1024 * 1024


def keep_freed_memory() -> None:
    """Let the process keep up to 16 MiB that it has freed, for what it reads next.

    Data that was sent is freed by the MiB, when the other end reports that it has come. glibc then returns the memory
    to the system, and each page that is read into after that is a page fault: a fifth of the processor time of a
    transfer. It returns what is more than twice the largest piece that was freed, if that had a mapping of its own, see
    M_MMAP_THRESHOLD in mallopt(3). So this frees one that is never touched. Other allocators do not notice.
    """
    bytes(_LARGE)
