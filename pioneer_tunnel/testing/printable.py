"""Data whose repr is the code that makes it: what a failing test prints can be pasted into the next test.

Neighbours: the steps of `scripted`, the faults and the visitors of this kit.
"""

from __future__ import annotations

import enum
import math

import attrs

__all__ = ["Printable"]


@attrs.frozen(repr=False)
class Printable:
    """A repr of what differs from the defaults, that is the code for it."""

    def __repr__(self) -> str:
        told = []
        by_name = False
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            if value == field.default:
                by_name = True  # what stands after something left out is no longer told by its place
            else:
                told.append(f"{field.name}={_code(value)}" if by_name or field.kw_only else _code(value))
        return f"{type(self).__name__}({', '.join(told)})"


def _code(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value)
