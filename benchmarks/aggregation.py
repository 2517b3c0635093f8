"""How long 10,000 finished points take to become tables, figures and a report: `python -m benchmarks.aggregation`."""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from src.methods import METHODS
from src.stages.evaluate import mean_and_error, selection_items
from src.store.store import DONE, QUALITY_FILE, RESULT_FILE

PROMPTS = 512


def make_sweep(folder: Path, seeds: int = 5, lrs: int = 25, betas: int = 10, setup: str = "made") -> int:
    """A sweep's folder and its store, as runs leave them: eight methods over betas, learning rates and seeds."""
    rng, points = random.Random(0), []
    difficulty = [rng.random() for _ in range(PROMPTS)]
    selects = selection_items(list(range(PROMPTS)), 0.5, 0)
    for method, beta, lr, seed in product(METHODS, range(betas), range(lrs), range(seeds)):
        identity = f"{method}-{beta}-{lr}-{seed}"
        ease = 0.4 + 0.02 * beta + rng.gauss(0, 0.02)
        values = [float(d < ease) for d in difficulty]
        stage = folder / "store" / "evaluate" / identity
        stage.mkdir(parents=True)
        split = {
            own: mean_and_error([v for i, v in enumerate(values) if (i in selects) == own]) for own in (True, False)
        }
        some = {"value": 1.0 + beta, "se": 0.1, "n": PROMPTS}
        result = {
            "quality": {"metric": "win_rate", **mean_and_error(values)},
            "splits": {"selection": split[True], "reporting": split[False]},
            "kl": {"per_sequence": some, "per_token": some},
            **dict.fromkeys(("reward_accuracy", "reward_margin", "response_tokens"), some),
            "stages": [{"stage": "align", "identity": f"align-{identity}", "seconds": 1.0, "tokens": 1}],
        }
        quality = {
            "prompts": list(range(PROMPTS)),
            "values": values,
            "selection": [i in selects for i in range(PROMPTS)],
        }
        (stage / RESULT_FILE).write_text(json.dumps(result, indent=1))
        (stage / QUALITY_FILE).write_text(json.dumps(quality, indent=1))
        (stage / DONE).write_text("{}")
        point = {"setup": setup, "method": method, "init": "sft", "variant": "", "seed": seed, "state": "done"}
        point |= {
            "beta": 10.0 ** (beta - 5),
            "lr": 10.0 ** (lr / 10 - 6),
            "label": identity,
            "error": None,
            "job": None,
        }
        stages = {kind: f"{kind}-{identity}" for kind in ("align", "generate")} | {"evaluate": identity}
        points.append(point | {"identity": identity, "stages": stages})
    sweep = {"name": "made", "command": "made", "store": str(folder / "store"), "written": "now", "points": points}
    (folder / "sweeps" / "made").mkdir(parents=True)
    (folder / "sweeps" / "made" / "sweep.json").write_text(json.dumps(sweep))
    return len(points)


def main() -> int:
    from sweeps.aggregate import aggregate

    with tempfile.TemporaryDirectory() as folder:
        count = make_sweep(Path(folder))
        begun = time.perf_counter()
        aggregate([Path(folder) / "sweeps" / "made"], quiet=True)
        print(f"{count} points: {time.perf_counter() - begun:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
