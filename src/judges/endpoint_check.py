"""Whether the endpoint of a judge can answer, found out before anything runs: key, model, log-probs."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from src.config.endpoints import read_key
from src.config.judge import JudgeEndpoint
from src.config.judge_rules import ENDPOINT_JUDGES, naming_judge, with_judge_key
from src.config.schema import CONF_DIR
from src.errors import ConfigError, warn
from src.judges.annotators import models_asked
from src.judges.answers import answers_folder
from src.planning.identity import EvaluateInputs, FurtherJudgeInputs, JudgeInputs
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.store import Store

if TYPE_CHECKING:
    import openai

QUESTION = "Is this endpoint ready? Answer with one letter."  # of one token, which no budget counts
NUM_RETRIES = 2
MAX_NAMES = 5  # of models that a message lists


class Unreachable(ConfigError):
    """The endpoint did not answer at all; on another machine it might."""


@functools.cache
def retired_models() -> dict[str, dict[str, Any]]:
    """Return conf/retired_models.yaml: the name of a model -> since when it is off, and its successor."""
    return yaml.safe_load((CONF_DIR / "retired_models.yaml").read_text(encoding="utf-8"))


def check_judges(plan: Plan, store: Store, runs_here: bool) -> None:
    """Check the endpoints of all judges that the plan needs, and print what is said of their models.

    One that has answered before is not asked where all samples are there: nothing may be left to ask. runs_here:
    whether this machine computes the plan. Raises ConfigError, also when an endpoint does not answer here.
    """
    groups: dict[str, list[Stage]] = {}
    for stage in (stage for identity, stage in plan.stages.items() if identity in plan.needed):
        judge, endpoint = judge_of(stage), stage.resources.judge
        if judge is not None and judge.name in ENDPOINT_JUDGES and judge.server is None:
            with naming_judge(key_of(stage)):
                read_key(endpoint)
            groups.setdefault(repr((replace(judge, baseline=None), endpoint)), []).append(stage)
    for stages in groups.values():
        judge, endpoint = judge_of(stages[0]), stages[0].resources.judge
        assert judge is not None
        is_sampled = all(stage.upstream["samples"].identity in plan.done for stage in stages)
        if is_sampled and answers_folder(judge, store.output_dir).exists():
            continue
        key = key_of(stages[0])
        try:
            with naming_judge(key):
                for warning in check_endpoint(judge, endpoint):
                    warn(with_judge_key(warning, key))
        except Unreachable as error:
            if runs_here:
                raise
            warn(f"{error}; compute nodes must reach it")


def judge_of(stage: Stage) -> JudgeInputs | None:
    """Return the judge of an evaluation; None of another stage."""
    return stage.inputs.judge if isinstance(stage.inputs, EvaluateInputs) else None


def key_of(stage: Stage) -> str:
    """Return the key of the config that has the judge of an evaluation: `judge`, or judges.NAME of a further one."""
    return f"judges.{stage.inputs.name}" if isinstance(stage.inputs, FurtherJudgeInputs) else "judge"


def check_endpoint(judge: JudgeInputs, endpoint: JudgeEndpoint) -> Iterator[str]:
    """Yield warnings about the models that a judge asks for.

    Raises ConfigError when the key is not there, or when the endpoint does not know a model or gives no log-probs
    where they are needed; Unreachable when it does not answer.
    """
    key = read_key(endpoint)
    models = models_asked(judge)
    for name in models:
        if (retired := retired_models().get(name)) is not None:
            yield (
                f"judge.model={judge.model_name}: {name} is switched off by its vendor since {retired['since']}; its "
                f"successor as a judge is {retired['successor']}"
            )
    # The client is an optional package.
    import openai

    from src.serving.openai_client import NOT_A_COMPLETION, ConcurrentClient

    client = ConcurrentClient(endpoint.base_url, key, endpoint.timeout, NUM_RETRIES, 1, grace=0.0)
    where = f"judge.model={judge.model_name}: {client.url}"
    try:
        listed = {model.id: model for model in client.client.models.list().data}
    except openai.APIConnectionError as error:
        raise Unreachable(f"{where} does not answer: {client.describe(error)}") from None
    except (openai.APIError, *NOT_A_COMPLETION):  # not every server has a list; the question tells as well
        listed = {}
    for name, num_logprobs in models.items():
        off = getattr(listed.get(name), "shutdown_date", None)  # OpenAI's list has a date, or null
        if isinstance(off, str) and re.fullmatch(r"[\d-]{10}", off):
            yield f"{where} switches {name} off on {off}"
        if name in listed and num_logprobs is None:
            continue
        try:
            has_logprobs = _ask(client.client, name, num_logprobs)
        except openai.APIError as error:
            status = error.status_code if isinstance(error, openai.APIStatusError) else None
            if status is None or status >= 500 or status in (408, 429):
                raise Unreachable(f"{where} does not answer: {client.describe(error)}") from None
            served = f"; it lists {', '.join(map(client.strike_out, [*listed][:MAX_NAMES]))}" if listed else ""
            raise ConfigError(f"{where} refuses a question to {name}: {client.describe(error)}{served}") from None
        except NOT_A_COMPLETION as error:
            raise ConfigError(f"{where} gives no chat completion ({type(error).__name__})") from None
        if num_logprobs is not None and not has_logprobs:
            raise ConfigError(
                f"{where} returns no log-probs of {name}, which this annotator needs: choose an endpoint or a model "
                "that does, such as vLLM's (docs/judges.md), or an annotator without them"
            )


def _ask(client: openai.OpenAI, model: str, num_logprobs: int | None) -> bool:
    """Ask a question of one token; return whether log-probs came with its answer."""
    options: dict[str, Any] = {} if num_logprobs is None else {"logprobs": True, "top_logprobs": num_logprobs}
    messages: Any = [{"role": "user", "content": QUESTION}]
    choice = client.chat.completions.create(model=model, messages=messages, max_tokens=1, **options).choices[0]
    return bool(choice.logprobs and choice.logprobs.content and choice.logprobs.content[0].top_logprobs)
