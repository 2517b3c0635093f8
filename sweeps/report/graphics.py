"""A figure as files, and as a part of a page: that page's colours, and a tip at each mark."""

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

_TIP = "tip-"
_LETTERS = 11  # of a title, that go into an inch


@dataclass
class Drawing:
    """name: stem of its files. title: what a reader is told it shows."""

    name: str
    title: str
    figure: Figure
    tips: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figure.suptitle(textwrap.fill(self.title, round(_LETTERS * self.figure.get_figwidth())))

    def mark(self, ax: Axes, x: float, y: float, tip: str, **style: Any) -> None:
        """One mark that says `tip` when somebody points at it."""
        ax.plot([x], [y], gid=self.tip(tip), linestyle="none", **style)

    def tip(self, text: str) -> str:
        """The gid of an artist that says this."""
        self.tips.append(text)
        return f"{_TIP}{len(self.tips) - 1}"

    def save(self, folder: Path) -> str:
        """NAME.png and NAME.svg. Returns the SVG as a page takes it in."""
        svg = self._svg()
        (folder / f"{self.name}.svg").write_text(svg)
        self.figure.savefig(folder / f"{self.name}.png", dpi=150)
        return self._inline(svg)

    def inline(self) -> str:
        """The SVG as a page takes it in, and no file."""
        return self._inline(self._svg())

    def _svg(self) -> str:
        logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it announces its font cache
        layout = self.figure.get_layout_engine()
        if layout is not None:
            layout.execute(self.figure)
            self.figure.set_layout_engine("none")  # it would find the same places again for each format
        # Text stays text, which is small and can be searched. Fixed salt and no date: same results, same bytes.
        with rc_context({"svg.hashsalt": "alignment-sweep", "svg.fonttype": "none"}):
            text = StringIO()
            self.figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()

    def _inline(self, svg: str) -> str:
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = svg.replace("#000000", "currentColor").replace("fill: #ffffff", "fill: none")
        svg = re.sub(rf'<g id="{_TIP}(\d+)"', self._with_tip, svg)
        # A page has several figures, and matplotlib numbers the parts of each from one.
        svg = re.sub(r'<g id="[\w.]+_\d+"', "<g", svg)
        size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', svg)
        assert size is not None
        label = html.escape(self.title, quote=True)
        return svg.replace(size[0], f'role="img" aria-label="{label}" style="width: {float(size[1]) * 4 / 3:.0f}px"', 1)

    def _with_tip(self, match: re.Match[str]) -> str:
        return f'<g class="mark" tabindex="0" data-tip="{html.escape(self.tips[int(match[1])], quote=True)}"'
