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
    """Print rows under a header, one line each; the columns named in `right` are aligned right."""
    from rich.cells import cell_len

    lines = [[visible(name) for name in header], *([cell(value) for value in row] for row in rows)]
    widths = [max(cell_len(line[i]) for line in lines) for i in range(len(header))]
    for line in lines:
        parts = []
        for name, text, width in zip(header, line, widths, strict=True):
            gap = " " * (width - cell_len(text))
            parts.append(gap + text if name in right else text + gap)
        stream.write("  ".join(parts).rstrip() + "\n")
