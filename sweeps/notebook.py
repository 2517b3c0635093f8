"""The results of a sweep in a notebook: `from sweeps import open_study; s = open_study("outputs/sweeps/demo")`."""

from __future__ import annotations

import html
import os
from collections.abc import Hashable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from src.config.fields import choices_of
from src.config.schema import Sweep
from src.errors import ConfigError
from src.store.files import read_jsonl
from src.store.store import JUDGEMENTS_FILE, METRICS_FILE, SAMPLES_FILE, sample_key
from sweeps.analysis import judges, reporting_split
from sweeps.analysis.results import Results, collect, read_quality
from sweeps.report import figures
from sweeps.report.graphics import Drawing
from sweeps.report.published import published_points
from sweeps.report.tables import best_table
from sweeps.study.opening import open_sweep

# Columns of points that every other table begins with; `identity` names one point.
KEYS = ["setup", "method", "init", "variant", "beta", "lr", "seed", "identity"]
JUDGED = ["verdict", "reason", "baseline"]  # columns of `samples` that are those of judgements.jsonl
SPLITS = {True: "selection", False: "reporting"}


def open_study(*paths: str | os.PathLike[str], select: str | None = None) -> Study:
    """Open a sweep's folder or a study.zip of sweeps.pack; several, and their points stand side by side.

    select: how a point of each method is selected, by default `sweep.select` of the first sweep. Raises ConfigError for
    what is no sweep, one of another version, a study that is not as it was packed, and an unknown rule.
    """
    if not paths:
        raise ConfigError("open_study: no folder; give that of a sweep, such as outputs/sweeps/demo")
    if select is not None and select not in (rules := choices_of(Sweep, "select")):
        raise ConfigError(f"select={select}: unknown, use one of {', '.join(map(str, rules))}")
    unpacked = TemporaryDirectory(prefix="study-", ignore_cleanup_errors=True)
    results = collect([open_sweep(os.fspath(path), Path(unpacked.name)) for path in paths])
    results.temporary = Path(unpacked.name).resolve()
    return Study(results, select, unpacked)


