"""A callback that does nothing: the default where none is set."""

from __future__ import annotations

__all__ = ["nothing"]


def nothing(*_: object) -> None:
    """Ignore the arguments."""
