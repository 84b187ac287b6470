"""What the access log knows of a visitor before its first request: its address, its tunnel and its service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, final

from ..._model.services import FIRST_SERVICE
from ...access_log.following import VisitorLog
from ...access_log.writer import AccessLog
from ..tunnels import Route
from .visit import Visit

__all__ = ["VisitorLogs"]


@final
class VisitorLogs:
    """Makes the log of each visitor.

    Args:
        log: the access log; None for none.
        wall_clock: seconds since 1970.
    """

    def __init__(self, log: AccessLog | None, wall_clock: Callable[[], float]) -> None:
        self._log: Final = log
        self._wall_clock: Final = wall_clock

    def of(self, visit: Visit, route: Route | None) -> VisitorLog | None:
        """The log of a visitor of `route`, as far as that is known; None without an access log."""
        if self._log is None:
            return None
        return VisitorLog(
            self._log,
            visit.visitor,
            tunnel=None if route is None else route.entry.id,
            service=(route and route.service) or FIRST_SERVICE,
            wall_clock=self._wall_clock,
        )
