"""What the stages still to run will cost, in accelerator-hours and bytes, for `dry_run=true`. No torch.

Numbers that are not known are NaN, as are their sums and products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from src.data.table_size import num_candidates, table_size
from src.estimates.card import card_of
from src.estimates.disk import bytes_text, disk_of, free_bytes, number_text
from src.estimates.forecast import ARITHMETIC, REHEARSED, Forecast
from src.estimates.waiting import READ_RATE, START_SECONDS, WRITE_RATE, lasting_seconds, uneven_share
from src.planning.identity import (
    VERSIONS,
    AlignInputs,
    CandidatesInputs,
    CapabilityInputs,
    GenerateInputs,
    ReferenceInputs,
    SftInputs,
)
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.store import Store
from src.store.usage import Usage, usage_of

_KINDS = ("sft", "candidates", "reference", "align", "generate", "capability")  # of stages that a model computes
MEASURED = "measured"
_HEADER = "stage      to run     tokens  accelerator-hours  waiting  a point  source"
_ASSUMED = f"weights are read at {READ_RATE / 1e9:g} GB/s and published at {WRITE_RATE / 1e9:g}"
RECENT_STAGES = 50  # newest finished stages of a kind that sizes and speeds are taken from


@dataclass
class Estimate:
    """Cost of the stages of one kind that are to run."""

    num_stages: int
    tokens: float
    hours: float  # of one accelerator (or CPU process), waiting included
    waiting: float  # of these hours, as finished stages waited, else by arithmetic
    source: str  # of the speed: measured (finished stages of this store), rehearsed, or arithmetic


class Cost:
    """Estimates for the stages a plan needs: as fast as finished stages of the store were, else as rehearsed."""

    def __init__(
        self,
        plan: Plan,
        store: Store,
        forecast: Forecast,
        num_running: int = 1,
        starts_job: Callable[[Stage], bool] = lambda _: False,
    ) -> None:
        """Read from the store what has finished.

        num_running: points that are computed at once. starts_job: whether a job begins with a stage.
        """
        self.plan, self.store, self.forecast, self.num_running = plan, store, forecast, num_running
        self.starts_job = starts_job
        self.stages = [stage for identity, stage in plan.stages.items() if identity in plan.needed]
        self.finished = {
            kind: [(stored, done) for stored, done in store.finished(kind, VERSIONS[kind], RECENT_STAGES)]
            for kind in _KINDS
        }

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Stage kind -> estimate, for the kinds that have something to run."""
        estimates: dict[str, Estimate] = {}
        for kind in _KINDS:
            if stages := [stage for stage in self.stages if stage.kind == kind]:
                usages = [self.usage(stage, self.forecast.processes(stage), self.starts_job(stage)) for stage in stages]
                in_use, waiting = (sum(getattr(u, name) for u in usages) / 3600 for name in ("in_use", "waiting"))
                hours = in_use + waiting
                sources = sorted({self._speed(stage)[1] for stage in stages})
                source = "" if math.isnan(hours) else " and ".join(sources)
                estimates[kind] = Estimate(len(stages), sum(map(self._tokens, stages)), hours, waiting, source)
        return estimates

    def usage(self, stage: Stage, processes: int, starts_job: bool) -> Usage:
        """Return what a stage takes of the accelerators of so many processes. NaN where nothing tells."""
        in_use = self._tokens(stage) * self._speed(stage)[0]
        return Usage(in_use, self._waiting(stage, in_use, processes, starts_job))

    def _tokens(self, stage: Stage) -> float:
        """Return how many tokens the stage will process.

        They are scaled from finished stages of the same data, or computed from the size of the tables.
        """
        num_passes, data_key = _num_passes(stage.description["inputs"], stage.kind), _data_key(stage.description)
        same_data = [(other, done) for other, done in self.finished[stage.kind] if _data_key(other) == data_key]
        scaled = []
        for other, done in same_data:
            constant = done.get("validation_tokens") or 0  # stages of older versions do not say which these were
            scaled.append(
                (done["tokens"] - constant) / _num_passes(other["inputs"], stage.kind) * num_passes + constant
            )
        known = [tokens for tokens in scaled if not math.isnan(tokens)]
        return median(known) if known else _expected_tokens(stage)

    def _speed(self, stage: Stage) -> tuple[float, str]:
        """Return the seconds of one accelerator per token, and where they come from."""
        measured = [usage_of(done).in_use / done["tokens"] for done in self._of_same_model(stage) if done["tokens"]]
        if measured:
            return median(measured), MEASURED
        if stage.kind == "capability":
            return math.nan, ""
        rehearsed = self.forecast.seconds_per_token(stage)
        if not math.isnan(rehearsed):
            return rehearsed, REHEARSED
        return self.forecast.computed_seconds_per_token(stage), ARITHMETIC

    def _waiting(self, stage: Stage, in_use: float, processes: int, starts_job: bool) -> float:
        """Return the seconds that accelerators wait: for what does not depend on the stage's size, and for each other.

        in_use: seconds of all of them.
        """
        measured = [self._lasting(done, processes) for done in self._of_same_model(stage)]
        start = processes * START_SECONDS if starts_job else 0.0
        if measured:
            return start + median(measured)  # of a share that was uneven, what was waited counts as use
        if card_of(stage.point.engine) is None:  # a CPU, whose hours are not known
            return 0.0
        return start + processes * lasting_seconds(stage) + in_use * uneven_share(stage, processes)

    def _lasting(self, done: dict[str, Any], processes: int) -> float:
        """Return the seconds that so many accelerators would have waited for what a finished stage read and wrote."""
        held = max(done.get("processes") or 1, done.get("held_processes") or 1)
        return usage_of(done).waiting * processes / held

    def _of_same_model(self, stage: Stage) -> Iterator[dict[str, Any]]:
        """Yield what DONE says of the finished stages of the same kind and model."""
        inputs = stage.description["inputs"]
        for other, done in self.finished[stage.kind]:
            if all(other["inputs"].get(name) == inputs.get(name) for name in ("model", "lora")):
                yield done

    def text(self) -> str:
        """Return the estimate as a table; empty when nothing is to run."""
        if not self.stages:
            return ""
        lines = ["", "estimated cost of the stages to run", _HEADER]
        num_points = max(1, self.plan.num_points_to_compute)

        def row(kind: str, count: str, tokens: str, hours: float, waiting: float, source: str = "") -> str:
            numbers = (_format_hours(value) for value in (hours, waiting, hours / num_points))
            return "{:10} {:>6} {:>10} {:>18} {:>8} {:>8}  {}".format(kind, count, tokens, *numbers, source).rstrip()

        for kind, e in self.estimates.items():
            lines.append(row(kind, str(e.num_stages), number_text(e.tokens), e.hours, e.waiting, e.source))
        unknown = "capability" in self.estimates and math.isnan(self.estimates["capability"].hours)
        counted = [e for kind, e in self.estimates.items() if not (unknown and kind == "capability")]
        total, waiting = (sum(getattr(e, name) for e in counted) for name in ("hours", "waiting"))
        if not math.isnan(total):
            lines.append(row("all", "", "", total, waiting))
        if unknown:
            lines.append(
                "capability: known once these tasks have been asked of this model in this output_dir; not in `all`"
            )
        if waiting > 0:
            start = f"; a job starts in {START_SECONDS:g} s" if any(map(self.starts_job, self.stages)) else ""
            lines.append(f"waiting: as finished stages did, or {_ASSUMED}{start}")
        if any(ARITHMETIC in e.source for e in self.estimates.values()):
            lines.append(
                f"{ARITHMETIC}: products alone, and in sampling the reading of weights and keys, at the rates of "
                "conf/gpus.yaml"
            )
        if math.isnan(total):
            lines.append(f'"-" = {self.why_unknown}')
        return "\n".join([*lines, *self._disk()])

    @property
    def why_unknown(self) -> str:
        """What hours need to be known."""
        named = any(card_of(stage.point.engine) is not None for stage in self.stages)
        card = "" if named else ", or engine.gpu=NAME of conf/gpus.yaml"
        return f"not known: needs one finished run of this model and dataset in this output_dir{card}"

    def _disk(self) -> Iterator[str]:
        disk = disk_of(self.plan, self.num_running)
        if disk is None or math.isnan(disk.model_bytes):
            return
        models, keep = f"{disk.num_in_all} models", self.plan.points[0].keep_checkpoints
        if disk.num_models < disk.num_in_all:
            running = f"{self.num_running} point{'s' if self.num_running > 1 else ''} at a time"
            models = f"at most {disk.num_models} of {models} at any moment (keep_checkpoints={keep}, {running})"
        if disk.partial_bytes:
            models += f", {bytes_text(disk.partial_bytes)} for the checkpoints that partial runs resume from"
        yield (
            f"disk: {bytes_text(disk.model_bytes)} for the weights of {models}, "
            f"{bytes_text(disk.checkpoint_bytes)} for each that is being trained; "
            f"{bytes_text(free_bytes(self.store))} free"
        )


