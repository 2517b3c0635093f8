"""Differences between methods that seeds or prompts are too few to show."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

from src.estimates.power import LEVEL
from sweeps.analysis.diagnosis.finding import Z95, Finding, mean_and_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

FEW_PROMPTS = 100  # ours: the 95 % interval of a win rate around one half is then wider than 0.2
MAX_MORE = 20  # ours: times as many prompts; a difference that needs more is not worth a run
SEEDS = "0,1,2"


def seed_noise(
    names: tuple[str, str], seeds: tuple[NDArray[np.float64], NDArray[np.float64]], p: float
) -> Finding | None:
    """Find that a difference that is significant over prompts is within the noise of seeds.

    names: of two methods. seeds: (seeds,) quality of each, two or more, compared by Welch's t-test. p: of the test over
    prompts, by Holm.
    """
    if not p < LEVEL or min(map(len, seeds)) < 2:
        return None
    from scipy.stats import ttest_ind_from_stats

    (one, error), (other, other_error) = map(mean_and_error, seeds)
    if error == other_error == 0:
        return None
    # With two seeds each a normal distribution would call four times as many equal methods different.
    deviations = [values.std(ddof=1) for values in seeds]
    test = ttest_ind_from_stats(one, deviations[0], len(seeds[0]), other, deviations[1], len(seeds[1]), equal_var=False)
    if test.pvalue < LEVEL:
        return None
    text = (
        f"{names[0]} and {names[1]} differ by {abs(one - other):.3f} (p = {p:.2g} over prompts), which is within the "
        f"noise of their {len(seeds[0])} and {len(seeds[1])} seeds (± {math.hypot(error, other_error):.3f})"
    )
    count = 2 * max(map(len, seeds))
    return Finding("within seed noise", "warning", text, {"seed": ",".join(map(str, range(count)))})


def one_seed(num_methods: int) -> Finding:
    """Say that methods which ran with one seed each are not ranked by it."""
    text = (
        f"{num_methods} methods were compared with one seed each: their differences contain the noise of seeds, which "
        "p-values over prompts do not count"
    )
    return Finding("one seed", "note", text, {"seed": SEEDS})


class Pair(NamedTuple):
    """A method beside the best one: their difference, its 95 % interval over prompts, p of it adjusted by Holm."""

    name: str
    difference: float
    low: float
    high: float
    p: float


def too_few_prompts(
    best: str, others: Sequence[Pair], num_pairs: int, num_prompts: int, setting: str | None, share: float
) -> Finding | None:
    """Find that the best method is not told apart from others: the interval is wider than the difference.

    Of the methods that the report calls not significantly different, the one with the largest difference counts. It is
    a warning where there are so few prompts that only large differences could be seen. num_pairs: of methods, over all
    of which p is adjusted. setting: the config key of how many prompts there are, of which `share` is reported on; None
    where no more are known of.
    """
    tied = [pair for pair in others if not pair.p < LEVEL]
    if not tied:
        return None
    largest = max(tied, key=lambda pair: abs(pair.difference))
    difference, half = abs(largest.difference), (largest.high - largest.low) / 2
    names = ", ".join(pair.name for pair in tied)
    text = (
        f"{num_prompts} reporting prompts do not tell {best} from {names}: the largest of these differences, "
        f"{difference:.3f} to {largest.name}, has an interval of ± {half:.3f} and p = {largest.p:.2g}"
    )
    overrides: dict[str, str] = {}
    # The largest of all differences must be below Holm's first threshold.
    needed = num_prompts * (half * _widened(num_pairs) / difference) ** 2 if difference else math.inf
    if needed <= MAX_MORE * num_prompts:
        text += f"; about {math.ceil(needed):,} would show one of this size in half of such studies"
        overrides = {setting: str(math.ceil(needed / share))} if setting else {}
    return Finding("too few prompts", "warning" if num_prompts < FEW_PROMPTS else "note", text, overrides)


def _widened(num_pairs: int) -> float:
    """Return how much wider an interval is that holds for so many differences together (Bonferroni)."""
    return NormalDist().inv_cdf(1 - LEVEL / 2 / num_pairs) / Z95
