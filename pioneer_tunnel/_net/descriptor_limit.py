"""The limit of open descriptors of this process, which bounds the connections of a relay."""

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
    """The current soft limit; None if there is none or the system does not report it."""
    if not _HAS_LIMIT:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def raise_descriptor_limit() -> None:
    """Raise the soft limit to the hard limit. Child processes inherit it."""
    if not _HAS_LIMIT:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
