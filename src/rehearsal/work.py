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
from src.rehearsal.streams import Streams

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "dot", "mv", "addmv", "_grouped_mm"}
OPTIMIZER = {"_fused_adamw_"}
# Kernels that touch a few rows of a large tensor: of its bytes they move as many as of the rows.
_ROWS = {"embedding", "index_select", "gather", "index"}
_ROWS_WRITTEN = {"index_add", "index_add_", "index_put", "index_put_", "scatter_add_", "scatter_"}
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
        self.streams = Streams()
        self.reset()

    def reset(self) -> None:
        self.by_kind: dict[str, list[float]] = {}
        self.flops_by_phase: dict[str, float] = defaultdict(float)
        self._waited_before = self.streams.default.waited
        self.host_copies: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def add(self, kernel: Kernel, phase: str) -> None:
        self.flops_by_phase[phase] += kernel.flops
        row = (1.0, kernel.flops, kernel.bytes, kernel.seconds)
        before = self.by_kind.get(kernel.kind, (0.0, 0.0, 0.0, 0.0))
        self.by_kind[kernel.kind] = [a + b for a, b in zip(before, row, strict=True)]
        (self.streams.exchange if kernel.kind == "communication" else self.streams.launch)(kernel.seconds)

    @property
    def exposed_exchange(self) -> float:
        """The seconds since the last reset in which the device exchanges with other ranks and computes nothing."""
        return self.streams.default.waited - self._waited_before

    def floor(self, rate: float, lora: bool) -> float:
        """Return the seconds that have to be. rate: FLOP/s of a large product.

        Of training the FLOPs, none of those that compute activations and logits again: the backward pass takes twice
        the forward pass; with adapters once, as frozen weights have no gradient. Of scoring and sampling the longer of
        the FLOPs and of reading what products and attention read: weights, and the cache.
        """
        if forward := self.flops_by_phase["forward"]:
            return (2.0 if lora else 3.0) * forward / rate
        needed = [self.by_kind.get(kind, (0.0, 0.0, 0.0)) for kind in ("products", "attention")]
        return max(sum(row[1] for row in needed) / rate, sum(row[2] for row in needed) / self.gpu.bandwidth)

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
        gpu, moved = self.gpu, bytes_moved(name, args, inputs, outputs)
        if (received := _received(name, inputs, outputs, self.ranks)) is not None:
            return Kernel("communication", 0.0, received, received / gpu.exchange_rate(self.ranks))
        if "attn" in name or "attention" in name:
            return self._attention(name, inputs, moved, pairs, _is_causal(func, args, kwargs))
        if name in PRODUCTS:
            flops = _flops(func, inputs, outputs)
            rate = gpu.fp32 if inputs[1].dtype == torch.float32 else gpu.bf16  # what addmm adds to may have more
            return Kernel("products", flops, moved, max(flops / rate, moved / gpu.bandwidth, gpu.least_kernel))
        kind = self._kind(name, phase, inputs, outputs)
        return Kernel(kind, 0.0, moved, max(moved / gpu.bandwidth, gpu.least_kernel))

    def _kind(self, name: str, phase: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
        if name in OPTIMIZER or phase == "optimizer":
            return "optimizer"
        written = outputs or inputs  # a list of tensors that are written to is not returned
        if name in ("_to_copy", "copy_", "_foreach_copy_") and inputs[-1].dtype != written[0].dtype:
            return "casts"
        same = len(inputs) == 2 and inputs[0].shape == inputs[1].shape and inputs[0].shape in self.parameter_shapes
        if phase == "backward" and name in ("add", "add_") and same:
            return "accumulation"
        return "elementwise"

    def _attention(self, name: str, inputs: list[Tensor], moved: float, pairs: float | None, is_causal: bool) -> Kernel:
        backward = "backward" in name
        q, k = inputs[1:3] if backward else inputs[:2]
        if q.dim() == 4:  # (batch, heads, n, d): scaled_dot_product_attention
            batch, heads, rows, width = q.shape
            pairs = batch * rows * k.shape[2] * (0.5 if is_causal and rows > 1 else 1.0)
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


def causal_pairs(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: float = math.inf) -> float:
    """Return how many (query, key) pairs see each other, causal and aligned to the bottom right in every segment.

    window: keys that a query sees at most, its own included.
    """
    q, k = (bounds.double().diff() for bounds in (cu_seqlens_q, cu_seqlens_k))

    def of_first(n: Tensor) -> Tensor:
        """Return the pairs of the first n positions of a sequence."""
        growing = n.clamp(max=window)
        beyond = (n - growing) * window if window < math.inf else 0.0
        return growing * (growing + 1) / 2 + beyond

    return float((of_first(k) - of_first(k - q)).sum())


def _is_causal(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return the argument is_causal of an operation, at the place where its schema has it."""
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    return bool(given.get("is_causal", False))


def _flops(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    packet = func.overloadpacket
    if packet not in flop_registry:
        return 0.0
    return float(flop_registry[packet](*inputs[:3], out_val=outputs[0]))


def bytes_moved(name: str, args: Sequence[Any], inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Return the bytes that a kernel reads and writes, where each element of a tensor is read or written once."""
    if name == "_fused_adamw_":  # reads weight, gradient and two moments; writes all but the gradient
        parameters, gradients, first, second = (sum(map(_size, tensors)) for tensors in args[:4])
        return 2 * (parameters + first + second) + gradients
    if name in _ROWS:
        return 2.0 * sum(map(_size, outputs))
    if name == "embedding_dense_backward":  # all of it is set to zero, and the rows of tokens are added
        return _size(outputs[0]) + 3.0 * _size(inputs[0])
    if name in _ROWS_WRITTEN:  # the rows are the last argument; in a new tensor, the others are copied
        return 3.0 * _size(inputs[-1]) + (0.0 if name.endswith("_") else 2.0 * _size(outputs[0]))
    if name in ("copy_", "zero_", "fill_"):  # what is there before is not read
        return sum(map(_size, inputs[1:])) + sum(map(_size, outputs))
    return float(sum(map(_size, inputs)) + sum(map(_size, outputs)))


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
