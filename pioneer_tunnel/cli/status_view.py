"""How `run` shows its statuses: lines, and on a terminal a bar below them that is kept up to date."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, final

import trio

from .._model.stats import TunnelStats
from .._model.status import State, Status
from .qr import QrCode
from .status_lines import STATE_COLOURS, StatusLines, where_visitors_come_in

__all__ = ["LiveView", "PlainView", "StatusView"]

REFRESH_SECONDS: Final = 1.0


class StatusView(Protocol):
    """Shows statuses."""

    async def run(self) -> None:
        """Keep what is shown up to date, until cancelled."""

    def catch_up(self, history: Sequence[Status], dropped: int) -> None:
        """Show what is new since the last call. `dropped` is the number of statuses before `history`."""


@final
class PlainView:
    """Lines alone: for a log, a pipe, or a machine.

    Args:
        as_json: as JSON.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._lines: Final = StatusLines(as_json=as_json, of_options=False)

    async def run(self) -> None:
        """Nothing is to be done."""

    def catch_up(self, history: Sequence[Status], dropped: int) -> None:
        """See `StatusView`."""
        self._lines.catch_up(history, dropped)


@final
class LiveView:
    """Lines, and a bar below them with what changes all the time.

    It writes to `sys.stderr`, which never blocks: see `standard_error`.

    Args:
        local: where visitors are forwarded to.
        stats: what remote access has done.
        qr: prints the public address once more.
        log_handler: writes the log, which has to go above the bar.
    """

    def __init__(
        self, local: str, stats: Callable[[], TunnelStats], *, qr: QrCode, log_handler: logging.StreamHandler[Any]
    ) -> None:
        from rich.console import Console  # noqa: PLC0415  # only who shows it pays for it
        from rich.live import Live  # noqa: PLC0415

        self._console: Final = Console(file=sys.stderr, highlight=False)
        self._live: Final = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False, transient=True
        )
        self._lines: Final = StatusLines(as_json=False, of_options=False, qr=qr, echo=self._echo)
        self._local: Final = local
        self._stats: Final = stats
        self._log_handler: Final = log_handler
        self._since = time.monotonic()
        self._status = Status(state=State.STARTING)

    async def run(self) -> None:
        """See `StatusView`."""
        with self._log_above(), self._live:
            # A process that is stopped or killed would leave the terminal without its cursor.
            self._console.show_cursor(True)
            while True:
                self._draw()
                await trio.sleep(REFRESH_SECONDS)

    def catch_up(self, history: Sequence[Status], dropped: int) -> None:
        """See `StatusView`."""
        self._lines.catch_up(history, dropped)
        if history:
            if history[-1].state is not self._status.state:
                self._since = time.monotonic()
            self._status = history[-1]
            if self._live.is_started:
                self._draw()

    def _draw(self) -> None:
        from rich.console import Group  # noqa: PLC0415
        from rich.filesize import decimal  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        status = self._status
        minutes, seconds = divmod(int(time.monotonic() - self._since), 60)
        first = Text(no_wrap=True, overflow="ellipsis")
        first.append(f"● {status.state}", style=STATE_COLOURS.get(status.state) or "")
        first.append(f"  {minutes // 60}:{minutes % 60:02}:{seconds:02}")
        if status.state is State.CONNECTED and status.relay_rtt_ms is not None:
            first.append(f"  relay {status.relay_rtt_ms:.0f} ms")
        if status.links_wanted is not None:
            first.append(f"  {status.links_up} of {status.links_wanted} links up")
        first.append(f"  → {self._local}  (Ctrl-C stops)", style="dim")
        second = Text(no_wrap=True, overflow="ellipsis")
        if status.state is State.CONNECTED and status.public_url:
            second.append(f"  {where_visitors_come_in(status, status.public_url)}")
        elif status.retry_at_unix is not None:
            second.append(f"  tried again in {max(status.retry_at_unix - int(time.time()), 0)} s")
        streams = self._stats().streams
        third = Text(no_wrap=True, overflow="ellipsis")
        third.append(f"  visitors: {streams.open} now, {streams.opened_total} so far")
        third.append(f", {decimal(streams.to_visitors_bytes_total)} to them", style="dim")
        self._live.update(Group(first, second, third), refresh=True)

    def _echo(self, text: str) -> None:
        from rich.text import Text  # noqa: PLC0415

        self._console.print(Text.from_ansi(text), soft_wrap=True)

    @contextmanager
    def _log_above(self) -> Iterator[None]:
        above = _Lines(self)
        before = self._log_handler.setStream(above)
        try:
            yield
        finally:
            self._log_handler.setStream(before or sys.stderr)

    def write_line(self, line: str) -> None:
        """Write a line of the log above the bar."""
        self._echo(line)


@final
class _Lines:
    """A stream for a log handler."""

    def __init__(self, view: LiveView) -> None:
        self._view: Final = view

    def write(self, text: str) -> None:
        if text.strip():
            self._view.write_line(text.rstrip("\n"))

    def flush(self) -> None:
        """Nothing is kept."""
