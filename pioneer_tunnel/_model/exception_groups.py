"""Unwrap exception groups that hold a single error.

A nursery wraps exceptions in a group. Where the nursery is an internal detail, callers get the exception itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn

import trio

__all__ = ["leaves", "lone_error_bare", "open_tasks_beside_body", "raise_bare"]


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions in a group and in its nested groups, in order; for any other exception, a list of itself."""
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for child in error.exceptions for leaf in leaves(child)]


def raise_bare(error: BaseException) -> NoReturn:
    """Raise `error` while a group is handled, without that group as its `__context__`."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context


@contextmanager
def lone_error_bare() -> Iterator[None]:
    """Replace a group by its error, when it holds a single error and otherwise only `trio.Cancelled`."""
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

    An exception of the body is raised unchanged, also when it is a group. An exception of one of our tasks cancels the
    body, and is raised unwrapped when it is a single error. When both raise, both are raised in a group.
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
            raise_bare(raised)  # cancelled from outside, and there is no error
        # Trio has removed the cancellations that it caused from what the body raised. So the groups are other objects,
        # but their leaves are the same.
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
