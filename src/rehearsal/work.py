"""What kernels on fake CUDA tensors would do: FLOPs, bytes, seconds, by class of kernel."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from src.planning.gpus import Gpu
from src.rehearsal.request import Work

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv", "_grouped_mm"}
OPTIMIZER = {"_fused_adamw_"}
# Kernels that touch a few rows of a large tensor: of its bytes they move as many as of the rows.
_ROWS = {"embedding", "index_select", "gather", "index"}
_ROWS_WRITTEN = {
    "index_add",
    "index_add_",
    "index_put",
    "index_put_",
    "scatter_add_",
    "scatter_",
    "embedding_dense_backward",
}
_NO_KERNEL = {
    "detach", "alias", "lift_fresh", "empty", "empty_like", "new_empty", "new_empty_strided", "empty_strided",
    "record_stream", "_unsafe_view", "_reshape_alias", "set_", "resize_", "split_with_sizes", "wait_tensor",
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One kernel: its class, what it computes and moves, and bytes it allocates for itself."""

    kind: str  # products, attention, casts, elementwise, accumulation, optimizer, communication, copies
    flops: float
    bytes: float
    seconds: float
    workspace: int = 0


class WorkMeter:
    """Adds up kernels by class."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.parameter_shapes: set[torch.Size] = set()  # sums of gradients are recognized by their shape
        self.ranks = 1
        self.reset()

    def reset(self) -> None:
        self.by_kind: dict[str, list[float]] = {}
        self.flops_by_phase: dict[str, float] = defaultdict(float)
        self.by_operation: dict[str, list[float]] = {}
        self.host_copies: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def add(self, kernel: Kernel, operation: str, phase: str) -> None:
        self.flops_by_phase[phase] += kernel.flops
        row = (1.0, kernel.flops, kernel.bytes, kernel.seconds)
        for table, key in ((self.by_kind, kernel.kind), (self.by_operation, operation)):
            table[key] = [a + b for a, b in zip(table.get(key, (0.0, 0.0, 0.0, 0.0)), row, strict=True)]

    def useful_flops(self, lora: bool) -> float:
        """Return the FLOPs that have to be: none of those that compute activations and logits again.

        The backward pass takes twice the forward pass; with adapters once, as frozen weights have no gradient.
        """
        forward = self.flops_by_phase["forward"]
        return (2.0 if lora else 3.0) * forward if forward else sum(self.flops_by_phase.values())

    @property
    def work(self) -> dict[str, Work]:
        return {kind: Work(*row) for kind, row in sorted(self.by_kind.items(), key=lambda item: -item[1][3])}

    def kernel(
        self, func: Any, name: str, phase: str, args: Sequence[Any], kwargs: dict[str, Any],
        inputs: list[Tensor], outputs: list[Tensor], pairs: float | None,
    ) -> Kernel | None:  # fmt: skip
        """Return what an operation takes; None when it launches no kernel. pairs: of queries and keys in attention."""
        if name in _NO_KERNEL or func.is_view or (not outputs and not func._schema.is_mutable):
            return None
        gpu, moved = self.gpu, _bytes_moved(name, args, inputs, outputs)
        if (received := _received(name, inputs, outputs, self.ranks)) is not None:
            return Kernel("communication", 0.0, received, received / gpu.interconnect)
        if "attn" in name or "attention" in name:
            return self._attention(name, inputs, outputs, moved, pairs, args, kwargs)
        if name in PRODUCTS:
            flops = _flops(func, inputs, outputs)
            rate = gpu.fp32 if inputs[1].dtype == torch.float32 else gpu.bf16  # what addmm adds to may have more
            return Kernel("products", flops, moved, max(flops / rate, moved / gpu.bandwidth, gpu.least_kernel))
        kind = self._kind(name, phase, inputs, outputs)
        return Kernel(kind, 0.0, moved, max(moved / gpu.bandwidth, gpu.least_kernel))

    def _kind(self, name: str, phase: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
        if name in OPTIMIZER or phase == "optimizer":
            return "optimizer"
        if name in ("_to_copy", "copy_") and inputs[-1].dtype != outputs[0].dtype:
            return "casts"
        same = len(inputs) == 2 and inputs[0].shape == inputs[1].shape and inputs[0].shape in self.parameter_shapes
        if phase == "backward" and name in ("add", "add_") and same:
            return "accumulation"
        return "elementwise"

    def _attention(
        self, name: str, inputs: list[Tensor], outputs: list[Tensor], moved: float, pairs: float | None,
        args: Sequence[Any], kwargs: dict[str, Any],
    ) -> Kernel:  # fmt: skip
        backward = "backward" in name
        q, k = inputs[1:3] if backward else inputs[:2]
        if q.dim() == 4:  # (batch, heads, n, d): scaled_dot_product_attention
            batch, heads, rows, width = q.shape
            causal = kwargs.get("is_causal", False) or any(x is True for x in args)
            pairs = batch * rows * k.shape[2] * (0.5 if causal and rows > 1 else 1.0)
        else:  # (tokens, heads, d): variable lengths
            heads, width = q.shape[1:]
            assert pairs is not None, "the lengths of the segments are on the host"
        flops = (10.0 if backward else 4.0) * heads * width * pairs
        # An efficient-attention kernel in float32 multiplies on the same units as other float32 products.
        ceiling = self.gpu.attention_backward if backward else self.gpu.attention_forward
        rate = ceiling if q.dtype != torch.float32 else min(ceiling, self.gpu.fp32)
        workspace = 0
        if backward:
            # FlashAttention 2 sums the queries' gradient in float32, and with fewer key-value heads it writes the
            # gradients of keys and values for every query head before it adds them up.
            k_heads = k.shape[1]
            per_query_head = 2 * k.element_size() * (k.numel() // k_heads) * heads if k_heads != heads else 0
            workspace = 4 * q.numel() + per_query_head
            moved += 2 * 4 * q.numel() + 2 * per_query_head
        seconds = max(flops / rate, moved / self.gpu.bandwidth, self.gpu.least_kernel)
        return Kernel("attention", flops, moved, seconds, workspace)


def causal_pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> float:
    """Return how many (query, key) pairs see each other, causal and aligned to the bottom right in every segment."""
    q, k = (bounds.double().diff() for bounds in (cu_seqlens_q, cu_seqlens_k))
    return float((q * k - q * (q - 1) / 2).sum())


def _flops(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    packet = func.overloadpacket
    if packet not in flop_registry:
        return 0.0
    return float(flop_registry[packet](*inputs[:3], out_val=outputs[0]))


def _bytes_moved(name: str, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Return the bytes that a kernel reads and writes, where each element of a tensor is read or written once."""
    if name == "_fused_adamw_":  # reads weight, gradient and two moments; writes all but the gradient
        parameters, gradients, first, second = (sum(map(_size, tensors)) for tensors in args[:4])
        return 2 * (parameters + first + second) + gradients
    if name in _ROWS:
        return 2.0 * sum(map(_size, outputs))
    if name in _ROWS_WRITTEN:
        return (
            3.0 * min(map(_size, inputs[1:] or inputs), default=0.0)
            if "embedding" not in name
            else _embedding(inputs, outputs)
        )
    if name in ("copy_", "zero_", "fill_"):  # what is there before is not read
        return sum(map(_size, inputs[1:])) + sum(map(_size, outputs))
    return float(sum(map(_size, inputs)) + sum(map(_size, outputs)))


