"""Time to turn 10,000 finished points into tables, figures and a report: `python -m benchmarks.aggregation`."""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from src.methods import COMPARED
from src.stages.averages import mean_and_error, selection_prompts
from src.store.files import with_checksum, write_json, write_jsonl
from src.store.integrity import describe_files
from src.store.store import (
    DONE,
    METRICS_FILE,
    QUALITY_FILE,
    RESULT_FILE,
    RESULT_SCHEMA,
    SAMPLES_FILE,
    VALIDATION_FILE,
    Store,
)
from src.store.sweep_folder import SweepFolder

NUM_PROMPTS = 512
NUM_PAIRS, NUM_STEPS, NUM_WORDS = 256, 300, 60  # held out; of training; of a response


def make_sweep(
    output_dir: Path,
    seeds: int = 5,
    lrs: int = 25,
    betas: int = 10,
    setup: str = "synthetic",
    methods: Sequence[str] = tuple(COMPARED),
    metric: str = "win_rate",
) -> SweepFolder:
    """Write a synthetic sweep and its store, as runs leave them: methods over betas, learning rates and seeds."""
    rng, points, store = random.Random(0), [], Store(output_dir)
    folder = SweepFolder(store.sweeps / "synthetic")
    difficulty = [rng.random() for _ in range(NUM_PROMPTS)]
    selection = selection_prompts(list(range(NUM_PROMPTS)), 0.5, 0)
    for method, beta, lr, seed in product(methods, range(betas), range(lrs), range(seeds)):
        identity = f"{method}-{beta}-{lr}-{seed}"
        ability = 0.4 + 0.02 * beta + rng.gauss(0, 0.02)
        _write_result(
            store.root / "evaluate" / identity, [float(d < ability) for d in difficulty], selection, beta, metric
        )
        points.append(
            {
                "setup": setup,
                "method": method,
                "init": "sft",
                "variant": "",
                "beta": 10.0 ** (beta - 5),
                "lr": 10.0 ** (lr / 10 - 6),
                "seed": seed,
                "stop_fraction": 1.0,
                "label": identity,
                "state": "done",
                "error": None,
                "job": None,
                "identity": identity,
                "stages": {kind: f"{kind}-{identity}" for kind in ("align", "generate")} | {"evaluate": identity},
            }
        )
    record = {"name": folder.name, "command": "synthetic", "store": str(store.root), "written": "now"}
    record |= {"keep_checkpoints": "all", "tracking": {"name": "none"}, "search": None, "finished": None}
    folder.write({**record, "select": "best", "studies": [], "points": points})
    return folder


def _write_result(stage: Path, values: list[float], selection: set[int], beta: int, metric: str) -> None:
    """Write what an evaluate stage writes; values: one per prompt."""
    stage.mkdir(parents=True)
    measurement = {"value": 1.0 + beta, "se": 0.1, "n": len(values)}
    result: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "quality": {"metric": metric, **mean_and_error(values)},
        "splits": {
            "selection": mean_and_error([v for i, v in enumerate(values) if i in selection]),
            "reporting": mean_and_error([v for i, v in enumerate(values) if i not in selection]),
        },
        "kl": {"per_sequence": measurement, "per_token": measurement},
        **dict.fromkeys(("reward_accuracy", "reward_margin", "response_tokens"), measurement),
        "stages": [{"stage": "align", "identity": f"align-{stage.name}", "seconds": 1.0, "tokens": 1}],
    }
    prompts = list(range(len(values)))
    write_json(stage / RESULT_FILE, result)
    write_json(
        stage / QUALITY_FILE,
        {"schema": RESULT_SCHEMA, "prompts": prompts, "values": values, "selection": [i in selection for i in prompts]},
    )
    write_json(stage / DONE, with_checksum({"identity": stage.name, "seconds": 1.0, "files": describe_files(stage)}))


def write_artifacts(folder: SweepFolder) -> None:
    """Add the files of training and sampling that the diagnosis reads: the same ones for every point, as links."""
    rng, store = random.Random(1), folder.store.root
    logps = [[[rng.gauss(-90, 9), rng.gauss(-90, 9)] for _ in range(2)] for _ in range(NUM_PAIRS)]
    words = [f"word{i}" for i in range(1000)]
    files = {
        "align": {
            VALIDATION_FILE: [
                {"prompt": i, "loss": 0.6, "margin": 0.1, "correct": 1.0, "logps": pair[0], "reference_logps": pair[1]}
                for i, pair in enumerate(logps)
            ],
            METRICS_FILE: [
                {"step": i, "loss": 0.7 - i / 1000, "grad_norm": 1.0, "rewards/margins": 0.1, "rewards/accuracies": 0.6}
                for i in range(NUM_STEPS)
            ],
        },
        "generate": {
            SAMPLES_FILE: [
                {"index": i, "prompt": "p", "response": " ".join(rng.choices(words, k=NUM_WORDS)), "finished": True}
                for i in range(NUM_PROMPTS)
            ]
        },
    }
    for kind, tables in files.items():
        for name, rows in tables.items():
            write_jsonl(store / name, rows)
            for point in folder.read()["points"]:
                stage = store / kind / point["stages"][kind]
                stage.mkdir(parents=True, exist_ok=True)
                os.link(store / name, stage / name)


def main() -> int:
    from sweeps.aggregate import aggregate

    with tempfile.TemporaryDirectory() as output_dir:
        folder = make_sweep(Path(output_dir))
        write_artifacts(folder)
        start = time.perf_counter()
        aggregate([folder], quiet=True)
        print(f"{len(folder.read()['points'])} points: {time.perf_counter() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
