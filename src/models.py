"""Checkpoints in and out: hub, local folder, GGUF file, or a stage's artefacts; weights in float32 always."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from src import attention
from src.config import ConfigError, Engine, Model, Point
from src.data.templates import Template
from src.distributed import world
from src.identity import locate
from src.logprobs import Compute, prepare
from src.machine import cores_of_process

log = logging.getLogger(__name__)

# Weights come from files; what a library prints while it reads them says nothing a user can act on.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def device_of(engine: Engine) -> torch.device:
    """Raises ConfigError when cuda is asked for and not there."""
    if engine.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda: torch sees no GPU here; use engine.device=auto or cpu")
    return torch.device("cpu" if engine.device == "cpu" or not torch.cuda.is_available() else "cuda")


def compute_of(point: Point) -> Compute:
    """How the point's log-probs and samples are computed on this machine; says why, once. Raises ConfigError."""
    return _compute(point.engine.precision, point.model.attention, device_of(point.engine))


@lru_cache(maxsize=4)
def _compute(precision: str, wanted: str, device: torch.device) -> Compute:
    kernel, reason = attention.choose(wanted, device, precision)
    slower = kernel == "sdpa" and wanted == "auto" and device.type == "cpu" and precision == "fp32"
    log.log(logging.WARNING if slower else logging.INFO, "attention: %s (%s)", kernel, reason)
    return Compute(precision, kernel)


def use_threads(engine: Engine, share: int = 1) -> None:
    """CPU threads of this process: as configured, or its share of the cores."""
    torch.set_num_threads(engine.threads or cores_of_process(max(share, world().local_size)))


def load_base(point: Point) -> Any:
    """The model a point starts from, before SFT: float32, on the engine's device."""
    return _load(point.model, None, point)


def load_checkpoint(folder: Path, point: Point) -> Any:
    """A model that a stage saved."""
    return _load(point.model, folder, point)


def _load(spec: Model, folder: Path | None, point: Point) -> Any:
    where, options = (str(folder), {}) if folder is not None else _source(spec)
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, attn_implementation="sdpa", **options)
    except OSError as error:
        raise ConfigError(f"model.path={spec.path} cannot be loaded: {str(error).splitlines()[0]}") from error
    if "gguf_file" in options:
        # The weights were dequantised on reading; what says otherwise would make saving fail.
        del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        model.config.architectures = [type(model).__name__]
    data, generation = point.dataset, point.evaluation.generation
    attention.check_supported(model.config, max(data.max_tokens, data.max_prompt_tokens + generation.max_new_tokens))
    return prepare(model.to(device_of(point.engine)))


def _source(spec: Model) -> tuple[str, dict[str, Any]]:
    """What to hand to transformers' from_pretrained. Raises ConfigError when a local path is not there."""
    local = locate(spec.path)
    if local is None:
        return spec.path, {"revision": spec.revision} if spec.revision else {}
    if local.suffix == ".gguf":
        return str(local.parent), {"gguf_file": local.name}
    return str(local), {}


@lru_cache(maxsize=2)
def _template(path: str, revision: str | None, name: str) -> Template:
    where, options = _source(Model(path=path, revision=revision))
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"model.path={path}: its tokenizer cannot be loaded: {str(error).splitlines()[0]}") from error
    return Template(name, tokenizer)


def template_of(point: Point) -> Template:
    """The point's tokenizer and template, read once a process (a GGUF tokenizer takes seconds)."""
    return _template(point.model.path, point.model.revision, point.model.template)


def save_checkpoint(model: Any, template: Template, folder: Path) -> None:
    """model.safetensors (float32), config and tokenizer: a folder that from_pretrained reads."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    template.tokenizer.save_pretrained(folder)
