"""Exception groups, unwrapped where exactly one thing went wrong.

A nursery wraps what leaves it in a group. Where the nursery is an internal detail, callers get the exception itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import trio

__all__ = ["leaves", "lone_error_bare", "open_tasks_beside_body", "raise_bare"]


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group of groups, in order; of an exception that is no group, itself."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for child in error.exceptions for leaf in leaves(child)]


def raise_bare(error: BaseException) -> NoReturn:
    """Raise `error` out of the group that is being handled, without that group in its `__context__`."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context


@contextmanager
def lone_error_bare() -> Iterator[None]:
    """Let a group that holds a single error, beside cancellations that it caused, leave as that error."""
    try:
        yield
    except BaseExceptionGroup as group:
        errors = _errors_in(group)
        if len(errors) != 1:
            raise
        raise_bare(errors.pop())


@asynccontextmanager
async def open_tasks_beside_body() -> AsyncIterator[trio.Nursery]:
    """A nursery for our own tasks, which run beside the caller's body and are cancelled when the body ends.

    What the body raises comes out as it is, also when it is a group. What one of our tasks raises cancels the body
    and comes out unwrapped when it is a single error. When both raise, both come out in a group.
    """
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                raised = error
                raise
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        parts = [part for part in group.exceptions if _errors_in(part)]
        if raised is not None and not parts:
            raise_bare(raised)  # cancelled from outside, and nothing else
        # Trio has taken the cancellations that it caused out of what the body raised, which makes other groups of the
        # same leaves.
        of_body = [] if raised is None else leaves(raised)
        if len(parts) == 1 and any(leaves(parts[0])[0] is leaf for leaf in of_body):
            raise_bare(raised if raised is not None and leaves(parts[0]) == of_body else parts[0])
        errors = _errors_in(group)
        if len(errors) != 1:
            raise
        raise_bare(errors.pop())
    finally:
        del raised  # it refers to this frame by its traceback


def _errors_in(error: BaseException) -> list[BaseException]:
    return [leaf for leaf in leaves(error) if not isinstance(leaf, trio.Cancelled)]
