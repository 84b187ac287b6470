"""The public address as a QR code, for a telephone's camera. Only on a terminal."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from typing import Final, final

__all__ = ["QrCode"]

_BORDER: Final = 2
"""Light modules around it: half of what the standard asks for, and enough for cameras."""

_LINES_FOR_THE_REST: Final = 8
_WHITE_ON_BLACK: Final = "\x1b[0;97;40m"
_RESET: Final = "\x1b[0m"


@final
class QrCode:
    """Prints an address as a QR code once for each address.

    Args:
        wanted: True for every terminal that is wide enough, False for none, None where it also fits in height.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted: Final = wanted
        self._shown: str | None = None

    def show(self, address: str, echo: Callable[[str], None]) -> None:
        """Print it with `echo`, unless it was the last one that was printed."""
        if self._wanted is False or not sys.stderr.isatty() or address == self._shown:
            return
        self._shown = address
        lines = _drawn(address)
        size = shutil.get_terminal_size()
        fits = len(lines) + _LINES_FOR_THE_REST <= size.lines
        if len(lines[0]) <= size.columns and (self._wanted or fits):
            echo("\n".join(lines))


def _drawn(address: str) -> list[str]:
    """The lines. Where there are colours, they say what is light, so that it does not depend on the terminal's."""
    import segno  # noqa: PLC0415  # only who shows one pays for it

    out = io.StringIO()
    segno.make(address, micro=False).terminal(out, border=_BORDER, compact=True)
    lines = out.getvalue().splitlines()
    return lines if "NO_COLOR" in os.environ else [f"{_WHITE_ON_BLACK}{line}{_RESET}" for line in lines]
