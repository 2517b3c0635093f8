"""What judges are alike in, the fields of servers, and the rules between them. No torch."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

from src.config.endpoints import SERVED, check_key_is_protected, check_key_name, check_url
from src.config.judge import JUDGES, Judge
from src.config.paths import is_file
from src.config.placeholders import placeholders
from src.config.schema import GENERATED, Point
from src.errors import ConfigError, StageError

# Judges of a response by itself, which have no baseline -> evaluation.metric: whether it is right, or a rating.
ABSOLUTE_JUDGES = {"math": "accuracy", "mt_bench": "rating"}

# Judges of conversations: a response is the prompt of a second one.
MULTI_TURN_JUDGES = ("mt_bench", "mt_bench_pairwise")

# Values of judge.baseline that are not a file of answers.
BASELINES = ("sft", "chosen")

# Judges that call an endpoint: OpenAI's, unless judge.base_url names another. The address is part of the identity.
ENDPOINT_JUDGES = ("tldr", "alpaca_eval", "arena_hard", "arena_hard_v2", *MULTI_TURN_JUDGES)

# Judges whose prompts, or scores, depend on a benchmark's questions -> its evaluation.
OF_QUESTIONS = {"arena_hard_v2": "arena_hard_v2", **dict.fromkeys(MULTI_TURN_JUDGES, "mt_bench")}

# Judges that compute a model themselves, which all processes of a job do together.
MODEL_JUDGES = ("reward_model",)

# Judges whose model may be a local folder, which is identified by its content.
CONTENT_HASHED_MODELS = ("alpaca_eval", "reward_model")

# Judges that give a response a number, by which on-policy pairs are made: src/judges/NAME.py has the function `grades`.
GRADING_JUDGES = ("gold", "reward_model", "math")

SERVER_PLACEHOLDERS = ("checkpoint", "port", "dtype")  # of server.command


def check_server(point: Point) -> None:
    """Raise ConfigError when `server` cannot be run as configured."""
    command = point.server.command or ""
    if point.server.name == "none":
        if command:
            raise ConfigError("server.command: server=none has no such field; choose server=vllm or another")
        return
    try:
        words = shlex.split(command)
        names = {name for word in words for name in placeholders(word, SERVER_PLACEHOLDERS)}
    except ValueError as error:
        raise ConfigError(
            f"server.command={command}: {error}; only {{checkpoint}}, {{port}} and {{dtype}} are substituted, a brace "
            "is written {{ or }}, and quotes come in pairs"
        ) from None
    if not {"checkpoint", "port"} <= names:
        raise ConfigError(f"server.command={command}: needs {{checkpoint}} and {{port}}")
    if not words[0] or "\0" in command:
        raise ConfigError(f"server.command={command!r}: must begin with a program, and have no NUL character")


def _check_metric(point: Point) -> None:
    metric, judge = point.evaluation.metric, point.judge.name
    if metric == "win_rate" and judge == "none":
        raise ConfigError("evaluation.metric=win_rate needs a judge; without one use reward_accuracy")
    of_judge = ABSOLUTE_JUDGES.get(judge)
    if metric == "win_rate" and of_judge is not None:
        raise ConfigError(f"evaluation.metric=win_rate: judge={judge} compares with no baseline; use {of_judge}")
    for name, of_other in ABSOLUTE_JUDGES.items():
        if metric == of_other != of_judge:
            lacks = "does not tell right from wrong" if metric == "accuracy" else "gives no ratings"
            raise ConfigError(f"evaluation.metric={metric}: judge={judge} {lacks}; use judge={name}, or another metric")


def metric_of(judge: str) -> str:
    """Return what the mean verdict of a judge is, as evaluation.metric has it."""
    return ABSOLUTE_JUDGES.get(judge, "win_rate")


def by_judge(point: Point) -> Iterator[tuple[str, Point]]:
    """Yield the key of every judge, `judge` first, and the point as if it had this one alone."""
    yield "judge", replace(point, judges={})
    for name, judge in point.judges.items():
        evaluation = replace(point.evaluation, metric=metric_of(judge.name))
        yield f"judges.{name}", replace(point, judge=judge, judges={}, evaluation=evaluation)


@contextmanager
def naming_judge(key: str) -> Iterator[None]:
    """In messages of errors in the body, call the judge by this key, where it is not `judge`."""
    try:
        yield
    except (ConfigError, StageError) as error:
        if key == "judge":
            raise
        raise type(error)(with_judge_key(str(error), key)) from None


def with_judge_key(message: str, key: str) -> str:
    """Return a message about `judge` as one about the judge of this key: judges.NAME.model, judge@judges.NAME=tldr."""
    if key == "judge":
        return message
    names = "|".join(field.name for field in fields(Judge))
    message = re.sub(rf"(?<![\w./@])judge\.(?=({names})\b)", lambda _: f"{key}.", message)
    return re.sub(r"(?<![\w./@])judge=(?!none\b)", lambda _: f"judge@{key}=", message)


def num_turns(point: Point) -> int:
    """Return the most answers that the judges want to a question, each to what came before."""
    return max(2 if of_one.judge.name in MULTI_TURN_JUDGES else 1 for _, of_one in by_judge(point))


def judged_in_part(point: Point) -> str | None:
    """Return the key of the first judge that judges only selection prompts until the point is selected; None: none."""
    return next((key for key, of_one in by_judge(point) if of_one.judge.reporting == "selected"), None)


def split_annotator(name: str) -> tuple[str, str | None]:
    """Return the annotator that judge.model of alpaca_eval names, and the model it asks; None for its own.

    ANNOTATOR:MODEL asks another model; the name of a model may have colons of its own.
    """
    annotator, _, model = (name, "", "") if os.path.isdir(name) else name.partition(":")
    return annotator, model or None


def served_model(judge: Judge) -> str | None:
    """Return the model that a judging job serves itself; None when the judge has an address."""
    if judge.base_url != SERVED or judge.model is None:
        return None
    return split_annotator(judge.model)[1] if judge.name == "alpaca_eval" else judge.model


def _check_served(point: Point) -> None:
    """Raise ConfigError when the job cannot serve the judge's model itself."""
    judge, key = point.judge, f"judge.base_url={SERVED}"
    if point.server.name == "none":
        raise ConfigError(f"{key}: the job serves the judge by server.command; add server=vllm, or give an address")
    if judge.api_key_env is not None:
        raise ConfigError(f"judge.api_key_env: {key} needs no key; remove the override")
    if judge.model is not None and served_model(judge) is None:
        raise ConfigError(f"judge.model={judge.model}: {key} needs to know the model: judge.model={judge.model}:MODEL")


