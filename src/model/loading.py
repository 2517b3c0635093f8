"""Loading and saving checkpoints: hub, local folder, GGUF file, or a stage's artifacts. Weights are always float32."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.data.templates import Template
from src.distributed import get_distributed
from src.errors import ConfigError
from src.hardware import check_num_threads, cores_of_process
from src.model import attention
from src.model.logprobs import NumericsConfig, patch_model_
from src.planning.content import ContentPath, locate, reading
from src.planning.identity import ModelInputs
from src.planning.resources import Resources

log = logging.getLogger(__name__)

# Users cannot act on what transformers prints while it reads weights.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def device_of(device: str) -> torch.device:
    """Return the device for engine.device. Raises ConfigError when `cuda` is asked for and there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device=cuda: torch sees no GPU here; use engine.device=auto or cpu")
    return torch.device("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")


def numerics_of(model: ModelInputs, resources: Resources) -> NumericsConfig:
    """Return the numerics of log-probs and samples on this machine; log the reason once. Raises ConfigError."""
    return _numerics(model.precision, resources.attention, device_of(resources.device))


@lru_cache(maxsize=4)
def _numerics(precision: str, requested: str, device: torch.device) -> NumericsConfig:
    backend, reason = attention.resolve_backend(requested, device, precision)
    slower = backend == "sdpa" and requested == "auto" and device.type == "cpu" and precision == "fp32"
    log.log(logging.WARNING if slower else logging.INFO, "attention backend: %s (%s)", backend, reason)
    return NumericsConfig(precision, backend)


def set_cpu_threads(configured: int | None, sharing: int = 1) -> None:
    """Set torch's CPU threads: as configured, or this process's share of the cores among `sharing` processes.

    Raises ConfigError for more than this machine has cores.
    """
    check_num_threads(configured)
    torch.set_num_threads(configured or cores_of_process(max(sharing, get_distributed().local_size)))


def load_model(model: ModelInputs, resources: Resources, checkpoint: Path | None = None) -> Any:
    """Load a stage's checkpoint, or the base model: float32, on the run's device, patched for the log-prob path.

    Raises ConfigError when it cannot be loaded or the log-prob path does not support its architecture.
    """
    source, options = (str(checkpoint), {}) if checkpoint is not None else _pretrained_source(model.path)
    try:
        with reading(None if checkpoint is not None else model.path):
            loaded = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, attn_implementation="sdpa", **options
            )
            if checkpoint is None:
                copy_weights_(loaded)
    except OSError as error:
        raise ConfigError(f"model.path={model.path.location} cannot be loaded: {str(error).splitlines()[0]}") from error
    if "gguf_file" in options:
        # The weights were dequantized while reading; metadata that says otherwise would make saving fail.
        del loaded.config.quantization_config
        loaded.hf_quantizer, loaded.is_quantized = None, False
        loaded.config.architectures = [type(loaded).__name__]
    attention.check_supported(loaded.config, resources.max_sequence_tokens)
    return patch_model_(loaded.to(device_of(resources.device)))


def copy_weights_(model: Any) -> None:
    """Copy weights that are mapped from a file: until they are, what is written to the file is written to them."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _pretrained_source(path: ContentPath) -> tuple[str, dict[str, Any]]:
    """Return the arguments of from_pretrained. Raises ConfigError when a local path does not exist."""
    local = locate(path.location)
    if local is None:
        return path.location, {"revision": path.revision} if path.revision else {}
    if local.suffix == ".gguf":
        # Joined to any folder, an absolute path is itself. Not to the file's own: a tokenizer beside it would be read.
        return str(Path(__file__).parent), {"gguf_file": str(local.absolute())}
    return str(local), {}


@lru_cache(maxsize=2)
def load_template(model: ModelInputs) -> Template:
    """Load the tokenizer with its chat template, once per process: a GGUF tokenizer takes seconds."""
    source, options = _pretrained_source(model.path)
    try:
        with reading(model.path):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.path={model.path.location}: its tokenizer cannot be loaded: {reason}") from error
    return Template(model.template, tokenizer)


def save_checkpoint(model: Any, template: Template, folder: Path) -> None:
    """Write model.safetensors (float32), config and tokenizer: a folder that from_pretrained reads."""
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    template.tokenizer.save_pretrained(folder)
