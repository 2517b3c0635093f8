"""How much differences between methods vary: between prompts, seeds and samples, from finished sweeps of a store."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from src.errors import ConfigError, warn
from src.estimates.power import DEFAULT, SHARE_OF_PROMPTS, Components, is_bounded
from src.store.sweep_folder import SweepFolder

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from sweeps.analysis.results import Results

MAX_SWEEPS = 5  # of a store, whose results are read until one compares two methods


@dataclass(frozen=True)
class Tokens:
    """What an endpoint read and wrote to judge a point's response to one prompt, in the mean."""

    read: float
    written: float


@dataclass(frozen=True)
class Spread:
    """Variance components, and what they were estimated from."""

    components: Components
    source: str  # in words
    num_pairs: int = 0  # of methods; 0: a stated default
    num_seeds: int = 0  # that all methods have in common
    num_prompts: int = 0  # reporting prompts
    judge_tokens: dict[str, Tokens] = field(default_factory=dict)  # name of a judge -> tokens for one prompt


def default_spread(metric: str) -> Spread | None:
    """Return the stated default; None for a metric whose scale is not known."""
    return Spread(DEFAULT, "a stated default: no finished sweep of this setup") if is_bounded(metric) else None


def spread_in_store(output_dir: Path, setup: str, metric: str, first: SweepFolder | None = None) -> Spread | None:
    """Return the spread in a finished sweep of the setup: the one with most seeds, the newest of equals.

    None without one in which two methods are compared. first: a sweep that is asked before the others.
    """
    if not (folders := _candidates(output_dir, setup, first)):
        return None
    from sweeps.analysis.results import collect  # pandas, which a dry run without results does without

    for folder in folders[:MAX_SWEEPS]:
        try:
            if (spread := spread_of(collect([folder]), setup, metric)) is not None:
                return spread
        except ConfigError as error:
            warn(f"{error}; the power estimate does without this sweep")
    return None


def _candidates(output_dir: Path, setup: str, first: SweepFolder | None) -> list[SweepFolder]:
    """Return the finished sweeps that have the setup, in the order in which they are asked."""
    found: list[tuple[tuple[bool, int, str, str], SweepFolder]] = []
    for folder in SweepFolder.all_in(output_dir):
        try:
            record = folder.read()
        except ConfigError as error:
            warn(f"{error}; the power estimate does without this sweep")
            continue
        seeds = {point["seed"] for point in record["points"] if point["setup"] == setup}
        if record["finished"] and seeds:
            is_first = first is not None and folder.path.resolve() == first.path.resolve()
            found.append(((is_first, len(seeds), record["finished"], folder.name), folder))
    return [folder for _, folder in sorted(found, key=lambda pair: pair[0], reverse=True)]


def spread_of(results: Results, setup: str, metric: str) -> Spread | None:
    """Return the spread of the differences between the selected methods of a sweep; None without two methods.

    Components are averaged over all pairs of methods that the report compares.
    """
    tables = compared_values(results, setup, metric)
    parts = [components_of(a - b) for table in tables for a, b in combinations(table, 2)]
    if not parts:
        return None
    num_seeds = min(table.shape[1] for table in tables)
    means = [fmean(getattr(part, name) for part in parts) for name in ("prompts", "samples", "seeds")]
    if num_seeds == 1 and is_bounded(metric):
        means[2] = DEFAULT.seeds
    source = f"sweep {results.name}, {len(parts)} pairs of methods, {num_seeds} seed{'s' if num_seeds > 1 else ''}"
    return Spread(Components(*means), source, len(parts), num_seeds, tables[0].shape[2], judge_tokens(results))


def compared_values(results: Results, setup: str, metric: str) -> list[NDArray[np.float64]]:
    """Return quality on the reporting prompts, (methods, seeds, prompts), of each group of methods that are compared.

    The methods' selected points, with the seeds that all of them have.
    """
    from sweeps.analysis.reporting_split import reported
    from sweeps.analysis.selection import GROUP, average_seeds, select_points

    points = results.points
    points = points[points.candidate & (points.setup == setup) & (points.metric == metric)]
    best = reported(select_points(average_seeds(points), results.sweeps[0]["select"], results.prompts))
    tables = []
    for _, group in best.groupby(GROUP, sort=False, dropna=False):
        by_seed = [_by_seed(points, identities) for identities in group.identities]
        seeds = sorted(set.intersection(*map(set, by_seed)))
        if len(by_seed) > 1 and seeds:
            values = results.prompts.reporting([[one[seed]] for one in by_seed for seed in seeds])
            if values.shape[1] > 1:
                tables.append(values.reshape(len(by_seed), len(seeds), -1))
    return tables


def judge_tokens(results: Results) -> dict[str, Tokens]:
    """Return name of a judge -> its tokens for one prompt, of judges that asked an endpoint.

    Answers that equal questions shared count once, as they are paid for. A result of which only the selection prompts
    were judged counts with its share of the prompts.
    """
    usages: dict[str, list[dict[str, float]]] = {}
    for name, usage in results.usages:
        if usage.get("answers") and usage.get("calls"):
            usages.setdefault(name, []).append(usage)
    if not usages:
        return {}
    from sweeps.analysis.judges import read_verdicts

    # Quality may be that of validation pairs, which no judge sees.
    judged = read_verdicts(results).groupby(["judge", "identity"])["index"].nunique().groupby("judge").max().to_dict()
    tokens = {}
    for name, found in usages.items():
        if name not in judged:
            continue
        whole = max(usage["answers"] for usage in found)  # of a result in which all prompts were judged
        prompts = judged[name] * sum(usage["answers"] / whole for usage in found)
        read, written = (sum(usage[key] for usage in found) for key in ("prompt_tokens", "completion_tokens"))
        tokens[name] = Tokens(read / prompts, written / prompts)
    return tokens


def _by_seed(points: pd.DataFrame, identities: list[str]) -> dict[int, str]:
    rows = points[points.identity.isin(identities)]
    return dict(zip(rows.seed.astype(int), rows.identity, strict=True))


def components_of(differences: NDArray[np.float64]) -> Components:
    """Return the variance components of (seeds, prompts) differences of two methods, at least two prompts.

    By the mean squares of two crossed random factors without repetition (Searle et al., Variance Components, 1992,
    chapter 4); a negative estimate is 0. One seed shows only the sum over prompts and samples, which is divided by
    SHARE_OF_PROMPTS; the variance between seeds is then NaN.
    """
    num_seeds, num_prompts = differences.shape
    over_prompts = differences.mean(0).var(ddof=1)
    if num_seeds == 1:
        return Components(SHARE_OF_PROMPTS * over_prompts, (1 - SHARE_OF_PROMPTS) * over_prompts, math.nan)
    residual = differences - differences.mean(0) - differences.mean(1, keepdims=True) + differences.mean()
    samples = float((residual**2).sum() / ((num_seeds - 1) * (num_prompts - 1)))
    prompts = max(0.0, float(over_prompts) - samples / num_seeds)
    seeds = max(0.0, float(differences.mean(1).var(ddof=1)) - samples / num_prompts)
    return Components(prompts, samples, seeds)
