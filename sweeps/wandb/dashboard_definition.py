"""What the dashboard of a sweep shows, by the keys that its runs have in W&B; as plain data, to be saved there and
drawn here from the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from src.methods import METHODS
from sweeps.report.plot_style import COLORS, NAMES

SCHEMA = 1  # of dashboard.json

METHOD, BETA, LR, SERIES = "config:method.name", "config:beta", "config:lr", "config:series"
QUALITY, KL = "summary:quality/value", "summary:kl/per_sequence/value"
# Curves of training and what they are called; only those that a sweep has are shown. What has no common unit over betas
# is not averaged over them.
BY_METHOD = {
    "train/rewards/accuracies": "reward accuracy",
    "train/rewards/margins": "reward margin",
    "train/logps/chosen": "log-prob of the chosen response",
    "train/logps/rejected": "log-prob of the rejected response",
}
BY_SERIES = {
    "train/loss": "training loss",
    "train/rewards/accuracies": "reward accuracy",
    "train/rewards/margins": "reward margin",
    "train/grad_norm": "gradient norm before clipping",
}
# In W&B there is nothing but its color to tell a method by.
PALETTE = (*COLORS, "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#7F7F7F")


@dataclass(frozen=True)
class Scatter:
    """A mark a point, in the color of its method."""

    title: str
    x: str
    y: str
    log_x: bool = False


@dataclass(frozen=True)
class Curves:
    """A metric over steps: of all runs with one value of `group` the mean, and from least to most."""

    title: str
    y: str
    group: str


@dataclass(frozen=True)
class Parallel:
    """A line a point, through its values in the columns."""

    title: str
    columns: tuple[tuple[str, str, bool], ...]  # key, name, whether logarithmic


@dataclass(frozen=True)
class Table:
    """A table that the aggregation run has logged."""

    title: str
    key: str


@dataclass(frozen=True)
class Images:
    """Figures that the aggregation run has logged."""

    title: str
    keys: tuple[str, ...]


Panel = Scatter | Curves | Parallel | Table | Images


@dataclass(frozen=True)
class Section:
    title: str
    said: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """Of one sweep."""

    name: str  # the group of its runs
    title: str
    intro: str
    colors: dict[str, str]  # method -> color
    runs: dict[str, str]  # identity of a point -> its method
    columns: tuple[str, ...]  # of the table of runs, beside the name
    sections: tuple[Section, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        sections = [
            {**asdict(section), "panels": [{"kind": type(p).__name__.lower(), **asdict(p)} for p in section.panels]}
            for section in self.sections
        ]
        return {"schema": SCHEMA, **asdict(self), "sections": sections}


def define(sweep: dict[str, Any], points: pd.DataFrame, metrics: Sequence[str], figures: Sequence[str]) -> Dashboard:
    """sweep: sweep.json. points: of sweeps.analysis.results. metrics: keys that training logs, as train/loss. figures: names of
    those that the aggregator drew."""
    metric = str(points.metric.dropna().iloc[0]).replace("_", " ") if points.metric.notna().any() else "quality"
    methods = list(dict.fromkeys(points.method))
    parallel = Parallel(
        f"Every point: method, beta and lr to {metric} and KL",
        (
            (METHOD, "method", False),
            (BETA, "beta", True),
            (LR, "lr", True),
            (QUALITY, metric, False),
            (KL, "KL", False),
        ),
    )
    result = (
        Table("Best point of each method", "tables/best"),
        Scatter(f"{metric} over beta, by method", BETA, QUALITY, log_x=True),
        Scatter(f"{metric} over KL, by method", KL, QUALITY),
        parallel,
    )
    by_method, by_series = (
        tuple(Curves(f"{title}, by {word}", key, group) for key, title in keys.items() if key in metrics)
        for keys, group, word in ((BY_METHOD, METHOD, "method"), (BY_SERIES, SERIES, "method and beta"))
    )
    sections = [
        Section("Result", "Colors are methods. Chosen on one half of the prompts, reported on the other.", result),
        Section("Training, by method", "Mean over the points of a method, and from least to most.", by_method),
        Section("Training, by method and beta", "ProgressFn learning rates and seeds; without outliers.", by_series),
    ]
    if figures:
        images = Images("As the report has them", tuple(f"figures/{name}" for name in figures))
        sections.append(Section("Figures", "What report.html shows.", (images,)))
    done = int((points.state == "done").sum())
    names = ", ".join(NAMES[method] for method in methods)
    return Dashboard(
        name=sweep["name"],
        title=f"{sweep['name']}: {names}",
        intro=f"{done} of {len(points)} points done; {', '.join(dict.fromkeys(points.setup))}. `{sweep['command']}`",
        colors={method: PALETTE[list(METHODS).index(method) % len(PALETTE)] for method in methods},
        runs=dict(zip(points.identity, points.method, strict=True)),
        columns=(METHOD, BETA, LR, QUALITY, KL),
        sections=tuple(section for section in sections if section.panels),
    )
