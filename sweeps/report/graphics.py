"""A figure as PNG and SVG files, and as an inline SVG in the colors of its page, with tooltips."""

from __future__ import annotations

import html
import logging
import re
import textwrap
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_GID = "tooltip-"
_CHARS_PER_INCH = 11  # of a title


@dataclass
class Drawing:
    """A figure with its title and tooltips; name: stem of its files."""

    name: str
    title: str
    figure: Figure
    tooltips: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figure.suptitle(textwrap.fill(self.title, round(_CHARS_PER_INCH * self.figure.get_figwidth())))

    def plot_mark(self, ax: Axes, x: float, y: float, tooltip: str, **style: Any) -> None:
        """Plot one marker with a tooltip."""
        ax.plot([x], [y], gid=self.add_tooltip(tooltip), linestyle="none", **style)

    def add_tooltip(self, text: str) -> str:
        """Return the gid for an artist to have this tooltip."""
        self.tooltips.append(text)
        return f"{_GID}{len(self.tooltips) - 1}"

    def save(self, folder: Path) -> str:
        """Write NAME.png and NAME.svg, and return the SVG for a page."""
        svg = self._svg()
        (folder / f"{self.name}.svg").write_text(svg)
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)
        return self._inline(svg)

    def inline(self) -> str:
        """Return the SVG for a page without writing a file."""
        return self._inline(self._svg())

    def _svg(self) -> str:
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # matplotlib logs that it builds its font cache
        layout = self.figure.get_layout_engine()
        if layout is not None:
            layout.execute(self.figure)
            self.figure.set_layout_engine("none")  # not again for each format
        # Text stays text: small and searchable. With a fixed salt and no date the same results give the same bytes.
        with rc_context({"svg.hashsalt": "alignment-sweep", "svg.fonttype": "none"}):
            text = StringIO()
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()

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
