"""Which row of the paper's tables (arXiv 2502.01237) a selected point is of, and what a row is the best of."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from src.methods import METHODS
from sweeps.analysis.results import Results
from sweeps.report.plot_style import NAMES

# What a row of the paper is the best of, besides beta and lr, or says itself.
TUNED = ("init.sft_weight", "init.align_weight", "trainer.align.epochs")
SFT_WEIGHTS = {"sft": 0.0, "base": 1.0}  # of an init whose weight a sweep does not set (conf/init)
INITS = {"sft": "SFT", "base": "Base"}


class PaperRow(NamedTuple):
    """A method, the model that it starts from, and whether its loss has an SFT term."""

    init: str
    sft_term: bool
    method: str

    def init_name(self) -> str:
        """Return the name of the model that alignment starts from."""
        return INITS.get(self.init, self.init)

    def method_name(self) -> str:
        """Return the method's name, with + for an SFT term in its loss."""
        return NAMES[self.method] + ("+" if self.sft_term else "")

    @property
    def is_two_stage(self) -> bool:
        """Whether the row is one of Table 2: alignment alone, after SFT."""
        return self.init == "sft" and not self.sft_term

    def order(self) -> tuple[bool, bool, str, int]:
        """Return a sort key: rows of Table 2 first, methods in the order of METHODS."""
        return not self.is_two_stage, self.init == "sft", self.init, list(METHODS).index(self.method)


def settings_of(results: Results, row: dict[Hashable, Any]) -> dict[str, Any]:
    """Return the settings that a point has in common with others of its sweep, and its own. row: of average_seeds."""
    study = {name: row[name] for name in ("setup", "method", "init")}
    shared: dict[str, Any] = {}
    for sweep in results.sweeps:
        shared |= next((s["settings"] for s in sweep["studies"] if study.items() <= s.items()), {})
    return shared | results.settings.get(row["identities"][0], {})


def paper_row(row: dict[Hashable, Any], settings: dict[str, Any]) -> PaperRow:
    """Return the row that a point is of. settings: of settings_of."""
    sft_weight = settings.get("init.sft_weight", SFT_WEIGHTS.get(row["init"], 0.0))
    return PaperRow(row["init"], sft_weight > 0, row["method"])
