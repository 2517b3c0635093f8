"""Gradients of a whole DPO step of a small Llama against float64 and against transformers and TRL.

Each way to compute the step is a row: float32, bf16 under the engine that large models take, and activation
checkpointing, compilation and adapters, which must not change it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.gpu_check.errors import relative
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.shapes import SHAPES, llama, pairs
from benchmarks.gpu_check.training import engine_gradients, reference_logps, stage_of
from benchmarks.trl_side import trl_trainer
from src.data.examples import Example
from src.model.loading import load_template
from src.model.logprobs import patch_model_, sequence_logps
from src.model.packing import pack
from src.planning.stage import Stage

FLOAT32 = Limit(1e-5, "rounding of float32 through the layers; a wrong position or dtype is off by more than 1e-3")
BF16 = Limit(1.25, "as far from float64 as under autocast, and 9 to 18 % for embeddings and norms in bf16, too")
SAME = Limit(1e-5, "what is recomputed or compiled differs by rounding at most")
BETA = 0.1
POINT = ("setup=mini_tldr", "method=dpo", f"beta={BETA}", "lr=1e-6")


def run(setting: Setting) -> list[Row]:
    shape = "small" if setting.on_card else "tiny"
    examples = pairs(16, SHAPES[shape][-1], 200 if setting.on_card else 40)
    model = llama(shape, setting.device)
    fp32 = stage_of("align", *POINT)
    references = reference_logps(patch_model_(copy.deepcopy(model)), examples, fp32, noise=3.0)
    exact = exact_gradients(patch_model_(copy.deepcopy(model)), examples, references)

    def gradients(*overrides: str) -> Tensor:
        stage = stage_of("align", *POINT, *overrides)
        return joined(engine_gradients(copy.deepcopy(model), examples, stage, references))

    plain = {precision: plain_gradients(model, examples, references, precision) for precision in ("fp32", "bf16")}
    yardstick = relative(plain["bf16"], exact)
    recomputed, bf16 = "engine.activation_checkpointing=true", "engine=fsdp"
    # float32 first: FSDP2 starts a group of processes, in which engine=single would be another engine.
    alone, alone_recomputed = gradients(), gradients(recomputed)
    rows = [
        setting.row("float32: error to float64", relative(alone, exact), "", FLOAT32),
        setting.row("float32, checkpointing: difference", relative(alone_recomputed, alone), "", SAME),
        adapters_row(setting, model, examples, references),
        setting.row("transformers' model in float32: error to float64", relative(plain["fp32"], exact), "", FLOAT32),
        setting.row("transformers' model under autocast: error to float64", yardstick),
    ]
    if trl_is_there():
        by_trl = relative(trl_gradients(model, examples, references, fp32, setting), exact)
        rows.append(setting.row("TRL's DPOTrainer in float32: error to our float64", by_trl, "", FLOAT32))
    in_bf16 = gradients(bf16)
    rows += [
        setting.row("bf16, engine=fsdp: error over that of autocast", relative(in_bf16, exact) / yardstick, "", BF16),
        setting.row("bf16, checkpointing: difference", relative(gradients(bf16, recomputed), in_bf16), "", SAME),
    ]
    if setting.on_card:  # a CPU has no fused kernels, and compiling for it takes minutes
        for name, override in {"compiled": "engine.compile=true", "not fused": "engine.fused=false"}.items():
            ratio = relative(gradients(bf16, override), exact) / yardstick
            rows.append(setting.row(f"bf16, {name}: error over that of autocast", ratio, "", BF16))
    return rows


def joined(gradients: dict[str, Tensor]) -> Tensor:
    """Return all gradients as one vector, in the order of their names; of a tied weight there is one."""
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def by_name(model: Any, prefix: str = "model.") -> dict[str, Tensor]:
    """Return the gradients of a model under the names that the engine's policy gives them."""
    return {prefix + name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def dpo_loss(logps: Tensor, references: Tensor) -> Tensor:
    """Return the mean of `-log s(b (r_w - r_l))` over the pairs; logps: chosen, rejected, chosen, rejected, ..."""
    ratios = logps.view(-1, 2) - references.to(logps)
    return -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


def exact_gradients(model: Any, examples: Sequence[Example], references: Tensor) -> Tensor:
    """Return gradients of the packed path with everything in float64."""
    device = next(model.parameters()).device
    with norms_in_float64():
        logps, _ = sequence_logps(model.double(), pack(examples, range(len(examples))).to(device))
        dpo_loss(logps, references).backward()
    return joined(by_name(model))


@contextmanager
def norms_in_float64() -> Iterator[None]:
    """Compute norms in the dtype of their input; transformers' are float32 whatever it is."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    with mock.patch.object(LlamaRMSNorm, "forward", forward):
        yield


def plain_gradients(model: Any, examples: Sequence[Example], references: Tensor, precision: str) -> Tensor:
    """Return gradients of transformers' model: one sequence at a time with its own copy of the prompt, whole logits."""
    model = copy.deepcopy(model).train()
    device = next(model.parameters()).device
    logps = []
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        for example in examples:
            for response in example.responses:
                ids = torch.tensor([[*example.prompt, *response]], device=device)
                logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 : -1]
                logps.append(-F.cross_entropy(logits.float(), ids[0, len(example.prompt) :], reduction="sum"))
    dpo_loss(torch.stack(logps), references).backward()
    return joined(by_name(model))


def trl_is_there() -> bool:
    return importlib.util.find_spec("trl") is not None


def trl_gradients(
    model: Any, examples: Sequence[Example], references: Tensor, stage: Stage, setting: Setting
) -> Tensor:
    """Return the gradients of TRL's loss on the same pairs, padded to the longest."""
    model = copy.deepcopy(model).train()
    tokenizer = load_template(stage.inputs.model).tokenizer
    job = {"micro_batch": len(examples), "pairs": len(examples), "references": references.tolist()}
    trainer = trl_trainer(job | {"device": setting.device.type}, model, tokenizer, examples, 1)
    (batch,) = trainer.get_train_dataloader()
    trainer.compute_loss(model, batch).backward()
    return joined(by_name(model))


def adapters_row(setting: Setting, model: Any, examples: Sequence[Example], references: Tensor) -> Row:
    """Return the error of the gradients of low-rank adapters, whose second factor is not zero as at their start."""
    stage = stage_of("align", *POINT, "model.lora.rank=4")
    adapted: dict[str, Any] = {}

    def randomize(policy: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        adapted["model"] = copy.deepcopy(policy.model)

    actual = engine_gradients(copy.deepcopy(model), examples, stage, references, randomize)
    exact = exact_gradients(patch_model_(adapted["model"]), examples, references)
    return setting.row("float32, adapters: error to float64", relative(joined(actual), exact), "", FLOAT32)
