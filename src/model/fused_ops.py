"""RMSNorm, RoPE and SwiGLU as one kernel each: liger-kernel's, as operators that torch knows.

torch.library knows shapes, dtypes and what is overwritten, so that torch.compile takes each as a whole and fake tensors
go through them without a GPU and without liger-kernel. In eager mode transformers' modules launch 4 to 12 kernels for
each, which read and write float32 copies of the activations.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Liger(NamedTuple):
    rms_norm: ModuleType
    add_rms_norm: ModuleType
    rope: ModuleType
    swiglu: ModuleType


@cache
def _liger() -> _Liger:
    from liger_kernel.ops import fused_add_rms_norm, rms_norm, rope, swiglu

    return _Liger(rms_norm, fused_add_rms_norm, rope, swiglu)


# Arguments of liger's RMSNorm kernels, which are launched here directly: liger's own functions return the dtype of the
# residual stream, float32, which products would then cast to bf16, once each.
_NORM = {"Y_ptr", "X_ptr", "W_ptr", "RSTD_ptr", "n_cols", "eps", "offset", "casting_mode"}
_NORM_ALONE = _NORM | {"elementwise_affine"}
_NORM_OF_SUM = _NORM | {"S_ptr", "R_ptr"}
_NORM_BACKWARD = {"dY_ptr", "dS_out_ptr", "dX_ptr", "X_dtype", "dW_ptr", "n_rows", "rows_per_program", "has_dS_out"}
# A constant of the compiled kernel: always the same, so that it is compiled once and not for every number of rows.
_ROWS_PER_PROGRAM = 16


def why_not_fused(device: torch.device) -> str | None:
    """Return the reason why the kernels cannot run, or None."""
    if device.type != "cuda":
        return f"CUDA only, device is {device.type}"
    missing = [name for name in ("triton", "liger_kernel") if importlib.util.find_spec(name) is None]
    if missing:
        return f"package {missing[0].replace('_', '-')} is not installed (pip install '.[fused]')"
    norms, sums = _liger().rms_norm, _liger().add_rms_norm
    kernels = (
        (norms._rms_norm_forward_kernel, _NORM_ALONE),
        (sums._fused_add_rms_norm_forward_kernel, _NORM_OF_SUM),
        (sums._fused_add_rms_norm_backward_kernel, _NORM_BACKWARD),
    )
    if any(not arguments <= set(kernel.arg_names) for kernel, arguments in kernels):
        return "this release of liger-kernel has other kernels than 0.8; pip install '.[fused]' has one that fits"
    return None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@torch.library.custom_op("alignment_sweep::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x / rms(x) * weight in `dtype`, computed in float32, and 1 / rms(x), (rows,) float32.

    x: (..., width) contiguous; weight: (width,).
    """
    liger, rows = _liger().rms_norm, _rows(x)
    y, rstd = torch.empty_like(rows, dtype=dtype), rows.new_empty(len(rows), dtype=torch.float32)
    block_size, num_warps = liger.calculate_settings(rows.shape[1])
    with liger.device_context(x.device):
        liger._rms_norm_forward_kernel[(len(rows),)](
            Y_ptr=y,
            Y_row_stride=y.stride(0),
            X_ptr=rows,
            X_row_stride=rows.stride(0),
            W_ptr=weight,
            W_row_stride=weight.stride(0),
            RSTD_ptr=rstd,
            RSTD_row_stride=rstd.stride(0),
            n_cols=rows.shape[1],
            eps=eps,
            offset=0.0,
            casting_mode=liger._CASTING_MODE_GEMMA.value,  # weights too are float32 in the computation
            elementwise_affine=True,
            BLOCK_SIZE=block_size,
            num_warps=num_warps,
        )
    return y.view(x.shape), rstd


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=dtype), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("alignment_sweep::add_rms_norm", mutates_args=())
def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return x = residual + branch in the dtype of `residual`, and what `rms_norm` returns of x.

    residual, branch: (..., width) contiguous.
    """
    liger, residuals, branches = _liger().add_rms_norm, _rows(residual), _rows(branch)
    x, y = torch.empty_like(residuals), torch.empty_like(residuals, dtype=dtype)
    rstd = residuals.new_empty(len(residuals), dtype=torch.float32)
    block_size, num_warps = liger.calculate_settings(x.shape[1])
    with _liger().rms_norm.device_context(x.device):
        liger._fused_add_rms_norm_forward_kernel[(len(x),)](
            Y_ptr=y,
            Y_row_stride=y.stride(0),
            S_ptr=x,
            S_row_stride=x.stride(0),
            X_ptr=branches,
            X_row_stride=branches.stride(0),
            R_ptr=residuals,
            R_row_stride=residuals.stride(0),
            W_ptr=weight,
            W_row_stride=weight.stride(0),
            RSTD_ptr=rstd,
            RSTD_row_stride=rstd.stride(0),
            n_cols=x.shape[1],
            eps=eps,
            offset=0.0,
            casting_mode=liger._CASTING_MODE_GEMMA.value,
            BLOCK_SIZE=block_size,
            num_warps=num_warps,
        )
    return x.view(residual.shape), y.view(residual.shape), rstd


@add_rms_norm.register_fake
def _(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(residual), *rms_norm(residual, weight, eps, dtype)


@torch.library.custom_op("alignment_sweep::rms_norm_backward", mutates_args=())
def rms_norm_backward(
    grad: Tensor, grad_x: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, in their dtypes; both are summed in float32.

    grad: of the norm's output; grad_x: of x itself where the residual stream goes on, which is added.
    """
    liger, rows, grad_rows = _liger().add_rms_norm, _rows(x), _rows(grad)
    grad_residual = grad_rows if grad_x is None else _rows(grad_x)
    programs = math.ceil(len(rows) / _ROWS_PER_PROGRAM)
    total = torch.empty_like(rows)
    grad_weight = rows.new_empty(programs, rows.shape[1], dtype=torch.float32)  # a partial sum of each program
    block_size, num_warps = liger.calculate_settings(rows.shape[1])
    with _liger().rms_norm.device_context(x.device):
        liger._fused_add_rms_norm_backward_kernel[(programs,)](
            dY_ptr=grad_rows,
            dY_row_stride=grad_rows.stride(0),
            dS_out_ptr=grad_residual,
            dS_out_row_stride=grad_residual.stride(0),
            dX_ptr=total,
            dX_row_stride=total.stride(0),
            X_ptr=rows,
            X_row_stride=rows.stride(0),
            X_dtype=liger.torch_to_triton_dtype[x.dtype],
            W_ptr=weight,
            W_row_stride=weight.stride(0),
            RSTD_ptr=rstd,
            RSTD_row_stride=rstd.stride(0),
            dW_ptr=grad_weight,
            dW_row_stride=grad_weight.stride(0),
            n_rows=len(rows),
            n_cols=rows.shape[1],
            offset=0.0,
            rows_per_program=_ROWS_PER_PROGRAM,
            casting_mode=liger._CASTING_MODE_GEMMA.value,
            BLOCK_SIZE=block_size,
            has_dS_out=grad_x is not None,
            COMPUTE_DW=True,
            num_warps=num_warps,
        )
    return total.view(x.shape), grad_weight.sum(0).to(weight.dtype)


