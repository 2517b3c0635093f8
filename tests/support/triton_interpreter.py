"""Triton kernels on a CPU: run `python -m tests.support.triton_interpreter FAMILY...` with TRITON_INTERPRET=1.

Prints, as JSON, the errors of small bf16 models against float64 with and without fused kernels, and what the operators
return beside what they say they do. A process of its own, because triton reads the variable when it is imported.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import liger_kernel.ops.fused_add_rms_norm as liger_add_rms_norm
import liger_kernel.ops.rms_norm as liger_rms_norm
import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from src.data.examples import Example
from src.model import fused_ops
from src.model.logprobs import configure_, patch_model_, sequence_logps
from src.model.numerics import FLOAT32, NumericsConfig, cast_for_inference_
from src.model.packing import pack
from tests.support.small_models import VOCABULARY

SEEDS = 6


def complete_interpreter() -> None:
    """Compute what the interpreter leaves out as a GPU does.

    Scalars are float32, libdevice has rsqrt, float32 is rounded to the nearest bf16 (not cut off), and bf16 is
    multiplied and added as numbers, not as the integers that store it.
    """
    implicit, convert, binary = interpreter._implicit_cvt, interpreter._convert_float, interpreter.InterpreterBuilder

    def implicit_cvt(argument: Any) -> Any:
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
        return implicit(argument)

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(data.copy()).view(torch.bfloat16).float().numpy()
        return convert(data, source, target, rounding)

    original = binary.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return original(self, lhs, rhs, op)
        wide = [self.cast_impl(x, tl.float32) for x in (lhs, rhs)]
        result = original(self, *wide, op)
        return self.cast_impl(result, tl.bfloat16) if result.dtype.scalar == tl.float32 else result

    interpreter._implicit_cvt, interpreter._convert_float, binary.binary_op = implicit_cvt, convert_float, binary_op
    liger_rms_norm.rsqrt = liger_add_rms_norm.rsqrt = lambda x: tl.rsqrt(x)


def make_model(model_type: str, seed: int) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 12, "vocab_size": VOCABULARY, "max_position_embeddings": 256}
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[model_type](**sizes, initializer_range=0.05, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def logps_and_gradient(model: Any, seed: int, numerics: NumericsConfig) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    prompt, chosen, rejected = (tuple(torch.randint(3, VOCABULARY, (n,), generator=draw).tolist()) for n in (9, 7, 5))
    logps, _ = sequence_logps(patch_model_(model), pack([Example(prompt, (chosen, rejected))], [0]), numerics)
    (logps[0] - logps[1]).backward()
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return [logps.detach().double(), torch.cat(gradients)]


def errors(model_type: str) -> dict[str, list[float]]:
    """Return the root mean square over random models of the relative errors of log-probs and gradients.

    Weights are bf16 numbers, so that only the computation differs.
    """
    squares: dict[str, torch.Tensor] = {}
    swapped = []
    for seed in range(SEEDS):
        model = make_model(model_type, seed)
        cast = cast_for_inference_(copy.deepcopy(model), NumericsConfig("bf16"))
        model.load_state_dict(cast.state_dict())
        exact = logps_and_gradient(copy.deepcopy(model).double(), seed, FLOAT32)
        variants = {
            "autocast": (copy.deepcopy(model), NumericsConfig("bf16")),
            "fused": (cast, NumericsConfig("bf16", fused=True)),
            "fused fp32": (model, NumericsConfig(fused=True)),
        }
        for name, (variant, numerics) in variants.items():
            actual = logps_and_gradient(variant, seed, numerics)
            relative = torch.stack([(a - e).norm() / e.norm() for a, e in zip(actual, exact, strict=True)])
            squares[name] = squares.get(name, torch.zeros(2)) + relative.square() / SEEDS
        swapped = sorted({type(m).__name__ for m in cast.modules() if type(m).__name__.startswith("Fused")})
    return {name: value.sqrt().tolist() for name, value in squares.items()} | {"swapped": swapped}


def recomputed_and_compiled_are_equal() -> list[bool]:
    """Return whether activation checkpointing, and compilation of layers, give the same bits.

    The kernels overwrite what backward passes need once: a second use would show.
    """
    numerics = NumericsConfig("bf16", fused=True)

    def gradient(change: Callable[[Any], None]) -> torch.Tensor:
        model = patch_model_(cast_for_inference_(make_model("llama", 0), numerics)).train()
        configure_(model, numerics)
        for layer in model.base_model.layers:
            change(layer)
        return logps_and_gradient(model, 0, numerics)[1]

    def checkpoint_activations(layer: Any) -> None:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    plain = gradient(lambda layer: None)
    changes = (checkpoint_activations, lambda layer: layer.compile(dynamic=True, backend="aot_eager"))
    return [torch.equal(gradient(change), plain) for change in changes]


def operator_outputs() -> dict[str, list[Any]]:
    """Return, for every operator, dtypes and shapes of its real outputs and of those on fake tensors."""
    bf16 = torch.bfloat16
    x, weight, grad = torch.randn(2, 5, 48), torch.rand(48).to(bf16), torch.randn(2, 5, 48).to(bf16)
    q, k, angles = torch.randn(1, 5, 4, 12).to(bf16), torch.randn(1, 5, 2, 12).to(bf16), torch.randn(1, 5, 12)
    calls: dict[str, Any] = {
        "rms_norm": (fused_ops.rms_norm, (x, weight, 1e-6, bf16)),
        "add_rms_norm": (fused_ops.add_rms_norm, (x, grad, weight, 1e-6, bf16)),
        "rms_norm_backward": (fused_ops.rms_norm_backward, (grad, x, x, weight, torch.rand(10))),
        "rotate_": (fused_ops.rotate_, (q, k, angles, angles, False)),
        "swiglu": (fused_ops.swiglu, (grad, grad.clone())),
        "swiglu_backward_": (fused_ops.swiglu_backward_, (grad, grad.clone(), grad.clone())),
    }

    def describe(outputs: Any) -> list[Any]:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [None if o is None else [str(o.dtype), list(o.shape), list(o.stride())] for o in outputs]

    described = {}
    for name, (operator, arguments) in calls.items():
        real = describe(operator(*arguments))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            described[name] = [real, describe(operator(*fake))]
    return described


if __name__ == "__main__":
    torch.set_num_threads(1)
    complete_interpreter()
    results: dict[str, Any] = {family: errors(family) for family in sys.argv[1:]}
    results |= {"operators": operator_outputs(), "equal": recomputed_and_compiled_are_equal()}
    print(json.dumps(results))
