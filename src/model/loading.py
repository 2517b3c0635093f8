"""Loading and saving checkpoints: hub, local folder, GGUF file, or a stage's artifacts. Files are read as float32."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from src.data.templates import Template
from src.distributed import get_distributed
from src.errors import ConfigError, DamagedFile
from src.hardware import check_num_threads, cores_of_process
from src.model import attention
from src.model.adapters import is_adapter, merge_adapter
from src.model.files import too_many_tokens, wrapper_hint
from src.model.fused_ops import why_not_fused
from src.model.logprobs import patch_model_
from src.model.numerics import NumericsConfig, cast_for_inference_, set_deterministic
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
    """Return the numerics of log-probs and samples on this machine; log the reason once. Raises ConfigError.

    Every stage asks for them before it computes anything, so that the order of sums on a GPU is set here, too.
    """
    if device_of(resources.device).type == "cuda":
        set_deterministic(resources.deterministic)
    fused = resources.fused if not resources.compile or resources.fused is True else False  # compilation fuses, too
    return _numerics(model.precision, resources.attention, fused, device_of(resources.device))


@lru_cache(maxsize=4)
def _numerics(precision: str, requested: str, fused: bool | str, device: torch.device) -> NumericsConfig:
    backend, reason = attention.resolve_backend(requested, device, precision)
    slower = backend == "sdpa" and requested == "auto" and device.type == "cpu" and precision == "fp32"
    log.log(logging.WARNING if slower else logging.INFO, "attention backend: %s (%s)", backend, reason)
    not_fused = why_not_fused(device)
    if fused is True and not_fused:
        raise ConfigError(f"engine.fused=true: {not_fused}; use engine.fused=auto")
    if device.type != "cpu":
        log.info("fused kernels: %s", "off, as configured" if fused is False else not_fused or "liger-kernel's")
    return NumericsConfig(precision, backend, fused=fused is not False and not not_fused)


def set_cpu_threads(configured: int | None, sharing: int = 1) -> None:
    """Set torch's CPU threads: as configured, or this process's share of the cores among `sharing` processes.

    Raises ConfigError for more than this machine has cores.
    """
    check_num_threads(configured)
    torch.set_num_threads(configured or cores_of_process(max(sharing, get_distributed().local_size)))


def load_for_inference(
    model: ModelInputs, resources: Resources, checkpoint: Path | None = None, base: Path | None = None
) -> Any:
    """Load a model for log-probs and samples: cast by `cast_for_inference_`, on the run's device, patched.

    Weights are cast before they reach the device, which holds half of the bytes in bf16. Arguments and errors are those
    of load_weights.
    """
    loaded = cast_for_inference_(load_weights(model, resources, checkpoint, base), numerics_of(model, resources))
    return patch_model_(loaded.to(device_of(resources.device)))


def load_weights(
    model: ModelInputs, resources: Resources, checkpoint: Path | None = None, base: Path | None = None
) -> Any:
    """Load a stage's checkpoint, or the base model: float32, in CPU memory, as transformers builds it.

    base: the checkpoint that training started from, None for the base model; adapters are merged into it. Training
    engines start from what is returned. Raises ConfigError when it cannot be loaded whole, when the log-prob path does
    not support its architecture, or when the tokenizer is not its own; DamagedFile for a stage's checkpoint.
    """
    if checkpoint is not None and is_adapter(checkpoint):
        return merge_adapter(load_weights(model, resources, base), checkpoint)
    if checkpoint is not None:
        try:
            loaded = load_pretrained(AutoModelForCausalLM, str(checkpoint), str(checkpoint), attn_implementation="sdpa")
        except ConfigError as error:
            raise DamagedFile(str(error)) from error
        return loaded
    name, (source, options) = f"model.path={model.path.location}", _pretrained_source(model.path)
    is_gguf = "gguf_file" in options
    with reading(model.path):
        if not is_gguf:  # before gigabytes of weights are fetched; a GGUF file's config takes as long as its weights
            _check_supported(_load_config(source, name, options), name, resources)
        loaded = load_pretrained(AutoModelForCausalLM, source, name, attn_implementation="sdpa", **options)
        copy_weights_(loaded)
    largest = max(load_template(model).tokenizer.get_vocab().values())
    if largest >= (num_embeddings := loaded.get_input_embeddings().num_embeddings):
        raise ConfigError(f"{name}: {too_many_tokens(largest, num_embeddings)}")
    if is_gguf:
        # The weights were dequantized while reading; metadata that says otherwise would make saving fail.
        del loaded.config.quantization_config
        loaded.hf_quantizer, loaded.is_quantized = None, False
        loaded.config.architectures = [type(loaded).__name__]
        _check_supported(loaded.config, name, resources)
    return loaded


def copy_weights_(model: Any) -> None:
    """Copy weights that are mapped from a file: until they are, what is written to the file is written to them."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def _check_supported(config: Any, name: str, resources: Resources) -> None:
    try:
        attention.check_supported(config, resources.max_sequence_tokens)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def _load_config(source: str, name: str, options: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # as in load_pretrained
        raise ConfigError(f"{name}: its config.json cannot be loaded: {_reason(error)}") from error


def load_pretrained(auto_class: Any, source: str, name: str, **options: Any) -> Any:
    """Load a model whole, float32, without executing code that comes with it.

    auto_class: of transformers. name: the setting or folder that messages begin with. Raises ConfigError when it cannot
    be loaded, and when a tensor is not finite, or is missing or has another shape, where transformers would fill in
    random numbers. Tensors that the model does not have are a warning.
    """
    try:
        loaded, info = auto_class.from_pretrained(
            source,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except Exception as error:  # of any type: each of the libraries that read models has its own
        raise ConfigError(f"{name} cannot be loaded: {_reason(error)}") from error
    architecture = type(loaded).__name__
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if mismatched := sorted(info["mismatched_keys"]):
        tensor, shape, expected = mismatched[0]
        raise ConfigError(
            f"{name}: the shapes of {len(mismatched)} tensors do not fit its config.json, the first {tensor}: "
            f"{tuple(shape)} in the file, {tuple(expected)} by the config"
        )
    if missing:
        raise ConfigError(
            f"{name}: {len(missing)} tensors of a {architecture} are missing from its files: "
            f"{_first(missing)}{wrapper_hint(unexpected)}"
        )
    # A sum is finite only if all its terms are.
    if bad := [tensor for tensor, weight in loaded.named_parameters() if not weight.detach().sum().isfinite()]:
        raise ConfigError(f"{name}: {len(bad)} tensors have values that are not finite: {_first(bad)}")
    if unexpected:
        _warn_unexpected(name, architecture, tuple(unexpected))
    return loaded


def _reason(error: Exception) -> str:
    """Return one line that says what a library found wrong with a model's files."""
    if "trust_remote_code" in str(error):
        return "its auto_map names code of its own, which is never executed; use an architecture of transformers"
    if isinstance(error, UnpicklingError):
        return "its pickled weights hold other objects than tensors, which are never executed; use model.safetensors"
    text = shorten(" ".join(str(error).split()), 300, placeholder=" ...")
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@lru_cache
def _warn_unexpected(name: str, architecture: str, tensors: tuple[str, ...]) -> None:
    """Warn once per process, though several stages load the model."""
    log.warning(
        "%s: %d tensors that a %s does not have are ignored: %s", name, len(tensors), architecture, _first(tensors)
    )


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
    name = f"model.path={model.path.location}"
    with reading(model):
        if "gguf_file" not in options:  # what is wrong there is no fault of the tokenizer, which reads it first
            _load_config(source, name, options)
        tokenizer = load_tokenizer(source, name, **options)
        return Template(model.template_name, tokenizer, model.end_tokens, model.system_prompt)


def load_tokenizer(source: str, name: str, **options: Any) -> Any:
    """Load a tokenizer without executing code that comes with it. Raises ConfigError; name: as in load_pretrained."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:  # as in load_pretrained
        raise ConfigError(f"{name}: its tokenizer cannot be loaded: {_reason(error)}") from error


def save_checkpoint(model: Any, template: Template, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write model.safetensors, config and tokenizer: a folder that from_pretrained reads.

    The float32 model stays as it is. dtype: one that has the values of its weights.
    """
    model.set_attn_implementation("sdpa")
    _cast_(model, dtype)
    model.save_pretrained(folder)  # which writes the dtype to config.json, too
    _cast_(model, torch.float32)
    model.config.dtype = torch.float32
    template.tokenizer.save_pretrained(folder)


def _cast_(model: Any, dtype: torch.dtype) -> None:
    """Cast parameters, not buffers: in bf16 the frequencies of rotary embeddings would be others."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
