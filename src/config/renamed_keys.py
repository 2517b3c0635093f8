"""Config keys and values of version 0.1 that have new names: using one is an error that gives the new name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from src.errors import ConfigError

RENAMED_KEYS = {
    "dataset.preference.distinct": "dataset.preference.deduplicate",
    "dataset.preference.never_rejected": "dataset.preference.drop_if_rejected_elsewhere",
    "dataset.sft.distinct": "dataset.sft.deduplicate",
    "dataset.sft.never_rejected": "dataset.sft.drop_if_rejected_elsewhere",
    "engine.parallel": "engine.strategy",
    "engine.threads": "engine.cpu_threads",
    "evaluation.prompts": "evaluation.num_prompts",
    "evaluation.quality": "evaluation.metric",
    "evaluation.questions": "evaluation.prompts_file",
    "hydra.launcher.kinds.point": "hydra.launcher.kinds.align",
    "hydra.launcher.retry": "hydra.launcher.retry_failed",
    "hydra.launcher.wandb": "hydra.launcher.upload",
    "judge.attempts": "judge.max_retries",
    "judge.prompt": "judge.prompt_file",
    "keep": "keep_checkpoints",
    "sweep.share": "sweep.keep_fraction",
    "tracking.entity": "tracking.wandb.entity",
    "tracking.mode": "tracking.wandb.mode",
    "tracking.project": "tracking.wandb.project",
    "trainer.align.schedule": "trainer.align.lr_scheduler_type",
    "trainer.align.stop": "trainer.align.stop_fraction",
    "trainer.checkpoint_steps": "trainer.save_steps",
    "trainer.sft.schedule": "trainer.sft.lr_scheduler_type",
    "trainer.tokens_per_batch": "trainer.max_tokens_per_micro_batch",
}
RENAMED_VALUES = {
    "sweep.search=halving": "sweep.search=successive_halving",
    "tracking.wandb=false": "tracking.wandb.enabled=false",
    "tracking.wandb=true": "tracking.wandb.enabled=true",
}


def check_renamed(overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that uses a key or value of version 0.1."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if new := new_name(key):
            raise ConfigError(f"{override}: the key {key} is called {new} since version 0.2")
        if f"{key}={value}" in RENAMED_VALUES:
            raise ConfigError(f"{override}: since version 0.2 this is {RENAMED_VALUES[f'{key}={value}']}")


def rename_hint(message: str) -> str:
    """Return a hint to append to an error of Hydra about an old key in a YAML file; empty for other errors."""
    place, argument = re.search(r"at key ([\w.]+)", message), re.search(r"unexpected keyword argument '(\w+)'", message)
    if place is None:
        return ""
    key = f"{place[1]}.{argument[1]}" if argument else place[1]
    new = new_name(key)
    return f"; the key {key} is called {new} since version 0.2" if new else ""


def new_name(key: str) -> str | None:
    """Return what an old key, or one below it, is called now; None for any other key."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None
