"""The definition of a sweep's dashboard: sections of panels over the keys of its W&B runs.

It is plain data, which `workspace` saves in W&B.
"""

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
# Training curves and their titles; a sweep shows those it has logged. Losses and gradient norms depend on the scale of
# beta, so they are not averaged over betas.
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
# In W&B methods differ by color alone, so no two of the first twelve share one.
PALETTE = (*COLORS, "#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#7F7F7F")


@dataclass(frozen=True)
class Scatter:
    """One mark per point, in the color of its method."""

    title: str
    x: str
    y: str
    log_x: bool = False


@dataclass(frozen=True)
class Curves:
    """A metric over steps: mean and range of the runs that share a value of `group`."""

    title: str
    y: str
    group: str


@dataclass(frozen=True)
class Parallel:
    """Parallel coordinates: one line per point."""

    title: str
    columns: tuple[tuple[str, str, bool], ...]  # key, name, whether logarithmic


@dataclass(frozen=True)
class Table:
    """A table that the aggregation run logged."""

    title: str
    key: str


@dataclass(frozen=True)
class Images:
    """Figures that the aggregation run logged."""

    title: str
    keys: tuple[str, ...]


Panel = Scatter | Curves | Parallel | Table | Images


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """The dashboard of one sweep."""

    name: str  # group of the runs
    title: str
    intro: str
    colors: dict[str, str]  # method -> color
    runs: dict[str, str]  # identity of a point -> its method
    columns: tuple[str, ...]  # of the table of runs, after the name
    sections: tuple[Section, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        sections = [
            {**asdict(section), "panels": [{"kind": type(p).__name__.lower(), **asdict(p)} for p in section.panels]}
            for section in self.sections
        ]
        return {"schema": SCHEMA, **asdict(self), "sections": sections}


def define(sweep: dict[str, Any], points: pd.DataFrame, metrics: Sequence[str], figures: Sequence[str]) -> Dashboard:
    """Return the dashboard of a sweep.

    sweep: content of sweep.json. points: of sweeps.analysis.results. metrics: keys of the training metrics, such as
    train/loss. figures: names of the figures that aggregation drew.
    """
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
        Section("Result", "Colors are methods. Selected on one split of the prompts, reported on the other.", result),
        Section("Training, by method", "Mean and range over the points of a method.", by_method),
        Section("Training, by method and beta", "Mean and range over learning rates and seeds.", by_series),
    ]
    if figures:
        images = Images("Figures of the report", tuple(f"figures/{name}" for name in figures))
        sections.append(Section("Figures", "The figures of report.html.", (images,)))
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
