"""What two stores must have in common when the same sweep made both."""

from __future__ import annotations

import json
from pathlib import Path


def results(output_dir: Path) -> dict[str, object]:
    """Everything a finished run computed, without its timings, and without how (tracked.json has batch sizes, too)."""
    found: dict[str, object] = {}
    for done in sorted((output_dir / "store").glob("*/*/DONE")):
        folder = done.parent
        for path in sorted(set(folder.iterdir()) - {folder / "tracked.json"}):
            key = f"{folder.parent.name}/{folder.name}/{path.name}"
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                found[key] = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
            elif path.name == "result.json":
                result = json.loads(path.read_text())
                result["stages"] = [{k: v for k, v in s.items() if k != "seconds"} for s in result["stages"]]
                found[key] = result
            elif path.name == "DONE":
                found[key] = {
                    k: v for k, v in json.loads(path.read_text()).items() if k in ("stage", "identity", "tokens")
                }
            else:
                found[key] = path.read_bytes()
    return found
