"""What one process holds of a stage, and what would make it fit: rehearsed where possible, else by arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from src.config.judge_rules import num_turns
from src.config.schema import Generation, Point
from src.data.table_size import TableSize, table_size
from src.estimates.card import card_of
from src.planning.fit import BUDGET_MULTIPLE, MAX_BUDGET, TARGET_FRACTION, Held, held_by_process
from src.planning.gpus import Gpu
from src.planning.model_shape import ModelShape, model_shape
from src.planning.resources import prompt_limit
from src.planning.stage import Stage
from src.rehearsal.request import Request, Result, draw_lengths, longest_lengths

_REHEARSED_LAYERS = (2, 4)  # a line through two depths gives the whole one
_SCORED_EXAMPLES = 64  # rehearsed of a pass over all pairs
_FLOPS = {"sft": 6, "reference": 2, "align": 6}  # per parameter and token: 2 forward, 4 backward
_SAMPLING = ("candidates", "generate")  # kinds of stages
_MORE_GPUS = (2, 4, 8, 16, 32)
_LORA_RANK = 16
# Their steps are rehearsed as those of FSDP2 (src/rehearsal/run.py:STAND_INS), which holds more on a card than they
# do: what it cannot fit they may.
_BY_ARITHMETIC = ("zero1", "zero2", "zero3_offload")


@dataclass(frozen=True)
class Load:
    """A stage that stands for all of its kind with the same model, engine, data and sampling.

    result: of its rehearsal, None without one.
    """

    stage: Stage
    point: Point
    shape: ModelShape
    ranks: int
    card: Gpu | None
    size: TableSize
    result: Result | None = None

    @property
    def rehearsed(self) -> Result | None:
        """The result of a rehearsal that came to its end; None without one."""
        return self.result if self.result is not None and self.result.error is None else None

    @property
    def held(self) -> Held:
        engine = self.point.engine
        return held_by_process(
            self.shape,
            self.stage.kind,
            strategy=engine.strategy,
            precision=engine.precision,
            ranks=self.ranks,
            lora=None if self.point.model.lora.rank is None else self.point.model.lora,
            cached_tokens=self._cached_tokens,
            device_bytes=0 if self.card is None else self.card.memory,
        )

    @property
    def is_sampling(self) -> bool:
        return self.stage.kind in _SAMPLING

    @property
    def generation(self) -> Generation:
        """How the stage samples, if it does."""
        return _generation(self.point, self.stage.kind)

    @property
    def _cached_tokens(self) -> int:
        """Tokens whose keys and values are held when the longest prompts have the longest responses."""
        if not self.is_sampling or self.point.server.name != "none":  # a server plans its own memory
            return 0
        generation = self.generation
        return generation.batch_size * (self._prompt_tokens + generation.max_new_tokens)

    @property
    def _prompt_tokens(self) -> int:
        """Tokens of the longest prompt that is sampled for."""
        turns = num_turns(self.point) if self.stage.kind == "generate" else 1
        return prompt_limit(self.point.dataset.max_prompt_tokens, self.generation.max_new_tokens, turns)

    @property
    def computed_seconds_per_token(self) -> float:
        """Seconds of one card for a token: products of all parameters, or in sampling reading them and half the cache.

        The scale of a step and no bound: parameters of the embedding count, attention and elementwise kernels do not.
        """
        if self.card is None:
            return math.nan
        if self.is_sampling:
            read = self.held.weights + self.held.kv_cache / 2
            return read / self.card.bandwidth / self.generation.batch_size
        rate = self.card.bf16 if self.point.engine.precision == "bf16" else self.card.fp32
        return _FLOPS[self.stage.kind] * self.shape.num_parameters / rate

    @property
    def longest(self) -> int:
        """Tokens of the longest example that the limits allow."""
        return sum(self._longest)

    @property
    def _longest(self) -> tuple[int, ...]:
        data, size = self.point.dataset, self.size
        prompt = 0 if math.isnan(size.prompt_tokens) else size.prompt_tokens
        return longest_lengths(prompt, size.responses, data.max_tokens, data.max_prompt_tokens)

    @property
    def usable(self) -> float:
        """The bytes of the card that a peak may take, whether rehearsed or computed."""
        return math.inf if self.card is None else TARGET_FRACTION * self.card.memory

    @property
    def budget(self) -> float:
        """Tokens of a micro-batch of training; NaN where nothing shows how many fit."""
        if self.rehearsed is not None and self.rehearsed.token_budget is not None:
            return self.rehearsed.token_budget
        if (configured := self.point.trainer.max_tokens_per_micro_batch) is not None:
            return configured
        if self.card is None:
            return math.nan
        held = self.held
        per_token = held.checkpointed_per_token if self._checkpoints else held.activations_per_token
        fitting = int((self.usable - held.constant) / per_token) // BUDGET_MULTIPLE * BUDGET_MULTIPLE
        return max(self.longest, min(MAX_BUDGET, fitting))

    @property
    def peak(self) -> float:
        """Bytes of a step at their highest; NaN where neither a rehearsal nor the arithmetic shows them."""
        if self.rehearsed is not None:
            return self.rehearsed.peak
        if not self.stage.is_training:
            return self.held.constant
        per_token = self.held.checkpointed_per_token if self._checkpoints else self.held.activations_per_token
        return self.held.constant + self.budget * per_token

    @property
    def problem(self) -> str | None:
        """Why the stage cannot run on the card, in a few words; None when it can, or no card is named."""
        if self.card is None:
            return None
        if self.result is not None and self.result.error is not None and "does not fit" in self.result.error:
            return self.result.error.partition(": use ")[0]  # what it says to use is tried here
        if self.peak > self.usable:
            return f"it takes {self.peak / 2**30:.1f} GiB"
        return None

    @property
    def _checkpoints(self) -> bool:
        """Whether arithmetic counts recomputed activations: where asked for, and by `auto` for what fits only so."""
        chosen = self.point.engine.activation_checkpointing
        if chosen != "auto":
            return bool(chosen)
        return self.held.constant + self.longest * self.held.activations_per_token > self.usable

    @property
    def why_not_rehearsed(self) -> str | None:
        """Why the stage is not rehearsed but computed by arithmetic; None when it can be rehearsed."""
        if self.is_sampling and self.point.server.name != "none":
            return f"samples of server={self.point.server.name}"
        if math.isnan(self.size.tokens):
            return "the length of the rows is not known"
        strategy = self.point.engine.strategy
        return f"training with {strategy}" if self.stage.is_training and strategy in _BY_ARITHMETIC else None

    @property
    def request(self) -> Request | None:
        """What to rehearse; None without a card, or when something stands against it."""
        if self.card is None or self.why_not_rehearsed is not None:
            return None
        point, data, engine = self.point, self.point.dataset, self.point.engine
        trainer = point.trainer.sft if self.stage.kind == "sft" else point.trainer.align
        count = trainer.batch_size if self.stage.is_training else _SCORED_EXAMPLES
        examples = draw_lengths(
            count, self.size.prompt_tokens, self.size.response_tokens, self.size.responses,
            data.max_tokens, data.max_prompt_tokens,
        )  # fmt: skip
        return Request(
            stage=self.stage.kind,
            config=self.shape.config,
            gpu=self.card.name,
            examples=() if self.is_sampling else examples,
            longest=() if self.is_sampling else self._longest,
            precision=engine.precision,
            strategy=engine.strategy,
            ranks=self.ranks if self.stage.is_training else 1,  # others hold the whole model in every process
            attention=point.model.attention,
            activation_checkpointing=str(engine.activation_checkpointing).lower(),
            fused_kernels=str(engine.fused).lower(),
            lora=None if point.model.lora.rank is None else asdict(point.model.lora),
            max_tokens_per_micro_batch=point.trainer.max_tokens_per_micro_batch,
            batch_size=trainer.batch_size,
            rows=self.generation.batch_size,
            prompt_tokens=self._prompt_tokens if self.is_sampling else data.max_prompt_tokens,
            new_tokens=self.generation.max_new_tokens,
            layers=_REHEARSED_LAYERS if self.shape.num_layers > 2 * max(_REHEARSED_LAYERS) else (),
        )

    def remedies(self, on_gpus: Callable[[int], str]) -> Iterator[tuple[str, Load]]:
        """Yield what may make the stage fit: overrides, and the load with them; last those that change what is learned.

        on_gpus: returns what gives a number of GPUs to training.
        """
        point, plain = self.point, replace(self, result=None)
        if not self.stage.is_training:
            rows, group = self.generation.batch_size, "pairs" if self.stage.kind == "candidates" else "evaluation"
            while self.is_sampling and rows > 1:
                rows //= 2
                generation = replace(self.generation, batch_size=rows)
                changed: dict[str, Any] = {group: replace(getattr(point, group), generation=generation)}
                yield f"{group}.generation.batch_size={rows}", replace(plain, point=replace(point, **changed))
            return
        if point.engine.activation_checkpointing is False:
            engine = replace(point.engine, activation_checkpointing="auto")
            yield "engine.activation_checkpointing=auto", replace(plain, point=replace(point, engine=engine))
        fsdp: dict[str, Any] = {"precision": "bf16", "activation_checkpointing": "auto"}
        overrides = [f"engine.{name}={value}" for name, value in fsdp.items() if getattr(point.engine, name) != value]
        if point.engine.strategy != "fsdp":
            overrides.insert(0, "engine=fsdp")
        on_fsdp = replace(plain, point=replace(point, engine=replace(point.engine, strategy="fsdp", **fsdp)))
        if point.engine.strategy != "fsdp":
            yield " ".join(overrides), on_fsdp
        for ranks in _MORE_GPUS:
            if ranks > self.ranks:
                yield " ".join((on_gpus(ranks), *overrides)), replace(on_fsdp, ranks=ranks)
        limit = point.dataset.max_tokens
        while (limit := limit // 2) > point.dataset.max_prompt_tokens:
            data = replace(point.dataset, max_tokens=limit)
            yield f"dataset.max_tokens={limit}", replace(plain, point=replace(point, dataset=data))
        if point.model.lora.rank is None:
            model = replace(point.model, lora=replace(point.model.lora, rank=_LORA_RANK))
            yield f"model.lora.rank={_LORA_RANK}", replace(plain, point=replace(point, model=model))


def load_of(stage: Stage, ranks: int) -> Load | None:
    """Return the load of a stage in each of `ranks` processes; None for a stage without a model of known shape."""
    point = stage.point
    shape = model_shape(point.model.path, point.model.revision)
    if shape is None or stage.kind not in ("sft", "reference", "align", *_SAMPLING):
        return None
    size = table_size(point, "sft" if stage.kind == "sft" else "train")
    return Load(stage, point, shape, ranks, card_of(point.engine), size)


def _generation(point: Point, kind: str) -> Generation:
    """Return how stages of a kind sample; that of the evaluation for those that do not."""
    if kind != "candidates":
        return point.evaluation.generation
    assert point.pairs.generation is not None
    return point.pairs.generation


def key(load: Load) -> str:
    """Return a text that is equal for loads that hold the same."""
    point, generation = load.point, load.generation
    trainer = point.trainer.sft if load.stage.kind == "sft" else point.trainer.align
    sampling = (generation.batch_size, generation.max_new_tokens) if load.is_sampling else ()
    limits = point.dataset.max_tokens, point.dataset.max_prompt_tokens, point.trainer.max_tokens_per_micro_batch
    model = point.model.path, point.model.revision, point.model.lora, point.model.attention
    return repr((load.stage.kind, model, point.engine, load.ranks, load.size, limits, trainer.batch_size, sampling))
