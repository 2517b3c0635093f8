"""The folder of a published model: weights, tokenizer, chat template, generation settings, a figure and its card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tokenizers import Tokenizer

from src.config.schema import Generation
from src.data.templates import published_chat_template, tokens_of
from src.errors import ConfigError, DamagedFile
from src.model.files import ADAPTER_CONFIG
from src.planning.content import HUB_FINGERPRINT, locate
from src.store.files import read_json, write_json
from src.store.integrity import DONE, STAGE_FILE, find_damage
from src.store.store import COUNTS_FILE, METRICS_FILE, RUN_CONFIG_FILE, VALIDATION_FILE
from sweeps.report.figures import quality_over_beta
from sweeps.share.chosen import ChosenModel

CHAT_TEMPLATE = "chat_template.jinja"  # where transformers looks for it
FIGURE = "quality_over_beta"
# What a stage that trains writes beside the model; the data set has it.
_OF_THE_STAGE = (DONE, STAGE_FILE, RUN_CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, COUNTS_FILE)
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.jinja",
)


@dataclass(frozen=True)
class Base:
    """What a published model was made from.

    name: on the hub; None where it is not known. local: its folder on this machine, where there is one.
    """

    name: str | None
    local: Path | None = None


def base_of(model: ChosenModel, named: str | None) -> Base:
    """Return the model that SFT or alignment began with. named: --base-model, its name where it was a local folder.

    Whether model.path names one of the hub is what the run has recorded of it, as a folder may be gone by now.
    """
    location = model.config["model"]["path"]
    inputs = read_json(model.checkpoint / STAGE_FILE).get("inputs", {})
    is_of_hub = str(inputs.get("model", {}).get("path", "")).startswith(HUB_FINGERPRINT)
    name = named or (location if is_of_hub else None)
    try:
        local = locate(location)
    except ConfigError:  # it was there when the sweep ran
        local = None
    return Base(name, local if local is not None and local.is_dir() else None)


def write_weights(source: Path, target: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> None:
    """Copy a model as transformers and peft read it, with the chat template and the sampling settings of the study.

    source: artifacts of a stage that trains. tokenizer: a folder to take the tokenizer from, for adapters. Raises
    OSError, and ConfigError where the file of the chat template is gone.
    """
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in _OF_THE_STAGE:
            shutil.copyfile(path, target / path.name)
    if tokenizer is not None:
        for pattern in _TOKENIZER:
            for path in sorted(tokenizer.glob(pattern)):
                shutil.copyfile(path, target / path.name)
    if (target / "tokenizer_config.json").exists():
        _write_chat_template(target, config["model"])
    if not (target / ADAPTER_CONFIG).exists():
        _write_generation_config(target, config)


def write_adapter_base(folder: Path, base: str) -> None:
    """Let the adapters in a folder name their model as it is called on the hub, not where it was on this machine."""
    path = folder / ADAPTER_CONFIG
    write_json(path, read_json(path) | {"base_model_name_or_path": base, "revision": None})


def _write_chat_template(folder: Path, model: Mapping[str, Any]) -> None:
    """Replace the chat template of a tokenizer, where the study had another one, or none."""
    name = model["template"]
    if name == "tokenizer":
        return
    settings = folder / "tokenizer_config.json"
    content = read_json(settings)
    if content.pop("chat_template", None) is not None:
        write_json(settings, content)
    (folder / CHAT_TEMPLATE).unlink(missing_ok=True)
    if (template := published_chat_template(name, model["system_prompt"])) is not None:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _write_generation_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Let `generate` sample as the study did, and stop where its responses end."""
    path, sampling = folder / "generation_config.json", config["evaluation"]["generation"]
    settings = read_json(path) if path.exists() else {}
    settings["max_new_tokens"] = sampling["max_new_tokens"]
    settings |= sampling_options(sampling)
    if ends := _end_ids(folder, config["model"]):
        settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    write_json(path, settings)


def sampling_options(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `generate` that sample as the study did. sampling: of evaluation.generation."""
    if Generation(temperature=sampling["temperature"], top_k=sampling["top_k"]).is_greedy:
        return {"do_sample": False}
    return {"do_sample": True, **{name: sampling[name] for name in ("temperature", "top_k", "top_p")}}


def _end_ids(folder: Path, model: Mapping[str, Any]) -> list[int]:
    """Return the tokens that end a response, of the study's template or end_token; none where that is the EOS."""
    named = model["end_token"] or list(tokens_of(model["template"])[-1:])
    tokens = [named] if isinstance(named, str) else list(named)
    if not tokens or not (folder / "tokenizer.json").exists():
        return []
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [number for token in tokens if (number := tokenizer.token_to_id(token)) is not None]


def draw_figure(model: ChosenModel, folder: Path) -> None:
    """Write the quality over beta of the model's method as PNG and SVG."""
    shown = model.curve[model.curve.quality_reporting.notna()]
    if shown.empty:
        return
    none = pd.DataFrame(columns=["method", "beta", "source"])
    drawing = quality_over_beta("", str(model.row["setup"]), shown, pd.DataFrame([dict(model.row)]), none)
    drawing.name = FIGURE
    drawing.save(folder)


def check_sft(sft: Path) -> None:
    """Raise DamagedFile when the SFT model that adapters belong to is not as it was published."""
    if damage := find_damage(sft, sft.name) or (None if sft.is_dir() else f"{sft}: no such folder"):
        raise DamagedFile(f"{damage}; it is the base of the adapters; run the sweep again")
