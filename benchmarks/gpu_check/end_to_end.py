"""Points of the embedded setup by the command that users type: SFT and alignment in one process, killed and resumed.

On a card the whole setup, whose win rate is compared with the one recorded on a CPU; on a CPU a few steps of it.
"""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks/recorded/demo_points.csv"
POINT = ("setup=mini_tldr", "method=dpo", "beta=0.1", "lr=1e-3", "engine.deterministic=true")
OFTEN = "trainer.checkpoint_minutes=0"  # a checkpoint after every step
FEW = (
    *("dataset.sft_size=128", "dataset.train_size=128", "dataset.validation_size=16", "evaluation.num_prompts=16"),
    *("evaluation.generation.max_new_tokens=24", "trainer.sft.batch_size=32", "trainer.align.batch_size=16"),
)
WIN_RATE = Limit(2.0, "two standard errors of the difference to the same point on a CPU (benchmarks/recorded)")
BITS = Limit(0.0, "resumed is undisturbed, bit for bit: on a CPU, and on a card with engine.deterministic=true")
ENDED = Limit(1, "the command ends with a result", "least")


def run(setting: Setting) -> list[Row]:
    folder = setting.out / "end_to_end"
    size = () if setting.on_card else FEW
    rows, calm = [], folder / "fp32"
    for name, overrides in {"fp32": (), "bf16": ("engine=fsdp",)}.items():
        train(folder / name, *POINT, *size, *overrides)
        rows += win_rate_rows(setting, name, folder / name)
    killed = folder / "killed"
    kills = kill_at_checkpoint(killed, *POINT, *size, OFTEN)
    rows.append(setting.row("kill -9 at a checkpoint of alignment, kills", kills, "", ENDED))
    train(killed, *POINT, *size, OFTEN)
    return [*rows, setting.row("resumed against undisturbed, over what moved", resumed_error(killed, calm), "", BITS)]


def command(folder: Path, *overrides: str) -> list[str]:
    hydra = f"hydra.run.dir={folder}/run"
    return [sys.executable, "-m", "src.train", *overrides, f"output_dir={folder}", hydra, "tracking=none"]


def train(folder: Path, *overrides: str) -> None:
    """Run one point to its end. Raises RuntimeError with the last line it printed."""
    done = subprocess.run(command(folder, *overrides), cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, sep="\n")  # to the log of this part
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise RuntimeError(f"python -m src.train ended with exit code {done.returncode}: {lines[-1]}")


def kill_at_checkpoint(folder: Path, *overrides: str) -> int:
    """Start a point and kill -9 it once alignment has a checkpoint; return 1, or 0 when it ended before."""
    process = subprocess.Popen(
        command(folder, *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while process.poll() is None:
            if any((folder / "store").glob("align/.work/*/checkpoints/*/step-*")):
                return 1
            time.sleep(0.002)
        return 0
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


def artifact(folder: Path, kind: str, name: str) -> Path:
    """Return the only published file of this name of a stage. Raises RuntimeError without one."""
    files = list((folder / "store").glob(f"{kind}/*/{name}"))
    if len(files) != 1:
        raise RuntimeError(f"{folder}/store/{kind} has {len(files)} of {name}, 1 is expected")
    return files[0]


def win_rate_rows(setting: Setting, name: str, folder: Path) -> Iterator[Row]:
    """Yield the win rate; on a card its distance to the recorded one in standard errors, too."""
    result: Any = json.loads(artifact(folder, "evaluate", "result.json").read_text(encoding="utf-8"))
    rate, error = result["quality"]["value"], result["quality"]["se"]
    yield setting.row(f"{name}: win rate", rate, "", note=f"standard error {error:.3f}")
    if setting.on_card:
        expected, expected_error = recorded_win_rate()
        distance = abs(rate - expected) / math.hypot(error, expected_error)
        note = f"recorded on a CPU: {expected:.3f}, standard error {expected_error:.3f}"
        yield setting.row(f"{name}: distance of the win rate to the CPU's", distance, "standard errors", WIN_RATE, note)


def recorded_win_rate() -> tuple[float, float]:
    """Return the win rate of the same point in the recorded sweep, and its standard error."""
    with RECORDED.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["method"], row["init"], float(row["beta"]), float(row["lr"])) == ("dpo", "sft", 0.1, 1e-3):
                return float(row["quality"]), float(row["quality_se"])
    raise RuntimeError(f"{RECORDED} has no row of DPO with beta 0.1 and lr 1e-3")


def resumed_error(resumed: Path, calm: Path) -> float:
    """Return the difference of the aligned weights over what alignment moved, both as norms over all weights."""
    weights = {kind: vector(artifact(calm, kind, "model.safetensors")) for kind in ("sft", "align")}
    actual = vector(artifact(resumed, "align", "model.safetensors"))
    return float((actual - weights["align"]).norm() / (weights["align"] - weights["sft"]).norm())


def vector(file: Path) -> Tensor:
    """Return all tensors of a file as one float64 vector."""
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(load_file(file).items())])
