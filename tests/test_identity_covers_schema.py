"""Every key of the schema either changes the identity of a stage or is listed here with the reason why it need not."""

import copy
import json
import re
import typing
from dataclasses import fields, is_dataclass, replace

import pytest

from src.config.fields import typed_leaves
from src.config.schema import Point
from src.config.validation import build_point
from src.planning.stage import stages_of
from tests.support.configs import composed

# key, or group of keys ending with a dot -> why results do not depend on it
NOT_HASHED = {
    "setup.best": "default values of beta and lr, which are hashed themselves",
    "beta_grid": "values a sweep expands beta=grid to; each point hashes its beta",
    "lr_grid": "values a sweep expands lr=grid to; each point hashes its lr",
    "best_from": "a file that beta and lr are read from, which are hashed themselves",
    "init.name": "hashed as the upstream checkpoint and as an input of alignment; tested by name below",
    "method.name": "hashed, and tested by name below",
    "model.name": "a display name; the weights behind model.path are hashed",
    "model.revision": "hashed for a model of the hub; a local folder is hashed by content",
    "model.attention": "kernels that compute the same attention, to rounding",
    "pairs.name": "hashed as the stage that pairs come from; tested by name below",
    "pairs.generation.batch_size": "a sample depends on its prompt and seed, not on its batch",
    "dataset.name": "a display name; source, files and tables are hashed",
    "dataset.sft.rows": "expected table sizes, compared with the real ones",
    "dataset.sft.tokens": "for cost estimates",
    "dataset.sft.prompt_tokens": "for cost estimates",
    "dataset.preference.rows": "expected table sizes, compared with the real ones",
    "dataset.preference.tokens": "for cost estimates",
    "dataset.preference.prompt_tokens": "for cost estimates",
    **{
        f"dataset.{name}.tables.{key}": f"as dataset.{name}.{key}"
        for name in ("sft", "preference")
        for key in ("rows", "tokens", "prompt_tokens")
    },
    "trainer.name": "a display name; its fields are hashed",
    "trainer.max_tokens_per_micro_batch": "how a step is split into micro-batches; every example keeps its weight",
    "trainer.checkpoint_minutes": "how often a checkpoint to resume from is written",
    "engine.name": "a display name; precision is hashed",
    "engine.gpu": "the card that costs are planned for",
    "engine.device": "where it is computed; equal to rounding",
    "engine.cpu_threads": "how many cores compute it; equal to rounding",
    "engine.strategy": "how many processes compute it; equal to rounding",
    "engine.activation_checkpointing": "recomputes the same activations",
    "engine.compile": "compiles the same computation; equal to rounding",
    "engine.fused": "other kernels for the same computation; equal to rounding",
    "engine.deterministic": "the order in which a GPU sums; equal to rounding",
    "evaluation.name": "a display name; its fields are hashed",
    "evaluation.generation.batch_size": "a sample depends on its prompt and seed, not on its batch",
    "capability.metrics": "hashed for the tasks that are asked; tested by name below",
    "capability.num_fewshot": "hashed for the tasks that are asked; tested by name below",
    "capability.batch_size": "how many sequences are computed together; equal to rounding",
    "server.timeout": "how long to wait for a server to start",
    "server.concurrency": "how many samples are asked for at once",
    "server.is_automatic": "how the server was chosen; what was chosen is hashed",
    "judge.api_key_env": "which variable holds the key",
    "judge.concurrency": "how many questions are asked at once",
    "judge.timeout": "how long to wait for an answer",
    "judge.server_timeout": "how long to wait for the judge's server to start",
    "judge.max_retries": "how often a failed question is asked again",
    "judge.max_calls": "a budget: what is beyond it is an error, not another result",
    "judge.max_cost": "a budget: what is beyond it is an error, not another result",
    "judge.input_price": "for the budget",
    "judge.output_price": "for the budget",
    "judges": "hashed as the stages of these judges; tested by name below",
    "tracking.": "where metrics are sent",
    "sweep.": "which points there are, and what is reported of them",
    "output_dir": "where results are kept",
    "keep_checkpoints": "which checkpoints stay",
    "dry_run": "whether anything runs",
}

# Configs that together use every group; a key counts as hashed when it changes an identity in one of them.
CONFIGS = [
    (),
    ("setup=llama32_3b_tldr", "judge=tldr", "evaluation.metric=win_rate", "model.lora.rank=8"),
    *((f"method={name}",) for name in ("simpo", "robust_dpo", "exo_pair", "discopop", "dpop", "r_dpo", "alphapo")),
    ("pairs=onpolicy", "pairs.judge=reward_model", "pairs.model=org/rewards"),
    ("method=cal_dpo", "init=base", "beta=0.1", "lr=1e-3"),
    ("judge=alpaca_eval", "judge.baseline=sft"),
    ("setup=llama31_8b_uf", "dataset=ultrafeedback_hh"),
    ("setup=llama31_8b_uf", "server=vllm", "judge=arena_hard", "judge.baseline=sft", "judge.prompt_file={prompt_file}"),
    ("capability=subset",),
    ("judge=mt_bench", "evaluation=mt_bench", "evaluation.prompts_file={prompt_file}"),
]

