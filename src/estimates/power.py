"""Which difference between two methods a study can see: its minimal detectable difference. Pure arithmetic, no torch.

The test is the report's: a two-sided paired t-test over the reporting prompts, seeds averaged first, p adjusted by Holm
over all pairs of methods. Power of the t-test: Cohen, Statistical Power Analysis, 1988, chapter 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from src.errors import ConfigError

LEVEL = 0.05  # of significance in all tables: two methods differ when Holm's p of their difference is below
POWER = 0.8  # the share of studies in which a true difference of this size is found


@dataclass(frozen=True)
class Components:
    """Variances of the difference between two methods, in squared units of the metric.

    With methods A and B, seed k and prompt i: A - B = difference + prompt_i + seed_k + sample_ik.
    """

    prompts: float  # between prompts, the same for every seed: on some prompts A is better, on others B
    samples: float  # between seeds on the same prompt, beyond what a seed changes on all: sampling and training
    seeds: float  # between seeds, the same on all prompts: how far trainings differ; NaN where that is not known

    def __post_init__(self) -> None:
        """Raise ConfigError for what is no variance."""
        for name, value in vars(self).items():
            if not (0 <= value < math.inf or (name == "seeds" and math.isnan(value))):
                raise ConfigError(f"variance of {name}={value:g}: must be a finite number that is not negative")

    def per_prompt(self, seeds: int) -> float:
        """Return the variance over prompts of the difference averaged over seeds, which the paired t-test divides."""
        return self.prompts + self.samples / seeds


@dataclass(frozen=True)
class Design:
    """How large a study is; prompts: those that are reported."""

    prompts: int
    seeds: int = 1
    methods: int = 2  # of which every two are compared; with one method two of its points are

    def __post_init__(self) -> None:
        """Raise ConfigError for a study in which nothing can be tested."""
        for name, least in (("prompts", 2), ("seeds", 1), ("methods", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)}: at least {least} for a comparison")

    @property
    def num_pairs(self) -> int:
        """The number of comparisons that Holm adjusts for."""
        return max(1, math.comb(self.methods, 2))


# Of a metric in [0, 1], before any sweep has been measured. Two verdicts that are right half of the time vary by 1/4
# each; half of that is taken to be the prompt's difficulty, which the two methods share, so that their difference
# varies by 1/4, half of it between prompts. Trainings with other seeds differ by .014, the standard deviation of the
# difference: more than in most pairs of methods of the demo, less than in its mean pair (docs/power.md).
DEFAULT = Components(prompts=0.125, samples=0.125, seeds=0.0002)
BOUNDED_METRICS = ("win_rate", "reward_accuracy", "accuracy")  # for which DEFAULT is meant
SHARE_OF_PROMPTS = 0.5  # of the variance over prompts, where one seed cannot tell prompts from samples


def is_bounded(metric: str) -> bool:
    """Return whether a metric lies in [0, 1], also as the mean of several samples: `accuracy (avg@4)`."""
    return metric.partition(" (")[0] in BOUNDED_METRICS


def minimal_difference(components: Components, design: Design, level: float = LEVEL, power: float = POWER) -> float:
    """Return the true difference that the report calls significant in `power` of all studies of this size.

    It is an upper bound: Holm compares the smallest p with level / pairs, the next with level / (pairs - 1) and so on,
    and the difference is computed for the first of these steps. What is significant with the other, wrong sign is not
    counted as found.
    """
    return _noncentrality(design, level, power) * math.sqrt(components.per_prompt(design.seeds) / design.prompts)


def minimal_difference_of_trainings(
    components: Components, design: Design, level: float = LEVEL, power: float = POWER
) -> float:
    """Return the same for a claim about methods, trained with any seeds, and not about these trained models alone.

    The variance between seeds is added to the error of the mean. The report's test does not count it; the critical
    value is the paired t-test's, as if this variance were known. NaN where it is not known at all.
    """
    error = components.per_prompt(design.seeds) / design.prompts + components.seeds / design.seeds
    return _noncentrality(design, level, power) * math.sqrt(error)


def _noncentrality(design: Design, level: float, power: float) -> float:
    """Return how many standard errors the true difference must be."""
    from scipy.special import nctdtrinc  # the noncentrality at which a noncentral t has this probability below a value
    from scipy.stats import t

    if not 0 < level < power < 1:
        raise ConfigError(f"level={level:g} power={power:g}: both must lie between 0 and 1, power above level")
    critical = t.isf(level / design.num_pairs / 2, design.prompts - 1)
    return float(nctdtrinc(design.prompts - 1, 1 - power, critical))
