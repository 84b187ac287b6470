"""Exception groups, undone where exactly one thing went wrong.

A nursery wraps what leaves it in a group. Where a nursery is nobody's business but ours, callers get the exception
itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio

__all__ = ["leaves", "lone_error_bare"]


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group of groups, in order; of an exception that is no group, itself."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for child in error.exceptions for leaf in leaves(child)]


@contextmanager
def lone_error_bare() -> Iterator[None]:
    """Let a group that holds a single error, beside cancellations that it caused, leave as that error."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = [leaf for leaf in leaves(group) if not isinstance(leaf, trio.Cancelled)]
        if len(errors) != 1:
            raise
        error = errors[0]
        context = error.__context__
        try:
            raise error
        finally:
            # Raising it here has put the group into its history, where it explains nothing.
            error.__context__ = context
            del error, errors, group