class Study:
    """Tables and figures of one or several sweeps, each computed when it is first asked for.

    What a sweep has finished is there while it runs: open it again to see more. Damaged files raise DamagedFile.
    """

    def __init__(self, results: Results, select: str | None, unpacked: TemporaryDirectory[str]) -> None:
        """Keep the folder that studies are `unpacked` in as long as there is this object."""
        self.results, self._unpacked = results, unpacked
        self.name = results.name
        self.select = select or results.sweeps[0]["select"]

    @cached_property
    def points(self) -> pd.DataFrame:
        """One row a point, done or not, with the columns of points.csv; of a study.zip without checkpoints."""
        return self.results.without_temporary(self.results.points)

    @cached_property
    def best(self) -> pd.DataFrame:
        """The selected point of every setup, method, init and variant, averaged over seeds.

        Columns of `points`, `seeds`, `identities` (of the results of the seeds), `shortlist`, `top3_reporting`, and the
        95 % interval of the reported quality, `quality_reporting_low` and `_high`.
        """
        best = self.results.without_temporary(self._selected[1])
        return best.drop(columns=["seed", "identity", "candidate", "error"]).reset_index(drop=True)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row a finished point and prompt: KEYS, `prompt_index`, `split` (selection, reporting), `quality`."""
        tables = []
        for row in self._done():
            quality = read_quality(self._folder(row, "evaluate"))
            splits = [SPLITS[selects] for selects in quality["selection"]]
            table = {"prompt_index": quality["prompts"], "split": splits, "quality": quality["values"]}
            tables.append(_with_keys(row, table))
        return _stacked(tables, [*KEYS, "prompt_index", "split", "quality"])

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a finished point and optimizer step of alignment: KEYS, `step`, `loss`, and the others logged."""
        tables = [_with_keys(row, _rows(self._folder(row, "align") / METRICS_FILE, "step")) for row in self._done()]
        return _stacked(tables, [*KEYS, "step", "loss"])

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a finished point and sampled response.

        KEYS, `prompt_index` (as in `prompts`), `prompt`, `response`, `tokens`, `logp` and `reference_logp` (nats), and
        where a judge compared it `verdict` (1: it won), `reason` and `baseline`, the response it was compared with.
        """
        tables = []
        for row in self._done():
            judgements = _rows(self._folder(row, "evaluate") / JUDGEMENTS_FILE, "index")
            judged = {sample_key(one): {name: one.get(name) for name in JUDGED} for one in judgements}
            samples = _rows(self._folder(row, "generate") / SAMPLES_FILE, "index", "prompt", "response")
            not_judged = dict.fromkeys(JUDGED)
            tables.append(_with_keys(row, [one | judged.get(sample_key(one), not_judged) for one in samples]))
        tables = [table.rename(columns={"index": "prompt_index"}) for table in tables]
        return _stacked(tables, [*KEYS, "prompt_index", "prompt", "response", *JUDGED])

    @cached_property
    def figures(self) -> list[str]:
        """The names of all figures, which are those of the files in the sweep's folder figures/."""
        return [drawing.name for drawing in self._drawings()]

    def figure(self, name: str) -> Figure:
        """Return a figure of the report, to be shown, changed or saved.

        name: one of `figures`, or its end where that is enough, as `quality_over_beta` is for a sweep of one setup.
        Raises ConfigError, with the names, for another one and one that fits several.
        """
        fitting = [one for one in self.figures if one == name] or [
            one for one in self.figures if one.endswith(f"_{name}")
        ]
        if len(fitting) == 1:
            return next(drawing.figure for drawing in self._drawings() if drawing.name == fitting[0])
        if fitting:
            raise ConfigError(f"figure {name!r}: {len(fitting)} have this name, use one of {', '.join(fitting)}")
        names = ", ".join(self.figures) or "none, as no point is done"
        raise ConfigError(f"figure {name!r}: unknown; the figures of {self.name} are {names}")

    def __repr__(self) -> str:
        return f"Study {self.name}: {self._counts()}"

    def _repr_html_(self) -> str:
        """Return the best table of the report, with what else there is."""
        best, prompts = self.best, self.results.prompts
        table = best_table(best, reporting_split.differences(best, prompts)).to_html(index=False, border=0)
        tables = ", ".join(f"<code>{name}</code>" for name in ("points", "best", "prompts", "metrics", "samples"))
        names = ", ".join(f"<code>{html.escape(name)}</code>" for name in self.figures) or "none yet"
        title = f"<b>{html.escape(self.name)}</b>: {html.escape(self._counts())}"
        return f"<p>{title}</p>{table}<p>Tables: {tables}. Figures: {names}.</p>"

    def _counts(self) -> str:
        states = self.points.state.value_counts()
        return f"{len(self.points)} points: " + ", ".join(f"{count} {state}" for state, count in states.items())

    @cached_property
    def _selected(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The points averaged over seeds, and the selected ones with intervals, as aggregate has them."""
        return reporting_split.selected_points(self.results, self.select)

    def _drawings(self) -> Iterator[Drawing]:
        """Yield every figure of the report anew: what a reader changes in one does not come back."""
        averages, best = self._selected
        verdicts = reporting_split.verdicts(best, self.results.prompts)
        verdicts = judges.with_outcomes(verdicts, judges.read_verdicts(self.results), best)
        return figures.draw(averages, best, verdicts, published_points(self.results, best))

    def _done(self) -> list[dict[Hashable, Any]]:
        return self.points[self.points.state == "done"].to_dict("records")

    def _folder(self, row: dict[Hashable, Any], role: str) -> Path:
        folder = self.results.artifacts(row["identity"], role)
        assert folder is not None, "every point has this stage"
        return folder


def _rows(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the rows of a file, which have these keys; none where there is no such file."""
    try:
        return list(read_jsonl(path, keys))
    except FileNotFoundError:
        return []


def _with_keys(row: dict[Hashable, Any], table: list[dict[str, Any]] | dict[str, Any]) -> pd.DataFrame:
    """Return the table with the KEYS of its point as first columns. table: rows or columns."""
    frame = pd.DataFrame(table)
    keys = pd.DataFrame({name: [row[name]] * len(frame) for name in KEYS}, index=frame.index)
    return pd.concat([keys, frame], axis=1)


def _stacked(tables: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    """Return one table of those that have rows; without any an empty one with these columns."""
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
