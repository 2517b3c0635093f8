"""Compare tables, best.yaml and figures of a study with those that were computed again from its rows."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from src.errors import ConfigError
from src.store.sweep_folder import SweepFolder
from sweeps.aggregate import best_yaml
from sweeps.analysis import reporting_split
from sweeps.analysis.results import collect
from sweeps.report.escapes import csv_text

# Columns that say which row of a table one is.
KEYS = (
    "setup",
    "method",
    "against",
    "other",
    "judge",
    "task",
    "init",
    "variant",
    "beta",
    "lr",
    "seed",
    "Method",
    "rule",
)
ROUNDING = 1e-9  # share of a number by which sums on another processor may differ
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


@dataclass
class Comparison:
    """What was compared, and where the new files differ. figures: names of those that differ, numbers apart."""

    numbers: int = 0
    rounded: int = 0  # of the numbers, those that differ by rounding alone
    files: Counter[str] = field(default_factory=Counter)  # by kind
    lines: list[str] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)

    def value(self, where: str, old: Any, new: Any) -> None:
        """Compare a cell of a table, or a leaf of best.yaml."""
        one, other = _number(old), _number(new)
        if one is not None and other is not None:
            self.numbers += 1
            if one == other or (math.isnan(one) and math.isnan(other)):
                return
            if is_rounding(one, other):
                self.rounded += 1
                return
        elif old == new or _without_store(where, old) == _without_store(where, new):
            return
        self.lines.append(f"{where}: {_shown(old)} in the study, {_shown(new)} computed again")


def is_rounding(one: float, other: float) -> bool:
    """Return whether numbers differ by no more than sums on another processor may be rounded otherwise."""
    return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-12)


def compare(packed: SweepFolder, again: SweepFolder) -> Comparison:
    """Compare points.csv, best.yaml, all tables and all figures of a study with those computed again."""
    comparison = Comparison()
    _compare_csv(comparison, packed.points_csv, again.points_csv, packed.points_csv.name)
    comparison.files["points.csv"] += 1
    _compare_best(comparison, *(f.best_yaml.read_text(encoding="utf-8") for f in (packed, again)))
    comparison.files["best.yaml"] += 1
    for kind, one, other in (("tables", packed.tables, again.tables), ("figures", packed.figures, again.figures)):
        names = {path.name for folder in (one, other) for path in folder.glob("*") if path.suffix != ".png"}
        for name in sorted(names):
            _compare_file(comparison, kind, one / name, other / name)
    return comparison


def check_tables(folder: SweepFolder) -> None:
    """Raise ConfigError when the tables of a sweep are not made of the results that its store has now.

    points.csv stands for all of them, and best.yaml for those that depend on the rule of selection.
    """
    results, comparison, name = collect([folder]), Comparison(), folder.points_csv.name
    points = csv_text(results.points).decode()
    compare_tables(comparison, _read_csv(folder.points_csv.read_text(encoding="utf-8")), _read_csv(points), name)
    _, best = reporting_split.selected_points(results, rule := results.sweeps[0]["select"])
    _compare_best(comparison, folder.best_yaml.read_text(encoding="utf-8"), best_yaml(best, results.settings))
    if comparison.lines:
        place = comparison.lines[0].partition(": ")[0]
        raise ConfigError(
            f"{folder.path}: its tables are not of the results that the store has now, selected by sweep.select={rule} "
            f"({place}); python -m sweeps.aggregate {folder.path} brings them up to date"
        )


def _compare_best(comparison: Comparison, old: str, new: str) -> None:
    one, other = (dict(_leaves(yaml.safe_load(text))) for text in (old, new))
    for key in dict.fromkeys((*one, *other)):
        comparison.value(f"best.yaml, {key}", one.get(key), other.get(key))


def _compare_file(comparison: Comparison, kind: str, old: Path, new: Path) -> None:
    name = f"{kind}/{old.name}"
    if not old.exists() or not new.exists():
        where = "not in the study, but" if new.exists() else "in the study, but not"
        comparison.lines.append(f"{name}: {where} among those that were made again")
        return
    comparison.files["tables" if old.suffix == ".csv" else kind if kind == "figures" else "other formats"] += 1
    if old.suffix == ".csv":
        _compare_csv(comparison, old, new, name)
    elif old.read_bytes() != new.read_bytes():
        if kind == "figures" and not _same_drawing(old, new):
            comparison.figures.append(name)
        elif kind == "tables":
            comparison.lines.append(f"{name}: another text")


def _compare_csv(comparison: Comparison, old: Path, new: Path, name: str) -> None:
    one, other = (_read_csv(path.read_text(encoding="utf-8")) for path in (old, new))
    compare_tables(comparison, one, other, name)


def compare_tables(comparison: Comparison, one: list[list[str]], other: list[list[str]], name: str) -> None:
    """Compare tables row by row, found by their labels: the order of rows says nothing that their numbers do not."""
    if one[:1] != other[:1]:
        others = sorted({*one[0]} ^ {*other[0]}) if one and other else []
        comparison.lines.append(f"{name}: other columns ({', '.join(others) or 'in another order, or none'})")
        return
    header = one[0] if one else []
    tables = [_by_label(header, rows[1:]) for rows in (one, other)]
    for label in dict.fromkeys((*tables[0], *tables[1])):
        old_row, new_row = (table.get(label) for table in tables)
        if old_row is None or new_row is None:
            where = "not in the study, but" if old_row is None else "in the study, but not"
            comparison.lines.append(f"{name}, {label}: {where} in the one that was made again")
            continue
        for column, old_cell, new_cell in zip(header, old_row, new_row, strict=True):
            comparison.value(f"{name}, {label}, {column}", old_cell, new_cell)


def _read_csv(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def _by_label(header: list[str], rows: list[list[str]]) -> dict[str, list[str]]:
    """Return rows by what says which one each is, the second one of a label with `(2)`."""
    places = [(column, header.index(column)) for column in KEYS if column in header]
    seen: Counter[str] = Counter()
    labeled: dict[str, list[str]] = {}
    for row in rows:
        label = " ".join(_labeled(column, row[place]) for column, place in places if row[place]) or "row"
        seen[label] += 1
        labeled[f"{label} ({seen[label]})" if seen[label] > 1 or label == "row" else label] = row
    return labeled


def _labeled(column: str, cell: str) -> str:
    return f"{column}={cell}" if column in ("beta", "lr", "seed", "variant") else cell


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{place}.{key}".lstrip("."))
    else:
        yield place, value


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _without_store(where: str, value: Any) -> Any:
    """Return a checkpoint without the path of its store, which is another one here."""
    return PurePosixPath(value).parts[-2:] if where.endswith("checkpoint") and isinstance(value, str) else value


def _shown(value: Any) -> str:
    return "nothing" if value in (None, "") else str(value)


def _same_drawing(old: Path, new: Path) -> bool:
    """Return whether two SVGs are equal but for numbers that differ by less than a hundredth of a point."""
    one, other = (path.read_text(encoding="utf-8") for path in (old, new))
    if NUMBER.sub("#", one) != NUMBER.sub("#", other):
        return False
    numbers = zip(NUMBER.findall(one), NUMBER.findall(other), strict=True)
    return all(a == b or math.isclose(float(a), float(b), abs_tol=0.01) for a, b in numbers)
