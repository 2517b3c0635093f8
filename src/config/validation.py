"""Rules between the fields of a config; the values of single fields are rules of the schema. No torch."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from src.config.capability import check_capability
from src.config.fields import check_value, shortened, typed_leaves
from src.config.judge_rules import MULTI_TURN_JUDGES, by_judge, check_judges, check_server
from src.config.overrides import MAX_VALUES
from src.config.pair_rules import check_pairs, resolve_pairs
from src.config.paths import is_file
from src.config.sampler import resolve_server
from src.config.schema import Point
from src.config.secrets import check_secret, conceal_secrets
from src.config.table_rules import check_tables
from src.config.template_rules import check_template
from src.errors import ConfigError, one_line
from src.methods import METHODS, SCORES, options_of, scores_of

ANY_METHOD = "default"  # the entry of lr_grid for methods without a list of their own
BENCHMARKS = (
    "alpaca_eval",
    "arena_hard",
    "arena_hard_v2",
    "mt_bench",
    "math",
)  # evaluations that need a file of prompts
# Whose scores are of one answer to each question.
SINGLE_ANSWER_JUDGES = ("alpaca_eval", "arena_hard", "arena_hard_v2", *MULTI_TURN_JUDGES)


def build_point(cfg: DictConfig) -> Point:
    """Return the resolved, checked Point of a composed config. Raises ConfigError."""
    try:
        point = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        group = key.removesuffix(".name")
        missing = f"{key} has no value: add {key}=VALUE" if group == key else f"{group} has no option: add {group}=NAME"
        raise ConfigError(missing) from error
    except OmegaConfBaseException as error:
        raise ConfigError(conceal_secrets(one_line(error))) from error
    assert isinstance(point, Point)
    point.server = resolve_server(point.server)
    point.pairs = resolve_pairs(point.pairs, point.judge)
    check(point)
    return point


def check(point: Point) -> None:
    """Check every field and every rule between fields. Raises ConfigError naming the override to change."""
    for key, spec, value in typed_leaves(point):
        check_secret(key, value)
        check_value(key, spec, value)
    check_folder("output_dir", point.output_dir)
    for stage in ("sft", "align"):
        betas = getattr(point.trainer, stage).adam_betas
        if len(betas) != 2:
            raise ConfigError(f"trainer.{stage}.adam_betas={list(betas)}: must be two numbers >= 0 and < 1")
    _check_search(point)
    _check_method(point)
    _check_dataset(point)
    _check_engine(point)
    check_template(point.model)
    if point.model.attention in ("varlen", "flash_attention_2"):
        if point.engine.precision != "bf16":
            raise ConfigError(f"model.attention={point.model.attention} requires engine.precision=bf16")
        if point.engine.device == "cpu":
            raise ConfigError(f"model.attention={point.model.attention} requires CUDA, but engine.device=cpu")
    for name in ("beta_grid", "lr_grid"):
        check_grid(name, getattr(point, name))
    prompts_file = point.evaluation.prompts_file
    if prompts_file is None and point.evaluation.name in BENCHMARKS:
        raise ConfigError(
            f"evaluation.prompts_file is not set: evaluation={point.evaluation.name} needs the benchmark's prompts, "
            "evaluation.prompts_file=FILE"
        )
    if prompts_file is not None and not is_file("evaluation.prompts_file", prompts_file):
        raise ConfigError(f"evaluation.prompts_file={prompts_file}: no such file")
    _check_samples(point)
    check_judges(point)
    check_pairs(point)
    check_server(point)
    check_capability(point.capability)


def check_folder(key: str, folder: str) -> None:
    """Raise ConfigError for a folder that cannot be made or written to. Nothing is made."""
    if not folder.strip() or not folder.isprintable():
        raise ConfigError(f"{key}={shortened(folder)}: must be the path of a folder")
    path = Path(folder).absolute()
    try:
        nearest = next(parent for parent in (path, *path.parents) if parent.exists())
        if not nearest.is_dir():
            reason = f"{nearest} is not a folder"
        elif not os.access(nearest, os.W_OK | os.X_OK) or nearest.is_relative_to("/proc"):
            reason = f"no permission to write to {nearest}"
        else:
            return
    except OSError as error:
        reason = f"{error.strerror}"
    raise ConfigError(f"{key}={shortened(folder)}: cannot be written ({reason}); choose another folder")


def _check_engine(point: Point) -> None:
    engine = point.engine
    if engine.precision == "bf16" and engine.strategy in ("none", "ddp"):
        raise ConfigError(
            f"engine.precision=bf16: engine.strategy={engine.strategy} holds one copy of the weights, and steps of "
            "3e-7 vanish in bf16 ones: choose engine=fsdp, which also holds float32 ones, on one GPU or several"
        )


def _check_samples(point: Point) -> None:
    generation = point.evaluation.generation
    if generation.temperatures and point.evaluation.prompts_file is None:
        raise ConfigError(
            "evaluation.generation.temperatures: only the questions of a file have categories; add "
            "evaluation.prompts_file=FILE, or remove the override"
        )
    if (count := generation.samples_per_prompt) == 1:
        return
    key = f"evaluation.generation.samples_per_prompt={count}"
    if generation.is_greedy:
        setting = "temperature=0" if generation.temperature == 0 else "top_k=1"
        raise ConfigError(f"{key}: at evaluation.generation.{setting} they are all the same; use one, or sample")
    for _, of_one in by_judge(point):
        if of_one.judge.name in SINGLE_ANSWER_JUDGES:
            raise ConfigError(f"{key}: judge={of_one.judge.name} scores one answer to each question; use one")


def _check_search(point: Point) -> None:
    rungs = point.sweep.rungs
    rising = all(low < high for low, high in pairwise([0.0, *rungs]))
    if not rungs or not rising or rungs[-1] != 1:
        raise ConfigError(
            f"sweep.rungs={rungs}: must be an increasing list of step fractions ending in 1.0, e.g. [0.25, 0.5, 1.0]"
        )
    if point.sweep.search == "successive_halving" and point.trainer.align.stop_fraction != 1:
        raise ConfigError(
            f"trainer.align.stop_fraction={point.trainer.align.stop_fraction:g}: must be 1 with "
            "sweep.search=successive_halving, which stops points itself at sweep.rungs=[...]"
        )


def check_grid(name: str, grid: dict[str, list[float]]) -> None:
    """Raise ConfigError for a grid of an unknown method, or without values or with too many."""
    for method, values in grid.items():
        if method not in METHODS and (name, method) != ("lr_grid", ANY_METHOD):
            raise ConfigError(f"{name}.{method}: no such method; methods are {', '.join(METHODS)}")
        if not values:
            raise ConfigError(f"{name}.{method}=[]: an empty grid has no points; add at least one value")
        if len(values) > MAX_VALUES:
            raise ConfigError(f"{name}.{method}: has more than {MAX_VALUES:,} values")


def _check_method(point: Point) -> None:
    name, score = point.method.name, point.method.score
    if score not in scores_of(name):
        raise ConfigError(
            f"method.score={score}: is never positive, and method={name} compares the score of each response with 0; "
            f"choose {', '.join(scores_of(name))}, or a pairwise method"
        )
    needed = options_of(name, score)
    known = (*needed, *SCORES[METHODS[name].score].options)  # a default for the score that was replaced is no mistake
    for option, value in vars(point.method).items():
        if value is not None and option not in (*known, "name", "score"):
            raise ConfigError(f"method.{option}: method={name} has no such field; remove the override")
        if value is None and option in needed:
            of_score = f" with method.score={score}" if option in SCORES[score].options else ""
            raise ConfigError(f"method.{option}: method={name}{of_score} needs a value: add method.{option}=VALUE")


def _check_dataset(point: Point) -> None:
    data = point.dataset
    if data.source == "jsonl":
        if data.path is None:
            raise ConfigError(
                "dataset.path is not set: add dataset.path=FILE, "
                "a JSON list or JSON lines with prompt or conversations, chosen, rejected"
            )
        if not is_file("dataset.path", data.path):
            raise ConfigError(f"dataset.path={data.path}: no such file")
    if data.source == "hub":
        if data.sft is None or data.preference is None:
            raise ConfigError("dataset.source=hub needs dataset.sft.path and dataset.preference.path")
        check_tables(data)
    if data.max_prompt_tokens >= data.max_tokens:
        raise ConfigError(
            f"dataset.max_prompt_tokens={data.max_prompt_tokens}: must be below dataset.max_tokens={data.max_tokens}"
        )