@rms_norm_backward.register_fake
def _(grad: Tensor, grad_x: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


@torch.library.custom_op("alignment_sweep::rotate_", mutates_args=("query", "key"))
def rotate_(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """Rotate the halves of every head by its position's angles, or back, in place; computed in float32.

    query: (batch, n, heads, d); key: (batch, n, kv_heads, d), contiguous; cos, sin: (batch or 1, n, d) float32.
    """
    rotate = _liger().rope.rope_backward if inverse else _liger().rope.rope_forward
    rotated = rotate(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    assert [x.data_ptr() for x in rotated[:2]] == [query.data_ptr(), key.data_ptr()], "liger made copies"


@rotate_.register_fake
def _(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    return None


@torch.library.custom_op("alignment_sweep::swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up of two contiguous tensors, computed in float32."""
    return _liger().swiglu.swiglu_forward(gate, up)[2]


@swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate)


@torch.library.custom_op("alignment_sweep::swiglu_backward_", mutates_args=("gate", "up"))
def swiglu_backward_(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    """Overwrite gate and up with their gradients."""
    grads = _liger().swiglu.swiglu_backward(gate, up, grad)
    assert [x.data_ptr() for x in grads] == [gate.data_ptr(), up.data_ptr()], "liger made copies"


@swiglu_backward_.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> None:
    return None


class RMSNormFunction(torch.autograd.Function):
    """Where the residual stream passes a norm: (x, norm of x) of x = residual + branch, or without a branch.

    The stream goes on with the x that is returned, whose gradient the kernel of the norm's backward pass adds.
    """

    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        residual = residual.contiguous()
        if branch is None:
            x, (y, rstd) = residual.view_as(residual), rms_norm(residual, weight, eps, dtype)
        else:
            x, y, rstd = add_rms_norm(residual, branch.contiguous(), weight, eps, dtype)
        ctx.save_for_backward(x, weight, rstd)
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_x, grad = (None if g is None else g.contiguous() for g in grad_outputs)
        assert grad is not None, "every caller uses the normed output"
        total, grad_weight = rms_norm_backward(grad, grad_x, *ctx.saved_tensors)
        return total, total if ctx.needs_input_grad[1] else None, grad_weight, None, None


class RotaryFunction(torch.autograd.Function):
    """Overwrites the outputs of the projections, which no backward pass reads; likewise their gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(query, key, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_query, grad_key), (cos, sin) = grad_outputs, ctx.saved_tensors
        return *_rotate(grad_query, grad_key, cos, sin, inverse=True), None, None


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Rotate (batch, heads, n, d), whose heads of a position are adjacent in memory; others are copied."""
    query, key = query.transpose(1, 2).contiguous(), key.transpose(1, 2).contiguous()
    rotate_(query, key, cos, sin, inverse)
    return query.transpose(1, 2), key.transpose(1, 2)


class SwiGLUFunction(torch.autograd.Function):
    """Its backward pass overwrites its inputs, so that it runs once."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        swiglu_backward_(grad_outputs[0].contiguous(), gate, up)
        return gate, up
