"""One table of texts, written as Markdown or as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: of the columns.
        rows: as many cells each.
        caption: a paragraph above, if any.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    def markdown(self) -> str:
        """With aligned columns."""
        title = f"{self.caption}\n\n" if self.caption else ""
        return title + grid([self.header, *self.rows])

    def html(self) -> str:
        """The first column heads its rows; columns of figures are set to the right."""
        figures = {
            i
            for i in range(1, len(self.header))
            if self.rows and all(_is_figure(row[i]) for row in self.rows)
        }
        kind = [' class="n"' if i in figures else "" for i in range(len(self.header))]
        head = "".join(
            f'<th scope="col"{k}>{text(cell)}</th>'
            for k, cell in zip(kind, self.header, strict=True)
        )
        body = "\n".join(
            f'<tr><th scope="row">{text(row[0])}</th>'
            + "".join(
                f"<td{k}>{text(cell)}</td>" for k, cell in zip(kind[1:], row[1:], strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        content = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        # Not a <caption>, which would scroll sideways with its table.
        title = f'<p class="quiet">{text(self.caption)}</p>\n' if self.caption else ""
        return title + scrolling(content, self.caption or "Table")


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first line is its header."""
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    ruled = [cells[0], ["-" * w for w in widths], *cells[1:]]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in ruled
    )


def text(content: object) -> str:
    """Text for HTML."""
    return html.escape(str(content))


def scrolling(content: str, label: str) -> str:
    """HTML that scrolls sideways within itself where the page is narrower."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">\n'
        f"{content}\n</div>"
    )


def _is_figure(cell: str) -> bool:
    return re.fullmatch(r"(\W*\d.*)?\W*", cell) is not None
