"""Limits log lines whose number visitors, gateways or relays decide.

The first five lines of each kind are written. After that one line a minute is written, with the number of those that
were dropped. A kind that was quiet for some minutes may write several lines again.

The counts are kept per Trio run, for the kinds that were logged last.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Final, TypeAlias, final

import trio

__all__ = ["LogLimiter"]

LOG_INTERVAL: Final = 60.0
"""Seconds after which one more line of a kind may be written."""

LINES_IN_FULL: Final = 5
"""Lines of a kind that may be written at once."""

MOST_KINDS: Final = 4096
"""Kinds that are counted; beyond that, the one that was logged least recently is evicted."""

_Kinds: TypeAlias = OrderedDict[tuple[str, Hashable], tuple[float, float, int]]
"""For each kind: the lines it may write, as of when, and how many were dropped."""

_of_this_run: Final[trio.lowlevel.RunVar[_Kinds]] = trio.lowlevel.RunVar("pioneer_tunnel.log_limiter")


@final
class LogLimiter:
    """Writes to a log: each kind of line five times, then once a minute. Needs a Trio run.

    Args:
        log: shares its kinds with other instances for the same log.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log: Final = log

    def log(
        self,
        kind: Hashable,
        text: str,
        *,
        level: int = logging.WARNING,
        error: BaseException | None = None,
        about: Mapping[str, object] | None = None,
    ) -> None:
        """Write `text`, unless there were too many lines of its kind.

        Args:
            kind: what the limit counts. A peer must not be able to choose it.
            text: the line.
            level: of the line.
            error: adds its traceback.
            about: the fields of the record, see `log_fields`.
        """
        if not self._log.isEnabledFor(level):
            return
        kinds = _kinds()
        now = trio.current_time()
        left, since, dropped = kinds.pop((self._log.name, kind), (LINES_IN_FULL, now, 0))
        left = min(left + (now - since) / LOG_INTERVAL, LINES_IN_FULL)
        may_write = left >= 1
        kinds[self._log.name, kind] = (left - 1, now, 0) if may_write else (left, now, dropped + 1)
        if len(kinds) > MOST_KINDS:
            kinds.popitem(last=False)
        if may_write:
            more = f" ({dropped} more since the last such line)" if dropped else ""
            fields = {**(about or {}), "dropped": dropped} if dropped else about
            self._log.log(level, "%s%s", text, more, exc_info=error, extra=fields)


def _kinds() -> _Kinds:
    try:
        return _of_this_run.get()
    except LookupError:
        kinds: _Kinds = OrderedDict()
        _of_this_run.set(kinds)
        return kinds
