"""The artifacts that are equal in two stores when the same sweep wrote both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.store.integrity import WEIGHTS_REMOVED
from src.store.store import RUN_CONFIG_FILE


def results(output_dir: Path) -> dict[str, object]:
    """Return what a run computed, by file: without timings, and without the config, whose batch sizes may differ."""
    contents: dict[str, object] = {}
    for done in sorted((output_dir / "store").glob("*/*/DONE")):
        folder = done.parent
        for path in sorted(set(folder.iterdir()) - {folder / RUN_CONFIG_FILE}):
            contents[f"{folder.parent.name}/{folder.name}/{path.name}"] = content(path)
    return contents


def content(path: Path) -> object:
    """Return what an artifact says apart from timings; the bytes of one that is damaged, None of what is no file."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    try:
        return _parsed(path.name, data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


def _parsed(name: str, data: bytes) -> Any:
    if name == "metrics.jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
    if name == "result.json":
        result = json.loads(data)
        cost = ("processes", "held_processes")
        stages = result["stages"]
        result["stages"] = [{k: v for k, v in s.items() if k not in cost and not k.endswith("seconds")} for s in stages]
        return result
    if name == WEIGHTS_REMOVED:
        return None  # it says when
    if name == "adapter_config.json":
        config = json.loads(data)
        # peft needs the whole path of the SFT checkpoint; two stores have the part below them in common.
        config["base_model_name_or_path"] = config["base_model_name_or_path"].rpartition("/store/")[2]
        return config
    if name == "DONE":
        return {k: v for k, v in json.loads(data).items() if k in ("stage", "identity", "tokens")}
    return data
