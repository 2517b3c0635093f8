"""Which differences a sweep can show before it runs, and what more prompts or seeds would show at what cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import count, islice

from launchers.protocol import PlanLauncher
from src.config.judge_rules import ENDPOINT_JUDGES, num_turns
from src.config.schema import GENERATED, Point
from src.config.tables import MAX_ROWS
from src.data.table_size import table_size
from src.errors import ConfigError
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.estimates.power import (
    POWER,
    Components,
    Design,
    is_bounded,
    minimal_difference,
    minimal_difference_of_trainings,
)
from src.planning.plan import Plan, make_plan
from src.stages.averages import selection_prompts
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.spread import Spread, default_spread, spread_in_store

FACTORS = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2))  # of prompts and of seeds, in the rows of the table
_HEADER = "prompts  reported  seeds  difference     any seeds  judge dollars  accelerator-hours"
ROW = "{:>7}  {:>8}  {:>5}  {:>10}  {:>12}  {:>13}  {:>17}"


@dataclass(frozen=True)
class Comparison:
    """The points of one setup, init and variant: its methods are compared with each other."""

    points: list[Point]

    @property
    def setup(self) -> str:
        return self.points[0].setup.name

    @property
    def metric(self) -> str:
        """The name of the metric as points.csv has it."""
        first = self.points[0]
        samples = first.evaluation.generation.samples_per_prompt
        several = samples > 1 and num_turns(first) == 1 and first.evaluation.metric != "reward_accuracy"
        return f"{first.evaluation.metric} (avg@{samples})" if several else first.evaluation.metric

    @property
    def num_prompts(self) -> float:
        """The prompts that quality is measured on, in both splits; NaN where nothing tells."""
        first = self.points[0]
        by_pairs = first.evaluation.metric == "reward_accuracy"
        return table_size(first, "validation").rows if by_pairs else self.num_sampled

    @property
    def num_sampled(self) -> int:
        """The prompts that responses are sampled for, which may be those of held-out pairs: no more than there are."""
        first = self.points[0]
        if first.evaluation.prompts_file is not None or first.dataset.source in GENERATED:
            return first.evaluation.num_prompts
        pairs = table_size(first, "validation").rows
        return first.evaluation.num_prompts if math.isnan(pairs) else min(first.evaluation.num_prompts, int(pairs))

    @property
    def num_seeds(self) -> int:
        """The seeds that every point has, at least."""
        return min(map(len, self.by_seed))

    @property
    def by_seed(self) -> list[list[Point]]:
        """The points that differ in nothing but their seed, together."""
        groups: dict[tuple[object, ...], list[Point]] = {}
        for point in self.points:
            groups.setdefault(point.without_seed, []).append(point)
        return list(groups.values())

    @property
    def num_methods(self) -> int:
        return len({point.method.name for point in self.points})

    def num_selecting(self) -> int:
        """Return how many prompts select; the others are reported."""
        evaluation, prompts = self.points[0].evaluation, list(range(int(self.num_prompts)))
        return len(selection_prompts(prompts, evaluation.selection_fraction, evaluation.split_seed))

    def design(self) -> Design | None:
        """Return the size of the study; None where the number of prompts is not known or nothing is compared."""
        if len(self.by_seed) < 2 or math.isnan(self.num_prompts) or self.num_prompts - self.num_selecting() < 2:
            return None
        return Design(int(self.num_prompts) - self.num_selecting(), self.num_seeds, self.num_methods)

    def enlarged(self, prompts: int, seeds: int) -> Comparison | None:
        """Return the comparison with so many times the prompts and seeds; None where there are no more prompts.

        New seeds are the smallest that are not used.
        """
        first = self.points[0]
        by_pairs = first.evaluation.metric == "reward_accuracy"
        has_more = first.dataset.validation_size is not None if by_pairs else first.evaluation.prompts_file is None
        if prompts > 1 and (not has_more or prompts * self.num_prompts > MAX_ROWS):
            return None
        points = []
        for same in self.by_seed:
            used = [point.seed for point in same]
            more = islice((seed for seed in count() if seed not in used), (seeds - 1) * len(used))
            points += [_with_prompts(point, prompts) for point in same]
            points += [replace(_with_prompts(same[0], prompts), seed=seed) for seed in more]
        larger = Comparison(points)
        try:
            return larger if larger.num_prompts >= prompts * self.num_prompts else None
        except ConfigError:  # a file in which no pair would remain to train on
            return None


def _with_prompts(point: Point, factor: int) -> Point:
    if point.evaluation.metric == "reward_accuracy":
        size = point.dataset.validation_size
        return replace(point, dataset=replace(point.dataset, validation_size=size and factor * size))
    return replace(point, evaluation=replace(point.evaluation, num_prompts=factor * point.evaluation.num_prompts))


def comparisons(points: Sequence[Point]) -> list[Comparison]:
    """Return the points by what is compared with each other, as the report groups them."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        groups.setdefault((point.setup.name, point.init.name, point.sweep.variant), []).append(point)
    return [Comparison(group) for group in groups.values()]


