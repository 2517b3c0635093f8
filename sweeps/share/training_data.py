"""What a published model was trained on, in words, and which of that is on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from src.config.schema import GENERATED
from src.store.files import read_json
from src.store.store import COUNTS_FILE


def hub_tables(config: Mapping[str, Any], with_sft: bool, with_pairs: bool = True) -> list[str]:
    """Return the names of the tables on the hub that a model was trained on, also where local copies were read."""
    if config["dataset"]["source"] != "hub":
        return []
    parts = ["preference"] * with_pairs + ["sft"] * with_sft
    return list(dict.fromkeys(table["path"] for part in parts for table in _tables(config, part)))


def describe_data(config: Mapping[str, Any], checkpoint: Path | None, sft: Path | None) -> list[str]:
    """Return a line about the preference pairs and one about the demonstrations.

    checkpoint, sft: artifacts of alignment and SFT; None where only the other is described, or there was no SFT.
    Raises FileNotFoundError and DamagedFile when their data.json cannot be read.
    """
    lines = []
    if checkpoint is not None:
        content = read_json(checkpoint / COUNTS_FILE)
        count, dropped = content["pairs"], content["dropped"]["train"]
        pairs = config["pairs"]
        source = _source(config, "preference")
        if pairs["name"] == "onpolicy":
            source = f"samples of the SFT model for prompts of {source}, graded by {pairs['judge']}"
            source += f" ({pairs['model']})" if pairs["model"] else ""
        lines.append(f"Alignment: {count} preference pairs, {source}{_dropped(dropped)}.")
    if sft is not None:
        content = read_json(sft / COUNTS_FILE)
        lines.append(f"SFT: {content['rows']} demonstrations, {_source(config, 'sft')}{_dropped(content['dropped'])}.")
    return lines


def _source(config: Mapping[str, Any], part: str) -> str:
    dataset = config["dataset"]
    if dataset["source"] in GENERATED:
        return f"the generated task `{dataset['source']}`"
    if dataset["source"] == "hub" and (tables := _tables(config, part)):
        return " and ".join(
            f"[{table['path']}](https://huggingface.co/datasets/{table['path']}), split `{table['train_split']}`"
            for table in tables
        )
    return f"the file `{Path(dataset['path'] or '').name}`, which is not published"


def _tables(config: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    table = config["dataset"][part]
    return [] if table is None else table["tables"] or [table]


def _dropped(counts: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
    return f" (dropped: {reasons})" if reasons else ""
