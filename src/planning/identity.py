"""What a stage's identity is made of: the inputs of every stage. Files count by their content (`src.planning.content`).

The inputs of a stage are all that its code is given and all that its identity hashes, so nothing can be read without
being hashed. What results do not depend on (device, threads, budgets, addresses) is in `src.planning.resources`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from src.config.fields import added_field
from src.config.schema import Lora, Training
from src.config.tables import MixedTable, Table
from src.methods import METHODS
from src.planning.content import ContentPath

Mixture = tuple[MixedTable, ...]

# Raise a stage's number when what it computes changes: artifacts of the old version are then not reused.
VERSIONS = {"sft": 11, "candidates": 1, "pairs": 1, "reference": 10, "align": 10, "generate": 10}
VERSIONS |= {"capability": 1, "judge": 1, "evaluate": 6}


@dataclass(frozen=True)
class ModelInputs:
    """The base model: weights and tokenizer, chat template, and the precision everything of a run computes in.

    end_tokens: that end a response, the first one learned; none: the template's own. system_prompt: of conversations
    that have none.
    """

    path: ContentPath
    template: str | ContentPath
    precision: str
    end_tokens: tuple[str, ...] = added_field(field(default=()))
    system_prompt: str | None = added_field(field(default=None))

    @property
    def template_name(self) -> str:
        """The template as it is configured."""
        return self.template.location if isinstance(self.template, ContentPath) else self.template


@dataclass(frozen=True)
class DataInputs:
    """Rows of a dataset. SFT has the fields of its demonstrations set, all other stages those of preference pairs.

    max_examples: that training reads, the first in a seeded order from which something can be learned; None: all.
    sft_validation_size: of held-out demonstrations, which SFT is validated on; None: all, 0: none.
    """

    source: str
    seed: int
    max_tokens: int
    max_prompt_tokens: int
    path: ContentPath | None = None
    sft: Table | Mixture | None = None
    preference: Table | Mixture | None = None
    sft_size: int | None = None
    sft_fraction: float = 1.0
    train_size: int | None = None
    validation_size: int | None = None
    max_examples: int | None = None
    sft_validation_size: int | None = added_field(field(default=0))

    @property
    def held_out(self) -> DataInputs:
        """What validation rows and their prompts depend on: not how many rows are trained on."""
        return replace(self, train_size=None, sft_size=None, sft_fraction=1.0, max_examples=None)


@dataclass(frozen=True)
class PromptInputs:
    """The prompts to sample responses for: held-out ones of `data`, or the first of a benchmark's file."""

    data: DataInputs
    num_prompts: int
    file: ContentPath | None
    num_turns: int = added_field(field(default=1))  # the most answers to a prompt, each to all that came before


@dataclass(frozen=True)
class TrainingPromptInputs:
    """The prompts of a dataset's training pairs, each once; num_prompts: of these, drawn by its seed, None: all."""

    data: DataInputs
    num_prompts: int | None


@dataclass(frozen=True)
class SftInputs:
    kind: ClassVar[str] = "sft"
    model: ModelInputs
    lora: Lora | None
    data: DataInputs
    trainer: Training
    seed: int


