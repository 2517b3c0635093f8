"""torch.cuda as it answers where the card of conf/gpus.yaml is there and free."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor

from src.planning.gpus import Gpu
from src.rehearsal.device import FakeCudaMode
from src.rehearsal.streams import Stream

_TENSOR_DATA: Any = torch._C.TensorBase.data


def _set_data(tensor: Any, value: Any) -> None:
    """Let `tensor.data = value` move a tensor to a fake device: torch changes what it holds, not what it says it is."""
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    _TENSOR_DATA.__set__(tensor, value)
    if isinstance(value, FakeTensor):
        tensor.__class__ = FakeTensor
        for name in ("fake_device", "fake_mode", "constant", "real_tensor", "nonzero_memo", "item_memo"):
            if hasattr(value, name):
                setattr(tensor, name, getattr(value, name))
        if is_parameter:
            tensor._is_param = True


_DATA = property(_TENSOR_DATA.__get__, _set_data)


def _answers(gpu: Gpu, mode: FakeCudaMode) -> dict[str, Any]:
    """Return what stands in for the functions of torch.cuda, by name."""
    memory, streams = mode.memory, mode.work.streams
    properties = SimpleNamespace(
        name=gpu.name, total_memory=gpu.memory, major=gpu.capability[0], minor=gpu.capability[1],
        multi_processor_count=gpu.multiprocessors, warp_size=32, L2_cache_size=50 * 2**20,
        regs_per_multiprocessor=65536, shared_memory_per_block_optin=227 * 1024,
    )  # fmt: skip
    return {
        "_lazy_init": lambda *_: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "get_device_name": lambda *_: gpu.name,
        "get_device_capability": lambda *_: gpu.capability,
        "get_device_properties": lambda *_: properties,
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (gpu.usable - memory.reserved, gpu.memory),
        "memory_allocated": lambda *_: memory.live,
        "max_memory_allocated": lambda *_: memory.peak,
        "memory_reserved": lambda *_: memory.reserved,
        "max_memory_reserved": lambda *_: memory.reserved,
        "reset_peak_memory_stats": lambda *_: memory.start_peak(),
        "empty_cache": memory.empty_cache,
        "synchronize": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
        "Stream": Stream,
        "Event": streams.event,
        "current_stream": lambda *_: streams.current,
        "default_stream": lambda *_: streams.default,
        "stream": streams.use,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "amp.common.amp_definitely_not_available": lambda: False,
    }


def _resize_and_note(mode: FakeCudaMode) -> Callable[[torch.UntypedStorage, int], Any]:
    """Return `UntypedStorage.resize_`, by which FSDP2 frees and allocates gathered weights, telling the meter."""
    resize = torch.UntypedStorage.resize_

    def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
        resized = resize(storage, size)
        mode.memory.resized(storage, mode.phase)
        return resized

    return resize_and_note


@contextlib.contextmanager
def fake_cuda(gpu: Gpu) -> Iterator[FakeCudaMode]:
    """Run a block with `cuda` tensors that have no values, on a card that is not there; yield the mode that meters it.

    Needs `guard.load_guard` before torch was imported. Autograd stays in the calling thread.
    """
    mode = FakeCudaMode(gpu)
    with contextlib.ExitStack() as stack:
        for name, answer in _answers(gpu, mode).items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", answer))
        stack.enter_context(mock.patch("torch.Tensor.pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", _resize_and_note(mode)))
        # A fake tensor otherwise starts the card of its device first.
        stack.enter_context(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.Tensor, "data", _DATA, create=True))
        # Module.to swaps fake parameters, which it refuses for those that something refers to weakly.
        stack.enter_context(mock.patch("torch.utils.weakref", SimpleNamespace(getweakrefs=lambda _: [])))
        # torch.tensor(..., device="cuda") otherwise copies to the device where no mode sees it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(mode)
        yield mode
