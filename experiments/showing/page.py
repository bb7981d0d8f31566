"""The look of a page: its colours, and figures as pictures within it."""

from __future__ import annotations

import io
import re
from typing import Any

from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

from . import figures
from .grid import scrolling, text

INK, LINE = "#111112", "#b0b0b1"
"""Text and lines are drawn in these; the page puts its own colours in their place."""
DARK = {
    "#6b6b6b": "#a8aeb5",
    "#0072b2": "#4aa3dd",
    "#d55e00": "#f2843a",
    "#cc79a7": "#e09bc2",
    "#009e73": "#2cc297",
    figures.PRUNED: "#7d8894",
    figures.DENSE: "#454c55",
    figures.EDGE: "#1c2026",
}
"""The figures' colours, and what stands for them on a dark page."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same records make the same bytes
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.prop_cycle": cycler(color=[INK]),
    "axes.labelcolor": INK,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.5,
    "font.size": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
SIZE = (4.6, 3.4)
"""Inches of a figure: text stays readable where it is scaled down to a phone's width."""


def palette(colours: dict[str, str]) -> str:
    """Colours as the page's own properties, by the colours that figures are drawn in."""
    return "\n".join(f"  --c-{name[1:]}: {value};" for name, value in colours.items())


class Page:
    """The figures of a page, which share its ids."""

    def __init__(self) -> None:
        self._count = 0

    def figure(self, drawn: Figure, title: str, caption: str, alt: str) -> str:
        """A figure as inline SVG with its caption.

        Args:
            drawn: the figure.
            title: the caption's first words.
            caption: what is to be seen, as plain text.
            alt: what it shows, for those who do not see it.
        """
        self._count += 1
        name = f"f{self._count}"
        wide = drawn.get_figwidth() > 1.4 * SIZE[0]
        picture = _svg(drawn, name, alt, wide)
        if wide:
            picture = scrolling(picture, title)
        return (
            f'<figure class="wide">\n{picture}' if wide else f"<figure>\n{picture}"
        ) + f"\n<figcaption><b>{text(title)}.</b> {text(caption)}</figcaption>\n</figure>"


def _svg(figure: Figure, name: str, alt: str, wide: bool) -> str:
    """A figure as an SVG element for a page: its own ids, the page's colours and fonts."""
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    width = round(figure.get_figwidth() * 96)
    content = file.getvalue()
    content = content[content.index("<svg") :]
    content = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", content, flags=re.DOTALL)
    content = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', content)
    content = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', content)
    content = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", content)
    content = re.sub(r"#[0-9a-f]{6}\b", lambda match: _colour(match.group()), content)
    (box,) = re.findall(r'viewBox="([^"]+)"', content)[:1]
    # A wide one keeps its size and scrolls; the others shrink with the page.
    size = f"width:{width}px" if wide else f"width:100%;max-width:{round(1.2 * width)}px"
    start = f'<svg viewBox="{box}" style="{size}" role="img" aria-label="{text(alt)}">'
    return start + content[content.index(">") + 1 :].strip()


def _colour(drawn: str) -> str:
    if drawn == INK:
        return "currentColor"
    if drawn == LINE:
        return "var(--quiet)"
    return f"var(--c-{drawn[1:]})" if drawn in DARK else drawn
