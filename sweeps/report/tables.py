"""The tables of a sweep, and the best one on the terminal."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from src.estimates.power import LEVEL
from sweeps.analysis.reporting_split import VERDICTS
from sweeps.analysis.results import Results
from sweeps.analysis.selection import GROUP
from sweeps.report.diagnosis import diagnosis_lines
from sweeps.report.plot_style import NAMES
from sweeps.search.variants import variant_text

BEST, NOT_SIGNIFICANT = "best", "n.s."  # values of the column "Gap to best"
NOT_JUDGED = "not judged"  # the quality of a point on the reporting split, where its prompts have no verdict
# Of all validation pairs; where quality is reward accuracy, that is the average by prompt on the reporting split.
ALL_PAIRS = "Reward accuracy, all pairs"
SFT_SETTINGS = ("dataset.", "model.", "trainer.sft.", "engine.precision")  # of a variant, those that SFT depends on
CAPABILITY = "Capability change"
OPTIONAL_COLUMNS = (
    CAPABILITY,
    "KL / sequence",
    "Shortlist",
    "Gap to best",
)  # dropped in this order on a narrow terminal
PER_TOKEN = ["KL / token", "KL (RB) / token"]  # too wide for the page too: in the table's files and points.csv
NOT_ON_TERMINAL = ["Kind", "Top 3", *PER_TOKEN, "KL (RB) / sequence", ALL_PAIRS, "Length"]
CAPTION = """selected on the selection split, measured on the reporting split (95 % interval)
KL: mean log-ratio of policy and initial model over samples of the policy, nats
shortlist: number of points not significantly different from the method's best one
n.s.: not significantly different from the best method (paired t-test, Holm, 5 %)"""


def best_table(best: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """Return the selected point of every method as text. differences: of reporting_split.differences."""
    quality, rows = quality_column(best), []
    for row, gap in zip(best.to_dict("records"), gap_to_best(best, differences), strict=True):
        low, high = row["quality_reporting_low"], row["quality_reporting_high"]
        interval = NOT_JUDGED if pd.isna(low) else f"{row['quality_reporting']:.3f} [{low:.3f}, {high:.3f}]"
        rows.append(
            _varying(best, row, "setup", "init", "variant", "seeds")
            | {
                "Method": NAMES[row["method"]],
                "Kind": row["kind"],
                "beta": f"{row['beta']:g}",
                "lr": f"{row['lr']:g}",
                quality: interval,
                "Gap to best": gap,
                "Top 3": with_error(row["top3_reporting"], None, 3),
                "Shortlist": str(row["shortlist"]),
                "KL / sequence": with_error(row["kl_sequence"], row["kl_sequence_se"], 2),
                "KL / token": with_error(row["kl_token"], row["kl_token_se"], 3),
                "KL (RB) / sequence": with_error(row["kl_sequence_rb"], row["kl_sequence_rb_se"], 2),
                "KL (RB) / token": with_error(row["kl_token_rb"], row["kl_token_rb_se"], 3),
                ALL_PAIRS: with_error(row["reward_accuracy"], None, 3),
                "Length": with_error(row["response_tokens"], None, 1),
            }
            | ({CAPABILITY: change_with_error(row)} if best.capability_change.notna().any() else {})
        )
    return pd.DataFrame(rows)


def change_with_error(row: Mapping[Hashable, Any]) -> str:
    """Return the change of capability from the SFT model's, with its sign."""
    text = with_error(row["capability_change"], row["capability_change_se"], 3)
    return text if text == "-" or text.startswith("-") else f"+{text}"


def _varying(best: pd.DataFrame, row: dict[Hashable, Any], *keys: str) -> dict[str, str]:
    """Return those of the keys in which the rows of the table differ, as columns of one row."""
    return {key.capitalize(): str(row[key]) for key in keys if best[key].nunique() > 1}