@dataclass(frozen=True)
class GenerationInputs:
    """How responses are sampled; server: name and command of the program that samples, None for transformers."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int
    server: tuple[str, str] | None
    samples_per_prompt: int = added_field(field(default=1))
    temperatures: dict[str, float] = added_field(field(default_factory=dict))  # category of a prompt -> its own


@dataclass(frozen=True)
class CandidatesInputs:
    """Responses of the SFT model to training prompts, several for each, of which pairs are made."""

    kind: ClassVar[str] = "candidates"
    model: ModelInputs
    prompts: TrainingPromptInputs
    generation: GenerationInputs
    seed: int


def _name(part: str | ContentPath) -> str:
    return part.location if isinstance(part, ContentPath) else part


@dataclass(frozen=True)
class JudgeInputs:
    """What verdicts and grades depend on; a field the judge does not have is None.

    baseline: `sft`, `chosen`, or a file; None where responses are graded by themselves.
    """

    name: str
    baseline: str | ContentPath | None
    model: str | ContentPath | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    prompt_file: ContentPath | None = None
    base_url: str | None = None  # of its endpoint, None for OpenAI's: two servers may call two models by one name
    difficulties: ContentPath | None = added_field(field(default=None))
    asked: str | ContentPath | None = added_field(field(default=None))  # by an annotator, instead of its own model
    server: tuple[str, str] | None = added_field(field(default=None))  # name and command, when the job serves the model
    references: ContentPath | None = added_field(field(default=None))
    repeat: int = added_field(field(default=0))  # which time its questions are asked, from 0

    @property
    def model_name(self) -> str:
        """The model as its endpoint, or its location, calls it; of an annotator ANNOTATOR:MODEL."""
        assert self.model is not None
        return ":".join(_name(part) for part in (self.model, self.asked) if part is not None)

    @property
    def asked_name(self) -> str:
        """The model that the endpoint is asked for, where it is not an annotator that knows it."""
        name = self.asked or self.model
        assert name is not None
        return _name(name)


@dataclass(frozen=True)
class PairsInputs:
    """Which candidates become pairs: those whose grades differ by more than `margin`, of a prompt one pair or all."""

    kind: ClassVar[str] = "pairs"
    model: ModelInputs
    prompts: TrainingPromptInputs
    judge: JudgeInputs
    selection: str
    margin: float


@dataclass(frozen=True)
class ReferenceInputs:
    """init: `sft` when the checkpoint comes from upstream, `base` when it is the base model.

    data: of all pairs; where the training pairs come from upstream, of the held-out ones.
    """

    kind: ClassVar[str] = "reference"
    model: ModelInputs
    init: str
    data: DataInputs


@dataclass(frozen=True)
class AlignInputs:
    """options: the fields of loss and score besides beta. stop_fraction: of the steps, after which to stop.

    data: as of ReferenceInputs. other_score: that the loss takes instead of the method's own; None: its own.
    """

    kind: ClassVar[str] = "align"
    model: ModelInputs
    init: str
    lora: Lora | None
    data: DataInputs
    method: str
    options: dict[str, float]
    beta: float
    sft_weight: float
    align_weight: float
    trainer: Training
    seed: int
    stop_fraction: float = 1.0
    save_dtype: str = "float32"
    other_score: str | None = added_field(field(default=None))

    @property
    def score(self) -> str:
        """The score that the loss takes."""
        return self.other_score or METHODS[self.method].score


@dataclass(frozen=True)
class GenerateInputs:
    """role: `policy`, or `baseline` for the samples of the SFT model that judges compare with."""

    kind: ClassVar[str] = "generate"
    role: str
    model: ModelInputs
    init: str
    prompts: PromptInputs
    generation: GenerationInputs
    seed: int

    @property
    def num_samples(self) -> int:
        return self.prompts.num_prompts * self.prompts.num_turns * self.generation.samples_per_prompt


@dataclass(frozen=True)
class TaskInputs:
    """A task or group of lm-eval. metric: None for its first. num_fewshot: examples in a prompt, None for its own."""

    name: str
    metric: str | None
    num_fewshot: int | None


@dataclass(frozen=True)
class CapabilityInputs:
    """What a model can do by tasks of lm-eval. role: `policy`, or `sft` for the model that points are compared with.

    limit: documents of each task, drawn by the seed; None: all. files: folder of tasks of one's own. server: as of
    GenerationInputs.
    """

    kind: ClassVar[str] = "capability"
    role: str
    model: ModelInputs
    tasks: tuple[TaskInputs, ...]
    limit: int | None
    seed: int
    chat_template: bool
    files: ContentPath | None
    server: tuple[str, str] | None


@dataclass(frozen=True)
class EvaluateInputs:
    """metric: what points are compared by, as evaluation.metric has it. judge: None without one.

    judged: the prompts whose responses it judges, `all` or those of the `selection` split. repeated_prompts: whose
    questions it is asked a second time.
    """

    kind: ClassVar[str] = "evaluate"
    setup: str
    init: str
    prompts: PromptInputs
    judge: JudgeInputs | None
    metric: str
    selection_fraction: float
    split_seed: int
    judged: str = added_field(field(default="all"))
    repeated_prompts: int = added_field(field(default=0))


@dataclass(frozen=True)
class FurtherJudgeInputs(EvaluateInputs):
    """What verdicts of a judge beside the one that points are compared by depend on; name: NAME in judges.NAME."""

    kind: ClassVar[str] = "judge"
    name: str = ""


StageInputs = (
    SftInputs
    | CandidatesInputs
    | PairsInputs
    | ReferenceInputs
    | AlignInputs
    | GenerateInputs
    | CapabilityInputs
    | EvaluateInputs
)
