"""Tables on standard output: by rich on a terminal, as plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["rendered", "show_table"]

_GAP: Final = "  "


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Plain text has one row on each line, whatever its width."""
    if sys.stdout.isatty():
        from rich.console import Console  # noqa: PLC0415  # it takes long to import

        Console().print(rendered(columns, rows))
        return
    table = [columns, *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    for row in table:
        click.echo(_GAP.join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def rendered(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The table for a terminal. Cells are folded where it is narrow."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415  # as above
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
