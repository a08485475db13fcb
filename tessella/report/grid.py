"""A table of texts: drawn on a terminal, plain in a file, as Markdown, in a notebook."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from typing import NamedTuple

from tessella.report.page import literal


class Grid(NamedTuple):
    """Heads and rows of texts, which may come from elsewhere; the first columns are words, the others numbers."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 2  # columns of words

    def show(self) -> None:
        """Print: a drawn table on a terminal, plain lines elsewhere."""
        from rich.box import HEAVY_HEAD
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        drawn = sys.stdout.isatty()
        table = Table(title=escape(literal(self.title)) or None, box=HEAVY_HEAD if drawn else None, pad_edge=drawn)
        for number, head in enumerate(self.heads):
            side = "left" if number < self.words else "right"
            table.add_column(escape(literal(head)), justify=side, no_wrap=not drawn)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(*(escape(literal(cell)) for cell in row))
        Console(width=None if drawn else 10_000, force_jupyter=False).print(table)

    def markdown(self) -> list[str]:
        """Lines of Markdown. Only words are escaped: numbers and their spread are ours."""
        rows = [[markdown(cell) if i < self.words else cell for i, cell in enumerate(row)] for row in self.rows]
        rule = ["---" if i < self.words else "---:" for i in range(len(self.heads))]
        return [f"| {' | '.join(row)} |" for row in [[*map(markdown, self.heads)], rule, *rows]]

    def html(self) -> str:
        """A table for a notebook."""
        rows = "".join(f"<tr>{''.join(f'<td>{_html(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        heads = "".join(f"<th>{_html(head)}</th>" for head in self.heads)
        return f"<table><caption>{_html(self.title)}</caption><tr>{heads}</tr>{rows}</table>"


def markdown(text: str) -> str:
    """Text from elsewhere that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#~&" else c for c in literal(text))


def _html(text: str) -> str:
    return html.escape(literal(text))
