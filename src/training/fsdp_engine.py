"""Training with FSDP2: each of several ranks holds a shard of weights, gradients and optimizer state.

The shards are float32. With precision=bf16 a forward pass gathers weights that have been cast to bf16, and gradients
are summed in float32 over micro-batches and ranks. A decoder layer is gathered as a whole; embeddings, final norm and
head are gathered together at the start of the forward pass, as they may share weights.

Where memory allows (`fsdp_keeps_whole`), the gathered weights stay from the first micro-batch of a step to its last;
otherwise each layer's are freed after its forward pass and gathered again for its backward pass.
Where it allows that too, gradients are exchanged once, in the last micro-batch, otherwise in every one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from src.config.schema import Lora, Training
from src.distributed import get_distributed, init_distributed
from src.model.logprobs import NumericsConfig, SequenceLogps
from src.planning.resources import Resources, fsdp_keeps_whole
from src.training.engine import ModelLoader, decoder_layers, empty_model
from src.training.sharded_engine import ShardedEngine, whole


class FsdpEngine(ShardedEngine):
    """engine.strategy = fsdp on several ranks; one process has `src.training.one_process_engine`."""

    def __init__(self, resources: Resources, trainer: Training, lora: Lora | None, seed: int) -> None:
        super().__init__(resources, trainer, lora, seed)
        init_distributed(resources.strategy)

    @property
    def shards(self) -> int:
        return get_distributed().size

    def prepare(self, load: ModelLoader, numerics: NumericsConfig) -> Any:
        model = self._load_on_rank_0(load)
        policy = SequenceLogps(self.configure_model(model), numerics).train()
        # Detached: of a parameter itself the device would hold the whole tensor for as long as it is referred to.
        weights: dict[str, Any] = {name: p.detach() for name, p in policy.named_parameters()}
        num_parameters = sum(p.numel() for p in weights.values())
        self.keeps = fsdp_keeps_whole(num_parameters, self.shards, self._device_bytes())
        self.policy: Any = self._shard(policy, numerics)
        self._distribute(weights)
        self.optimizer = self._optimizer_of(self.policy)
        return self.policy

    def _load_on_rank_0(self, load: ModelLoader) -> Any:
        """Return the model, on ranks other than 0 without its weights. Raises what loading raises, on every rank."""
        ranks = get_distributed()
        model: Any = None
        message: Any = None
        if ranks.is_main_process:
            try:
                model = load()
                message = type(model), model.config
            except Exception as error:
                message = error
        message = ranks.broadcast_object(message)
        if isinstance(message, Exception):
            raise message
        return model if ranks.is_main_process else empty_model(*message)

    def _shard(self, policy: SequenceLogps, numerics: NumericsConfig) -> Any:
        """Replace every parameter by this rank's shard of it; a rank without weights gets shards without memory."""
        mp_policy = MixedPrecisionPolicy()
        if numerics.precision == "bf16":
            mp_policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        mesh = self._mesh()
        for layer in decoder_layers(policy.model):
            fully_shard(layer, mesh=mesh, mp_policy=mp_policy, reshard_after_forward=not self.keeps.weights)
        fully_shard(policy, mesh=mesh, mp_policy=mp_policy, reshard_after_forward=False)
        for module in policy.modules():
            if isinstance(module, FSDPModule):
                # The ranks' losses are parts of one sum, so their gradients are added up, not averaged.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return policy

    def _mesh(self) -> DeviceMesh:
        return init_device_mesh(self.device.type, (self.shards,))

    def _distribute(self, weights: dict[str, Any]) -> None:
        """Send every rank its shards of rank 0's weights, a tensor at a time, and the buffers."""
        ranks = get_distributed()
        buffers = {name: buffer.to(self.device, copy=True) for name, buffer in self.policy.named_buffers()}
        if not ranks.is_main_process:
            self.policy.to_empty(device=self.device)
        for name, buffer in buffers.items():
            dist.broadcast(buffer, 0)
            self.policy.get_buffer(name).copy_(buffer)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.policy, weights if ranks.is_main_process else {}, options=options)

    def _device_bytes(self) -> int:
        """Return the memory of the device, of the smallest one of all ranks."""
        if self.device.type == "cuda":
            total = torch.cuda.mem_get_info(self.device)[1]
        else:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return get_distributed().all_reduce_min(total)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self.policy.set_is_last_backward(last)
        self.policy.set_reshard_after_backward(last or not self.keeps.weights)
        self.policy.set_requires_gradient_sync(last or not self.keeps.gradients)
        yield

    def gather_model(self) -> Any:
        weights = {}
        for name, parameter in self.policy.named_parameters():
            weight = whole(parameter.detach())
            if get_distributed().is_main_process:
                weights[name] = weight.cpu()
        model = type(self._model), self._model.config
        self.close()
        if not get_distributed().is_main_process:
            return None
        return self._published(self._rebuild(empty_model(*model), weights))