def power_sentences(points: Sequence[Point], store: Store) -> list[str]:
    """Return for `dry_run=true` one sentence for each setup, and for each of its comparisons that differs in size."""
    several, sentences = len({point.setup.name for point in points}) > 1, []
    spread_of = _cached_spreads(store)
    for comparison in comparisons(points):
        if (design := comparison.design()) is None:
            continue
        spread = spread_of(comparison)
        setup = f"{comparison.setup}: " if several else ""
        if spread is None:
            sentences.append(f"power: {setup}not known before a sweep of this setup has finished ({comparison.metric})")
            continue
        sentences.append(
            f"power: {setup}{_finding(comparison.metric, spread, design)} (variance: {spread.source}); "
            "python -m sweeps.power with the same overrides says what more prompts or seeds would show"
        )
    return list(dict.fromkeys(sentences))


def power_report(
    points: Sequence[Point],
    store: Store,
    launcher: PlanLauncher,
    folder: str | None = None,
    standard_deviation: float | None = None,
) -> str:
    """Return what `python -m sweeps.power` prints: for each comparison what it shows, and what more would show.

    folder: of the sweep whose variance is asked first. Raises ConfigError where nothing can be said.
    """
    if standard_deviation is not None and not (isinstance(standard_deviation, int | float) and standard_deviation > 0):
        raise ConfigError(f"hydra.sweeper.standard_deviation={standard_deviation}: must be a positive number, or null")
    first = None if folder is None else SweepFolder.open(folder)
    parts: dict[str, None] = {}
    spread_of = _cached_spreads(store, first, standard_deviation)
    for comparison in comparisons(points):
        design = comparison.design()
        if design is None:
            continue
        spread = spread_of(comparison)
        if spread is None:
            raise ConfigError(
                f"setup={comparison.setup}: how much {comparison.metric} varies is not known before a sweep of it has "
                f"finished in {store.output_dir}; --sd NUMBER says it: the standard deviation of the difference of two "
                "methods on one prompt"
            )
        parts["\n".join(_lines(comparison, design, spread, store, launcher))] = None
    if not parts:
        raise ConfigError(
            "the sweep compares nothing: give at least two points, such as method=dpo,ipo, and four prompts"
        )
    return "\n\n".join(parts)


def _cached_spreads(
    store: Store, first: SweepFolder | None = None, standard_deviation: float | None = None
) -> Callable[[Comparison], Spread | None]:
    """Return what gives the spread of a comparison; results are read once for each setup and metric."""

    @cache
    def of_setup(setup: str, metric: str) -> Spread | None:
        if standard_deviation is not None:
            half = standard_deviation**2 / 2
            return Spread(
                Components(half, half, math.nan), f"--sd {standard_deviation:g}, half of the variance between prompts"
            )
        return spread_in_store(store.output_dir, setup, metric, first) or default_spread(metric)

    return lambda comparison: of_setup(comparison.setup, comparison.metric)