def check_judges(point: Point) -> None:
    """Raise ConfigError when a judge does not fit its own fields, the other judges, the dataset or the evaluation."""
    seen: dict[str, str] = {}  # what verdicts depend on -> key
    for key, of_one in by_judge(point):
        judge, name = of_one.judge, key.removeprefix("judges.")
        with naming_judge(key):
            _check_judge(of_one)
        if key != "judge":
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
                raise ConfigError(f"{key}: a name is of letters, digits, _ and -, at most 40 of them")
            if name == point.judge.name:
                raise ConfigError(f"{key}: is the name of the judge that selects, judge={name}; choose another name")
            if judge.name == "none":
                raise ConfigError(f"{key}.name=none: judges nothing; remove it")
        depends_on = (*JUDGES.get(judge.name, ()), "name", "base_url", "baseline")
        settings = repr([getattr(judge, field) for field in depends_on])
        if (other := seen.setdefault(settings, key)) != key:
            raise ConfigError(f"{key}: is the same judge as {other}; give it another model, prompt or baseline")
    turns = {key: num_turns(of_one) for key, of_one in by_judge(point) if of_one.judge.name != "none"}
    if len(set(turns.values())) > 1:
        key = next(key for key, count in turns.items() if count != turns[next(iter(turns))])
        raise ConfigError(
            f"{key}: judges of conversations need other samples than judges of single responses; use one kind"
        )


