"""Every rule a run's config must keep; a checked Point comes out. No torch."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.config import ConfigError, Point, leaves, one_line
from src.judges import BASELINES, JUDGES, REMOTE
from src.judges.words import read_words
from src.methods import METHODS

BENCHMARKS = ("alpaca_eval", "arena_hard")  # evaluations that have questions of their own

# Which values a field may take, where its type does not say so.
CHOICES: dict[str, tuple[str | None, ...]] = {
    "init.name": ("sft", "base"),
    "method.name": tuple(METHODS),
    "model.template": ("plain", "tokenizer", "llama3", "mistral"),
    "dataset.source": ("mini_tldr", "jsonl", "hub"),
    "trainer.sft.schedule": ("linear", "cosine", "constant"),
    "trainer.align.schedule": ("linear", "cosine", "constant"),
    "engine.device": ("auto", "cpu", "cuda"),
    "engine.precision": ("fp32", "bf16"),
    "engine.parallel": ("none", "ddp", "zero1", "zero2", "zero3", "zero3_offload"),
    "model.attention": ("auto", "flash_attention_2", "varlen", "onednn", "sdpa"),
    "evaluation.quality": ("win_rate", "reward_accuracy"),
    "judge.name": ("none", *JUDGES),
    "keep": ("all", "best", "none"),
    "sweep.select": ("best", "lowest_kl_in_shortlist"),
    "tracking.mode": ("auto", "online", "offline"),
}

# Numbers and the interval they must lie in: (lowest, is it allowed, highest).
RANGES: dict[str, tuple[float, bool, float]] = {
    "beta": (0, False, math.inf),
    "lr": (0, False, math.inf),
    "seed": (0, True, 2**31 - 1),
    "init.sft_weight": (0, True, math.inf),
    "init.align_weight": (0, False, math.inf),
    "dataset.sft_size": (1, True, math.inf),
    "dataset.sft_fraction": (0, True, 1),
    "dataset.train_size": (1, True, math.inf),
    "dataset.validation_size": (2, True, math.inf),  # one to select, one to report
    "dataset.max_tokens": (2, True, math.inf),
    "dataset.max_prompt_tokens": (1, True, math.inf),
    "model.lora.rank": (1, True, math.inf),
    "model.lora.alpha": (0, False, math.inf),
    "trainer.sft.lr": (0, False, math.inf),
    "trainer.align.stop": (0, False, 1),
    "trainer.tokens_per_batch": (1, True, math.inf),
    "trainer.checkpoint_steps": (1, True, math.inf),
    "engine.threads": (1, True, math.inf),
    "evaluation.prompts": (2, True, math.inf),
    "evaluation.selection_fraction": (0, False, 0.999),
    "server.timeout": (0, False, math.inf),
    "server.concurrency": (1, True, math.inf),
    "judge.temperature": (0, True, math.inf),
    "judge.max_tokens": (1, True, math.inf),
    "judge.concurrency": (1, True, math.inf),
    "judge.timeout": (0, False, math.inf),
    "judge.attempts": (1, True, math.inf),
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


def point_from(cfg: DictConfig) -> Point:
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
    _check_method(point)
    _check_dataset(point)
    if point.model.attention in ("varlen", "flash_attention_2"):
        if point.engine.precision != "bf16":
            raise ConfigError(f"model.attention={point.model.attention} computes in 16 bits: add engine.precision=bf16")
        if point.engine.device == "cpu":
            raise ConfigError(f"model.attention={point.model.attention} needs CUDA, and engine.device=cpu")
    for name in ("beta_grid", "lr_grid"):
        check_grid(name, getattr(point, name))
    questions = point.evaluation.questions
    if questions is None and point.evaluation.name in BENCHMARKS:
        raise ConfigError(
            f"evaluation.questions is not set: evaluation={point.evaluation.name} needs evaluation.questions=FILE, "
            "the benchmark's own"
        )
    if questions is not None and not Path(questions).is_file():
        raise ConfigError(f"evaluation.questions={questions}: no such file")
    _check_judge(point)
    _check_server(point)


def check_packages(points: Iterable[Point]) -> None:
    """Whether the optional packages that points need are installed: asked before a launch, not before a plan.
    Raises ConfigError."""
    for point in points:
        engine = point.engine
        wanted = {"deepspeed": engine.parallel.startswith("zero") and f"engine.parallel={engine.parallel}"}
        wanted["flash_attn"] = point.model.attention == "flash_attention_2" and "model.attention=flash_attention_2"
        remote = f"judge={point.judge.name}" if point.judge.name in REMOTE else f"server={point.server.name}"
        wanted["openai"] = wanted["tenacity"] = remote != "server=none" and remote
        wanted["alpaca_eval"] = point.judge.name == "alpaca_eval" and "judge=alpaca_eval"
        for package, key in wanted.items():
            if key and importlib.util.find_spec(package) is None:
                extra = {"deepspeed": "zero", "flash_attn": "flash", "alpaca_eval": "alpaca"}.get(package, "judges")
                how = "pip install --no-build-isolation" if extra in ("zero", "flash") else "pip install"
                raise ConfigError(
                    f"{key} needs the package {package}: {how} '.[{extra}]', in the environment that jobs use"
                )
        if point.judge.name == "alpaca_eval":
            _check_annotator(point.judge.model or "")


def _check_annotator(name: str) -> None:
    spec = importlib.util.find_spec("alpaca_eval")
    assert spec is not None and spec.submodule_search_locations
    known = Path(spec.submodule_search_locations[0]) / "evaluators_configs"
    if not (known / name / "configs.yaml").is_file():  # an absolute path stays what it is
        raise ConfigError(
            f"judge.model={name}: no annotator; give one that alpaca-eval knows ({known}), "
            "or the absolute path of a folder with a configs.yaml"
        )


def check_key(points: Iterable[Point]) -> None:
    """Whether the key of a judge is in the environment, which jobs inherit. Raises ConfigError."""
    for judge in (point.judge for point in points):
        if judge.name in REMOTE and judge.base_url is None and not os.environ.get(judge.api_key_env):
            raise ConfigError(
                f"judge={judge.name} asks OpenAI and {judge.api_key_env} is not set: export it (judge.api_key_env "
                "names another variable), or give judge.base_url=URL of an endpoint of your own"
            )


def check_programs(points: Iterable[Point]) -> None:
    """Whether the servers that points start are on this machine, where they run here. Raises ConfigError."""
    for command in dict.fromkeys(point.server.command for point in points):
        if command is not None and shutil.which(program := shlex.split(command)[0]) is None:
            raise ConfigError(f"server.command: {program} is not on PATH; install it, or name it with its whole path")


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
    for option in ("gamma_beta_ratio", "calibration_weight"):
        given = getattr(point.method, option) is not None
        if given and option not in spec.options:
            raise ConfigError(f"method.{option}: method={point.method.name} has no such field; remove the override")
        if not given and option in spec.options:
            raise ConfigError(f"method.{option}: method={point.method.name} needs a value")


def _check_server(point: Point) -> None:
    command = point.server.command
    if point.server.name == "none":
        if command is not None:
            raise ConfigError("server.command: server=none has no such field; choose server=vllm or another")
        return
    try:
        words = [word.format(checkpoint="", port="", dtype="") for word in shlex.split(command or "")]
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"server.command={command}: {{checkpoint}}, {{port}} and {{dtype}} are all that is filled in ({error!r})"
        ) from None
    if not words or "{checkpoint}" not in (command or "") or "{port}" not in (command or ""):
        raise ConfigError(f"server.command={command}: needs {{checkpoint}} and {{port}}")


def _check_judge(point: Point) -> None:
    judge, mini = point.judge, point.dataset.source == "mini_tldr"
    fields = {
        "tldr": ("model", "base_url"),
        "alpaca_eval": ("model", "base_url"),
        "arena_hard": ("model", "base_url", "prompt"),
        "reward_model": ("model",),
    }.get(judge.name, ())
    for name in ("model", "base_url", "prompt"):
        if getattr(judge, name) is not None and name not in fields:
            raise ConfigError(f"judge.{name}: judge={judge.name} has no such field; remove the override")
    if "model" in fields and judge.model is None:
        raise ConfigError(f"judge.model is not set: judge={judge.name} needs judge.model=NAME")
    if judge.name == "none":
        if point.evaluation.quality == "win_rate":
            raise ConfigError("evaluation.quality=win_rate needs a judge; without one use reward_accuracy")
        return
    if judge.name == "gold" and (not mini or judge.baseline != "sft" or point.evaluation.questions is not None):
        raise ConfigError(
            "judge=gold compares samples of dataset=mini_tldr, whose facts it knows; "
            "use judge=none evaluation=preference, or another judge"
        )
    if judge.baseline is None:
        raise ConfigError(f"judge.baseline is not set: judge={judge.name} needs judge.baseline=FILE, sft or chosen")
    if judge.baseline == "chosen" and mini:
        raise ConfigError("judge.baseline=chosen: dataset=mini_tldr has no pairs on its held-out posts; use sft")
    if judge.baseline == "chosen" and point.evaluation.questions is not None:
        raise ConfigError("judge.baseline=chosen: evaluation.questions has no pairs; use a file of answers, or sft")
    for key, file in (("judge.baseline", judge.baseline), ("judge.prompt", judge.prompt)):
        if file is not None and file not in BASELINES and not Path(file).is_file():
            others = "; it is sft, chosen or a file of answers" if key == "judge.baseline" else ""
            raise ConfigError(f"{key}={file}: no such file{others}")
    if judge.prompt is not None:
        read_words(judge.prompt)
    if judge.base_url is not None and not judge.base_url.startswith(("http://", "https://")):
        raise ConfigError(f"judge.base_url={judge.base_url}: must begin with http:// or https://")
    if judge.max_cost is not None and (judge.input_price is None or judge.output_price is None):
        raise ConfigError(
            "judge.max_cost needs judge.input_price and judge.output_price (dollars for a million tokens)"
        )


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