def _finding(metric: str, spread: Spread, design: Design) -> str:
    seeds = f"{design.seeds} seed{'s' if design.seeds > 1 else ''}"
    compared = f"two of {design.methods} methods" if design.methods > 1 else "two points"
    holm = f", Holm over {design.num_pairs} pairs" if design.num_pairs > 1 else ""
    difference = _text(minimal_difference(spread.components, design), metric)
    return (
        f"{design.prompts} reporting prompts and {seeds} show a difference of {metric} of {difference} between "
        f"{compared} in {100 * POWER:g} % of studies (paired t-test{holm})"
    )


def _lines(
    comparison: Comparison, design: Design, spread: Spread, store: Store, launcher: PlanLauncher
) -> Iterator[str]:
    first, parts = comparison.points[0], spread.components
    variant = f" {first.sweep.variant}" if first.sweep.variant else ""
    yield f"{comparison.setup} init={first.init.name}{variant}: {_finding(comparison.metric, spread, design)}"
    yield (
        f"variance of a difference on one prompt: {parts.prompts:.3g} between prompts, {parts.samples:.3g} between "
        f"seeds; of the difference over all prompts: {_or_unknown(parts.seeds, '.2g')} between seeds; {spread.source}"
    )
    if spread.num_seeds == 1:
        default = "the last as a stated default" if is_bounded(comparison.metric) else "the last is not known"
        yield f"one seed does not tell these apart: taken as half and half, and {default}"
    yield _HEADER
    reasons: dict[str, None] = {}
    for prompts, seeds in FACTORS:
        larger = comparison.enlarged(prompts, seeds)
        if larger is None or (size := larger.design()) is None:
            continue
        plan = make_plan(larger.points, store)
        costs = judge_dollars(larger, plan, spread), hours(plan, store, launcher)
        reasons |= dict.fromkeys(reason for _, reason in costs if reason)
        differences = (
            _text(function(parts, size), comparison.metric)
            for function in (minimal_difference, minimal_difference_of_trainings)
        )
        texts = (_or_unknown(cost, form) for (cost, _), form in zip(costs, (",.2f", ",.3g"), strict=True))
        yield ROW.format(int(larger.num_prompts), size.prompts, size.seeds, *differences, *texts)
    yield "any seeds: for a claim about the methods trained with any seeds, which the report's test does not make"
    yield "dollars and hours: of what this store does not have yet"
    yield from reasons


def hours(plan: Plan, store: Store, launcher: PlanLauncher) -> tuple[float, str]:
    """Return the accelerator-hours of the stages that a plan needs, and why they are NaN where they are not known."""
    forecast = Forecast(plan, launcher.num_processes, launcher.on_gpus, all_rehearsed=True)
    cost = Cost(plan, store, forecast, launcher.max_running(plan), launcher.starts_job)
    total = math.fsum(estimate.hours for estimate in cost.estimates.values())
    return total, f"accelerator-hours: {cost.why_unknown}" if math.isnan(total) else ""


def judge_dollars(comparison: Comparison, plan: Plan, spread: Spread) -> tuple[float, str]:
    """Return the dollars of the verdicts that a plan needs, and why they are NaN where they are not known.

    Of the judge that points are compared by, at its tokens for a prompt in the sweep of the spread.
    """
    judge = comparison.points[0].judge
    needed = sum(result in plan.needed for result in plan.results)
    if judge.name not in ENDPOINT_JUDGES or not needed:
        return 0.0, ""
    if judge.input_price is None or judge.output_price is None:
        return math.nan, "judge dollars: need judge.input_price and judge.output_price (dollars for a million tokens)"
    if (tokens := spread.judge_tokens.get(judge.name)) is None:
        return math.nan, f"judge dollars: known once judge={judge.name} has judged a finished sweep of this setup here"
    prompts = needed * comparison.num_sampled
    if judge.reporting == "selected":
        selecting = comparison.num_selecting()
        reporting = comparison.num_sampled - selecting
        prompts = needed * selecting + comparison.num_methods * comparison.num_seeds * reporting
    return prompts * (tokens.read * judge.input_price + tokens.written * judge.output_price) / 1e6, ""


def _text(difference: float, metric: str) -> str:
    return "> 1" if is_bounded(metric) and difference > 1 else _or_unknown(difference, ".3f")


def _or_unknown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
