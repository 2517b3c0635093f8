"""What the stages of a plan hold, how fast they are on the card they are planned for, and whether they fit. No torch.

One rehearsal for all stages of a kind that share model, engine and data, in one process for all of them, kept on disk.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from threading import Timer

from src.errors import ConfigError, StageError
from src.estimates.load import Load, key, load_of
from src.planning.fit import TARGET_FRACTION
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.rehearsal.request import rehearse_all

_GIB = 2**30
_CERTAIN_FRACTION = 0.5  # of a card; what arithmetic puts below it fits, and a run does not wait for its rehearsal

_SECONDS = 15  # of one core that a rehearsal takes, about

_HEADER = (
    "stage      processes  weights  gradients  optimizer  KV cache  MB a token  micro-batch  recomputed   peak  "
    "s a step  source"
)
_LASTING = "weights", "gradients", "optimizer_state", "kv_cache"
REHEARSED, ARITHMETIC = "rehearsed", "arithmetic"  # where numbers come from

Processes = Callable[[Stage], int]  # that compute the stage together


def by_torchrun(number: int) -> str:
    """Return what starts a single run on a number of GPUs, in the place of `python -m src.train`."""
    nodes = f"--nnodes {number // 8} " if number > 8 else "--standalone "
    return f"torchrun {nodes}--nproc-per-node {min(8, number)} -m src.train"


class Forecast:
    """The distinct loads of the stages that a plan needs."""

    def __init__(
        self,
        plan: Plan,
        processes: Processes,
        on_gpus: Callable[[int], str] = by_torchrun,
        *,
        all_rehearsed: bool,
    ) -> None:
        """Rehearse what a card is named for: everything, or only loads of which arithmetic does not show that they fit.

        on_gpus: returns what gives a number of GPUs to training. Raises ConfigError for a card that conf/gpus.yaml does
        not have.
        """
        self._on_gpus, self.processes = on_gpus, processes
        stages = [plan.stages[identity] for identity in plan.stages if identity in plan.needed]
        self.why_not_rehearsed: str | None = None
        self._keys: dict[str, str] = {}  # identity of a stage -> key of its load
        self.loads: dict[str, Load] = {}
        for stage in stages:
            if (load := load_of(stage, processes(stage))) is not None:
                self._keys[stage.identity] = key(load)
                self.loads.setdefault(key(load), load)
        self._rehearse(all_rehearsed)

    def _rehearse(self, everything: bool) -> None:
        self._rehearse_loads(lambda load: everything or not load.peak < _CERTAIN_FRACTION * load.usable)

    def rehearse(self, kind: str) -> None:
        """Rehearse all stages of a kind, for their speed."""
        self._rehearse_loads(lambda load: load.stage.kind == kind and load.result is None)

    def update_processes(self) -> None:
        """Ask again how many processes compute a stage: what those without training hold does not depend on it."""
        untrained = {name: load for name, load in self.loads.items() if not load.stage.is_training}
        self.loads |= {name: replace(load, ranks=self.processes(load.stage)) for name, load in untrained.items()}

    def _rehearse_loads(self, is_chosen: Callable[[Load], bool]) -> None:
        chosen = {name: load for name, load in self.loads.items() if load.request is not None and is_chosen(load)}
        self.loads |= dict(zip(chosen, self._rehearsed(list(chosen.values())), strict=True))

    def _rehearsed(self, loads: list[Load]) -> list[Load]:
        """Return the loads with their rehearsals' results: all unchanged where none can be made here.

        A load without a request stays unchanged, too: the length of its rows is unknown.
        """
        requests = [load.request for load in loads if load.request is not None]
        if self.why_not_rehearsed is not None or not requests:
            return loads
        kinds = ", ".join(dict.fromkeys(request.stage for request in requests))
        note = f"rehearsing {kinds} on a card that is not there: about {_SECONDS * len(requests)} s, the next time none"
        waiting = Timer(1.0, print, (note,), {"file": sys.stderr, "flush": True})
        waiting.start()
        try:
            results = iter(rehearse_all(requests))
        except (ConfigError, StageError) as error:
            self.why_not_rehearsed = str(error)
            return loads
        finally:
            waiting.cancel()
        return [load if load.request is None else replace(load, result=next(results)) for load in loads]

    def seconds_per_token(self, stage: Stage) -> float:
        """Return the seconds of one accelerator for a token of the stage; NaN without a rehearsal."""
        load = self.loads.get(self._keys.get(stage.identity, ""))
        result = None if load is None else load.rehearsed
        if result is None or not result.tokens:
            return math.nan
        return max(result.seconds, result.host_seconds) / result.tokens

    def computed_seconds_per_token(self, stage: Stage) -> float:
        """Return what a token takes of one accelerator by arithmetic; NaN without a card."""
        load = self.loads.get(self._keys.get(stage.identity, ""))
        return math.nan if load is None else load.computed_seconds_per_token

    def check(self) -> None:
        """Raise ConfigError, with what would make it fit, for the first stage that cannot run on its card."""
        for load in self.loads.values():
            if load.problem is not None:
                raise ConfigError(self._refusal(load))

    def _refusal(self, load: Load) -> str:
        assert load.card is not None
        point = load.point
        in_shards = load.ranks > 1 and load.stage.is_training
        where = f"{load.ranks} {load.card.name}" if in_shards else f"one {load.card.name}"
        refusal = (
            f"{load.stage.kind} of {point.model.name} with engine={point.engine.name} does not fit on {where} "
            f"({load.card.memory / _GIB:.1f} GiB): {load.problem}"
        )
        helpful: list[str] = []
        for remedy, changed in load.remedies(self._on_gpus):
            if changed.held.constant > changed.usable or (helpful and changed.ranks > load.ranks):
                continue
            (tried,) = self._rehearsed([changed])
            if tried.problem is None and (tried.result is None or tried.rehearsed is not None):
                helpful.append(f"{remedy} fits, with {tried.peak / _GIB:.1f} GiB in each process")
                if tried.ranks == load.ranks:
                    break  # otherwise the line also names what fits on as many cards as there are
        return f"{refusal}; {' or '.join(helpful) or 'nothing that was tried helps: choose another card (engine.gpu)'}"

    def _cards(self) -> str:
        sizes = {load.card.name: load.card.memory / _GIB for load in self.loads.values() if load.card is not None}
        texts = [f"{name} has {g:.1f}, of which {TARGET_FRACTION * g:.1f} may be taken" for name, g in sizes.items()]
        return "; ".join(texts) or "no card named (engine.gpu)"

    def text(self) -> str:
        """Return the table of what one process holds; empty without a model of known shape."""
        if not self.loads:
            return ""
        lines = ["", f"memory of one process in GiB; {self._cards()}"]
        lines.append(_HEADER)
        lines += dict.fromkeys(self._row(load) for load in self.loads.values())
        lines += [
            f"{load.stage.kind}: {load.result.error}"
            for load in self.loads.values()
            if load.result is not None and load.result.error is not None
        ]
        if any(load.rehearsed is not None for load in self.loads.values()):
            lines.append(f"{REHEARSED}: the stages' own code on a card that is not there (docs/rehearsal.md)")
        reasons = [self._why_arithmetic(load) for load in self.loads.values() if load.result is None]
        lines += [f"{ARITHMETIC}: {reason}" for reason in dict.fromkeys(filter(None, reasons))]
        return "\n".join(lines)

    def _why_arithmetic(self, load: Load) -> str | None:
        return load.why_not_rehearsed or (None if load.card is None else self.why_not_rehearsed)

    def _row(self, load: Load) -> str:
        held, result = load.held, load.rehearsed
        rehearsed = {} if result is None else result.held
        lasting = [rehearsed.get(name, getattr(held, name)) for name in _LASTING]
        weights, gradients, state, cache, peak = (_gib(size) for size in (*lasting, load.peak))
        per_token = held.activations_per_token if result is None else result.activation_bytes_per_token
        micro_batch = f"{load.budget:,.0f}" if load.stage.is_training and not math.isnan(load.budget) else "-"
        recomputed = "-"
        if load.stage.is_training and result is not None:
            micro_batch = f"{result.micro_batches} x {micro_batch}"
            recomputed = str(result.checkpointed_micro_batches)
        step = f"{max(result.seconds, result.host_seconds):.3g}" if result is not None and result.seconds else "-"
        activations = f"{per_token / 1e6:.3g}" if load.stage.is_training else "-"
        return (
            f"{load.stage.kind:10} {load.ranks:9}  {weights:>7}  {gradients:>9}  {state:>9}  "
            f"{cache:>8}  {activations:>10}  {micro_batch:>11}  {recomputed:>10}  {peak:>5}  {step:>8}  "
            f"{ARITHMETIC if result is None else REHEARSED}"
        )


def _gib(size: float) -> str:
    if math.isnan(size) or not size:
        return "-"
    gib = size / _GIB
    return f"{gib:.1f}" if gib >= 0.1 else f"{gib:.2g}"
