"""Engines of several processes train what one process does: a group of one (NCCL on a card, gloo here), then all cards.

Every engine starts from the same random model and takes the same steps in a process of its own.
"""

from __future__ import annotations

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check.drift import all_weights
from benchmarks.gpu_check.end_to_end import FEW, POINT, ROOT, artifact, vector
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.runner import in_process
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.shapes import SHAPES, llama, pairs
from benchmarks.gpu_check.training import reference_logps, stage_of, train_steps
from src.model.logprobs import patch_model_

STEPS = 6
ONE_PROCESS = (
    *("setup=mini_tldr", "method=dpo", "beta=0.1", "lr=1e-4"),
    *(f"trainer.align.max_steps={STEPS}", "trainer.align.batch_size=8", "trainer.align.epochs=100"),
)
FLOAT32 = ("engine.precision=fp32",)
ENGINES = {
    "fsdp, float32": ("engine=fsdp", *FLOAT32),
    "zero2, float32": ("engine=zero2", *FLOAT32),
    "zero3, float32": ("engine=zero3", *FLOAT32),
    "fsdp, bf16": ("engine=fsdp",),
    "zero3, bf16": ("engine=zero3",),
}
SAME = Limit(1e-3, "sums in another order, which Adam enlarges where a gradient is near zero; lost work is all of it")
NEAR = Limit(0.3, "bf16 moves weights the same way up to noise of the gradients; lost work is all of it")


def run(setting: Setting) -> list[Row]:
    engines = {name: overrides for name, overrides in ENGINES.items() if "zero" not in name or has_deepspeed()}
    moves = {"one process": moved(setting, "one_process", ())}
    moves |= {name: moved(setting, name.replace(", ", "_"), overrides) for name, overrides in engines.items()}
    alone = moves.pop("one process")
    rows = [
        setting.row(
            f"{name}, group of one: difference to one process, over what moved",
            float((move - alone).norm() / alone.norm()),
            "",
            SAME if "float32" in name else NEAR,
        )
        for name, move in moves.items()
    ]
    if torch.cuda.device_count() > 1:
        rows += [all_cards_row(setting, strategy) for strategy in ("ddp", "fsdp")]
    return rows


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def moved(setting: Setting, name: str, overrides: tuple[str, ...]) -> Tensor:
    """Return how far training under an engine moved the weights. Raises RuntimeError when its process failed."""
    folder = setting.out / "processes" / name
    answer: Callable[[], Any] = lambda: train(setting, folder, *overrides)  # noqa: E731
    kind, content = in_process(answer, setting.out / f"processes_{name}.log", timeout=120, own_group=False)
    if kind != "value":
        raise RuntimeError(f"{name}: {content}")
    return torch.from_numpy(content)


def train(setting: Setting, folder: Path, *overrides: str) -> Any:
    """Train the random model for a few steps and return its move; as numpy, which a pipe carries whole."""
    shape = "small" if setting.on_card else "tiny"
    stage = stage_of("align", *ONE_PROCESS, f"engine.device={setting.device.type}", *overrides)
    examples = pairs(32, SHAPES[shape][-1], 100 if setting.on_card else 30)
    model = llama(shape, setting.device)
    references, before = reference_logps(patch_model_(copy.deepcopy(model)), examples, stage), all_weights(model)
    trained, _ = train_steps(model, examples, stage, references, folder)
    return (all_weights(trained) - before).numpy()


def all_cards_row(setting: Setting, strategy: str) -> Row:
    """Train a small point on all cards with torchrun; compare with one card, over what alignment moved."""
    folders = {count: setting.out / "processes" / f"{strategy}_on_{count}" for count in (1, torch.cuda.device_count())}
    overrides = {1: ("engine=single",)}
    for count, folder in folders.items():
        engine = overrides.get(count, (f"engine={strategy}", *FLOAT32))
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={count}", "--standalone"] if count > 1 else []
        command = [sys.executable, *launcher, "-m", "src.train", *POINT, *FEW, *engine, f"output_dir={folder}"]
        subprocess.run([*command, f"hydra.run.dir={folder}/run", "tracking=none"], cwd=ROOT, check=True)
    one, several = (vector(artifact(folder, "align", "model.safetensors")) for folder in folders.values())
    start = vector(artifact(folders[1], "sft", "model.safetensors"))
    error = float((several - one).norm() / (one - start).norm())
    name = f"{strategy} on {torch.cuda.device_count()} cards: difference to one card, over what moved"
    return setting.row(name, error, "", SAME)
