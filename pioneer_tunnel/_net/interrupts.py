"""What an interrupt (Ctrl-C) must not cut in two.

Trio finds that out by the frame of a function in Python. So this is the only one, and what it calls may be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

__all__ = ["uninterrupted"]

_T = TypeVar("_T")
_Arguments = TypeVarTuple("_Arguments")


@trio.lowlevel.enable_ki_protection
def uninterrupted(call: Callable[[*_Arguments], _T], *arguments: *_Arguments) -> _T:
    """Call `call`. An interrupt is raised after it."""
    return call(*arguments)
