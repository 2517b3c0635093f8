"""The schema of a run: dataclasses typed by OmegaConf, with the values each field may have.

Rules between fields are in `src.config.validation`. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from src.config.capability import Capability
from src.config.fields import MAX_SECONDS, choice, choices_of, folder_name, number, random_seed
from src.config.judge import Judge
from src.config.tables import MAX_ROWS, MAX_TOKENS, HubTable, ListedTable
from src.methods import METHODS, SCORES, options_of

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

GENERATED = ("mini_tldr", "mini_math")  # sources of rows that are made up: nothing is read, prompts are their own

# No useful value is larger, and none that is allowed overflows what is computed from it.
MAX_BETA = 1e6
MAX_LR = 1e6


@dataclass
class Option:
    """The base of every config group; `name` is the chosen option, as in `model=NAME`."""

    name: str = folder_name()


@dataclass
class Best:
    beta: float = number(above=0, maximum=MAX_BETA)
    lr: float = number(above=0, maximum=MAX_LR)


@dataclass
class Setup(Option):
    best: dict[str, Best] = field(default_factory=dict)  # method -> published or measured best values


@dataclass
class Init:
    name: str = choice("sft", "base")
    sft_weight: float = number(0.0, maximum=1e6)
    align_weight: float = number(1.0, above=0, maximum=1e6)


@dataclass
class MethodFields:
    name: str = choice(*METHODS)
    score: str = choice(*SCORES)
    gamma_beta_ratio: float | None = number(None, maximum=1e6)
    calibration_weight: float | None = number(None, maximum=1e6)
    label_smoothing: float | None = number(None, maximum=0.499)
    rejected_probability: float | None = number(None, above=0, maximum=0.499)
    discopop_tau: float | None = number(None, minimum=0.001, maximum=1)
    penalty_weight: float | None = number(None, maximum=1e6)
    length_beta_ratio: float | None = number(None, maximum=1e6)
    alpha: float | None = number(None, minimum=-10, maximum=10)


@dataclass
class Lora:
    rank: int | None = number(None, minimum=1, maximum=2**16)
    alpha: float = number(32.0, above=0, maximum=1e6)
    targets: list[str] | None = None  # names of linear layers
    publish: str = choice("adapter", "merged", default="adapter")  # by alignment; SFT merges


@dataclass
class Model(Option):
    path: str = MISSING  # hub name, local folder, GGUF file, or package://PACKAGE/FILE
    template: str = "plain"  # a name or FILE.jinja, see `src.config.template_rules`
    end_token: Any = None  # one or a list: the first is learned, any of them ends a sample; null: the template's own
    system_prompt: str | None = None  # of conversations that have none
    revision: str | None = None
    attention: str = choice("auto", "flash_attention_2", "varlen", "onednn", "sdpa", default="auto")
    lora: Lora = field(default_factory=Lora)
    save_dtype: str = choice("float32", "bfloat16", default="float32")  # of aligned models; SFT saves float32


@dataclass
class Dataset(Option):
    source: str = choice(*GENERATED, "jsonl", "hub")  # a key of src.data.sources.SOURCES
    path: str | None = None
    sft: HubTable | None = None
    preference: HubTable | None = None
    sft_size: int | None = number(None, minimum=1, maximum=MAX_ROWS)
    sft_fraction: float = number(1.0, maximum=1)  # 0: no SFT, the base model itself
    sft_validation_size: int | None = number(0, maximum=MAX_ROWS)  # 0: SFT is not validated
    train_size: int | None = number(None, minimum=1, maximum=MAX_ROWS)
    validation_size: int | None = number(None, minimum=2, maximum=MAX_ROWS)  # one pair to select, one to report
    seed: int = random_seed()
    max_tokens: int = number(1024, minimum=2, maximum=MAX_TOKENS)
    max_prompt_tokens: int = number(512, minimum=1, maximum=MAX_TOKENS)

    def tables(self, name: str) -> list[tuple[str, HubTable | ListedTable]]:
        """Return the tables of `sft` or `preference`, each with its key: one, those of a mixture, or none."""
        table: HubTable | None = getattr(self, name)
        if table is None:
            return []
        return [(f"{name}.tables.{i}", listed) for i, listed in enumerate(table.tables)] or [(name, table)]


@dataclass
class Optimization:
    epochs: float = number(1.0, above=0, maximum=10_000)
    max_steps: int | None = number(None, minimum=1, maximum=10**9)
    batch_size: int = number(128, minimum=1, maximum=10**6)
    lr_scheduler_type: str = choice("linear", "cosine", "constant", default="linear")
    warmup_ratio: float = number(0.03, maximum=1)
    adam_betas: tuple[float, float] = number((0.9, 0.95), below=1)
    weight_decay: float = number(0.0, maximum=1000)
    max_grad_norm: float = number(2.0, above=0)


@dataclass
class Training(Optimization):
    """AdamW on `epochs` passes in batches of `batch_size` examples; lr is the peak learning rate."""

    lr: float = number(above=0, maximum=MAX_LR)


@dataclass
class AlignOptimization(Optimization):  # the point has its lr
    stop_fraction: float = number(1.0, above=0, maximum=1)  # fraction of the steps after which training stops


@dataclass
class Trainer(Option):
    sft: Training = field(default_factory=Training)
    align: AlignOptimization = field(default_factory=AlignOptimization)
    max_tokens_per_micro_batch: int | None = number(None, minimum=1, maximum=10**9)
    checkpoint_minutes: float = number(20.0, maximum=10**6)


@dataclass
class Engine(Option):
    device: str = choice("auto", "cpu", "cuda", default="auto")
    gpu: str | None = None  # the card stages are planned for: a name of conf/gpus.yaml
    precision: str = choice("fp32", "bf16", default="fp32")  # of the computation; trained weights are float32
    cpu_threads: int | None = number(None, minimum=1, maximum=10_000)  # and at most the machine's cores
    strategy: str = choice("none", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload", default="none")
    activation_checkpointing: bool | str = choice("auto", True, False, default="auto")
    compile: bool = False
    fused: bool | str = choice("auto", True, False, default="auto")
    deterministic: bool = False


@dataclass
class Generation:
    temperature: float = number(1.0, maximum=100)
    temperatures: dict[str, float] = number(default_factory=dict, maximum=100)  # category of a question -> its own
    top_k: int = number(0, maximum=10**7)
    top_p: float = number(1.0, above=0, maximum=1)
    max_new_tokens: int = number(256, minimum=1, maximum=MAX_TOKENS)
    samples_per_prompt: int = number(1, minimum=1, maximum=10_000)
    batch_size: int = number(64, minimum=1, maximum=10**6)
    seed: int = random_seed()

    @property
    def is_greedy(self) -> bool:
        """Whether all samples of a prompt are the same."""
        return self.temperature == 0 or self.top_k == 1


@dataclass
class Server(Option):  # none | vllm | transformers; auto is replaced when a run is planned
    command: str | None = None  # with {checkpoint}, {port}, {dtype}
    timeout: float = number(600.0, above=0, maximum=MAX_SECONDS)
    concurrency: int = number(64, minimum=1, maximum=2**16)
    is_automatic: bool = False  # whether it was chosen by server=auto


@dataclass
class Evaluation(Option):
    metric: str = choice("win_rate", "reward_accuracy", "accuracy", "rating")
    prompts_file: str | None = None  # file of a benchmark's; null: held-out prompts
    num_prompts: int = number(500, minimum=2, maximum=MAX_ROWS)
    selection_fraction: float = number(0.5, above=0, maximum=0.999)
    split_seed: int = random_seed()
    generation: Generation = field(default_factory=Generation)


@dataclass
class Pairs:
    """Where the training pairs come from: the dataset, or samples of the SFT model that a judge has graded."""

    name: str = choice("dataset", "onpolicy")
    num_prompts: int | None = number(None, minimum=1, maximum=MAX_ROWS)
    judge: str | None = choice(None, *choices_of(Judge, "name"), default=None)
    model: str | None = None  # of judge=reward_model
    selection: str | None = choice(None, "best_worst", "all", default=None)
    margin: float | None = number(None, maximum=1e6)
    generation: Generation | None = None


@dataclass
class WandbTracking:
    enabled: bool = False
    project: str = "alignment-sweep"
    entity: str | None = None  # null: the default of the account
    mode: str = choice("auto", "online", "offline", default="auto")  # auto: online when logged in, else offline


@dataclass
class TensorboardTracking:
    enabled: bool = False  # event files below OUTPUT_DIR/tensorboard


@dataclass
class Tracking(Option):
    wandb: WandbTracking = field(default_factory=WandbTracking)
    tensorboard: TensorboardTracking = field(default_factory=TensorboardTracking)


@dataclass
class Sweep:
    name: str | None = folder_name(None)
    variant: str = ""  # settings that distinguish points with equal method, init, beta, lr; set by the sweeper
    # The point of each method that stands for it; the shortlist is what is not significantly worse than the best.
    select: str = choice("best", "lowest_kl_in_shortlist", default="best")
    search: str = choice("grid", "successive_halving", default="grid")
    rungs: list[float] = number(  # fractions of alignment's steps
        default_factory=lambda: [0.25, 0.5, 1.0], above=0, maximum=1
    )
    keep_fraction: float = number(0.5, above=0, maximum=1)  # of a method's points, promoted to the next rung
    judge_only: bool = False  # refuse to train, or to sample points; set by sweeps.rejudge


@dataclass
class Point:
    """One run, fully resolved and checked; also the schema of conf/train.yaml."""

    setup: Setup = field(default_factory=Setup)
    init: Init = field(default_factory=Init)
    method: MethodFields = field(default_factory=MethodFields)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    pairs: Pairs = field(default_factory=Pairs)
    trainer: Trainer = field(default_factory=Trainer)
    engine: Engine = field(default_factory=Engine)
    evaluation: Evaluation = field(default_factory=Evaluation)
    server: Server = field(default_factory=Server)
    judge: Judge = field(default_factory=Judge)  # that points are compared and selected by
    judges: dict[str, Judge] = field(default_factory=dict)  # others of the same samples, by names of their own
    capability: Capability = field(default_factory=Capability)
    tracking: Tracking = field(default_factory=Tracking)
    beta_grid: dict[str, list[float]] = number(default_factory=dict, above=0, maximum=MAX_BETA)
    lr_grid: dict[str, list[float]] = number(default_factory=dict, above=0, maximum=MAX_LR)
    sweep: Sweep = field(default_factory=Sweep)
    beta: float = number(above=0, maximum=MAX_BETA)
    lr: float = number(above=0, maximum=MAX_LR)
    seed: int = random_seed()
    best_from: str | None = None
    output_dir: str = "outputs"
    keep_checkpoints: str = choice("all", "best", "none", default="all")
    dry_run: bool = False

    @property
    def study(self) -> tuple[str, str, str, str]:
        """The setup, method, init and variant: one beta and one lr are selected for each combination."""
        return self.setup.name, self.method.name, self.init.name, self.sweep.variant

    @property
    def without_seed(self) -> tuple[object, ...]:
        """The study, beta and lr, which are equal for points that differ only in their seed."""
        return *self.study, self.beta, self.lr

    @property
    def label(self) -> str:
        """The display name of this point: `dpo beta=0.05 lr=7e-07`, with whatever differs from the defaults."""
        extra = "" if self.init.name == "sft" else f" init={self.init.name}"
        if self.method.score != METHODS[self.method.name].score and "method.score=" not in self.sweep.variant:
            extra += f" method.score={self.method.score}"
        extra += f" seed={self.seed}" if self.seed else ""
        extra += f" {self.sweep.variant}" if self.sweep.variant else ""
        extra += f" to {100 * self.trainer.align.stop_fraction:g} %" if self.trainer.align.stop_fraction < 1 else ""
        return f"{self.method.name} beta={self.beta:g} lr={self.lr:g}{extra}"


def method_options(point: Point) -> dict[str, float]:
    """Return the fields of the point's loss and score besides beta, by name."""
    return {name: getattr(point.method, name) for name in options_of(point.method.name, point.method.score)}
