"""The rules of `pairs`: what on-policy pairs need, and which other settings they exclude. No torch."""

from __future__ import annotations

from dataclasses import replace

from src.config.judge import JUDGES, Judge
from src.config.judge_rules import GRADING_JUDGES
from src.config.schema import Pairs, Point
from src.errors import ConfigError


def resolve_pairs(pairs: Pairs, judge: Judge) -> Pairs:
    """Return the pairs with the model that grades them: where none is set, that of the same judge in the evaluation."""
    return replace(pairs, model=judge.model) if pairs.model is None and pairs.judge == judge.name else pairs


def check_pairs(point: Point) -> None:
    """Raise ConfigError when `pairs` does not fit its own fields, the dataset or what alignment starts from."""
    pairs = point.pairs
    is_on_policy = pairs.name == "onpolicy"
    for name, value in vars(pairs).items():
        if value is not None and name != "name" and not is_on_policy:
            raise ConfigError(f"pairs.{name}: pairs=dataset has no such field; choose pairs=onpolicy")
        if value is None and is_on_policy and name not in ("num_prompts", "model"):
            raise ConfigError(f"pairs.{name} has no value: add pairs.{name}=VALUE")
    if not is_on_policy:
        return
    if point.init.name == "base" or point.dataset.sft_fraction == 0:
        key = "init=base" if point.init.name == "base" else "dataset.sft_fraction=0"
        remedy = "init=sft" if point.init.name == "base" else "a larger fraction"
        raise ConfigError(
            f"pairs=onpolicy: the responses are samples of the SFT model, and with {key} there is none; use {remedy}, "
            "or pairs=dataset"
        )
    _check_grading(point)
    generation = pairs.generation
    assert generation is not None
    if generation.temperatures:
        raise ConfigError("pairs.generation.temperatures: prompts of pairs have no categories; remove the override")
    if generation.samples_per_prompt < 2:
        raise ConfigError(
            f"pairs.generation.samples_per_prompt={generation.samples_per_prompt}: a pair needs two responses to a "
            "prompt; use at least 2"
        )
    if generation.is_greedy:
        key = "temperature=0" if generation.temperature == 0 else "top_k=1"
        raise ConfigError(
            f"pairs.generation.{key}: makes all samples of a prompt the same, of which there is no pair; use a "
            f"{'temperature above 0' if generation.temperature == 0 else 'top_k above 1, or 0 for all tokens'}"
        )


def _check_grading(point: Point) -> None:
    """Refuse a judge that gives no numbers, or lacks what it needs for them."""
    pairs = point.pairs
    if pairs.judge not in GRADING_JUDGES:
        raise ConfigError(
            f"pairs.judge={pairs.judge}: gives a response no number, by which pairs are made; add pairs.judge=gold "
            "(dataset=mini_tldr), pairs.judge=math (dataset=mini_math), or pairs.judge=reward_model pairs.model=NAME"
        )
    source = {"gold": "mini_tldr", "math": "mini_math"}.get(pairs.judge)
    if source is not None and point.dataset.source != source:
        raise ConfigError(
            f"pairs.judge={pairs.judge} works only with dataset={source} (it needs the generated ground truth); use "
            "pairs.judge=reward_model pairs.model=NAME"
        )
    if "model" in JUDGES[pairs.judge] and pairs.model is None:
        raise ConfigError(f"pairs.model is not set: pairs.judge={pairs.judge} needs pairs.model=NAME")
    if "model" not in JUDGES[pairs.judge] and pairs.model is not None:
        raise ConfigError(f"pairs.model: pairs.judge={pairs.judge} has no such field; remove the override")
