"""Data whose repr is the code that makes it, so that the output of a failing test can be pasted into a test."""

from __future__ import annotations

import enum
import math

import attrs

__all__ = ["Printable"]


@attrs.frozen(repr=False)
class Printable:
    """Base of attrs classes whose repr is a constructor call, without arguments that have their default."""

    def __repr__(self) -> str:
        arguments = []
        by_name = False
        for field in attrs.fields(type(self)):
            value = getattr(self, field.name)
            if value == field.default:
                by_name = True  # an argument after an omitted one cannot be positional
            else:
                arguments.append(f"{field.name}={_code(value)}" if by_name or field.kw_only else _code(value))
        return f"{type(self).__name__}({', '.join(arguments)})"


def _code(value: object) -> str:
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return repr(value)