def _num_passes(inputs: dict[str, Any], kind: str) -> float:
    """Return what the tokens of a stage are proportional to, of stages with the same data; NaN where nothing tells.

    inputs: as stage.json has them.
    """
    if kind in ("sft", "align"):
        trainer, data, fraction = inputs["trainer"], inputs["data"], inputs.get("stop_fraction", 1.0)
        if data.get("max_examples") is not None:
            return float(min(1.0, trainer["epochs"]) * fraction)
        return trainer["epochs"] * data["sft_fraction"] * fraction if trainer["max_steps"] is None else math.nan
    if kind == "reference":
        return 1.0
    if kind == "capability":
        return float(inputs["limit"] or 1)
    generation = inputs["generation"]
    if kind == "candidates":
        return float(generation["samples_per_prompt"] * generation["max_new_tokens"])
    prompts = inputs["prompts"]
    num_samples = prompts["num_prompts"] * prompts.get("num_turns", 1) * generation.get("samples_per_prompt", 1)
    return float(num_samples * generation["max_new_tokens"])


def _data_key(description: dict[str, Any]) -> dict[str, Any]:
    """Return what is equal when two stages read the same rows with the same tokenizer. description: a stage.json."""
    inputs, pairs = description["inputs"], description["upstream"].get("pairs")
    if description["stage"] == "capability":
        asked = {name: inputs[name] for name in ("model", "tasks", "files", "chat_template")}
        return {**asked, "all": inputs["limit"] is None}
    data = inputs["data"] if "data" in inputs else inputs["prompts"]
    kept = {name: value for name, value in data.items() if name != "sft_fraction"}
    return {"model": inputs["model"], "pairs": pairs, **kept}


