"""What goes wrong many times a second is told of once a minute.

Neighbours: the relay's accept loop, the data channels of `tcp` and `tls`, and `forward`: strangers decide how often.
"""

from __future__ import annotations

import logging
from typing import Final, final

import trio

__all__ = ["Complaints"]

COMPLAINT_INTERVAL: Final = 60.0
"""Seconds for which one line in the log has to do."""


@final
class Complaints:
    """Warnings in a log, each kind of them once a minute at the most."""

    def __init__(self, log: logging.Logger) -> None:
        self._log: Final = log
        self._told: Final[dict[str, tuple[float, int]]] = {}

    def tell(self, kind: str, text: str) -> None:
        """Warn of `text`, unless that was done of its kind less than a minute ago.

        Args:
            kind: one of a few; each is remembered.
        """
        now = trio.current_time()
        told_at, untold = self._told.get(kind, (-COMPLAINT_INTERVAL, 0))
        if now - told_at < COMPLAINT_INTERVAL:
            self._told[kind] = told_at, untold + 1
            return
        self._told[kind] = now, 0
        self._log.warning("%s%s", text, f" ({untold} more since the last such line)" if untold else "")
