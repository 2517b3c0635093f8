"""What the stages of a point are given: its model, data, prompts, candidates, pairs and judge, as inputs. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from src.config.endpoints import SERVED, normalize_url
from src.config.fields import select_fields
from src.config.judge import JUDGES
from src.config.judge_rules import (
    BASELINES,
    CONTENT_HASHED_MODELS,
    ENDPOINT_JUDGES,
    num_turns,
    split_annotator,
)
from src.config.schema import Dataset, Judge, Optimization, Point
from src.config.tables import MAX_ROWS, HubTable, MixedTable, Table
from src.config.template_rules import end_tokens_of, is_template_file
from src.planning.content import ContentPath, Kind
from src.planning.identity import (
    CandidatesInputs,
    CapabilityInputs,
    DataInputs,
    GenerationInputs,
    JudgeInputs,
    Mixture,
    ModelInputs,
    PairsInputs,
    PromptInputs,
    TaskInputs,
    TrainingPromptInputs,
)


def model_inputs(point: Point) -> ModelInputs:
    """Return the base model of a point. Raises ConfigError when a local file does not exist."""
    path = ContentPath.of(point.model.path, "model.path", point.model.revision)
    template: str | ContentPath = point.model.template
    if is_template_file(point.model.template):
        template = ContentPath.of(point.model.template, "model.template")
    return ModelInputs(path, template, point.engine.precision, end_tokens_of(point.model), point.model.system_prompt)


def sft_data(point: Point) -> DataInputs:
    """Return what SFT reads. JSON lines have no SFT table: SFT trains on the chosen responses of the training pairs."""
    data, inputs = point.dataset, pair_data(point)
    if data.source != "jsonl":
        inputs = replace(inputs, preference=None, train_size=None, validation_size=None)
    return replace(
        inputs,
        sft_validation_size=data.sft_validation_size,
        sft=_table(data, data.sft),
        sft_size=data.sft_size,
        sft_fraction=data.sft_fraction,
        max_examples=max_examples(point.trainer.sft, data.sft_size),
    )


def pair_data(point: Point) -> DataInputs:
    """Return what every stage that needs preference pairs reads."""
    data = point.dataset
    path = None if data.path is None else ContentPath.of(data.path, "dataset.path", kind="table")
    without_sft: dict[str, Any] = {"sft": None, "sft_size": None, "sft_fraction": 1.0, "sft_validation_size": 0}
    return select_fields(
        DataInputs,
        data,
        path=path,
        preference=_table(data, data.preference),
        max_examples=max_examples(point.trainer.align, data.train_size),
        **without_sft,
    )


def max_examples(trainer: Optimization, num_rows: int | None) -> int | None:
    """Return the fewest examples whose passes have max_steps steps; None where max_steps does not bound them.

    num_rows: of the split, None where a config does not tell. With at least one pass every step reads examples of its
    own; with less than one, `epochs` is a fraction of the examples as it is of a whole split.
    """
    if trainer.max_steps is None:
        return None
    read = trainer.max_steps * trainer.batch_size / min(1.0, trainer.epochs)
    if read >= (MAX_ROWS if num_rows is None else num_rows):
        return None
    count = math.ceil(read)
    while math.floor(count * trainer.epochs / trainer.batch_size) < trainer.max_steps:  # by rounding
        count += 1
    return count


def prompt_inputs(point: Point) -> PromptInputs:
    file = point.evaluation.prompts_file
    path = None if file is None else ContentPath.of(file, "evaluation.prompts_file")
    return PromptInputs(pair_data(point).held_out, point.evaluation.num_prompts, path, num_turns(point))


def candidates_inputs(point: Point, model: ModelInputs, server: tuple[str, str] | None) -> CandidatesInputs:
    """Return what samples of the SFT model for training prompts depend on: not how many pairs training reads."""
    generation = select_fields(GenerationInputs, point.pairs.generation, server=server)
    return CandidatesInputs(model, training_prompt_inputs(point), generation, point.seed)


def training_prompt_inputs(point: Point) -> TrainingPromptInputs:
    """Return what the prompts of on-policy pairs depend on."""
    return TrainingPromptInputs(replace(pair_data(point), max_examples=None), point.pairs.num_prompts)


def pairs_inputs(point: Point, candidates: CandidatesInputs) -> PairsInputs:
    """Return what pairs of these candidates depend on. Raises ConfigError when the judge's model does not exist."""
    pairs = point.pairs
    assert pairs.judge is not None and pairs.selection is not None and pairs.margin is not None
    model = None
    if pairs.judge in CONTENT_HASHED_MODELS and pairs.model is not None:
        model = ContentPath.of(pairs.model, "pairs.model")
    judge = JudgeInputs(pairs.judge, None, model)
    return PairsInputs(candidates.model, candidates.prompts, judge, pairs.selection, pairs.margin)


def judge_inputs(judge: Judge, key: str, server: tuple[str, str] | None) -> JudgeInputs | None:
    """Return what verdicts depend on; None without a judge. Raises ConfigError when a local file does not exist.

    key: of the config that has it, for messages. server: name and command of the program that serves models, None
    without one.
    """
    if judge.name == "none":
        return None
    options: dict[str, Any] = {name: getattr(judge, name) for name in JUDGES[judge.name]}
    is_served = judge.base_url == SERVED
    kind: Kind = "model"
    if judge.name == "alpaca_eval":
        kind = "annotator"
        options["model"], asked = split_annotator(options["model"])
        options["asked"] = ContentPath.of(asked, f"{key}.model") if is_served and asked is not None else asked
    if judge.name in CONTENT_HASHED_MODELS or is_served:
        options["model"] = ContentPath.of(options["model"], f"{key}.model", kind=kind)
    for name in ("prompt_file", "references", "difficulties"):
        if options.get(name) is not None:
            options[name] = ContentPath.of(options[name], f"{key}.{name}")
    if is_served:
        options |= {"base_url": SERVED, "server": server}
    elif judge.name in ENDPOINT_JUDGES and judge.base_url is not None:
        options["base_url"] = normalize_url(judge.base_url)
    baseline: str | ContentPath | None = judge.baseline
    if judge.baseline is not None and judge.baseline not in BASELINES:
        baseline = ContentPath.of(judge.baseline, f"{key}.baseline")
    return JudgeInputs(judge.name, baseline, **options)


def capability_inputs(point: Point, model: ModelInputs, role: str) -> CapabilityInputs | None:
    """Return which tasks measure capability; None without any. Raises ConfigError when the folder of tasks is missing.

    Only vllm's server gives the log-probs of a prompt, which most tasks need; without it the stage computes them.
    """
    options, server = point.capability, point.server
    if options.name == "none":
        return None
    tasks = (TaskInputs(name, options.metrics.get(name), options.num_fewshot.get(name)) for name in options.tasks)
    files, key = options.task_files, "capability.task_files"
    return select_fields(
        CapabilityInputs,
        options,
        role=role,
        model=model,
        tasks=tuple(tasks),
        files=None if files is None else ContentPath.of(files, key, kind="task"),
        server=(server.name, server.command or "") if server.name == "vllm" else None,
    )


def _table(data: Dataset, table: HubTable | None) -> Table | Mixture | None:
    if data.source != "hub" or table is None:
        return None
    if table.tables:
        return tuple(select_fields(MixedTable, listed, name=listed.label) for listed in table.tables)
    return select_fields(Table, table)
