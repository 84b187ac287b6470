"""How many descriptors this process may have: what bounds the connections of a relay, whatever it is told.

Neighbours: `server` asks; the command line raises the limit before it serves.
"""

from __future__ import annotations

from contextlib import suppress

try:
    import resource
except ModuleNotFoundError:  # Windows has no such limit
    _HAS_LIMIT = False
else:
    _HAS_LIMIT = True

__all__ = ["descriptor_limit", "raise_descriptor_limit"]


def descriptor_limit() -> int | None:
    """The limit that is in force; None where there is none, or nobody knows."""
    if not _HAS_LIMIT:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Raise the limit of this process as far as its user may. Processes that it starts inherit that."""
    if not _HAS_LIMIT:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