def _expected_tokens(stage: Stage) -> float:
    """Return the tokens a stage processes by the size of the tables it reads."""
    inputs, point = stage.inputs, stage.point
    if isinstance(inputs, CapabilityInputs):
        return math.nan  # of documents that have not been read
    if isinstance(inputs, GenerateInputs):
        return float(inputs.num_samples * inputs.generation.max_new_tokens)
    if isinstance(inputs, CandidatesInputs):
        return num_candidates(point) * inputs.generation.max_new_tokens
    size = table_size(point, "sft" if isinstance(inputs, SftInputs) else "train")
    if isinstance(inputs, ReferenceInputs):
        rows = size.rows if inputs.data.max_examples is None else min(size.rows, inputs.data.max_examples)
        return size.tokens * (rows + table_size(point, "validation").rows)
    assert isinstance(inputs, SftInputs | AlignInputs)
    trainer = inputs.trainer
    num_examples = size.rows * trainer.epochs * inputs.data.sft_fraction
    if trainer.max_steps is not None:
        num_examples = min(num_examples, trainer.max_steps * trainer.batch_size)
    tokens = stage.stop_fraction * size.tokens * num_examples
    if isinstance(inputs, SftInputs) and inputs.data.sft_validation_size != 0:
        validation = table_size(point, "sft_validation")
        tokens += validation.tokens * validation.rows
    return tokens  # alignment's pairs are at most a few thousand


def _format_hours(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
