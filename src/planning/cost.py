"""What the stages still to do will cost, in accelerator-hours and bytes, for `dry_run=true`. No torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from src.config.schema import Dataset, Model
from src.planning.identity import locate
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.store import Store

# FLOPs a parameter and token: 2 forward, 4 backward. Activations that are computed again are no useful ones.
_FLOPS = {"sft": 6, "reference": 2, "align": 6, "generate": 2}
_DECODING = 0.1  # of the MFU of training: a token at a time waits for the weights to be read
_WEIGHT = 4  # bytes: models are saved in float32
_TRAINING = 12  # bytes a parameter of a checkpoint to resume from: weights and two moments
_LOOK_AT = 50  # finished stages of a kind, the newest: how fast it goes now


@dataclass
class Estimate:
    """Of the stages of one kind that are to do. None: nothing says. hours: of one accelerator (or CPU process)."""

    stages: int
    tokens: float | None
    hours: float | None
    measured: bool  # the speed is that of finished stages of this store


class Cost:
    def __init__(self, plan: Plan, store: Store) -> None:
        self.plan, self.store = plan, store
        self.finished = {kind: list(store.finished(kind, _LOOK_AT)) for kind in _FLOPS}

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """By kind of stage, those that have something to do."""
        found: dict[str, Estimate] = {}
        for kind in _FLOPS:
            own = [s for i, s in self.plan.stages.items() if i in self.plan.needed and s.kind == kind]
            if own:
                tokens, rates = [self._tokens(stage) for stage in own], [self._rate(stage) for stage in own]
                known = [t for t in tokens if t is not None]
                hours = [t * r[0] / 3600 for t, r in zip(tokens, rates, strict=True) if t is not None and r is not None]
                found[kind] = Estimate(
                    len(own),
                    sum(known) if len(known) == len(own) else None,
                    sum(hours) if len(hours) == len(own) else None,
                    all(rate is not None and rate[1] for rate in rates),
                )
        return found

    def _tokens(self, stage: Stage) -> float | None:
        """What the stage will process: as stages of the same data did, or what conf/dataset says of its tables."""
        size = _size(stage.description["inputs"], stage.kind)
        if size is not None:
            seen = [
                done["tokens"] / other * size
                for fields, done in self.finished[stage.kind]
                if _kin(fields) == _kin(stage.description["inputs"]) and (other := _size(fields, stage.kind))
            ]
            if seen:
                return median(seen)
        return _said(stage)

    def _rate(self, stage: Stage) -> tuple[float, bool] | None:
        """Seconds of one accelerator a token, and whether that was measured."""
        same = ("model", "lora")
        seen = [
            done["seconds"] * done.get("processes", 1) / done["tokens"]
            for fields, done in self.finished[stage.kind]
            if all(fields.get(name) == stage.description["inputs"].get(name) for name in same) and done["tokens"]
        ]
        if seen:
            return median(seen), True
        engine, parameters = stage.point.engine, parameters_of(stage.point.model)
        if engine.tflops is None or parameters is None:
            return None
        mfu = engine.mfu * (_DECODING if stage.kind == "generate" else 1)
        return _FLOPS[stage.kind] * parameters / (mfu * engine.tflops * 1e12), False

    @cached_property
    def weights(self) -> float | None:
        """Bytes of the models that will be written, and of what those that stop early leave to go on from; None when a
        model's size is not known."""
        sizes = [
            (parameters_of(stage.point.model), _WEIGHT + (_TRAINING if stage.stop_fraction < 1 else 0))
            for identity, stage in self.plan.stages.items()
            if identity in self.plan.needed and stage.kind in ("sft", "align")
        ]
        known = [size * each for size, each in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def text(self) -> str:
        if not self.plan.needed:
            return ""
        point = self.plan.points[0]
        lines = ["", "estimated cost of what is to do", "stage      to do     tokens  accelerator-hours"]
        for kind, e in self.estimates.items():
            how = "as measured here" if e.measured else "" if e.hours is None else "assumed"
            lines.append(f"{kind:9} {e.stages:6} {_short(e.tokens):>10} {_hours(e.hours):>18}  {how}".rstrip())
        hours = [e.hours for e in self.estimates.values()]
        if None not in hours:
            lines.append(f"{'all':9} {'':6} {'':>10} {_hours(sum(h for h in hours if h is not None)):>18}")
        if any(e.hours is not None and not e.measured for e in self.estimates.values()):
            lines.append(
                f"assumed: {_FLOPS['align']} FLOPs a parameter and token in training, {_FLOPS['generate']} elsewhere, "
                f"at {100 * point.engine.mfu:g} % of {point.engine.tflops:g} TFLOPS (engine.mfu, engine.tflops), "
                "a tenth of that in sampling; rows and tokens of conf/dataset"
            )
        if None in hours:
            lines.append("-: nothing is known before a first run of this model and data in this output_dir")
        return "\n".join([*lines, *self._disk()])

    def _disk(self) -> Iterator[str]:
        if self.weights is None:
            return
        models = sum(e.stages for kind, e in self.estimates.items() if kind in ("sft", "align"))
        if models:
            size, keep = parameters_of(self.plan.points[0].model) or 0, self.plan.points[0].keep_checkpoints
            until = {
                "all": "",
                "best": " until the sweep ends and keep_checkpoints=best takes effect",
                "none": " at most",
            }[keep]
            early = any(self.plan.stages[identity].stop_fraction < 1 for identity in self.plan.needed)
            more = " and what those that stop early go on from" if early else ""
            yield (
                f"disk: {_bytes(self.weights)} for the weights of {models} models{more}{until}, "
                f"{_bytes(_TRAINING * size)} for each that is being trained; {_bytes(free(self.store))} are free"
            )


def warning(plan: Plan, store: Store) -> str | None:
    """Of a disk that will not hold what the plan writes."""
    weights = Cost(plan, store).weights
    if weights is None or weights < free(store):
        return None
    return (
        f"output_dir={store.output_dir}: the weights of this sweep take {_bytes(weights)}, {_bytes(free(store))} are "
        "free (dry_run=true shows the estimate; keep_checkpoints=none leaves no aligned model)"
    )


def free(store: Store) -> int:
    """Bytes where the store is or will be."""
    folder = next(path for path in (store.root, *store.root.parents) if path.exists())
    return shutil.disk_usage(folder).free


def parameters_of(model: Model) -> float | None:
    """Of a local model by its config.json, of another what conf/model says; None when neither does."""
    found = locate(model.path)
    if found is None or not (found / "config.json").is_file():
        return model.parameters
    config = json.loads((found / "config.json").read_text())
    try:
        return _llama(config)
    except KeyError:
        return model.parameters


def _llama(config: dict[str, Any]) -> float:
    """Of Llama and its kind; biases and norms are too few to count."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or d // heads
    attention = 2 * d * width * (heads + (config.get("num_key_value_heads") or heads))
    embeddings = config["vocab_size"] * d * (1 if config.get("tie_word_embeddings") else 2)
    return float(config["num_hidden_layers"] * (attention + 3 * d * config["intermediate_size"]) + embeddings)


def _size(fields: dict[str, Any], kind: str) -> float | None:
    """How much of its data a stage goes through; None when only its steps are known."""
    if kind in ("sft", "align"):
        trainer = fields["trainer"]
        share = fields["data"]["sft_fraction"]
        return trainer["epochs"] * share * fields.get("stop_fraction", 1.0) if trainer["max_steps"] is None else None
    return (
        1.0 if kind == "reference" else float(fields["prompts"]["num_prompts"] * fields["generation"]["max_new_tokens"])
    )


def _data_of(fields: dict[str, Any]) -> dict[str, Any]:
    return fields["data"] if "data" in fields else fields["prompts"]


def _kin(fields: dict[str, Any]) -> dict[str, Any]:
    """What makes two stages go through the same data."""
    data = {name: value for name, value in _data_of(fields).items() if name != "sft_fraction"}
    return {"data": data, "model": fields["model"]}


def _said(stage: Stage) -> float | None:
    point, data = stage.point, stage.point.dataset
    if stage.kind == "generate":
        return float(point.evaluation.num_prompts * point.evaluation.generation.max_new_tokens)
    name, asked = ("sft", data.sft_size) if stage.kind == "sft" else ("preference", data.train_size)
    rows, each = _rows(asked, data, name), _tokens_of(data, name)
    if rows is None or each is None:
        return None
    if stage.kind == "reference":
        return (rows + (data.validation_size or 0)) * each
    trainer = point.trainer.sft if stage.kind == "sft" else point.trainer.align
    seen = rows * trainer.epochs * (data.sft_fraction if stage.kind == "sft" else 1.0)
    return (
        stage.stop_fraction
        * each
        * (seen if trainer.max_steps is None else min(seen, trainer.max_steps * trainer.batch_size))
    )


def _rows(asked: int | None, data: Dataset, name: str) -> int | None:
    """Of a table's training split: as many as are asked for, or all that conf/dataset says it has."""
    table = data.sft if name == "sft" else data.preference
    return asked if asked is not None or table is None else table.rows.get(table.train_split)


def _tokens_of(data: Dataset, name: str) -> float | None:
    table = data.sft if name == "sft" else data.preference
    return None if table is None else table.tokens


def _short(value: float | None) -> str:
    """`249 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value is not None and value >= size:
            return f"{value / size:.3g} {unit}"
    return "-" if value is None else f"{value:.3g}"


def _hours(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
