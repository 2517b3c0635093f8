"""Annotators of the package alpaca-eval: which model each asks, and how. The package is found, not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from src.config.packages import require_package
from src.errors import ConfigError
from src.planning.content import ContentPath
from src.planning.identity import JudgeInputs


def read_annotators(name: str) -> dict[str, dict[str, Any]]:
    """Return the annotators of a configs.yaml of the package, or of a folder, by their names.

    Raises ConfigError for an unknown name, for a file that cannot be read, and for a prompt that is not in its folder:
    an annotator of one's own is identified by the content of its folder.
    """
    package = require_package("alpaca_eval", "judge=alpaca_eval") / "evaluators_configs"
    folder, key = package / name, f"judge.model={name}"  # joining an absolute path gives that path
    if not (folder / "configs.yaml").is_file():
        raise ConfigError(
            f"{key}: unknown annotator; use one of alpaca-eval's ({package}), or the absolute path of a folder with a "
            "configs.yaml; ANNOTATOR:MODEL asks another model"
        )
    try:
        annotators = yaml.safe_load((folder / "configs.yaml").read_text(encoding="utf-8"))
        templates = [annotator["prompt_template"] for annotator in annotators.values()]
        prompts = [folder.parent / template for template in templates if "{" not in template]  # others are no path
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{key}: its configs.yaml needs NAME: {{prompt_template: FILE, ...}} ({reason})") from None
    for prompt in prompts if Path(name).is_absolute() else ():
        if folder.resolve() not in prompt.resolve().parents or not prompt.is_file():
            raise ConfigError(f"{key}: prompt_template={prompt} is no file in this folder; copy it there")
    return annotators


def models_asked(judge: JudgeInputs) -> dict[str, int | None]:
    """Return the models that a judge asks its endpoint for -> how many log-probs of a token it needs, None for none."""
    if judge.name != "alpaca_eval":
        return {judge.asked_name: None}
    assert isinstance(judge.model, ContentPath)
    models: dict[str, int | None] = {}
    for annotator in read_annotators(judge.model.location).values():
        options = annotator.get("completions_kwargs") or {}
        name = judge.asked_name if judge.asked is not None else options.get("model_name")
        if isinstance(name, str):
            models[name] = int(options.get("top_logprobs") or 0) if options.get("logprobs") else None
    return models
