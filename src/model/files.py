"""Checks of a model's files on this machine that need neither torch nor transformers, so that planning makes them.

What only loading shows (missing tensors, shapes that do not fit the config) is checked in `src.model.loading`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.errors import ConfigError, DamagedFile
from src.planning.content import locate
from src.planning.weight_files import UnreadableWeights, read_safetensors_header
from src.store.files import read_json

# Architectures (`model_type` of config.json) for which the packed log-prob path gives what the model itself gives:
# tests/test_architectures.py computes both for each of them. Others would often give wrong numbers without an error:
# transformers' attention interface leaves masks, position biases and convolutions to each model's own code.
ARCHITECTURES = (
    *("apertus", "arcee", "cwm", "ernie4_5", "exaone4", "gemma", "gemma3_text", "glm", "glm4", "gpt2", "gpt_bigcode"),
    *("gpt_neox", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral"),
    *("mixtral", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
    *("seed_oss", "smollm3", "starcoder2"),
)

# Those that tell the attention the sliding window of a layer, so that it is computed by position. What others with a
# window do about it is in a mask, which the packed path does not use.
WINDOWED = (
    *("cwm", "exaone4", "gemma3_text", "ministral", "ministral3", "mistral", "mixtral", "olmo3", "phi3", "qwen2"),
    *("qwen3", "qwen3_moe", "smollm3", "starcoder2"),
)

WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}  # prefix of names -> what adds it
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER_CONFIG = "adapter_config.json"  # of peft: the folder has adapters, not a model
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab*", "tekken.json")


class _Unusable(Exception):
    """Why a file cannot be used; the message begins with its name."""


def check_model_files(location: str, key: str = "model.path", *, causal: bool = True) -> None:
    """Refuse a local model whose files show that it cannot be loaded; a name on the hub is not looked at.

    causal: also refuse models whose log-probs are not supported. Raises ConfigError naming the config key.
    """
    path = locate(location, key)
    if path is None:
        return
    try:
        if path.is_dir():
            _check_folder(path, causal)
        elif path.is_file() and path.suffix == ".gguf":
            _check_gguf(path)
        else:
            raise _Unusable("neither the folder of a model nor a .gguf file")
    except (_Unusable, DamagedFile, UnreadableWeights) as error:
        raise ConfigError(f"{key}={location}: {error}") from None
    except OSError as error:
        raise ConfigError(f"{key}={location}: {error.filename} cannot be read ({error.strerror})") from None


def why_not_supported(config: Mapping[str, Any]) -> str | None:
    """Return why log-probs of a model would not be the model's own, whatever it reads; or None.

    Its architecture must be one that has been compared, its attention plain causal softmax over a whole sequence or a
    window of it, and its logits the output of the head. config: fields of config.json, of which some may be absent.
    """
    name = config.get("model_type")
    if name not in ARCHITECTURES:
        return f"log-probs of model_type {name} are not supported; use one of {', '.join(ARCHITECTURES)}"
    if others := sorted({*(config.get("layer_types") or ())} - {"full_attention", "sliding_attention"}):
        return f"model {name}: layers of {', '.join(others)} are not supported"
    if config.get("use_bidirectional_attention"):
        return f"model {name}: use_bidirectional_attention attends to later tokens; not supported"
    if config.get("attn_logit_softcapping"):
        return f"model {name}: soft-capped attention scores are not supported"
    for field in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if config.get(field) not in (None, 1, 1.0):
            return f"model {name}: {field}={config[field]} changes logits after the head; not supported"
    return None


def why_too_long(config: Mapping[str, Any], max_sequence_tokens: int) -> str | None:
    """Return why log-probs of sequences of so many tokens would not be the model's own, or None.

    config: fields of config.json, of which some may be absent.
    """
    name, window = config.get("model_type"), config.get("sliding_window")
    is_used = window and config.get("use_sliding_window", True) and window < max_sequence_tokens
    if is_used and name not in WINDOWED:
        return (
            f"model {name}: its sliding window of {window} tokens is shorter than sequences of {max_sequence_tokens}, "
            f"and windows are supported for {', '.join(WINDOWED)}"
        )
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    if positions and positions < max_sequence_tokens:
        return f"model {name}: it has {positions} positions, sequences have up to {max_sequence_tokens} tokens"
    return None


def wrapper_hint(names: list[str]) -> str:
    """Return what to do about tensor names that all begin with the prefix of a wrapper; empty for others."""
    for prefix, wrapper in WRAPPERS.items():
        if names and all(name.startswith(prefix) for name in names):
            return f" (names begin with {prefix}: saved from inside {wrapper}; strip the prefix from the names)"
    return ""


def _check_folder(folder: Path, causal: bool) -> None:
    if (folder / ADAPTER_CONFIG).exists():
        # transformers would load its base model from elsewhere, which no identity hashes.
        raise _Unusable(
            f"a LoRA adapter ({ADAPTER_CONFIG}): merge it into its base model and give that folder "
            "(alignment with model.lora.publish=merged makes one)"
        )
    config = _read_object(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise _Unusable("config.json has no model_type: not the config of a model")
    if causal and (reason := why_not_supported(config)):
        raise _Unusable(f"config.json: {reason}")
    file = next((folder / name for name in _WEIGHTS if (folder / name).exists()), None)
    if file is None:
        raise _Unusable(f"no weights; one of {', '.join(_WEIGHTS)} is expected")
    _check_weights(file, is_quantized="quantization_config" in config)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise _Unusable("no tokenizer.json: save the tokenizer into the same folder")
    if (tokenizer := folder / "tokenizer.json").exists():
        _check_tokenizer(_read_object(tokenizer), config.get("vocab_size"))


def _read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises DamagedFile naming path and line, and _Unusable when there is no such file."""
    if not file.is_file():  # a pipe would be waited for
        raise _Unusable(f"no {file.name}")
    return read_json(file)


