"""Files whose writer crashes, or whose system calls fail."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from rig import only_looks

STEPS: Final = ("mkdir", "open", "fchown", "fchmod", "write", "fsync", "replace", "unlink")


LEFTOVER: Final = ".pioneer-tmp"


class Crash(BaseException):
    """The process is gone. Not an `Exception`: nothing in it gets to clean up."""


@contextlib.contextmanager
def crash_after(count: int, trace: list[str] | None = None) -> Iterator[list[str]]:
    """Let `count` calls of the operating system through, then none: neither the next one nor any clean-up after it.

    Gives the list of the calls that were let through.
    """
    real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in STEPS}
    done: list[str] = [] if trace is None else trace

    def dying(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if only_looks(name, args):
                return real[name](*args, **kwargs)
            if len(done) >= count:
                raise Crash
            done.append(name)
            return real[name](*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, dying(name))
        yield done


@contextlib.contextmanager
def failing(name: str, error: int, *, after: int = 0) -> Iterator[None]:
    """Let one kind of call fail with `error`, once `after` of it went well."""
    real = getattr(os, name)
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, call)
        yield


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
