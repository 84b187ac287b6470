"""The pages of the operator's page: HTML, CSS and JavaScript, and a report every few seconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http import HTTPStatus
from importlib import resources
from typing import Final, NoReturn, final

import trio

from ...monitoring.site import Accept, Answer, Page, Refresh
from ..config import RelayConfig
from ..stats import RelayStats
from .history import INTERVAL, History
from .report import report

__all__ = ["Dashboard"]

_FILES: Final[Mapping[bytes, tuple[str, str]]] = {
    b"/": ("dashboard.html", "text/html; charset=utf-8"),
    b"/dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    b"/dashboard.js": ("dashboard.js", "text/javascript; charset=utf-8"),
    b"/icon.svg": ("icon.svg", "image/svg+xml"),
}
_REPORT: Final = b"/report.json"


@final
class Dashboard:
    """The operator's page of a relay.

    Args:
        config: returns the configuration of now.
        stats: returns the relay's statistics of now.
        wall_clock: seconds since 1970.
        refresh: is awaited before `stats`; by default they are there.
    """

    def __init__(
        self,
        config: Callable[[], RelayConfig],
        stats: Callable[[], RelayStats],
        wall_clock: Callable[[], float],
        refresh: Refresh | None = None,
    ) -> None:
        self._config: Final = config
        self._stats: Final = stats
        self._wall_clock: Final = wall_clock
        self._refresh: Final = refresh
        self._history: Final = History()

    def pages(self) -> dict[bytes, Page]:
        """What the site of the page serves."""
        folder = resources.files(__package__) / "page"
        files = {path: _fixed(kind, (folder / name).read_bytes()) for path, (name, kind) in _FILES.items()}
        return {**files, _REPORT: Page(self._report)}

    async def take_samples(self) -> NoReturn:
        """Take samples until cancelled."""
        while True:
            if self._refresh is not None:
                await self._refresh()
            self._history.add(self._stats())
            # No deadline: it samples for as long as the relay serves.
            await trio.sleep(INTERVAL)

    async def _report(self, _accept: Accept) -> Answer:
        if self._refresh is not None:
            await self._refresh()
        told = report(self._config(), self._stats(), self._history, self._wall_clock())
        return Answer(HTTPStatus.OK, "application/json", json.dumps(told).encode())


def _fixed(kind: str, content: bytes) -> Page:
    async def answer(_accept: Accept) -> Answer:
        return Answer(HTTPStatus.OK, kind, content)

    return Page(answer)
