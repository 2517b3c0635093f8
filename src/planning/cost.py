"""What the stages still to run will cost, in accelerator-hours and bytes, for `dry_run=true`. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from src.config.schema import Model
from src.planning.identity import (
    VERSIONS,
    AlignInputs,
    GenerateInputs,
    ReferenceInputs,
    SftInputs,
    locate,
)
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.store import Store

# FLOPs per parameter and token: 2 forward + 4 backward. Recomputed activations are not counted (MFU, not HFU).
_FLOPS = {"sft": 6, "reference": 2, "align": 6, "generate": 2}
_DECODING_MFU = 0.1  # of the MFU of training: decoding is bound by reading the weights for every token
_WEIGHT_BYTES = 4  # per parameter: models are saved in float32
_CHECKPOINT_BYTES = 12  # per parameter of a checkpoint to resume from: weights and two moments of Adam in float32
RECENT_STAGES = 50  # newest finished stages of a kind that sizes and speeds are taken from


@dataclass
class Estimate:
    """Cost of the stages of one kind that are to run; None where it is not known."""

    num_stages: int
    tokens: float | None
    hours: float | None  # of one accelerator (or CPU process)
    measured: bool  # whether the speed is that of finished stages of this store


class Cost:
    """Estimates for the stages a plan needs, calibrated by what finished stages of the store took."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.finished = {
            kind: [
                (stored["inputs"], done)
                for stored, done in store.finished(kind, RECENT_STAGES)
                if stored["version"] == VERSIONS[kind]  # inputs of other versions have other fields
            ]
            for kind in _FLOPS
        }

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Stage kind -> estimate, for the kinds that have something to run."""
        estimates: dict[str, Estimate] = {}
        for kind in _FLOPS:
            stages = [s for identity, s in self.plan.stages.items() if identity in self.plan.needed and s.kind == kind]
            if stages:
                tokens, speeds = [self._tokens(stage) for stage in stages], [self._speed(stage) for stage in stages]
                hours = [
                    None if count is None or speed is None else count * speed[0] / 3600
                    for count, speed in zip(tokens, speeds, strict=True)
                ]
                measured = all(speed is not None and speed[1] for speed in speeds)
                estimates[kind] = Estimate(len(stages), _sum(tokens), _sum(hours), measured)
        return estimates

    def _tokens(self, stage: Stage) -> float | None:
        """Return how many tokens the stage will process.

        They are scaled from finished stages of the same data, or computed from the table sizes in conf/dataset.
        """
        inputs = stage.description["inputs"]
        num_passes = _num_passes(inputs, stage.kind)
        if num_passes is not None:
            scaled = [
                done["tokens"] / other_passes * num_passes
                for other, done in self.finished[stage.kind]
                if _data_key(other) == _data_key(inputs) and (other_passes := _num_passes(other, stage.kind))
            ]
            if scaled:
                return median(scaled)
        return _configured_tokens(stage)

    def _speed(self, stage: Stage) -> tuple[float, bool] | None:
        """Return the seconds of one accelerator per token, and whether that was measured."""
        inputs = stage.description["inputs"]
        measured = [
            done["seconds"] * done["processes"] / done["tokens"]
            for other, done in self.finished[stage.kind]
            if all(other.get(name) == inputs.get(name) for name in ("model", "lora")) and done["tokens"]
        ]
        if measured:
            return median(measured), True
        engine, num_parameters = stage.point.engine, count_parameters(stage.point.model)
        if engine.tflops is None or num_parameters is None:
            return None
        mfu = engine.mfu * (_DECODING_MFU if stage.kind == "generate" else 1)
        return _FLOPS[stage.kind] * num_parameters / (mfu * engine.tflops * 1e12), False

    @cached_property
    def weights(self) -> float | None:
        """Bytes of the models that will be written and of the checkpoints of partial runs; None when unknown."""
        sizes: list[float | None] = []
        for identity, stage in self.plan.stages.items():
            if identity in self.plan.needed and stage.kind in ("sft", "align"):
                num_parameters = count_parameters(stage.point.model)
                bytes_each = _WEIGHT_BYTES + (_CHECKPOINT_BYTES if stage.stop_fraction < 1 else 0)
                sizes.append(None if num_parameters is None else num_parameters * bytes_each)
        return _sum(sizes)

    def text(self) -> str:
        """Return the estimate as a table; empty when nothing is to run."""
        if not self.plan.needed:
            return ""
        point = self.plan.points[0]
        lines = ["", "estimated cost of the stages to run", "stage     to run     tokens  accelerator-hours"]
        for kind, e in self.estimates.items():
            source = "measured" if e.measured else "" if e.hours is None else "assumed"
            tokens, hours = _format_count(e.tokens), _format_hours(e.hours)
            lines.append(f"{kind:9} {e.num_stages:6} {tokens:>10} {hours:>18}  {source}".rstrip())
        total = _sum([e.hours for e in self.estimates.values()])
        if total is not None:
            lines.append(f"{'all':9} {'':6} {'':>10} {_format_hours(total):>18}")
        if any(e.hours is not None and not e.measured for e in self.estimates.values()):
            lines.append(
                f"assumed: {_FLOPS['align']} FLOPs per parameter and token in training, else {_FLOPS['generate']}, "
                f"at {100 * point.engine.mfu:g} % of {point.engine.tflops:g} TFLOPS (engine.mfu, engine.tflops), "
                "a tenth of that in sampling; rows and tokens of conf/dataset"
            )
        if total is None:
            lines.append('"-" = no estimate yet (needs one finished run of this model and dataset in this output_dir)')
        return "\n".join([*lines, *self._disk()])

    def _disk(self) -> Iterator[str]:
        if self.weights is None:
            return
        num_models = sum(e.num_stages for kind, e in self.estimates.items() if kind in ("sft", "align"))
        if num_models:
            size, keep = count_parameters(self.plan.points[0].model) or 0, self.plan.points[0].keep_checkpoints
            until = {
                "all": "",
                "best": " until the sweep ends and keep_checkpoints=best takes effect",
                "none": " at most",
            }[keep]
            partial = any(self.plan.stages[identity].stop_fraction < 1 for identity in self.plan.needed)
            checkpoints = " and the checkpoints that partial runs resume from" if partial else ""
            yield (
                f"disk: {_format_bytes(self.weights)} for the weights of {num_models} models{checkpoints}{until}, "
                f"{_format_bytes(_CHECKPOINT_BYTES * size)} for each that is being trained; "
                f"{_format_bytes(free_bytes(self.store))} free"
            )


def disk_warning(plan: Plan, store: Store) -> str | None:
    """Return a warning when the disk cannot hold what the plan writes, else None."""
    weights = Cost(plan, store).weights
    if weights is None or weights < free_bytes(store):
        return None
    return (
        f"output_dir={store.output_dir}: this sweep will write {_format_bytes(weights)} of weights but only "
        f"{_format_bytes(free_bytes(store))} is free (dry_run=true shows the estimate; keep_checkpoints=none keeps no "
        "aligned model)"
    )


def free_bytes(store: Store) -> int:
    """Return the free space of the file system that the store is on, or will be."""
    folder = next(path for path in (store.root, *store.root.parents) if path.exists())
    return shutil.disk_usage(folder).free


def count_parameters(model: Model) -> float | None:
    """Return the parameters of a local model by its config.json, of another by conf/model; None when unknown."""
    folder = locate(model.path)
    if folder is None or not (folder / "config.json").is_file():
        return model.parameters
    config = json.loads((folder / "config.json").read_text())
    try:
        return _count_llama_parameters(config)
    except KeyError:
        return model.parameters


def _count_llama_parameters(config: dict[str, Any]) -> float:
    """Count the weights of a decoder with Llama's layout; biases and norms are negligible."""
    hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden_size // num_heads
    attention = 2 * hidden_size * head_dim * (num_heads + (config.get("num_key_value_heads") or num_heads))
    mlp = 3 * hidden_size * config["intermediate_size"]
    embeddings = config["vocab_size"] * hidden_size * (1 if config.get("tie_word_embeddings") else 2)
    return float(config["num_hidden_layers"] * (attention + mlp) + embeddings)


