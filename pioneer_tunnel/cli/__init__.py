"""The command line. It parses arguments and calls the library. It needs the extra `cli`."""

from __future__ import annotations

import gc
import sys

from .._interrupts import end_quietly
from .standard_error import queue_standard_error

__all__ = ["main"]

_NEW_OBJECTS = 20_000
"""Objects, of some 2 MB, after which garbage is looked for."""


def main() -> None:
    """The `pioneer-tunnel` command."""
    end_quietly()
    queue_standard_error()
    # What is imported stays until the end. To look for garbage in it takes a fifth of the start, and time later on.
    gc.disable()
    try:
        from .commands import pioneer_tunnel  # noqa: PLC0415  # click is optional
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("the pioneer-tunnel command needs the extra 'cli': pip install 'pioneer-tunnel[cli]'")
    finally:
        gc.enable()
    gc.freeze()
    # By default it looks after 700 new objects, that is 30 visitors, at all who are there. It found nothing, and took a
    # fifth of a relay's time.
    gc.set_threshold(_NEW_OBJECTS)
    pioneer_tunnel()
