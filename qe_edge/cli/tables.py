"""Tables on standard output: rich's on a terminal, the same columns without wrapping elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PIPE_WIDTH = 400  # columns when nobody watches: lines are then read by programs, and wrapping would break them


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under `head`; numbers stand right, text left."""
    table = Table(box=box.SIMPLE, pad_edge=False)
    for column, title in enumerate(head):
        numeric = all(row[column][:1].isdigit() or not row[column] for row in rows)
        table.add_column(title, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))  # its square brackets are no markup of rich's
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(file=sys.stdout, width=width, highlight=False).print(table)
