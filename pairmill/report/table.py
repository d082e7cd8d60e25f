"""Tables on a terminal or in a pipe."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TextIO

from pairmill.report.text import shorten, visible

CELL_WIDTH = 80
"""Longest cell, in characters; JSON and CSV have values whole."""


def cell(value: object) -> str:
    """A value as it stands in a table: thousands grouped, bytes counted, one line, nothing that acts on a terminal."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value):,} bytes>"
    return shorten(visible(str(value)), CELL_WIDTH)


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], stream: TextIO, *, right: Collection[str] = ()
) -> None:
    """Print rows under a header; the columns named in `right` are aligned right.

    On a terminal long rows are folded into its width; elsewhere each row is one line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", collapse_padding=True)
    for name in header:
        table.add_column(Text(visible(name)), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(value)) for value in row))
    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console = Console(
            file=stream, highlight=False, no_color=True, width=max(80, 3 + console.measure(table).maximum)
        )
    console.print(table, soft_wrap=False)