def _check_judge(point: Point) -> None:
    judge = point.judge
    _check_metric(point)
    if judge.reporting == "selected" and point.evaluation.metric == "reward_accuracy":
        raise ConfigError(
            "judge.reporting=selected: evaluation.metric=reward_accuracy compares points without the judge; use "
            "judge.reporting=all, or another metric"
        )
    if judge.api_key_env is not None:
        check_key_name("judge.api_key_env", judge.api_key_env)
    if judge.base_url == SERVED:
        _check_served(point)
    elif judge.base_url is not None:
        check_url("judge.base_url", judge.base_url)
        check_key_is_protected(judge)
    fields = JUDGES.get(judge.name, ())
    if judge.repeated_prompts and judge.name not in ENDPOINT_JUDGES:
        raise ConfigError(f"judge.repeated_prompts: judge={judge.name} never changes a verdict; remove the override")
    if judge.name in ENDPOINT_JUDGES:
        fields = (*fields, "base_url")
    for name in ("model", "base_url", "prompt_file", "references", "difficulties"):
        if getattr(judge, name) is not None and name not in fields:
            raise ConfigError(f"judge.{name}: judge={judge.name} has no such field; remove the override")
    if "model" in fields and judge.model is None:
        raise ConfigError(f"judge.model is not set: judge={judge.name} needs judge.model=NAME")
    if judge.name in ABSOLUTE_JUDGES and judge.baseline is not None:
        raise ConfigError(f"judge.baseline: judge={judge.name} compares with no baseline; remove the override")
    if judge.name == "math" and point.evaluation.prompts_file is None and point.dataset.source != "mini_math":
        raise ConfigError(
            "judge=math needs problems with their answers: evaluation.prompts_file=FILE, or dataset=mini_math"
        )
    if judge.name in OF_QUESTIONS and point.evaluation.prompts_file is None:
        raise ConfigError(
            f"judge={judge.name} needs the benchmark's questions: evaluation={OF_QUESTIONS[judge.name]} "
            "evaluation.prompts_file=FILE, its question.jsonl"
        )
    for name in ("prompt_file", "references", "difficulties"):
        if (file := getattr(judge, name)) is not None and not is_file(f"judge.{name}", file):
            raise ConfigError(f"judge.{name}={file}: no such file")
    if judge.max_cost is not None and (judge.input_price is None or judge.output_price is None):
        raise ConfigError(
            "judge.max_cost needs judge.input_price and judge.output_price (dollars for a million tokens)"
        )
    if judge.name not in ("none", *ABSOLUTE_JUDGES):
        _check_baseline(point)


def _check_baseline(point: Point) -> None:
    judge, is_mini = point.judge, point.dataset.source == "mini_tldr"
    if judge.name == "gold" and is_mini and (judge.baseline != "sft" or point.evaluation.prompts_file is not None):
        key = "judge.baseline" if judge.baseline != "sft" else "evaluation.prompts_file"
        raise ConfigError(
            f"{key}: judge=gold knows only the posts of dataset=mini_tldr, compared with the SFT model's summaries; "
            "remove the override, or choose another judge"
        )
    if judge.name == "gold" and not is_mini:
        raise ConfigError(
            "judge=gold works only with dataset=mini_tldr (it needs the generated ground truth); "
            "use judge=none evaluation=preference, or another judge"
        )
    if judge.baseline is None:
        raise ConfigError(f"judge.baseline is not set: judge={judge.name} needs judge.baseline=FILE, sft or chosen")
    if judge.baseline == "chosen" and point.dataset.source in GENERATED:
        raise ConfigError(
            f"judge.baseline=chosen: dataset={point.dataset.source} has no pairs on its held-out prompts; use sft"
        )
    if judge.baseline == "chosen" and point.evaluation.prompts_file is not None:
        raise ConfigError("judge.baseline=chosen: evaluation.prompts_file has no pairs; use a file of answers, or sft")
    if judge.baseline not in BASELINES and not is_file("judge.baseline", judge.baseline):
        raise ConfigError(f"judge.baseline={judge.baseline}: no such file; it is sft, chosen or a file of answers")
