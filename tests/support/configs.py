"""Configs and points composed as the command line composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from src.config.hydra_setup import register
from src.config.schema import CONF_DIR, Point
from src.config.validation import build_point
from src.planning.stage import Stage, stages_of

# mini_tldr with eight steps of alignment, for tests that train in their own process.
TINY = [
    *("dataset.sft_size=64", "dataset.train_size=64", "dataset.validation_size=8", "evaluation.num_prompts=8"),
    *("evaluation.generation.max_new_tokens=8", "trainer.align.batch_size=8", "trainer.sft.max_steps=2"),
    "trainer.checkpoint_minutes=0",
]
ON_POLICY = [
    *(*TINY, "pairs=onpolicy", "pairs.generation.samples_per_prompt=3", "pairs.generation.batch_size=8", "beta=0.1"),
    *("dataset.train_size=24", "engine.cpu_threads=1", "evaluation.generation.max_new_tokens=16"),
]


def composed(*overrides: str) -> DictConfig:
    """Return the config of a command line with these overrides."""
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def point(*overrides: str) -> Point:
    """Return the point of a command line with these overrides."""
    return build_point(composed(*overrides))


def stage_of(kind: str, *overrides: str) -> Stage:
    """Return the stage of a point with that kind."""
    return next(stage for stage in stages_of(point(*overrides)) if stage.kind == kind)


def identities(*overrides: str) -> dict[str, str]:
    """Return role -> identity of the stages of a point."""
    return {stage.role: stage.identity for stage in stages_of(point(*overrides))}