def _check_weights(file: Path, is_quantized: bool) -> None:
    if file.suffix != ".json":
        shards = [file]
    else:
        weight_map = _read_object(file).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise _Unusable(f"{file.name} has no weight_map from tensors to files")
        shards = [file.with_name(name) for name in dict.fromkeys(weight_map.values())]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise _Unusable(f"{len(absent)} of {len(shards)} files of weights are missing, the first {absent[0]}")
    names: list[str] = []
    for shard in shards:
        if shard.suffix == ".safetensors":
            tensors = read_safetensors_header(shard)
            integers = [n for n, t in tensors.items() if n.endswith("weight") and not t["dtype"].startswith(("F", "B"))]
            if integers and not is_quantized:
                raise _Unusable(
                    f"{shard.name} has integers ({tensors[integers[0]]['dtype']}) as weights, {integers[0]} for "
                    "one, and config.json has no quantization_config that says what they stand for"
                )
            names += tensors
        elif shard.stat().st_size == 0:
            raise _Unusable(f"{shard.name} is empty")
    if hint := wrapper_hint(names):
        raise _Unusable(f"{file.name} has no tensors of this model{hint}")


def _check_gguf(file: Path) -> None:
    with file.open("rb") as handle:
        magic = handle.read(24)  # with version and counts
    if len(magic) < 24 or magic[:4] != b"GGUF":
        raise _Unusable("empty or not in the GGUF format")


def local_tokens(location: str) -> set[str] | None:
    """Return the tokens of a local model's tokenizer.json; None where it has none or is on the hub.

    Call `check_model_files` first, which refuses damaged ones.
    """
    path = locate(location)
    if path is None or not (path / "tokenizer.json").is_file():
        return None
    tokenizer = read_json(path / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    # Unigram models have a list of tokens and scores. Other files may add tokens when transformers reads the folder.
    pieces = vocabulary if isinstance(vocabulary, dict) else (token for token, _ in vocabulary)
    settings = path / "tokenizer_config.json"
    added = read_json(settings).get("added_tokens_decoder") or {} if settings.is_file() else {}
    return {*pieces, *(t["content"] for t in (*(tokenizer.get("added_tokens") or []), *added.values()))}


def _check_tokenizer(tokenizer: dict[str, Any], vocab_size: Any) -> None:
    try:
        vocabulary, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens") or []
        # From token to id; Unigram models have a list in the order of ids.
        ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))]
        largest = max(int(i) for i in (*ids, *(token["id"] for token in added)))
    except (KeyError, TypeError, ValueError):
        raise _Unusable("tokenizer.json has no vocabulary: not a tokenizer of the library tokenizers") from None
    if isinstance(vocab_size, int) and largest >= vocab_size:
        raise _Unusable(too_many_tokens(largest, vocab_size))


def too_many_tokens(largest: int, num_embeddings: int) -> str:
    return f"its tokenizer has ids up to {largest}, and the model embeds {num_embeddings} tokens: not the same model's"