def _embedding(inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Return the bytes of an embedding's gradient: all of it is set to zero, and the rows of tokens are added."""
    return _size(outputs[0]) + 3.0 * _size(inputs[0])


def _size(tensor: Tensor) -> float:
    """Return the bytes of a tensor's elements; what an expanded one repeats is in memory once."""
    if tensor.device.type != "cuda":
        return 0.0
    elements = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return float(elements * tensor.element_size())


_COLLECTIVES = {
    "_allgather_base_": "gather", "allgather_": "gather", "all_gather_into_tensor": "gather",
    "all_gather_into_tensor_coalesced": "gather", "allgather_into_tensor_coalesced_": "gather",
    "_reduce_scatter_base_": "scatter", "reduce_scatter_tensor": "scatter", "reduce_scatter_": "scatter",
    "allreduce_": "reduce", "all_reduce": "reduce", "broadcast_": "broadcast", "barrier": "barrier",
}  # fmt: skip


def _received(name: str, inputs: list[Tensor], outputs: list[Tensor], ranks: int) -> float | None:
    """Return the bytes a rank receives in a collective; None for other operations. Rings, as NCCL's."""
    kind = _COLLECTIVES.get(name)
    if kind is None:
        return None
    share, sizes = (ranks - 1) / ranks, [*map(_size, inputs), *map(_size, outputs), 0.0]
    return {"gather": share, "scatter": share, "reduce": 2 * share, "broadcast": 1.0, "barrier": 0.0}[kind] * max(sizes)
