"""Matplotlib figures as inline SVG, which takes its colours and its font from the page."""

from __future__ import annotations

import io
import re

from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.style import context

# Stand-ins that are drawn, and the variables of style.css that replace them in the SVG.
INK, MUTED, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
VISUAL, MERGER, LANGUAGE = "#050505", "#060606", "#070707"
ORIGINAL, QUANTIZED, ENGINE = "#080808", "#090909", "#0a0a0a"
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--card",
    VISUAL: "--visual",
    MERGER: "--merger",
    LANGUAGE: "--language",
    ORIGINAL: "--original",
    QUANTIZED: "--quantized",
    ENGINE: "--engine",
}
# Matplotlib writes the family apart, or (before 3.10) a short form of weight, size and family.
FONT = re.compile(r"font-family: (?P<family>[^;\"]*);? ?|font: (?:(?P<weight>\d+|bold) )?(?P<size>[\d.]+)px [^;\"]*")
GROUPS = {"visual": VISUAL, "merger": MERGER, "language": LANGUAGE}

_SETTINGS = {
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.facecolor": "none",
    "font.size": 11,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "svg.fonttype": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


class Drawing:
    r"""A figure in the house's style; use as `with Drawing(...) as drawing`, then `drawing.svg`.

    Args:
        name: Unique on the page, so that ids of several figures do not clash.
        alt: What the figure shows, for those who cannot see it.
        size: Width and height in inches of 72 pixels.
        columns: Number of axes side by side.
        widths: Relative widths of the axes.

    Example:
        >>> with Drawing("growth", "A line that grows.", size=(6, 3)) as drawing:
        ...     _ = drawing.axes[0].plot([1, 2, 3], color=LANGUAGE)
        >>> print(drawing.svg[:70])
        <svg viewBox="0 0 432 216" role="img" aria-label="A line that grows.">
        >>> "var(--language)" in drawing.svg  # the page's colour, in light and in dark
        True
    """

    def __init__(
        self, name: str, alt: str, size: tuple[float, float], columns: int = 1, widths: list[float] | None = None
    ) -> None:
        self._name = name
        self._alt = alt
        self._context = context({**_SETTINGS, "svg.hashsalt": name}, after_reset=True)
        self._size, self._columns, self._widths = size, columns, widths
        self.svg = Markup()

    def __enter__(self) -> Drawing:
        self._context.__enter__()
        self.figure = Figure(figsize=self._size, layout="constrained")
        FigureCanvasSVG(self.figure)
        ratios = {"width_ratios": self._widths} if self._widths else None
        self.axes: list[Axes] = list(self.figure.subplots(1, self._columns, squeeze=False, gridspec_kw=ratios)[0])
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                data = io.StringIO()
                self.figure.savefig(data, format="svg", metadata={"Date": None})
                self.svg = self._inline(data.getvalue())
        finally:
            self._context.__exit__(None, None, None)

    def _inline(self, text: str) -> Markup:
        """Only the `<svg>` element, sized by its view box, coloured by the page."""
        body = text[text.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = FONT.sub(_page_font, body)
        for stand_in, variable in VARIABLES.items():
            body = body.replace(stand_in, f"var({variable})")
        box = re.search(r'viewBox="[^"]*"', body)
        opening = f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(self._alt)}">'
        return Markup(opening + body[body.index(">") + 1 :])  # noqa: S704 - matplotlib escapes text, we the rest


def _page_font(match: re.Match[str]) -> str:
    """Keep weight and size, leave the family to the page."""
    if match["family"] is not None:
        return ""
    weight = f"font-weight: {match['weight']}; " if match["weight"] else ""
    return f"{weight}font-size: {match['size']}px"
