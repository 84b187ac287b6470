"""What an error kind means, what may have caused it and what to do: the docstrings of the exceptions, as values.

docs/errors.md is made from the same. Python's option `-OO` removes docstrings; explanations are empty then.
"""

from __future__ import annotations

import inspect
import re
from typing import Final, final

import attrs

from . import errors
from .errors import TunnelError
from .status import ErrorKind

__all__ = ["Cause", "Explanation", "causes_of", "classes_of", "explain"]

_ITEM: Final = re.compile(r"^- (.*(?:\n  .*)*)", re.MULTILINE)


@final
@attrs.frozen
class Cause:
    """One thing that may have caused an error.

    Attributes:
        text: the cause, without a full stop.
        cure: what to do, in whole sentences. Names of files, keys and commands stand in backticks.
    """

    text: str
    cure: str


@final
@attrs.frozen
class Explanation:
    """An error kind, explained to a person.

    Attributes:
        summary: what is wrong, in one sentence or two.
        final: whether no further attempt is made; one is all the same where a status has a `retry_at_unix`.
        causes: what may have caused it, each with its cure.
    """

    summary: str
    final: bool
    causes: tuple[Cause, ...]


def explain(kind: ErrorKind) -> Explanation:
    """What `kind` means and what to do, for a screen that shows a status. The same as docs/errors.md has."""
    classes = classes_of(kind)
    summary, _, _ = (classes[0].__doc__ or "").partition("\n")
    return Explanation(summary, classes[0].final, tuple(cause for cls in classes for cause in causes_of(cls)))


def classes_of(kind: ErrorKind) -> list[type[TunnelError]]:
    """Our exceptions of a kind, the general one first."""
    ours = [cls for name in errors.__all__ if inspect.isclass(cls := getattr(errors, name))]
    found = [cls for cls in ours if issubclass(cls, TunnelError) and cls is not TunnelError and cls.kind is kind]
    return sorted(found, key=lambda cls: len(cls.__mro__))


def causes_of(cls: type[TunnelError]) -> list[Cause]:
    """The causes in the docstring of an exception."""
    causes = []
    for item in _ITEM.findall(inspect.cleandoc(cls.__doc__ or "")):
        text, _, cure = " ".join(item.split()).partition(". ")
        causes.append(Cause(text, cure))
    return causes
