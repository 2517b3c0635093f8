"""The minimal detectable difference by simulated studies beside the computed one: `python -m benchmarks.power DIR`.

DIR is a finished sweep, such as outputs/sweeps/demo. Studies of its size are drawn twice: with normal differences of
its variance components, and with the verdicts of its own reporting prompts, drawn with replacement. The report's own
test is applied to each, and the difference sought that is significant in 80 % of them (minutes). The exit code is 1
when a simulated difference is not within 10 % of the computed one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from src.errors import ConfigError, report_errors
from src.estimates.power import LEVEL, POWER, Components, Design, minimal_difference
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.results import collect
from sweeps.analysis.significance import holm, paired_p
from sweeps.analysis.spread import compared_values, spread_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_STUDIES = 1000
TOLERANCE = 0.1  # relative, of the simulated to the computed difference
STEPS = 7  # of bisection, to less than 1 % of the computed difference

Draw = Callable[
    [np.random.Generator], "NDArray[np.float64]"
]  # one study: (methods, prompts) quality without differences


def normal_study(components: Components, design: Design, with_seeds: bool = False) -> Draw:
    """Return what draws quality averaged over seeds, so that every two methods differ with these variances.

    with_seeds: whether trainings differ between seeds, which the report's test does not count.
    """

    def draw(generator: np.random.Generator) -> NDArray[np.float64]:
        shape = design.methods, design.prompts
        by_prompt = generator.normal(0, (components.prompts / 2) ** 0.5, shape)
        samples = generator.normal(0, (components.samples / 2) ** 0.5, (design.seeds, *shape)).mean(0)
        values = by_prompt + samples
        if with_seeds:
            values += generator.normal(0, (components.seeds / 2) ** 0.5, (design.seeds, design.methods, 1)).mean(0)
        return values

    return draw


def resampled_study(values: NDArray[np.float64]) -> Draw:
    """Return what draws the prompts of a sweep with replacement, methods in random order, all with the same mean.

    values: (methods, prompts).
    """
    centered = values - values.mean(1, keepdims=True)

    def draw(generator: np.random.Generator) -> NDArray[np.float64]:
        methods = generator.permutation(len(centered))
        return centered[methods][:, generator.integers(centered.shape[1], size=centered.shape[1])]

    return draw


def adjusted_p(values: NDArray[np.float64], adjust: Callable[[list[float]], list[float]] = holm) -> list[float]:
    """Return the p-values of all pairs of methods as the report computes them, the pair of the first two first."""
    return adjust([paired_p(values[i], values[j]) for i, j in combinations(range(len(values)), 2)])


def share_found(
    draw: Draw,
    difference: float,
    num_studies: int = NUM_STUDIES,
    adjust: Callable[[list[float]], list[float]] = holm,
    seed: int = 0,
) -> float:
    """Return in which share of studies the first method, better than all others by this, is found better than the next.

    The same studies are drawn for every difference.
    """
    generator, found = np.random.default_rng(seed), 0
    for _ in range(num_studies):
        values = draw(generator)
        values[0] += difference
        is_better = values[0].mean() > values[1].mean()
        found += is_better and adjusted_p(values, adjust)[0] < LEVEL
    return found / num_studies


def share_false(draw: Draw, num_studies: int = NUM_STUDIES, seed: int = 0) -> float:
    """Return in which share of studies of equal methods any pair is significant."""
    generator = np.random.default_rng(seed)
    return sum(min(adjusted_p(draw(generator))) < LEVEL for _ in range(num_studies)) / num_studies


def simulated_difference(draw: Draw, start: float, num_studies: int = NUM_STUDIES) -> float:
    """Return the difference that is found in POWER of the studies, by bisection between 0.5 and 1.5 times `start`."""
    low, high = 0.5 * start, 1.5 * start
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if share_found(draw, middle, num_studies) > POWER else (middle, high)
    return (low + high) / 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.power", description=__doc__)
    parser.add_argument("dir", help="a finished sweep, such as outputs/sweeps/demo")
    parser.add_argument("--studies", type=int, default=NUM_STUDIES, help="how many are drawn")
    options = parser.parse_args()
    with report_errors():
        results = collect([SweepFolder.open(options.dir)])
        done = results.points[results.points.state == "done"]
        if done.empty or (spread := spread_of(results, done.setup.iloc[0], done.metric.iloc[0])) is None:
            raise ConfigError(f"{options.dir}: no two methods with results to compare")
    (values, *_) = compared_values(results, done.setup.iloc[0], done.metric.iloc[0])
    design = Design(values.shape[2], values.shape[1], len(values))
    computed = minimal_difference(spread.components, design)
    print(f"{design}, variance of {spread.source}\ncomputed               {computed:.4f}")
    is_close = True
    studies = {
        "simulated, normal": normal_study(spread.components, design),
        "simulated, its prompts": resampled_study(values.mean(1)),
    }
    for name, draw in studies.items():
        simulated = simulated_difference(draw, computed, options.studies)
        is_close &= abs(simulated / computed - 1) < TOLERANCE
        print(f"{name:22} {simulated:.4f}  {100 * (simulated / computed - 1):+.1f} %", flush=True)
    for name, with_seeds in (("as the test assumes", False), ("trainings differ between seeds", True)):
        share = share_false(normal_study(spread.components, design, with_seeds), options.studies)
        print(f"studies of equal methods with a significant difference, {name}: {100 * share:.1f} %", flush=True)
    pairs = list(combinations(values.mean((1, 2)), 2))
    tied = [abs(a - b) for (a, b), p in zip(pairs, adjusted_p(values.mean(1)), strict=True) if p >= LEVEL]
    print(
        f"{len(tied)} of {len(pairs)} pairs of the sweep are not significant; "
        f"the largest differs by {max(tied, default=0.0):.4f}"
    )
    return 0 if is_close else 1


if __name__ == "__main__":
    sys.exit(main())
