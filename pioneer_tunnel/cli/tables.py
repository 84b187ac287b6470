"""Tables on standard output: by rich on a terminal, as plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self, final

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

__all__ = ["Screen", "show_table"]

_GAP: Final = "  "
_PADDING: Final = 3
"""Columns of a terminal that a column of a table takes in addition to its text."""

_WRAPPED: Final = 1.3
"""How much wider than the terminal a table may be: its cells are wrapped."""


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Plain text has one row on each line, whatever its width."""
    if sys.stdout.isatty():
        console = _console()
        console.print(_rendered(columns, rows, console.width))
        return
    widths = _widths(columns, rows)
    for row in [columns, *rows]:
        click.echo(_GAP.join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


@final
class Screen:
    """What is shown again, in place of what was there, on a terminal; elsewhere one after the other."""

    def __init__(self) -> None:
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if sys.stdout.isatty():
            from rich.live import Live  # noqa: PLC0415  # it takes long to import

            self._live = Live(console=_console(), auto_refresh=False, screen=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, text: str, columns: Sequence[str] = (), rows: Sequence[Sequence[str]] = ()) -> None:
        """Show a text, and below it a table."""
        if self._live is None:
            click.echo(text)
            if columns:
                show_table(columns, rows)
            sys.stdout.flush()
            return
        from rich.console import Group  # noqa: PLC0415  # as above
        from rich.text import Text  # noqa: PLC0415

        width = self._live.console.width
        shown = Group(Text(text), _rendered(columns, rows, width)) if columns else Text(text)
        self._live.update(shown, refresh=True)


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415  # as above

    return Console()


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[index]) for row in [columns, *rows]) for index in range(len(columns))]


def _rendered(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> RenderableType:
    """The table; a list of its rows where the terminal is too narrow for it."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  # as above
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    if sum(_widths(columns, rows)) + _PADDING * len(columns) > width * _WRAPPED:
        first, *others = columns
        lines = []
        for name, *cells in rows:
            lines += ["", f"{first} {name}"]
            lines += [f"  {column}: {cell}" for column, cell in zip(others, cells, strict=True) if cell]
        return Text("\n".join(lines))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