def verdict_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Return the wins, ties and losses of the selected points against the baseline; empty without any.

    verdicts: of judges.with_outcomes.
    """
    names = {verdict: f"{verdict.capitalize()} %" for verdict in VERDICTS}
    rows = []
    for row in verdicts.to_dict("records"):
        point = {"Method": NAMES[row["method"]], "beta": f"{row['beta']:g}", "lr": f"{row['lr']:g}"}
        numbers = {name: row[verdict] for verdict, name in names.items()}
        numbers |= {"Win rate": row["quality_reporting"], "Prompts": row["prompts"]}
        rows.append(_varying(verdicts, row, *GROUP, "seeds", "judge") | point | numbers)
    return pd.DataFrame(rows)


def benchmark_table(best: pd.DataFrame, scores: dict[str, dict[str, dict[str, float]]]) -> pd.DataFrame:
    """Return the scores of the selected points by each benchmark's own rules, over all questions; empty without any.

    Scores are averaged over seeds. scores: of Results.
    """
    rows = []
    for row in best.to_dict("records"):
        means = mean_scores(row["identities"], scores)
        units = {name: "" if name.endswith("rating") else " %" for name in means}
        columns = {f"{name.replace('_', ' ').capitalize()}{unit}": _score(means[name]) for name, unit in units.items()}
        if columns:
            point = {"Method": NAMES[row["method"]], "beta": f"{row['beta']:g}", "lr": f"{row['lr']:g}"}
            rows.append(_varying(best, row, *GROUP) | point | columns)
    return pd.DataFrame(rows).fillna("-")


def mean_scores(identities: list[str], scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, pd.Series[float]]:
    """Return the benchmark scores of a point, averaged over its seeds: name -> value, and se or low and high."""
    by_seed = [scores.get(identity, {}) for identity in identities]
    names = dict.fromkeys(name for seed in by_seed for name in seed)
    return {name: pd.DataFrame([seed[name] for seed in by_seed if name in seed]).mean() for name in names}


def sources_table(best: pd.DataFrame, sources: dict[str, dict[str, dict[str, Any]]]) -> pd.DataFrame:
    """Return the measurements of the selected points by source, averaged over seeds; empty without any.

    A source is a table of a mixture or a part of a benchmark.

    Quality is that of the reporting split, all else of all held-out rows. sources: of Results.
    """
    quality, rows = quality_column(best), []
    names = {
        "quality": quality,
        "reward_accuracy": ALL_PAIRS,
        "validation_loss": "Loss",
        "sft_validation_loss": "SFT validation loss",
    }
    for row in best.to_dict("records"):
        by_seed = [sources.get(identity, {}) for identity in row["identities"]]
        for source in dict.fromkeys(name for seed in by_seed for name in seed):
            columns = {}
            for name, title in names.items():
                measured = [seed[source][name] for seed in by_seed if name in seed.get(source, {})]
                if measured:
                    mean = pd.DataFrame(measured, columns=["value", "se"], dtype=float).mean()
                    columns[title] = with_error(mean["value"], mean["se"], 3)
            point = {"Method": NAMES[row["method"]], "beta": f"{row['beta']:g}", "lr": f"{row['lr']:g}"}
            rows.append(_varying(best, row, *GROUP) | point | {"Source": source} | columns)
    return pd.DataFrame(rows).fillna("-")


def sft_table(results: Results) -> pd.DataFrame:
    """Return the validation loss of every SFT model, nats per token; empty where none was validated.

    Its setup, and where these differ its seed and those settings of the sweep that SFT depends on.
    """
    validated = results.points[results.points.sft_validation_loss.notna()]
    models: dict[tuple[str, str | None], list[dict[Hashable, Any]]] = {}
    for row in validated.to_dict("records"):
        models.setdefault((row["setup"], results.identity_of(row["identity"], "sft")), []).append(row)
    rows = []
    for (setup, _), points in models.items():
        first, *others = [results.settings.get(point["identity"], {}) for point in points]
        shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        shared = {key: value for key, value in shared.items() if key.startswith(SFT_SETTINGS)}
        loss = with_error(points[0]["sft_validation_loss"], points[0]["sft_validation_loss_se"], 3)
        rows.append(
            {"Setup": setup, "Seed": str(points[0]["seed"]), "Settings": variant_text(shared)}
            | {"SFT validation loss": loss}
        )
    table = pd.DataFrame(rows)
    return table.drop(columns=[name for name in ("Seed", "Settings") if rows and table[name].nunique() == 1])


def _score(score: pd.Series[float]) -> str:
    if "se" in score:
        return with_error(score["value"], score["se"], 1)
    value = score["value"]
    return f"{value:.1f} ({score['low'] - value:+.1f}, {score['high'] - value:+.1f})"


def gap_to_best(best: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """Return for each selected point its gap to the best method of its setup, init and variant.

    `best` for that method itself, `n.s.` when not significantly different from it, else the difference; `-` where it
    was not judged on the reporting split.
    """
    highest = best.groupby(GROUP, sort=False, dropna=False).quality_reporting.transform("max")
    best_methods = {_group(row): row["method"] for row in best[best.quality_reporting == highest].to_dict("records")}
    significant = {
        (*_group(row), frozenset((row["method"], row["other"]))): f"-{abs(row['difference']):.3f}"
        for row in differences[differences.p_holm < LEVEL].to_dict("records")
    }
    gaps = []
    for row in best.to_dict("records"):
        best_method = best_methods.get(_group(row))
        gap = significant.get((*_group(row), frozenset((row["method"], best_method))), NOT_SIGNIFICANT)
        gap = "-" if pd.isna(row["quality_reporting"]) else gap
        gaps.append(BEST if row["method"] == best_method else gap)
    return gaps


def _group(row: dict[Hashable, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in GROUP)


def quality_column(best: pd.DataFrame) -> str:
    """Return the name of the quality column: the metric, or `Quality` when the setups have different ones."""
    names = best.metric.unique()
    return names[0].replace("_", " ").capitalize() if len(names) == 1 else "Quality"


def with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None or pd.isna(value):
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None or pd.isna(error) else f" ± {error:.{digits}f}")


def group_lines(groups: pd.DataFrame) -> list[str]:
    """Return one sentence per setup, init and variant about the permutation test."""
    lines = []
    for row in groups.to_dict("records"):
        group = ", ".join(filter(None, _group(row))) + ": " if len(groups) > 1 else ""
        lines.append(
            f"{group}{row['pairwise']} pairwise vs. {row['pointwise']} pointwise methods: "
            f"{row['difference']:+.3f}, p = {row['p']:.3f} (permutation test, one-sided, {row['splits']} splits)"
        )
    return lines


def _terminal_table(name: str, table: pd.DataFrame) -> Table:
    terminal_table = Table(title=name, caption=CAPTION)
    for column in table.columns:
        is_text = column in ("Setup", "Init", "Variant", "Method")
        width = max(map(len, [column, *table[column]]))
        terminal_table.add_column(column, justify="left" if is_text else "right", no_wrap=True, min_width=width)
    for row in table.itertuples(index=False):
        terminal_table.add_row(*row)
    return terminal_table


def not_asked(results: Results) -> str:
    """Return one line about the points that were not judged on the reporting split; empty where all were."""
    done = int(results.points.quality_selection.notna().sum())
    if not (count := results.num_unreported):
        return ""
    return (
        f"judge.reporting=selected: {count} of {done} points were judged on the selection prompts alone; what needs "
        "their reporting prompts (top 3, gains, Pareto fronts, curves) is left out"
    )


def print_best(results: Results, folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """Print the selected points, the points without a result, and where the files are. tables: of write_tables."""
    # No markup: [x] in a name is text.
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200  # the width at which a log is read is unknown
    if len(tables["best"]):
        table = tables["best"].drop(columns=NOT_ON_TERMINAL)
        terminal_table = _terminal_table(results.name, table)
        for column in OPTIONAL_COLUMNS:
            if console.measure(terminal_table).minimum > console.width:
                table = table.drop(columns=column, errors="ignore")
                terminal_table = _terminal_table(results.name, table)
        console.print(terminal_table, soft_wrap=False)
    for line in (*group_lines(tables["pairwise_pointwise"]), *results.searches, *filter(None, [not_asked(results)])):
        console.print(line)
    for line in diagnosis_lines(tables["diagnosis"]):
        console.print(line)
    for point in results.failed:
        label = f"{point['method']} beta={point['beta']:g} lr={point['lr']:g} {point['variant']}".rstrip()
        console.print(f"{point['state']}: {label}: {point['error']}", style="red")
    for file in ("points.csv", "best.yaml", "figures", "report.html"):
        console.print(f"{file:11} {folder / file}")
