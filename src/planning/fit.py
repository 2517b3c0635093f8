"""What one process holds of a stage, by arithmetic: weights, gradients, optimizer state, activations, cache. No torch.

Quick enough to ask for every point. A rehearsal (`src.rehearsal`) runs the stage's own code instead, and its peak is
the one to trust; tests hold the two together.
"""

from __future__ import annotations

from dataclasses import dataclass

from src.config.schema import Lora
from src.planning.model_shape import ModelShape
from src.planning.resources import fsdp_keeps_whole

TARGET_FRACTION = 0.9  # of a card that a peak may take: the rest is for fragmentation, NCCL and other processes
MAX_BUDGET = 16_384  # tokens of a micro-batch: enough for products at their full rate, larger ones are no faster
BUDGET_MULTIPLE = 256  # budgets are rounded down to it, so that slightly different free memory gives the same budget

_FLOAT32, _BF16 = 4, 2
_ADAM = 2 * _FLOAT32  # two moments
_HEAD_FRACTION = 80  # logits of the head take this part of a card: 1 GiB, 2,048 rows of Llama 3, on 80 GB
_HEAD_MULTIPLE = 256  # of rows on a card
_HEAD_ROWS = 1024  # without a card
_SHARDED_WEIGHTS = ("fsdp", "zero3", "zero3_offload")


@dataclass(frozen=True)
class Held:
    """Bytes that one process holds of a stage.

    weights: float32 ones and their bf16 copy, or the process's shards of them; of scoring and sampling the model in the
    precision of the computation. gathered: weights that sharding assembles for the computation, and their gradients
    until they are exchanged. working: of the head for a chunk. activations: of one token in training, without and with
    activation checkpointing.
    """

    weights: int
    gradients: int = 0
    optimizer_state: int = 0
    gathered: int = 0
    kv_cache: int = 0
    working: int = 0
    activations_per_token: int = 0
    checkpointed_per_token: int = 0

    @property
    def constant(self) -> int:
        """What is held whatever the size of a micro-batch."""
        return self.weights + self.gradients + self.optimizer_state + self.gathered + self.kv_cache + self.working


def held_by_process(
    shape: ModelShape,
    stage: str,
    *,
    strategy: str = "none",
    precision: str = "fp32",
    ranks: int = 1,
    lora: Lora | None = None,
    cached_tokens: int = 0,
    device_bytes: int = 0,
) -> Held:
    """Return what each of `ranks` processes holds of a stage of this kind: sft or align, or one that trains nothing.

    cached_tokens: of all prompts and responses that are sampled together. device_bytes: the memory of a card, by which
    FSDP2 decides whether gathered weights stay, and the head how many logits it computes at once; 0: not known.
    """
    computed = _BF16 if precision == "bf16" else _FLOAT32
    logits = head_rows(shape.vocab_size, device_bytes) * shape.vocab_size
    working = 2 * _FLOAT32 * logits  # and their log-softmax
    if stage not in ("sft", "align"):  # one process holds the whole model, and trains nothing
        cache = cached_tokens * shape.kv_bytes_per_token * computed // _BF16
        return Held(computed * shape.num_parameters, kv_cache=cache, working=working)
    trained = shape.num_parameters if lora is None else num_adapter_parameters(shape, lora)
    weights, gradients, state = training_bytes(shape.num_parameters, trained, strategy, computed, ranks)
    gathered = 0
    keeps = fsdp_keeps_whole(shape.num_parameters, ranks, device_bytes)
    if strategy == "fsdp" and ranks == 1:
        gathered = computed * shape.num_parameters if computed < _FLOAT32 else 0  # copies; FSDP2 takes no part
    elif strategy == "fsdp" and keeps.weights:
        gathered = computed * shape.num_parameters + (_FLOAT32 * trained if keeps.gradients else 0)
    elif strategy in _SHARDED_WEIGHTS:
        # Two layers, as the next one is fetched meanwhile, and the embedding and the head, which stay.
        gathered = computed * (2 * shape.layer + _outside_layers(shape))
    if lora is None:  # the gradient of a chunk's logits, and the head's of the chunk and of those before it
        working = max(working, computed * logits + 2 * _FLOAT32 * shape.vocab_size * shape.hidden_size)
    layer = _activations_of_layer(shape, computed)
    checkpoint = _FLOAT32 * shape.hidden_size
    return Held(
        weights=weights,
        gradients=gradients,
        optimizer_state=state,
        gathered=gathered,
        working=working,
        activations_per_token=shape.num_layers * layer,
        checkpointed_per_token=shape.num_layers * checkpoint + layer,
    )


def head_rows(vocab_size: int, device_bytes: int) -> int:
    """Return the rows whose logits exist at once (src/model/lm_head.py): the same on every card of a kind.

    device_bytes: of the card's memory; 0 on other devices.
    """
    if not device_bytes:
        return _HEAD_ROWS
    rows = device_bytes // (_HEAD_FRACTION * _FLOAT32 * vocab_size)
    return max(_HEAD_MULTIPLE, rows // _HEAD_MULTIPLE * _HEAD_MULTIPLE)


def training_bytes(total: int, trained: int, strategy: str, computed: int, ranks: int) -> tuple[int, int, int]:
    """Return bytes of weights, gradients and optimizer state on the device of one process.

    total, trained: parameters. computed: bytes of a weight in the computation. FSDP2 and ZeRO-3 shard all of them,
    ZeRO-2 all but the weights, ZeRO-1 the optimizer state; ZeRO has a float32 copy of the trained weights beside those
    it computes with, which it shards with the optimizer state. With offload, weights and optimizer state are in the
    memory of the host. DeepSpeed's buffers for communication come on top.
    """
    whole = _FLOAT32 * total, _FLOAT32 * trained, _ADAM * trained
    if strategy == "fsdp":
        weights, gradients, state = (size // ranks for size in whole)
        return weights, gradients, state
    if not strategy.startswith("zero"):
        return whole
    stage = int(strategy[4])
    weights = computed * total // (ranks if stage == 3 else 1)
    gradients = _FLOAT32 * trained // (ranks if stage >= 2 else 1)
    master, state = _FLOAT32 * trained // ranks, _ADAM * trained // ranks
    return (0, gradients, 0) if strategy.endswith("_offload") else (weights + master, gradients, state)


def num_adapter_parameters(shape: ModelShape, lora: Lora) -> int:
    """Return the parameters of adapters of the layers' products, all of them or those named."""
    width, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = {"q_proj": width + queries, "k_proj": width + keys, "v_proj": width + keys, "o_proj": queries + width}
    sizes |= {"gate_proj": width + inner, "up_proj": width + inner, "down_proj": inner + width}
    named = [sizes.get(name, width + inner) for name in lora.targets] if lora.targets else sizes.values()
    return (lora.rank or 0) * shape.num_layers * sum(named)


def _outside_layers(shape: ModelShape) -> int:
    return max(0, shape.num_parameters - shape.num_layers * shape.layer)


def _activations_of_layer(shape: ModelShape, computed: int) -> int:
    """Return the bytes that one decoder layer keeps of a token for the backward pass.

    The float32 residual stream before each norm; in the computation's precision the outputs of the two norms, queries,
    keys and values, the attention's output, and gate, up and the product of both: what fused kernels keep. Without them
    it is half as much again.
    """
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    residuals = 2 * _FLOAT32 * shape.hidden_size
    attention = 2 * shape.hidden_size + 2 * queries + 2 * keys
    return residuals + computed * (attention + 3 * shape.intermediate_size) + _FLOAT32 * shape.num_heads
