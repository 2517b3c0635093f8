"""What a rank of ZeRO or DDP holds, by arithmetic: neither runs on fake tensors.

Their steps are rehearsed with an engine that computes the same, and the bytes that last are exchanged for these.
"""

from __future__ import annotations

# strategy -> (the one whose step is rehearsed, whether with all ranks)
STAND_INS = {
    "ddp": ("none", False),
    "zero1": ("fsdp", False),
    "zero2": ("fsdp", False),
    "zero3": ("fsdp", True),
    "zero3_offload": ("fsdp", True),
}


def held_by_rank(strategy: str, precision: str, parameters: int, trained: int, ranks: int) -> dict[str, int]:
    """Return the bytes on the device of a rank: weights, gradients and optimizer_state.

    Everything is float32 but, with precision=bf16, the weights that DeepSpeed computes with; it keeps float32 master
    weights beside them. ZeRO-1 divides what Adam needs by the ranks, ZeRO-2 also the gradients, ZeRO-3 also the
    weights; with offload they are in the memory of the host. DeepSpeed's buffers for communication come on top.
    """
    stage = int(strategy[4]) if strategy.startswith("zero") else 0
    computed = (2 if precision == "bf16" else 4) * parameters
    master = 4 * trained if stage else 0
    gradients, moments = 4 * trained, 8 * trained
    if strategy.endswith("_offload"):
        return {"weights": 0, "gradients": gradients // ranks, "optimizer_state": 0}
    weights = computed // (ranks if stage == 3 else 1) + master // ranks
    return {
        "weights": weights,
        "gradients": gradients // (ranks if stage >= 2 else 1),
        "optimizer_state": moments // (ranks if stage else 1),
    }
