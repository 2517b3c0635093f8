"""The artifacts that are equal in two stores when the same sweep wrote both."""

from __future__ import annotations

import json
from pathlib import Path

from src.store.store import RUN_CONFIG_FILE


def results(output_dir: Path) -> dict[str, object]:
    """Return what a run computed, by file: without timings, and without the config, whose batch sizes may differ."""
    contents: dict[str, object] = {}
    for done in sorted((output_dir / "store").glob("*/*/DONE")):
        folder = done.parent
        for path in sorted(set(folder.iterdir()) - {folder / RUN_CONFIG_FILE}):
            key = f"{folder.parent.name}/{folder.name}/{path.name}"
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                contents[key] = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
            elif path.name == "result.json":
                result = json.loads(path.read_text())
                result["stages"] = [{k: v for k, v in s.items() if k != "seconds"} for s in result["stages"]]
                contents[key] = result
            elif path.name == "DONE":
                contents[key] = {
                    k: v for k, v in json.loads(path.read_text()).items() if k in ("stage", "identity", "tokens")
                }
            else:
                contents[key] = path.read_bytes()
    return contents
