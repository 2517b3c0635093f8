"""Results at two depths -> the result at the whole depth, by a line.

Every layer holds and computes the same, so that what lasts and what is computed are on the line. Peaks are within a
percent of it: where activations are computed again, and where exchange overlaps, the layers beside one another count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from src.rehearsal.request import Result, Work
from src.training.token_budget import Pass, TokenBudget, choose_token_budget

_SECONDS = ("seconds", "exposed_exchange_seconds", "host_seconds", "floor_seconds")
_LINEAR = ("parameters", "activation_bytes_per_token", *_SECONDS)
_LINEAR_BY_NAME = ("held", "peak_by_phase", "held_at_peak", "host_copies", "syncs")
_NOT_OF_A_STEP = ("load", "budget")  # phases that the peak of a step does not count


def at_depth(few: Result, many: Result, layers: tuple[int, int], depth: int) -> Result:
    """Return what a model of `depth` layers comes to, by a line through the results at two numbers of layers."""

    def line(a: float, b: float) -> float:
        return a + (b - a) * (depth - layers[0]) / (layers[1] - layers[0])

    values: dict[str, Any] = {name: line(getattr(few, name), getattr(many, name)) for name in _LINEAR}
    values["parameters"] = round(values["parameters"])
    for name in _LINEAR_BY_NAME:
        a, b = getattr(few, name), getattr(many, name)
        values[name] = {key: round(line(a.get(key, 0), b.get(key, 0))) for key in b | a}
    values["work"] = {
        kind: Work(
            **{f.name: line(*(getattr(r.work.get(kind, Work()), f.name) for r in (few, many))) for f in fields(Work)}
        )
        for kind in many.work | few.work
    }
    values["peak"] = peak_of(values["peak_by_phase"])
    by_size = sorted(values["held_at_peak"].items(), key=lambda item: -item[1])
    values["held_at_peak"] = {label: size for label, size in by_size if size > 0}
    return replace(many, rehearsed_layers=layers, **values)


def peak_of(peak_by_phase: Mapping[str, int]) -> int:
    """Return the highest peak of the phases of a step; each is on a line, while the highest of all may not be."""
    return max((size for phase, size in peak_by_phase.items() if phase not in _NOT_OF_A_STEP), default=0)


class BudgetProbe:
    """Measures passes for the token budget at two depths, and chooses the budget of the whole depth from them."""

    SIZES = (1024, 4096)

    def __init__(self) -> None:
        self.passes: list[dict[tuple[int, bool], Pass]] = []  # of each depth
        self.limits: list[int] = []
        self.arguments: tuple[Any, ...] = ()

    def measure(self, measure: Callable[[int, bool], Pass], limit: int, *arguments: Any) -> TokenBudget:
        """Stand in for `choose_token_budget`: note what can be measured, then end this rehearsal."""
        checkpointing = arguments[-1]
        kinds = {True: (True,), False: (False,)}.get(checkpointing, (False, True))
        self.passes.append({(n, recompute): measure(n, recompute) for n in self.SIZES for recompute in kinds})
        self.limits.append(limit)
        self.arguments = arguments
        raise Probed

    def choose(self, layers: tuple[int, int], depth: int) -> TokenBudget:
        """Return the budget of the whole depth. Raises ConfigError when the longest example does not fit."""

        def line(a: float, b: float) -> float:
            return a + (b - a) * (depth - layers[0]) / (layers[1] - layers[0])

        whole = {
            key: Pass(
                few.num_tokens, *(round(line(*pair)) for pair in zip(few[1:], self.passes[1][key][1:], strict=True))
            )
            for key, few in self.passes[0].items()
        }

        def measure(num_tokens: int, recompute: bool) -> Pass:
            small, large = (whole[n, recompute] for n in self.SIZES)
            slope = (large.peak - small.peak) / (large.num_tokens - small.num_tokens)
            return Pass(num_tokens, small.before, round(small.peak + slope * (num_tokens - small.num_tokens)))

        return choose_token_budget(measure, round(line(*self.limits)), *self.arguments)


class Probed(Exception):
    """The passes for the token budget have been measured; the rest of the training is not needed."""
