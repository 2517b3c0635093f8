"""The schema of a run (dataclasses, typed by OmegaConf) and how a config is read; the rules are in checks. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException

from src.methods import METHODS

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"


class ConfigError(ValueError):
    """Something a user asked for that cannot be run: one line, naming the override or file and what would be right."""


@dataclass
class Best:
    beta: float = MISSING
    lr: float = MISSING


@dataclass
class Setup:
    name: str = MISSING
    best: dict[str, Best] = field(default_factory=dict)  # method -> published or measured best values


@dataclass
class Init:
    name: str = MISSING  # sft | base
    sft_weight: float = 0.0
    align_weight: float = 1.0


@dataclass
class MethodFields:
    name: str = MISSING
    gamma_beta_ratio: float | None = None
    calibration_weight: float | None = None


@dataclass
class Lora:
    rank: int | None = None
    alpha: float = 32.0
    targets: list[str] | None = None  # names of linear layers


@dataclass
class Model:
    name: str = MISSING
    path: str = MISSING  # hub name, local folder, GGUF file, or package://PACKAGE/FILE
    template: str = "plain"  # plain | tokenizer | llama3 | mistral
    parameters: float | None = None
    revision: str | None = None
    attention: str = "auto"  # auto | flash_attention_2 | varlen | onednn | sdpa
    lora: Lora = field(default_factory=Lora)


@dataclass
class HubTable:
    path: str = MISSING
    train_split: str = "train"
    validation_split: str = "validation"
    columns: dict[str, str] = field(default_factory=dict)  # prompt, chosen, ... -> what the table calls it
    adapter: str | None = None  # one of src.data.adapters.ADAPTERS
    distinct: bool = False  # a row that says what an earlier one did is left out
    never_rejected: bool = False  # and one whose chosen response another row of its prompt rejects
    rows: dict[str, int] = field(default_factory=dict)  # split -> rows
    tokens: float | None = None  # of a row


@dataclass
class Dataset:
    name: str = MISSING
    source: str = MISSING  # mini_tldr | jsonl | hub
    path: str | None = None
    sft: HubTable | None = None
    preference: HubTable | None = None
    sft_size: int | None = None
    sft_fraction: float = 1.0  # 0: none, the base model itself
    train_size: int | None = None
    validation_size: int | None = None
    seed: int = 0
    max_tokens: int = 1024
    max_prompt_tokens: int = 512


@dataclass
class Optimisation:
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 128
    schedule: str = "linear"  # linear | cosine | constant
    warmup_ratio: float = 0.03
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 2.0


@dataclass
class SftOptimisation(Optimisation):
    lr: float = MISSING  # alignment has the point's lr instead


@dataclass
class AlignOptimisation(Optimisation):
    stop: float = 1.0  # share of the schedule's steps after which it stops


@dataclass
class Trainer:
    name: str = MISSING
    sft: SftOptimisation = field(default_factory=SftOptimisation)
    align: AlignOptimisation = field(default_factory=AlignOptimisation)
    tokens_per_batch: int | None = None
    checkpoint_steps: int = 100


@dataclass
class Engine:
    name: str = MISSING
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "fp32"  # fp32 | bf16: of the computation; weights and optimiser are float32 always
    threads: int | None = None
    parallel: str = "none"  # none | ddp | zero1 | zero2 | zero3 | zero3_offload
    activation_checkpointing: bool = False
    compile: bool = False
    tflops: float | None = None
    mfu: float = 0.4


def zero_stage(engine: Engine) -> int:
    """1, 2 or 3 of an engine that is DeepSpeed ZeRO; 0 of any other."""
    return int(engine.parallel[4]) if engine.parallel.startswith("zero") else 0


@dataclass
class Generation:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 64
    seed: int = 0


@dataclass
class Server:
    name: str = MISSING  # none | vllm | transformers
    command: str | None = None  # with {checkpoint}, {port}, {dtype}
    timeout: float = 600.0
    concurrency: int = 64


@dataclass
class Evaluation:
    name: str = MISSING
    quality: str = MISSING  # win_rate | reward_accuracy
    questions: str | None = None  # file of a benchmark's; null: held-out prompts
    prompts: int = 500
    selection_fraction: float = 0.5
    split_seed: int = 0
    generation: Generation = field(default_factory=Generation)


@dataclass
class Judge:
    name: str = MISSING  # none | gold | tldr | alpaca_eval | arena_hard | reward_model
    baseline: str | None = "sft"  # sft | chosen | a file of answers: what a response is compared with
    model: str | None = None  # as the endpoint calls it; of alpaca_eval: an annotator; of reward_model: a model
    prompt: str | None = None  # file with the words of the question
    base_url: str | None = None  # of an OpenAI-compatible endpoint; null: OpenAI's
    api_key_env: str = "OPENAI_API_KEY"  # the key itself is never written down
    temperature: float = 0.0
    max_tokens: int = 256  # of an answer
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 8
    max_calls: int | None = None
    max_cost: float | None = None
    input_price: float | None = None  # of a million tokens
    output_price: float | None = None


@dataclass
class Tracking:
    name: str = MISSING
    wandb: bool = False
    project: str = "alignment-sweep"
    entity: str | None = None
    mode: str = "auto"  # auto | online | offline


@dataclass
class Sweep:
    name: str | None = None
    variant: str = ""  # what else tells a point from its neighbours; filled in by the sweeper
    select: str = "best"  # of each method: best | lowest_kl_in_shortlist (of those the prompts cannot tell from it)
    search: str = "grid"  # grid: every point to its end | halving: rung by rung
    rungs: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # shares of alignment's steps
    share: float = 0.5  # of the points of each method that go on to the next rung


@dataclass
class Point:
    """One run, fully resolved and checked; also the schema of conf/train.yaml."""

    setup: Setup = field(default_factory=Setup)
    init: Init = field(default_factory=Init)
    method: MethodFields = field(default_factory=MethodFields)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    trainer: Trainer = field(default_factory=Trainer)
    engine: Engine = field(default_factory=Engine)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: Server = field(default_factory=Server)
    judge: Judge = field(default_factory=Judge)
    tracking: Tracking = field(default_factory=Tracking)
    beta_grid: dict[str, list[float]] = field(default_factory=dict)
    lr_grid: dict[str, list[float]] = field(default_factory=dict)
    sweep: Sweep = field(default_factory=Sweep)
    beta: float = MISSING
    lr: float = MISSING
    seed: int = 0
    best_from: str | None = None
    output_dir: str = "outputs"
    keep: str = "all"  # all | best | none
    dry_run: bool = False

    @property
    def label(self) -> str:
        """How people name this point: `dpo beta=0.05 lr=7e-07`, with what differs from the usual."""
        extra = "" if self.init.name == "sft" else f" init={self.init.name}"
        extra += f" seed={self.seed}" if self.seed else ""
        extra += f" {self.sweep.variant}" if self.sweep.variant else ""
        extra += f" to {100 * self.trainer.align.stop:g} %" if self.trainer.align.stop < 1 else ""
        return f"{self.method.name} beta={self.beta:g} lr={self.lr:g}{extra}"


def method_options(point: Point) -> dict[str, float]:
    """The loss fields besides beta, by name."""
    return {name: getattr(point.method, name) for name in METHODS[point.method.name].options}


def leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every field of a dataclass. Raises ConfigError on a key the schema has not."""
    found: list[tuple[str, Any]] = []
    known = {f.name for f in fields(node)}
    for name in vars(node):
        if name not in known:  # `+key=value` adds even to a typed config
            raise ConfigError(f"{prefix}{name}: no such key; there are {', '.join(sorted(known))}")
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            found += leaves(value, f"{prefix}{f.name}.")
        else:
            found.append((prefix + f.name, value))
    return found


def one_line(error: BaseException) -> str:
    """The message of a Hydra or OmegaConf error, causes included, on one line."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen).split("\n")
        # OmegaConf appends its own coordinates; of those only the full key tells a user something.
        keep = [t.strip() for t in text if t.strip() and not t.strip().startswith(("object_type=", "reference_type="))]
        message = " ".join(keep).replace("full_key: ", "at key ")
        # Hydra proposes `+key=value`, which a typed config refuses as well.
        message = re.sub(r"\. To append to your config use \+\S+", "", message)
        if message and not any(message in part or part in message for part in parts):
            parts.append(message)
        seen = seen.__cause__
    return ": ".join(parts)


USER_ERRORS = (ConfigError, HydraException, OmegaConfBaseException)
