"""The schema of a run: dataclasses typed by OmegaConf. The rules between fields are in validation. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from src.errors import ConfigError
from src.methods import METHODS

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


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
    deduplicate: bool = False  # a row that says what an earlier one did is left out
    drop_if_rejected_elsewhere: bool = False  # and one whose chosen response another row of its prompt rejects
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
class Optimization:
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 128
    lr_scheduler_type: str = "linear"  # linear | cosine | constant
    warmup_ratio: float = 0.03
    adam_betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float = 2.0


@dataclass
class SftOptimization(Optimization):
    lr: float = MISSING  # alignment has the point's lr instead


@dataclass
class AlignOptimization(Optimization):
    stop_fraction: float = 1.0  # fraction of the steps after which training stops


@dataclass
class Trainer:
    name: str = MISSING
    sft: SftOptimization = field(default_factory=SftOptimization)
    align: AlignOptimization = field(default_factory=AlignOptimization)
    max_tokens_per_micro_batch: int | None = None
    save_steps: int = 100


@dataclass
class Engine:
    name: str = MISSING
    device: str = "auto"  # auto | cpu | cuda
    precision: str = "fp32"  # fp32 | bf16: of the computation; weights and optimizer are float32 always
    cpu_threads: int | None = None
    strategy: str = "none"  # none | ddp | zero1 | zero2 | zero3 | zero3_offload
    activation_checkpointing: bool = False
    compile: bool = False
    tflops: float | None = None
    mfu: float = 0.4


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
    metric: str = MISSING  # win_rate | reward_accuracy
    prompts_file: str | None = None  # file of a benchmark's; null: held-out prompts
    num_prompts: int = 500
    selection_fraction: float = 0.5
    split_seed: int = 0
    generation: Generation = field(default_factory=Generation)


@dataclass
class Judge:
    name: str = MISSING  # none | gold | tldr | alpaca_eval | arena_hard | reward_model
    baseline: str | None = "sft"  # sft | chosen | a file of answers: what a response is compared with
    model: str | None = None  # as the endpoint calls it; of alpaca_eval: an annotator; of reward_model: a model
    prompt_file: str | None = None  # the question in Arena-Hard's judge_config.yaml format
    base_url: str | None = None  # of an OpenAI-compatible endpoint; null: OpenAI's
    api_key_env: str = "OPENAI_API_KEY"  # the key itself is never written down
    temperature: float = 0.0
    max_tokens: int = 256  # of an answer
    concurrency: int = 8
    timeout: float = 60.0
    max_retries: int = 8
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
    search: str = "grid"  # grid: every point to its end | successive_halving: rung by rung
    rungs: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])  # shares of alignment's steps
    keep_fraction: float = 0.5  # of the points of each method that go on to the next rung


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
    keep_checkpoints: str = "all"  # all | best | none
    dry_run: bool = False

    @property
    def label(self) -> str:
        """How people name this point: `dpo beta=0.05 lr=7e-07`, with what differs from the usual."""
        extra = "" if self.init.name == "sft" else f" init={self.init.name}"
        extra += f" seed={self.seed}" if self.seed else ""
        extra += f" {self.sweep.variant}" if self.sweep.variant else ""
        extra += f" to {100 * self.trainer.align.stop_fraction:g} %" if self.trainer.align.stop_fraction < 1 else ""
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
