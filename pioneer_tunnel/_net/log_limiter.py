"""Log lines whose number others decide: visitors, gateways, relays.

The first lines of each kind are written in full. After that one line a minute is written, with the number of those that
were left out. A kind that was quiet for some minutes may write several lines again.

How often what was logged is kept for each Trio run, for the kinds that were logged last.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, TypeAlias, final

import trio

__all__ = ["Complaints"]

COMPLAINT_INTERVAL: Final = 60.0
"""Seconds after which one more line of a kind may be written."""

LINES_IN_FULL: Final = 5
"""Lines of a kind that may be written at once."""

MOST_KINDS: Final = 4096
"""Kinds that are remembered; beyond, the one that was logged least recently is forgotten."""

_Kinds: TypeAlias = OrderedDict[tuple[str, Hashable], tuple[float, float, int]]
"""For each kind: how many lines it may write, since when, and how many were left out."""

_of_this_run: Final[trio.lowlevel.RunVar[_Kinds]] = trio.lowlevel.RunVar("pioneer_tunnel.complaints")


@final
class Complaints:
    """Writes to a log, each kind of line five times and then once a minute. To be used in a Trio run.

    Args:
        log: shares its kinds with other instances for the same log.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log: Final = log

    def tell(
        self, kind: Hashable, text: str, *, level: int = logging.WARNING, error: BaseException | None = None
    ) -> None:
        """Write `text`, unless there were too many lines of its kind.

        Args:
            kind: what is limited. It must not be the other end's to choose.
            text: the line.
            level: of the line.
            error: what to add the traceback of.
        """
        if not self._log.isEnabledFor(level):
            return
        kinds = _kinds()
        now = trio.current_time()
        left, since, untold = kinds.pop((self._log.name, kind), (LINES_IN_FULL, now, 0))
        left = min(left + (now - since) / COMPLAINT_INTERVAL, LINES_IN_FULL)
        may_write = left >= 1
        kinds[self._log.name, kind] = (left - 1, now, 0) if may_write else (left, now, untold + 1)
        if len(kinds) > MOST_KINDS:
            kinds.popitem(last=False)
        if may_write:
            more = f" ({untold} more since the last such line)" if untold else ""
            self._log.log(level, "%s%s", text, more, exc_info=error)


def _kinds() -> _Kinds:
    try:
        return _of_this_run.get()
    except LookupError:
        kinds: _Kinds = OrderedDict()
        _of_this_run.set(kinds)
        return kinds