def _num_passes(inputs: dict[str, Any], kind: str) -> float | None:
    """Return what the tokens of a stage are proportional to; None when max_steps decides.

    inputs: as stage.json has them.
    """
    if kind in ("sft", "align"):
        trainer, fraction = inputs["trainer"], inputs["data"]["sft_fraction"] * inputs.get("stop_fraction", 1.0)
        return trainer["epochs"] * fraction if trainer["max_steps"] is None else None
    if kind == "reference":
        return 1.0
    return float(inputs["prompts"]["num_prompts"] * inputs["generation"]["max_new_tokens"])


def _data_key(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that are equal when two stages read the same rows with the same tokenizer."""
    data = inputs["data"] if "data" in inputs else inputs["prompts"]
    return {"model": inputs["model"], **{name: value for name, value in data.items() if name != "sft_fraction"}}


def _configured_tokens(stage: Stage) -> float | None:
    """Return the tokens a stage processes by the table sizes that the config states; None without them."""
    inputs, data = stage.inputs, stage.point.dataset
    if isinstance(inputs, GenerateInputs):
        return float(inputs.prompts.num_prompts * inputs.generation.max_new_tokens)
    table, rows = (data.sft, data.sft_size) if isinstance(inputs, SftInputs) else (data.preference, data.train_size)
    if rows is None and table is not None:
        rows = table.rows.get(table.train_split)
    if rows is None or table is None or table.tokens is None:
        return None
    if isinstance(inputs, ReferenceInputs):
        return (rows + (data.validation_size or 0)) * table.tokens
    assert isinstance(inputs, SftInputs | AlignInputs)
    trainer = inputs.trainer
    num_examples = rows * trainer.epochs * inputs.data.sft_fraction
    if trainer.max_steps is not None:
        num_examples = min(num_examples, trainer.max_steps * trainer.batch_size)
    return stage.stop_fraction * table.tokens * num_examples


def _sum(values: list[float | None]) -> float | None:
    """Return the sum, or None when a term is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _format_count(value: float | None) -> str:
    """Format as `249 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value is not None and value >= size:
            return f"{value / size:.3g} {unit}"
    return "-" if value is None else f"{value:.3g}"


def _format_hours(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _format_bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
