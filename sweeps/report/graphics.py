"""A figure as PNG and SVG files, and as an inline SVG in the colors of its page, with tooltips."""

from __future__ import annotations

import html
import io
import logging
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from src.store.files import atomic_write
from sweeps.report.escapes import printable

_GID = "tooltip-"
_CHARS_PER_INCH = 11  # of a title
_MAX_TITLE = 300  # characters


# A `$` in a name is no formula. Set for the process, because matplotlib also makes texts while it draws.
rcParams["text.parse_math"] = False


def shorten(text: str, length: int) -> str:
    """Return a text for a figure; of a longer one the end, which tells two files in one folder apart."""
    text = printable(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"


class PageFigure(Figure):
    """A figure that a notebook shows as report.html does: an SVG in the colors of the page, light or dark."""

    drawing: Drawing

    def _repr_html_(self) -> str:
        # What report.html's style sheet and script do for its figures: text in the page's color, and tooltips.
        svg = self.drawing.inline_svg().replace("<svg", '<svg fill="currentColor"', 1)
        return re.sub(r'(<g class="mark"[^>]*) data-tip="([^"]*)">', r"\1><title>\2</title>", svg)


class Drawing:
    """A figure with a title and tooltips; name: stem of its files."""

    def __init__(self, name: str, title: str, width: float, height: float) -> None:
        """Create an empty figure; width, height: in inches."""
        self.name, self.title, self.tooltips = name, shorten(title, _MAX_TITLE), list[str]()
        self.figure = PageFigure(figsize=(width, height), layout="constrained")
        self.figure.drawing = self
        self.figure.suptitle(textwrap.fill(self.title, round(_CHARS_PER_INCH * width)))

    def plot_mark(self, ax: Axes, x: float, y: float, tooltip: str, **style: Any) -> None:
        """Plot one marker with a tooltip."""
        ax.plot([x], [y], gid=self.add_tooltip(tooltip), linestyle="none", **style)

    def add_tooltip(self, text: str) -> str:
        """Return the gid for an artist to have this tooltip."""
        self.tooltips.append(text)
        return f"{_GID}{len(self.tooltips) - 1}"

    def save(self, folder: Path) -> str:
        """Write NAME.png and NAME.svg, and return the SVG for a page."""
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # matplotlib logs that it builds its font cache
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the PNG has a box for such a letter
            layout = self.figure.get_layout_engine()
            if layout is not None:
                layout.execute(self.figure)
                self.figure.set_layout_engine("none")  # not again for each format
            svg = self._render("svg", metadata={"Date": None})
            # Replaced, whatever is there: readers see the old figure or the new.
            atomic_write(folder / f"{self.name}.svg", svg)
            atomic_write(folder / f"{self.name}.png", self._render("png", dpi=150))
        return self._inline(svg.decode())

    def inline_svg(self) -> str:
        """Return the SVG for a page, as `save` does, without writing a file."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            return self._inline(self._render("svg", metadata={"Date": None}).decode())

    def _render(self, file_format: str, **options: Any) -> bytes:
        content = io.BytesIO()
        # Text stays text: small and searchable. With a fixed salt and no date equal results give equal bytes.
        with rc_context({"svg.hashsalt": "alignment-sweep", "svg.fonttype": "none"}):
            self.figure.savefig(content, format=file_format, **options)
        return content.getvalue()

    def _inline(self, svg: str) -> str:
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = svg.replace("#000000", "currentColor").replace("fill: #ffffff", "fill: none")
        svg = re.sub(rf'<g id="{_GID}(\d+)"', self._with_tooltip, svg)
        # matplotlib numbers the elements of every figure from one, but ids must be unique on a page.
        svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)
        size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
        assert size is not None
        label = html.escape(self.title, quote=True)
        return svg.replace(size[0], f'role="img" aria-label="{label}" style="width: {float(size[1]) * 4 / 3:.0f}px"', 1)

    def _with_tooltip(self, match: re.Match[str]) -> str:
        return f'<g class="mark" tabindex="0" data-tip="{html.escape(self.tooltips[int(match[1])], quote=True)}"'
