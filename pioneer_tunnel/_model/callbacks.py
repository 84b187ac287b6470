"""The callback of who wants to know nothing."""

from __future__ import annotations

__all__ = ["nothing"]


def nothing(*_: object) -> None:
    """Do nothing, whatever is told."""
