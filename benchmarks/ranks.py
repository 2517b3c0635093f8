"""Sampling and scoring by one process and by two ranks, a CPU thread each: `python -m benchmarks.ranks [SHAPE ...]`.

Shapes: mini_tldr and smollm2 (needs `make smollm2`). A point is trained once; then
its samples, scores and evaluation are computed by one process and by two ranks (gloo) in turn.
Prints how long each took without loading, and whether the files are the same, byte by byte.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.large_file import write_pairs
from src.store.store import DONE, RESULT_FILE, RUN_CONFIG_FILE

KINDS = ("generate", "evaluate")
POINT = ["method=dpo", "beta=0.1", "tracking=none", "engine.precision=fp32"]
# Eight batches of samples or more, and tens of micro-batches.
SHAPES = {
    "mini_tldr": [
        *("trainer.sft.max_steps=20", "trainer.align.max_steps=62", "evaluation.num_prompts=1024"),
        *("dataset.validation_size=1024", "evaluation.generation.batch_size=64"),
    ],
    "smollm2": [
        *("setup=smollm2_jsonl", "init=base", "lr=1e-5", "trainer.align.max_steps=4", "dataset.validation_size=64"),
        *(
            "evaluation.num_prompts=64",
            "evaluation.generation.max_new_tokens=48",
            "trainer.max_tokens_per_micro_batch=512",
        ),
    ],
}
REPEATS = 2


class Figures(NamedTuple):
    seconds: float  # of sampling and scoring, without loading
    tokens_per_second: float  # of sampling


def compute(num_ranks: int, arguments: list[str], folder: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    engine = ["engine=single"] if num_ranks == 1 else ["engine=ddp"]
    command = [sys.executable, *(torchrun if num_ranks > 1 else []), "-m", "src.train", *arguments, *engine]
    places = [f"output_dir={folder}", f"hydra.run.dir={folder / 'run'}"]
    subprocess.run([*command, "engine.cpu_threads=1", *places], check=True, capture_output=True)


def figures(folder: Path) -> Figures:
    """Return what the run in a folder took for the samples of the policy."""
    seconds = {}
    for done in (folder / "store" / "generate").glob(f"*/{DONE}"):
        record = json.loads(done.read_text())
        role = json.loads((done.parent / "stage.json").read_text())["inputs"]["role"]
        seconds[role] = record["seconds"] - record["loading_seconds"]
    (rate,) = re.findall(r" generate: (\d+) tokens/s", (folder / "run" / "train.log").read_text())
    return Figures(seconds["policy"], float(rate))


def artifacts(folder: Path) -> dict[str, Any]:
    """Return the content of every file that the stages published, apart from timings and the config."""
    contents: dict[str, Any] = {}
    for kind in KINDS:
        for file in (folder / "store" / kind).glob("*/*"):
            if file.name == RESULT_FILE:
                contents[file.parent.name + file.name] = {**json.loads(file.read_text()), "stages": None}
            elif file.name not in (DONE, RUN_CONFIG_FILE):
                contents[file.parent.name + file.name] = file.read_bytes()
    return contents


def measure(shape: str, folder: Path) -> None:
    arguments = [*POINT, *SHAPES[shape]]
    if shape == "smollm2":
        arguments.append(f"dataset.path={write_pairs(folder / 'pairs.jsonl', 400)}")
    compute(1, arguments, folder / "trained")
    expected = artifacts(folder / "trained")
    took: dict[int, list[Figures]] = {1: [], 2: []}
    for repeat in range(REPEATS):
        for num_ranks in took:
            copy = folder / f"{repeat}-{num_ranks}"
            shutil.copytree(folder / "trained" / "store", copy / "store", ignore=shutil.ignore_patterns(*KINDS))
            compute(num_ranks, arguments, copy)
            took[num_ranks].append(figures(copy))
            assert artifacts(copy) == expected and expected, f"{shape}: other bytes with {num_ranks} ranks"
    print(f"{shape}: {len(expected)} files the same, byte by byte, with one process and two ranks")
    for name in Figures._fields:
        one, two = (statistics.median(getattr(f, name) for f in took[n]) for n in took)
        ratio = one / two if name == "tokens_per_second" else two / one
        print(f"  {name:18} one process {one:8.1f}, two ranks {two:8.1f}: {ratio:.2f} of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=list(SHAPES), metavar="SHAPE", help=" ".join(SHAPES))
    for shape in parser.parse_args().shapes:
        with tempfile.TemporaryDirectory() as folder:
            measure(shape, Path(folder))


if __name__ == "__main__":
    main()
