"""Low-rank adapters on disk, laid out as peft and vLLM read them: adapter_model.safetensors, adapter_config.json."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from src.errors import DamagedFile
from src.model.files import ADAPTER_CONFIG

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """Trained adapters apart from their model: peft's LoraConfig, and weights in CPU memory by peft's names."""

    config: Any
    weights: dict[str, Tensor]


def is_adapter(folder: Path) -> bool:
    """Return whether a stage has published adapters instead of a whole model."""
    return (folder / ADAPTER_CONFIG).exists()


def adapter_of(adapted: Any) -> Adapter:
    """Return the adapters of peft's wrapper of a model."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return Adapter(adapted.peft_config["default"], {n: w.detach().cpu().contiguous() for n, w in weights.items()})


def save_adapter(adapter: Adapter, base: str, folder: Path, dtype: Any) -> None:
    """Write the adapters, in a dtype that has their values. base: the folder or hub name of their model."""
    config = copy.copy(adapter.config)
    config.base_model_name_or_path, config.inference_mode = base, True
    config.target_modules = sorted(config.target_modules)  # a set, whose order differs from process to process
    config.save_pretrained(folder)
    save_file({name: w.to(dtype) for name, w in adapter.weights.items()}, folder / WEIGHTS_FILE, {"format": "pt"})


def merge_adapter(model: Any, folder: Path) -> Any:
    """Return a float32 model in CPU memory with the adapters of a folder merged into its weights, in place.

    Raises DamagedFile when the adapters do not belong to such a model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), torch_device="cpu").merge_and_unload()
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise DamagedFile(f"{folder}: its adapters cannot be loaded: {' '.join(str(error).split())[:300]}") from error
