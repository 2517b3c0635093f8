"""The shape of a model, from the headers of its files or its config, without loading it. No torch.

A model on the hub is looked for in the hub's cache on this machine, then among those of `conf/hub_configs.yaml`; the
network is not asked here: `src.preflight` fetches the config.json of a model that neither has.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from src.config.schema import CONF_DIR
from src.planning.content import locate
from src.planning.weight_files import UnreadableWeights, read_gguf_header, read_safetensors_header

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blk|blocks)\.(\d+)\.")  # in the name of a tensor
_HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
_NO_PARAMETER = re.compile(r"rotary_emb|rope_freqs|\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Names of one number of a config in the architectures that this project supports.
_ALIASES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_heads": ("num_attention_heads", "n_head"),
    "num_kv_heads": ("num_key_value_heads",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab_size": ("vocab_size",),
}

# Architectures whose tensors follow from their config: the norms of a layer, and what queries and keys have beside.
_FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "smollm3"), (("input", "post_attention"), None)),
    "qwen2": (("input", "post_attention"), "biases"),
    "qwen3": (("input", "post_attention"), "norms of heads"),
    **dict.fromkeys(("olmo2", "olmo3"), (("post_attention", "post_feedforward"), "norms")),
    "gemma3_text": (("input", "post_attention", "pre_feedforward", "post_feedforward"), "norms of heads"),
}
_TIED_BY_DEFAULT = ("gemma", "gemma3_text", "smollm3")  # where config.json does not say whether the head is tied


@dataclass(frozen=True)
class ModelShape:
    """Numbers of parameters, and the config they belong to.

    config: fields of config.json. layer: parameters of the largest decoder layer.
    """

    config: dict[str, Any] = field(repr=False)
    num_parameters: int
    layer: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of the keys and values of one token in bf16."""
        return 2 * 2 * self.num_layers * self.num_kv_heads * self.head_dim


@lru_cache(maxsize=256)
def model_shape(location: str, revision: str | None = None) -> ModelShape | None:
    """Return the shape of the model at a path or of a name on the hub; None when it is not known on this machine.

    Raises ConfigError for a path that does not exist. Damaged files are refused by `check_model_files`, not here.
    """
    path = locate(location) or cached_on_hub(location, revision)
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, UnreadableWeights):
        if path is None:
            config = hub_configs().get(location)
            return None if config is None else _shape(config, _decoder_tensors(config))
        return _of_gguf(path) if path.is_file() else _of_folder(path)
    return None


@lru_cache(maxsize=1)
def hub_configs() -> dict[str, dict[str, Any]]:
    """Return the configs of the hub's models that setups use: name -> fields of config.json."""
    return yaml.safe_load((CONF_DIR / "hub_configs.yaml").read_text(encoding="utf-8"))


def cached_on_hub(name: str, revision: str | None) -> Path | None:
    """Return the folder of a model in the hub's cache on this machine; None when it is not there."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, (str, os.PathLike)) else None


def hub_config(name: str, revision: str | None) -> dict[str, Any] | None:
    """Return config.json of a model of the hub, from its cache or `conf/hub_configs.yaml`; None if neither has it."""
    folder = cached_on_hub(name, revision)
    if folder is None:
        return hub_configs().get(name)
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else None
    return None


def _of_folder(folder: Path) -> ModelShape:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    index = folder / "model.safetensors.index.json"
    shards = {folder / "model.safetensors"}
    if index.is_file():
        shards = {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    if all(shard.is_file() for shard in shards):
        headers = [read_safetensors_header(shard) for shard in sorted(shards)]
        return _shape(config, {name: tuple(t["shape"]) for header in headers for name, t in header.items()})
    pickles = sum(file.stat().st_size for file in folder.glob("pytorch_model*.bin"))
    if pickles:  # a zip archive of the plain numbers: a little more than they are
        return _shape(config, {}, pickles // _BYTES[config.get("dtype") or config.get("torch_dtype") or "float32"])
    return _shape(config, _decoder_tensors(config))


def _of_gguf(file: Path) -> ModelShape:
    header = read_gguf_header(file)
    data, kind = header.metadata, header.metadata["general.architecture"]
    heads = data[f"{kind}.attention.head_count"]
    config = {
        "model_type": kind,
        "hidden_size": data[f"{kind}.embedding_length"],
        "intermediate_size": data[f"{kind}.feed_forward_length"],
        "num_hidden_layers": data[f"{kind}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": data.get(f"{kind}.attention.head_count_kv", heads),
        "vocab_size": header.shapes["token_embd.weight"][0],
        "max_position_embeddings": data[f"{kind}.context_length"],
        "tie_word_embeddings": "output.weight" not in header.shapes,
    }
    optional = {
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
    }
    config |= {name: data[f"{kind}.{key}"] for name, key in optional.items() if f"{kind}.{key}" in data}
    return _shape(config, header.shapes)


def _shape(config: dict[str, Any], tensors: dict[str, tuple[int, ...]], total: int | None = None) -> ModelShape:
    """Return the shape of a model with these tensors; without them, of `total` parameters in equal layers."""
    tied = _is_tied(config)
    sizes = {
        name: math.prod(shape)
        for name, shape in tensors.items()
        if not _NO_PARAMETER.search(name) and not (tied and name in _HEADS)  # some files have a tied head twice
    }
    numbers = {name: _first(config, *keys) for name, keys in _ALIASES.items() if name != "num_kv_heads"}
    layers: Counter[str] = Counter()
    for name, size in sizes.items():
        if match := _LAYER.search(name):
            layers[match[1]] += size
    num_parameters = sum(sizes.values()) if total is None else total
    embeddings = numbers["vocab_size"] * numbers["hidden_size"] * (1 if tied else 2)
    largest = max(layers.values(), default=max(0, num_parameters - embeddings) // numbers["num_layers"])
    return ModelShape(
        config,
        num_parameters,
        largest,
        **numbers,
        num_kv_heads=config.get("num_key_value_heads") or numbers["num_heads"],
        head_dim=config.get("head_dim") or numbers["hidden_size"] // numbers["num_heads"],
    )


def _is_tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT))


def _first(config: dict[str, Any], *names: str) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if value is None and "intermediate_size" in names:
        return 4 * _first(config, *_ALIASES["hidden_size"])  # GPT-2's default
    return int(value)  # type: ignore[arg-type]  # None is a TypeError


def _decoder_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model with a gated MLP, by its config alone. Raises KeyError for another architecture."""
    norms, queries_and_keys = _FAMILIES[config["model_type"]]
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or width // heads
    queries, keys = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    layer |= {f"{name}_layernorm.weight": (width,) for name in norms}
    match queries_and_keys:
        case "biases":
            layer |= {f"self_attn.{x}_proj.bias": (size,) for x, size in (("q", queries), ("k", keys), ("v", keys))}
        case "norms of heads":
            layer |= {f"self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
        case "norms":
            layer |= {f"self_attn.{x}_norm.weight": (size,) for x, size in (("q", queries), ("k", keys))}
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for i in range(config["num_hidden_layers"]):
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (width,)
    if not _is_tied(config):
        tensors["lm_head.weight"] = (config["vocab_size"], width)
    return tensors
