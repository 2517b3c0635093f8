"""Tables 1, 2 and 7 of the paper (arXiv 2502.01237), in its layout, of one's own selected points.

Table 1 has scores by init and SFT term, Table 2 by setup, Table 7 the selected learning rates and betas by setup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd

from sweeps.analysis.results import OF_JUDGE, Results
from sweeps.report.escapes import csv_text, latex_cell, markdown_cell
from sweeps.report.graphics import shorten
from sweeps.report.paper_rows import TUNED, PaperRow, paper_row, settings_of
from sweeps.report.selected_figures import numeric_key
from sweeps.report.table_files import markdown_text
from sweeps.report.tables import mean_scores

SHORT = {"length_controlled_win_rate": "LC", "win_rate": "WR", "arena_hard": "AH", "accuracy": "Accuracy"}
BEST, SECOND = "best", "second"
MARKDOWN = {BEST: "**{}**", SECOND: "<ins>{}</ins>", "": "{}"}
LATEX = {BEST: r"\textbf{{{}}}", SECOND: r"\underline{{{}}}", "": "{}"}
EVALUATION = ("evaluation.", "judge.", "capability.")  # starts of settings that training does not depend on
MAX_LABEL = 60  # characters of a setup with its settings
CAPTIONS = {
    "paper_table_1": "Table 1: by init and SFT term (+)",
    "paper_table_2": "Table 2: by setup",
    "paper_table_7": "Table 7: selected learning rate and beta",
}


class Cell(NamedTuple):
    """A text and, where the cells of its column are ranked, the number as it is shown."""

    text: str
    value: float | None = None


class Study(NamedTuple):
    """A selected point with its place in the tables."""

    group: str  # the columns that it is in: its setup, and settings that are not tuned
    evaluation: str  # how it was evaluated, where the sweeps differ in that
    row: PaperRow
    settings: dict[str, Any]  # tuned ones, besides beta and lr
    point: dict[Hashable, Any]


class Column(NamedTuple):
    """Cells of one group and evaluation."""

    group: str
    name: str
    evaluation: str

    def is_alike(self, other: Column) -> bool:
        """Return whether the columns differ in their evaluation at most."""
        return (self.group, self.name) == (other.group, other.name)

    def title(self, columns: list[Column]) -> str:
        """Return the name, with the evaluation where several of the columns are alike."""
        return f"{self.name}, {self.evaluation}" if sum(map(self.is_alike, columns)) > 1 else self.name


@dataclass(frozen=True)
class PaperTable:
    """Rows of cells; columns that label the rows come first, then those of each group."""

    caption: str
    columns: list[tuple[str, str]]  # group, "" of labels, and title of each
    rows: list[list[Cell]]

    @property
    def headings(self) -> list[tuple[str, int]]:
        """The groups with their numbers of columns; none where there is only one group."""
        spans = [(group, len(list(columns))) for group, columns in groupby(group for group, _ in self.columns)]
        return spans if len(spans) > 2 else []

    @property
    def titles(self) -> list[str]:
        return [title for _, title in self.columns]

    @property
    def marked(self) -> list[list[tuple[str, str]]]:
        """The rows, each cell as its text and its mark: best, second, or none."""
        marks = [_marks([cell.value for cell in column]) for column in zip(*self.rows, strict=True)]
        return [[(cell.text, of.get(cell.value, "")) for cell, of in zip(row, marks, strict=True)] for row in self.rows]

    def formats(self) -> dict[str, str | bytes]:
        """Return suffix -> content of a file; none of a table without rows. The LaTeX needs booktabs."""
        if not self.rows:
            return {}
        names = [f"{group} {title}".strip() if self.headings else title for group, title in self.columns]
        rows = [[MARKDOWN[mark].format(markdown_cell(text)) for text, mark in row] for row in self.marked]
        texts = pd.DataFrame([[cell.text for cell in row] for row in self.rows], columns=names)
        return {
            "csv": csv_text(texts),
            "md": markdown_text([markdown_cell(name) for name in names], rows),
            "tex": "\n".join([*self._latex(), ""]),
        }

    def _latex(self) -> Iterator[str]:
        yield rf"\begin{{tabular}}{{{''.join('r' if group else 'l' for group, _ in self.columns)}}}"
        yield r"\toprule"
        if self.headings:
            spans = [rf"\multicolumn{{{width}}}{{c}}{{{latex_cell(text)}}}" for text, width in self.headings]
            yield rf"{' & '.join(spans)} \\"
            start = 1
            for text, width in self.headings:
                if text:
                    yield rf"\cmidrule(lr){{{start}-{start + width - 1}}}"
                start += width
        yield rf"{' & '.join(map(latex_cell, self.titles))} \\"
        yield r"\midrule"
        for row in self.marked:
            yield rf"{' & '.join(LATEX[mark].format(latex_cell(text)) for text, mark in row)} \\"
        yield r"\bottomrule"
        yield r"\end{tabular}"


def _marks(values: list[float | None]) -> dict[float | None, str]:
    """Return the mark of the best and of the second value; none where there is nothing to compare."""
    ranked = sorted({value for value in values if value is not None}, reverse=True)
    return dict(zip(ranked, (BEST, SECOND), strict=False)) if len(ranked) > 1 else {}


def paper_tables(results: Results, best: pd.DataFrame) -> dict[str, PaperTable]:
    """Return the paper's tables of the selected points: name of a file -> table, without rows where it has none.

    Of the points that a row stands for (any lambda, number of epochs and options of the method) it is the best one by
    the selection split. Scores are the benchmark's own, over all questions; without a benchmark, quality on the
    reporting split. best: of select_points.
    """
    studies = _studies(results, best)
    num_starts = Counter(group for group, *_ in {(study.group, *study.row[:2]) for study in studies})

    def scores(study: Study) -> Iterator[tuple[str, Cell]]:
        return _scores(study.point, results.scores)

    tables = {
        "paper_table_1": ([study for study in studies if num_starts[study.group] > 1], scores),
        "paper_table_2": ([study for study in studies if study.row.is_two_stage], scores),
        "paper_table_7": (studies, _hyper_parameters),
    }
    return {name: _table(CAPTIONS[name], *contents) for name, contents in tables.items()}


def _studies(results: Results, best: pd.DataFrame) -> list[Study]:
    """Return the best point of every row, group and evaluation."""
    studies: dict[tuple[str, str, PaperRow], Study] = {}
    rows = best.sort_values(["setup", "quality_selection"], kind="stable").to_dict("records")
    for point in rows:
        # Points of a sweep before version 0.3 have the name of their variant alone.
        varied = results.settings.get(point["identities"][0], {"variant": point["variant"]} if point["variant"] else {})
        tuned = {key: value for key, value in varied.items() if key in TUNED or key.startswith("method.")}
        judging = {key: value for key, value in varied.items() if key.startswith(EVALUATION)}
        others = {key: value for key, value in varied.items() if key not in tuned | judging}
        group = ", ".join(filter(None, (point["setup"], _label(others))))
        row = paper_row(point, settings_of(results, point))
        studies[group, _label(judging), row] = Study(group, _label(judging), row, tuned, point)
    return list(studies.values())


def _label(settings: dict[str, Any]) -> str:
    """Return settings in a few words: the value of a name, else the end of the key and the value."""
    words = (str(v) if k.endswith(".name") else f"{k.rpartition('.')[2]}={v}" for k, v in sorted(settings.items()))
    return ", ".join(dict.fromkeys(words))


def _scores(point: dict[Hashable, Any], scores: dict[str, dict[str, dict[str, float]]]) -> Iterator[tuple[str, Cell]]:
    """Yield the scores of a point in percent, as `LC% (std)` or `AH% (CI)`: the ends of the interval as offsets."""
    # Of the judge that selects, as in the paper.
    means = {n: s for n, s in mean_scores(point["identities"], scores).items() if OF_JUDGE not in n}
    if not means:
        value, error = 100 * point["quality_reporting"], 100 * point["quality_reporting_se"]
        means = {point["metric"]: pd.Series({"value": value, "se": error})}
    for name, score in means.items():
        title = SHORT.get(name, name.replace("_", " ").capitalize())
        title += "" if title.endswith("rating") else "%"
        value = score["value"]
        if pd.isna(value):  # a point whose reporting prompts were not judged
            yield f"{title} (std)", Cell("-")
        elif "low" in score:
            text = f"{value:.1f} ({score['low'] - value:z.1f}, {score['high'] - value:z.1f})"
            yield f"{title} (CI)", Cell(text, round(value, 1))
        else:
            error = "" if pd.isna(score["se"]) else f" ({score['se']:.2f})"
            yield f"{title} (std)", Cell(f"{value:.2f}{error}", round(value, 2))


def _hyper_parameters(study: Study) -> Iterator[tuple[str, Cell]]:
    yield "lr", Cell(f"{study.point['lr']:g}")
    yield "beta", Cell(f"{study.point['beta']:g}")
    of_loss = {key: value for key, value in study.settings.items() if study.row.sft_term or key != "init.sft_weight"}
    if of_loss:
        yield "other settings", Cell(_label(of_loss))


def _table(caption: str, studies: list[Study], cells_of: Callable[[Study], Iterator[tuple[str, Cell]]]) -> PaperTable:
    """Lay out one row for each method, init and SFT term, and the columns of each group side by side."""
    rows = sorted({study.row for study in studies}, key=PaperRow.order)
    columns: dict[Column, dict[PaperRow, Cell]] = {}
    for study in studies:
        for name, cell in cells_of(study):
            columns.setdefault(Column(study.group, name, study.evaluation), {})[study.row] = cell
    columns = _without_repetitions(columns)
    groups = sorted({column.group for column in columns}, key=numeric_key)
    order = sorted(columns, key=lambda column: (groups.index(column.group), _rank(column.name)))
    labels = {"Init": PaperRow.init_name, "Method": PaperRow.method_name}
    if len({(row.init, row.sft_term) for row in rows}) == 1:
        del labels["Init"]
    cells = [[columns[column].get(row, Cell("-")) for column in order] for row in rows]
    return PaperTable(
        caption,
        [("", label) for label in labels]
        + [(shorten(column.group, MAX_LABEL), column.title(order)) for column in order],
        [[*(Cell(label(row)) for label in labels.values()), *of_row] for row, of_row in zip(rows, cells, strict=True)],
    )


def _without_repetitions(columns: dict[Column, dict[PaperRow, Cell]]) -> dict[Column, dict[PaperRow, Cell]]:
    """Return the columns without those that another evaluation has as well, cell by cell, such as equal betas."""
    kept: dict[Column, dict[PaperRow, Cell]] = {}
    for column, cells in columns.items():
        if not any(column.is_alike(other) and cells == kept[other] for other in kept):
            kept[column] = cells
    return kept


def _rank(name: str) -> int:
    """Return the place of a score: the paper's first, in its order."""
    return next((n for n, short in enumerate(SHORT.values()) if name.startswith(f"{short}%")), len(SHORT))