JUDGE_PROMPT = {"system_prompt": "judge", "prompt_template": ["{question_1} {answer_1} {answer_2}"]}


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    prompt_file = tmp_path_factory.mktemp("judge") / "prompt.yaml"
    prompt_file.write_text(json.dumps(JUDGE_PROMPT))
    return [build_point(composed(*(o.format(prompt_file=prompt_file) for o in overrides))) for overrides in CONFIGS]


@pytest.fixture(scope="module")
def other_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("other") / "other.jsonl"
    file.write_text('{"prompt": "other"}')
    return str(file)


def keys(schema=Point, prefix=""):
    """Yield the dotted keys of the schema, from its types, so that optional groups are included."""
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        kinds = [hints[f.name], *typing.get_args(hints[f.name])]
        group = next((kind for kind in kinds if is_dataclass(kind)), None)
        if group is None or typing.get_origin(hints[f.name]) is dict:
            yield prefix + f.name
        else:
            yield from keys(group, f"{prefix}{f.name}.")


def reason(key):
    return next((why for k, why in NOT_HASHED.items() if key == k or (k.endswith(".") and key.startswith(k))), None)


def another_value(key, choices, value, file):
    """Return a value of the same kind that is not this one."""
    if choices is not None:
        return next(choice for choice in choices if choice not in (value, None))
    match value:
        case bool():
            return not value
        case int() | float():
            return value / 2 if value else 1
        case dict():
            return value | {"prompt": "another"}
        case list() | tuple():
            return type(value)([*value][::-1]) if len(value) > 1 else ["another"]
        case None if "size" in key or "max_" in key or "rank" in key:
            return 7
    return file


def with_value(point, key, file):
    changed = copy.deepcopy(point)
    node = changed
    *groups, name = key.split(".")
    for group in groups:
        node = getattr(node, group)
        node = node[0] if isinstance(node, list) and node else node
        if node is None or node == []:
            return None
    choices = type(node).__dataclass_fields__[name].metadata.get("choices")
    setattr(node, name, another_value(key, choices, getattr(node, name), file))
    return changed


def identities(point):
    return [stage.identity for stage in stages_of(point)]


def hashed(key, points, file):
    for point in points:
        changed = with_value(point, key, file)
        if changed is not None and identities(changed) != identities(point):
            return True
    return False


@pytest.mark.parametrize("key", keys())
def test_a_key_changes_an_identity_or_is_listed_with_a_reason(key, points, other_file):
    if reason(key) is None:
        assert hashed(key, points, other_file), f"{key} changes no identity: hash it, or list it in NOT_HASHED"


def test_every_listed_key_exists_and_changes_no_identity(points, other_file):
    schema = list(keys())
    for listed in NOT_HASHED:
        keys_listed = [k for k in schema if k == listed or (listed.endswith(".") and k.startswith(listed))]
        assert keys_listed, f"NOT_HASHED has {listed}, which is no key of the schema"
        by_content = {"init.name", "method.name", "model.revision", "pairs.name", "judges"}
        for key in keys_listed:
            if listed not in by_content and key != "sweep.variant":
                assert not hashed(key, points, other_file), f"{key} changes an identity: remove it from NOT_HASHED"


def test_choices_that_are_hashed_under_another_name_change_identities(points):
    default = identities(points[0])
    for overrides in (
        ["init=base", "beta=0.1", "lr=1e-3"],
        ["method=ipo", "beta=0.1", "lr=1e-3"],
        ["pairs=onpolicy"],
        ["capability=subset"],
        ["+judge@judges.other=tldr"],
    ):
        assert identities(build_point(composed(*overrides))) != default
    asked = next(point for point in points if point.capability.name != "none")
    for options in ({"metrics": {"mmlu": "acc"}}, {"num_fewshot": {"gsm8k": 0}}):
        other = replace(asked, capability=replace(asked.capability, **options))
        assert identities(other) != identities(asked)
        assert identities(other)[:3] == identities(asked)[:3]  # of what is trained
    hub = points[1]
    pinned = with_value(hub, "model.revision", "abc")
    assert identities(pinned) != identities(hub)


def test_every_key_of_a_composed_point_is_one_of_the_schema(points):
    schema = set(keys())
    for point in points:
        leaves = [key for key, *_ in typed_leaves(point) if not key.startswith("setup.best.")]
        composed_keys = {re.sub(r"[.]\d+(?=[.])", "", key) for key in leaves}
        tables = {"dataset.sft", "dataset.preference"}
        assert composed_keys <= schema | {"setup.best", "pairs.generation"} | tables | {
            f"{name}.tables" for name in tables
        }
