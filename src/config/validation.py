"""Every rule a run's config must keep; a checked Point comes out. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config.judge_rules import JUDGES, check_judge, check_server
from src.config.schema import Point, leaves
from src.data.adapters import ADAPTERS
from src.data.sources import SOURCES
from src.errors import ConfigError, one_line
from src.methods import METHODS

BENCHMARKS = ("alpaca_eval", "arena_hard")  # evaluations that have questions of their own

# Which values a field may take, where its type does not say so.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "init.name": ("sft", "base"),
    "method.name": tuple(METHODS),
    "model.template": ("plain", "tokenizer", "llama3", "mistral"),
    "dataset.source": tuple(SOURCES),
    "dataset.sft.adapter": (None, *ADAPTERS),
    "dataset.preference.adapter": (None, *ADAPTERS),
    "trainer.sft.lr_scheduler_type": ("linear", "cosine", "constant"),
    "trainer.align.lr_scheduler_type": ("linear", "cosine", "constant"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.precision": ("fp32", "bf16"),
    "engine.strategy": ("none", "ddp", "zero1", "zero2", "zero3", "zero3_offload"),
    "model.attention": ("auto", "flash_attention_2", "varlen", "onednn", "sdpa"),
    "evaluation.metric": ("win_rate", "reward_accuracy"),
    "judge.name": ("none", *JUDGES),
    "keep_checkpoints": ("all", "best", "none"),
    "sweep.select": ("best", "lowest_kl_in_shortlist"),
    "sweep.search": ("grid", "successive_halving"),
    "tracking.mode": ("auto", "online", "offline"),
}

# Numbers and the interval they must lie in: (lowest, is it allowed, highest).
RANGES: dict[str, tuple[float, bool, float]] = {
    "beta": (0, False, math.inf),
    "lr": (0, False, math.inf),
    "seed": (0, True, 2**31 - 1),
    "init.sft_weight": (0, True, math.inf),
    "init.align_weight": (0, False, math.inf),
    "method.gamma_beta_ratio": (0, True, math.inf),
    "method.calibration_weight": (0, True, math.inf),
    "dataset.sft_size": (1, True, math.inf),
    "dataset.sft_fraction": (0, True, 1),
    "dataset.train_size": (1, True, math.inf),
    "dataset.validation_size": (2, True, math.inf),  # one to select, one to report
    "dataset.max_tokens": (2, True, math.inf),
    "dataset.max_prompt_tokens": (1, True, math.inf),
    "model.lora.rank": (1, True, math.inf),
    "model.lora.alpha": (0, False, math.inf),
    "trainer.sft.lr": (0, False, math.inf),
    "trainer.align.stop_fraction": (0, False, 1),
    "sweep.keep_fraction": (0, False, 1),
    "trainer.max_tokens_per_micro_batch": (1, True, math.inf),
    "trainer.save_steps": (1, True, math.inf),
    "engine.cpu_threads": (1, True, math.inf),
    "evaluation.num_prompts": (2, True, math.inf),
    "evaluation.selection_fraction": (0, False, 0.999),
    "server.timeout": (0, False, math.inf),
    "server.concurrency": (1, True, math.inf),
    "judge.temperature": (0, True, math.inf),
    "judge.max_tokens": (1, True, math.inf),
    "judge.concurrency": (1, True, math.inf),
    "judge.timeout": (0, False, math.inf),
    "judge.max_retries": (1, True, math.inf),
    "judge.max_calls": (0, True, math.inf),
    "judge.max_cost": (0, True, math.inf),
    "judge.input_price": (0, True, math.inf),
    "judge.output_price": (0, True, math.inf),
    "evaluation.generation.temperature": (0, True, math.inf),
    "evaluation.generation.top_k": (0, True, math.inf),
    "evaluation.generation.top_p": (0, False, 1),
    "evaluation.generation.max_new_tokens": (1, True, math.inf),
    "evaluation.generation.batch_size": (1, True, math.inf),
} | {
    f"trainer.{stage}.{key}": bounds
    for stage in ("sft", "align")
    for key, bounds in {
        "epochs": (0.0, False, math.inf),
        "max_steps": (1.0, True, math.inf),
        "batch_size": (1.0, True, math.inf),
        "warmup_ratio": (0.0, True, 1.0),
        "weight_decay": (0.0, True, math.inf),
        "max_grad_norm": (0.0, False, math.inf),
    }.items()
}


def build_point(cfg: DictConfig) -> Point:
    """Resolve and check a composed config. Raises ConfigError."""
    try:
        point = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error)) from error
    assert isinstance(point, Point)
    check(point)
    return point


def check(point: Point) -> None:
    """Every rule between and within fields. Raises ConfigError naming the override to change."""
    values = dict(leaves(point))
    for key, value in values.items():
        _check_secret(key, value)
        if key in CHOICES and value not in CHOICES[key]:
            allowed = ", ".join("null" if c is None else c for c in CHOICES[key])
            raise ConfigError(f"{key}={value}: must be one of {allowed}")
        if key in RANGES and value is not None:
            low, inclusive, high = RANGES[key]
            if not (low <= value <= high and (inclusive or value > low)) or not math.isfinite(value):
                bound = f"{'>=' if inclusive else '>'} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
                raise ConfigError(f"{key}={value:g}: must be {bound}")
    for stage in ("sft", "align"):
        betas = getattr(point.trainer, stage).adam_betas
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise ConfigError(f"trainer.{stage}.adam_betas={list(betas)}: must be two numbers >= 0 and < 1")
    if point.sweep.name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.=+-]*", point.sweep.name):
        raise ConfigError(f"sweep.name={point.sweep.name}: names a folder; letters, digits and . _ - = + only")
    _check_search(point)
    _check_method(point)
    _check_dataset(point)
    if point.model.attention in ("varlen", "flash_attention_2"):
        if point.engine.precision != "bf16":
            raise ConfigError(f"model.attention={point.model.attention} computes in 16 bits: add engine.precision=bf16")
        if point.engine.device == "cpu":
            raise ConfigError(f"model.attention={point.model.attention} needs CUDA, and engine.device=cpu")
    for name in ("beta_grid", "lr_grid"):
        check_grid(name, getattr(point, name))
    questions = point.evaluation.prompts_file
    if questions is None and point.evaluation.name in BENCHMARKS:
        raise ConfigError(
            f"evaluation.prompts_file is not set: evaluation={point.evaluation.name} needs evaluation.prompts_file=FILE, "
            "the benchmark's own"
        )
    if questions is not None and not Path(questions).is_file():
        raise ConfigError(f"evaluation.prompts_file={questions}: no such file")
    check_judge(point)
    check_server(point)


def _check_secret(key: str, value: Any) -> None:
    """A config is written down in many places, so it only names where a key is. The message has no value."""
    if isinstance(value, str) and re.search(r"\w://[^/\s]*@", value):
        raise ConfigError(f"{key}: an address with a user or password; a config holds no secrets, export a key instead")
    if key == "judge.api_key_env" and not re.fullmatch(r"[A-Za-z_]\w*", value):
        raise ConfigError(
            f"{key}: names the environment variable that holds a key, such as OPENAI_API_KEY, not the key"
        )


def _check_search(point: Point) -> None:
    rungs = point.sweep.rungs
    rising = all(low < high for low, high in pairwise([0.0, *rungs]))
    if not rungs or not rising or rungs[-1] != 1:
        raise ConfigError(
            f"sweep.rungs={rungs}: must be shares of alignment's steps that rise and end with 1, as [0.25, 0.5, 1.0] do"
        )
    if point.sweep.search == "successive_halving" and point.trainer.align.stop_fraction != 1:
        raise ConfigError(
            f"trainer.align.stop_fraction={point.trainer.align.stop_fraction:g}: sweep.search=successive_halving stops points itself; "
            "give sweep.rungs=[...] and leave trainer.align.stop_fraction at 1"
        )


def check_grid(name: str, grid: dict[str, list[float]]) -> None:
    for method, values in grid.items():
        if method not in METHODS:
            raise ConfigError(f"{name}.{method}: no such method; methods are {', '.join(METHODS)}")
        if not values:
            raise ConfigError(f"{name}.{method}=[]: an empty grid has no points; give at least one value")
        for value in values:
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name}.{method}: {value:g} must be > 0")


def _check_method(point: Point) -> None:
    spec = METHODS[point.method.name]
    for option in sorted(f.name for f in fields(point.method) if f.name != "name"):
        given = getattr(point.method, option) is not None
        if given and option not in spec.options:
            raise ConfigError(f"method.{option}: method={point.method.name} has no such field; remove the override")
        if not given and option in spec.options:
            raise ConfigError(f"method.{option}: method={point.method.name} needs a value")


def _check_dataset(point: Point) -> None:
    data = point.dataset
    if data.source == "jsonl":
        if data.path is None:
            raise ConfigError(
                "dataset.path is not set: give dataset.path=FILE, "
                "a JSON list or JSON lines of prompt|conversations, chosen, rejected"
            )
        if not Path(data.path).is_file():
            raise ConfigError(f"dataset.path={data.path}: no such file")
    if data.source == "hub":
        if data.sft is None or data.preference is None:
            raise ConfigError("dataset.source=hub needs dataset.sft.path and dataset.preference.path")
        for name in ("sft", "preference"):
            if data.path is not None and not (Path(data.path) / name).is_dir():
                raise ConfigError(
                    f"dataset.path={data.path}: no folder {name} there; a local copy has sft and preference"
                )
    if data.max_prompt_tokens >= data.max_tokens:
        raise ConfigError(
            f"dataset.max_prompt_tokens={data.max_prompt_tokens}: must be below dataset.max_tokens={data.max_tokens}"
        )
