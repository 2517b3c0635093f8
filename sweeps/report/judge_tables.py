"""What the judges are like, in words and in tables for the report; from `sweeps.analysis.judges`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import pandas as pd

from sweeps.analysis.selection import GROUP
from sweeps.report.plot_style import NAMES

STRONG = 0.55  # share of wins of the first or the longer answer that is called a preference, when its interval is above


Group = tuple[Any, ...]  # setup, init and variant, within which methods are compared


def judge_sentences(
    selecting: dict[Group, str], leanings: pd.DataFrame, agreement: pd.DataFrame, disagreements: pd.DataFrame
) -> list[str]:
    """Return what is to be known before a ranking is believed, one sentence each; of which group, where several are.

    selecting: group -> the judge, or the measure, that its points were selected by.
    """
    sentences = _selections(selecting, leanings)
    for row in leanings.to_dict("records"):
        of_order, of_length = ("the answer it reads first", "the second one"), ("the longer answer", "the shorter one")
        where = _where(leanings, row)
        sentences += _preference(row, "first", "questions", of_order, where)
        explained = "Longer answers may be the better ones: compare with other judges."
        sentences += [f"{s} {explained}" for s in _preference(row, "longer", "decided", of_length, where)]
    if len(agreement) and disagreements.empty:
        sentences.append("No two methods are ordered oppositely by two judges beyond noise.")
    for row in disagreements.to_dict("records"):
        method, other = NAMES[row["method"]], NAMES[row["against"]]
        sides = f"{row['judge']} by {row['difference']:+.3f}, {row['judge_other']} by {row['difference_other']:+.3f}"
        where = _where(leanings, row)
        sentences.append(f"{method} against {other}{where}: the judges disagree beyond noise ({sides}).")
    return sentences


def _selections(selecting: dict[Group, str], leanings: pd.DataFrame) -> list[str]:
    """Return by what the points were selected that several judges have judged: once, where all were by the same."""
    if leanings.empty:
        return []
    judged = [rows for _, rows in leanings.groupby(GROUP, sort=False, dropna=False) if len(rows) > 1]
    first = [rows.iloc[0].to_dict() for rows in judged]
    by = [selecting[tuple(row[name] for name in GROUP)] for row in first]
    if len(set(by)) == 1:
        return [f"Points were selected by {by[0]} alone."]
    wheres = [_where(leanings, row) for row in first]
    return [f"Points{where} were selected by {name} alone." for where, name in zip(wheres, by, strict=True)]


def _preference(row: dict[Hashable, Any], name: str, count: str, words: tuple[str, str], where: str) -> list[str]:
    """Return a sentence where a share is far from a half. words: for a high and for a low one."""
    share, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    unit = {"questions": "questions", "decided": "decided comparisons"}[count]
    number = f"{row[count]:,} {unit}"
    if low > STRONG:
        return [f"{row['judge']} prefers {words[0]}{where}: in {_share(share, low, high)} of {number}."]
    if high < 1 - STRONG:
        return [f"{row['judge']} prefers {words[1]}{where}: in {_share(1 - share, 1 - high, 1 - low)} of {number}."]
    return []


def judge_tables(tables: dict[str, pd.DataFrame]) -> list[pd.DataFrame]:
    """Return rankings, agreement and leanings as text. tables: by name, as aggregate writes them."""
    return [
        rankings_text(tables["judge_rankings"]),
        agreement_text(tables["judge_agreement"]),
        leanings_text(tables["judges"]),
    ]


def leanings_text(leanings: pd.DataFrame) -> pd.DataFrame:
    """Return the table of judges as text."""
    rows = []
    for row in leanings.to_dict("records"):
        shares = {
            title: _share(row[name], row[f"{name}_low"], row[f"{name}_high"])
            for name, title in (("first", "First answer wins"), ("longer", "Longer answer wins"))
        }
        twice = "-" if pd.isna(row["equal"]) else f"{100 * row['equal']:.1f} % of {row['repeated']:,}"
        counts = {"Judge": row["judge"], "Verdicts": f"{row['verdicts']:,}"}
        rows.append(_varying(leanings, row) | counts | shares | {"Same verdict when asked twice": twice})
    return pd.DataFrame(rows)


def _share(value: float, low: float, high: float) -> str:
    return "-" if pd.isna(value) else f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def agreement_text(agreement: pd.DataFrame) -> pd.DataFrame:
    """Return the table of agreement as text."""
    rows = []
    for row in agreement.to_dict("records"):
        has_kappa = not pd.isna(row["kappa"])
        kappa = f"{row['kappa']:.3f} [{row['kappa_low']:.3f}, {row['kappa_high']:.3f}]" if has_kappa else "-"
        ranks = "-" if pd.isna(row["rank_correlation"]) else f"{row['rank_correlation']:.3f}"
        judges = {"Judges": f"{row['judge']}, {row['other']}", "Samples": f"{row['samples']:,}"}
        same = {"Same verdict": f"{100 * row['equal']:.1f} %" if has_kappa else "-", "Cohen's kappa": kappa}
        rows.append(_varying(agreement, row) | judges | same | {"Rank correlation of points": ranks})
    return pd.DataFrame(rows)


def rankings_text(rankings: pd.DataFrame) -> pd.DataFrame:
    """Return the selected points with quality and rank under each judge, and what another judge would select."""
    if rankings.empty or not rankings.further.any():
        return pd.DataFrame()
    rows: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rankings.to_dict("records"):
        key = tuple(row[name] for name in (*GROUP, "method"))
        point = {"Method": NAMES[row["method"]], "beta": f"{row['beta']:g}", "lr": f"{row['lr']:g}"}
        cells = rows.setdefault(key, _varying(rankings, row) | point)
        quality = "-" if pd.isna(row["quality"]) else f"{row['quality']:.3f} ({row['rank']:.0f})"
        cells[f"{row['judge']} (rank)"] = quality
        if row["further"]:
            cells[f"{row['judge']} would select"] = f"beta {row['beta_of_judge']:g}, lr {row['lr_of_judge']:g}"
    return pd.DataFrame(list(rows.values())).fillna("-")


def _where(table: pd.DataFrame, row: dict[Hashable, Any]) -> str:
    """Return the group of a row in words, such as " (setup a, init sft)"; empty where the table has a single one."""
    of_group = [f"{name.lower()} {value or 'default'}" for name, value in _varying(table, row).items()]
    return f" ({', '.join(of_group)})" if of_group else ""


def _varying(table: pd.DataFrame, row: dict[Hashable, Any]) -> dict[str, str]:
    """Return the columns of GROUP that vary in a table, with the values of a row."""
    varying = [name for name in GROUP if table[name].nunique(dropna=False) > 1]
    return {name.capitalize(): "" if pd.isna(row[name]) else str(row[name]) for name in varying}
