"""Fifty steps of DPO on the embedded model in float32 and bf16: losses stay together, and weights move the same way.

On a card both are also compared with float32 on the CPU. Steps of 3e-7, the smallest learning rate of the paper's
grids, must move the master weights in bf16 as they do in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.training import reference_logps, stage_of, train_steps
from src.data.tokenization import load_examples
from src.model.loading import load_for_inference, load_template, load_weights
from src.planning.stage import Stage
from src.store.attempt import Attempt

STEPS = 50
POINT = (
    *("setup=mini_tldr", "method=dpo", "beta=0.1", "init=base", "init.sft_weight=0", "init.align_weight=1"),
    *("dataset.train_size=800", "trainer.align.batch_size=16", f"trainer.align.max_steps={STEPS}"),
)
RATE = "lr=1e-4"  # at 1e-3 this model's losses are chaotic: float32 and bf16 part after 15 steps
LOSSES = Limit(0.02, "a number in bf16 is off by up to 0.4 %, and 50 steps must not let that grow")
DIRECTION = Limit(0.8, "the rule of the project's own test: bf16 gradients point another way only by noise", "least")
LENGTH = Limit(0.1, "in bf16 weights steps of 3e-7 would vanish, so that moves would be far shorter")


class Run(NamedTuple):
    """losses: (steps,) of training; move: the change of all weights, float64."""

    losses: Tensor
    move: Tensor


def run(setting: Setting) -> list[Row]:
    def steps(name: str, *overrides: str) -> Run:
        return train_point(setting.out / "drift" / name, f"engine.device={setting.device.type}", *overrides)

    # float32 first: FSDP2 starts a group of processes, in which engine=single would be another engine.
    fp32, slow = steps("fp32", RATE), steps("slow", "lr=3e-7")
    on_cpu = train_point(setting.out / "drift" / "cpu", "engine.device=cpu", RATE) if setting.on_card else None
    bf16, slow_bf16 = steps("bf16", RATE, "engine=fsdp"), steps("slow_bf16", "lr=3e-7", "engine=fsdp")
    rows = [losses_row(setting, "bf16 against float32", bf16, fp32)]
    if on_cpu is not None:
        rows += [losses_row(setting, "float32 on the card against the CPU", fp32, on_cpu)]
        rows += [losses_row(setting, "bf16 on the card against float32 on the CPU", bf16, on_cpu)]
    direction = float(F.cosine_similarity(slow_bf16.move, slow.move, dim=0))
    length = abs(float(slow_bf16.move.norm() / slow.move.norm()) - 1)
    rows.append(setting.row("steps of 3e-7, bf16 against float32: cosine of the moves", direction, "", DIRECTION))
    rows.append(setting.row("steps of 3e-7, bf16 against float32: difference of their lengths", length, "", LENGTH))
    return rows


def losses_row(setting: Setting, name: str, actual: Run, expected: Run) -> Row:
    """Return the largest difference of a loss over the expected one."""
    difference = ((actual.losses - expected.losses) / expected.losses).abs()
    note = f"of {STEPS} steps; the last loss is {float(actual.losses[-1]):.4f}"
    return setting.row(f"{name}: largest relative difference of a loss", float(difference.max()), "", LOSSES, note)


def train_point(folder: Path, *overrides: str) -> Run:
    """Train the embedded base model with DPO on its own preference pairs."""
    stage = stage_of("align", *POINT, *overrides)
    examples = training_pairs(stage, folder)
    references = reference_logps(load_for_inference(stage.inputs.model, stage.resources), examples, stage)
    model = load_weights(stage.inputs.model, stage.resources)
    before = all_weights(model)
    trained, lines = train_steps(model, examples, stage, references, folder / "training")
    return Run(torch.tensor([line["loss"] for line in lines]), all_weights(trained) - before)


def training_pairs(stage: Stage, folder: Path) -> Any:
    """Return the tokenized training pairs of a stage."""
    inputs = stage.inputs
    attempt = Attempt(folder, folder, None, lambda *_: None, "gpu_check", "gpu_check", folder)
    return load_examples(inputs.data, inputs.model, "train", load_template(inputs.model), attempt, {}).examples


def all_weights(model: Any) -> Tensor:
    """Return all parameters as one float64 vector on the CPU, in the order of their names."""
    parameters = sorted(model.named_parameters(), key=lambda item: item[0])
    return torch.cat([p.detach().double().cpu().flatten() for _, p in parameters])
