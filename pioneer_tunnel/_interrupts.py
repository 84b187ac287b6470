"""Ctrl-C while our program starts: it ends at once with exit status 130, without a traceback.

Importing the package takes most of a start, before any code of the command line runs. So the package calls this first,
and this imports next to nothing. A host that imports the package keeps its own handler.
"""

from __future__ import annotations

import itertools
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from types import FrameType
    from typing import Final
else:
    import _signal  # `signal` imports `enum`, which takes longer than all of this

__all__ = ["INTERRUPTED", "end_quietly", "end_quietly_in_our_program"]

INTERRUPTED: Final = 130
"""The exit status of an interrupted program, as shells report it."""


def end_quietly() -> None:
    """End this process at once on SIGINT. Where SIGINT is ignored, or has another handler, nothing changes."""
    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, _end)


def end_quietly_in_our_program() -> None:
    """`end_quietly`, if this process is `pioneer-tunnel` or `python -m pioneer_tunnel`."""
    if _is_our_program(sys.argv, sys.orig_argv):
        end_quietly()


def _is_our_program(arguments: list[str], with_interpreter: list[str]) -> bool:
    # While Python looks for the module of `-m`, which imports its package, the first argument is "-m".
    if arguments[:1] == ["-m"]:
        return ("-m", "pioneer_tunnel") in itertools.pairwise(with_interpreter)
    name = os.path.basename("".join(arguments[:1]))  # noqa: PTH119  # pathlib takes longer to import than all of this
    return name in {"pioneer-tunnel", "pioneer-tunnel.exe"}


def _end(_number: int, _frame: FrameType | None) -> None:
    # Not an exception: one that is raised within an import, a finalizer or a callback may be printed or lost.
    os._exit(INTERRUPTED)
