"""The mode under which CUDA tensors are fake and everything on the host is real.

A tensor on `cuda` has shape, dtype and device and no values; what is copied from it to the host is zeros. Tensors of
the host keep their values, so lengths, permutations and layouts are those of a real run.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from src.planning.gpus import Gpu
from src.rehearsal.memory import MemoryMeter
from src.rehearsal.work import PRODUCTS, WorkMeter, causal_pairs

_DEVICE = torch.ops.prim.device.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_PIN = (torch.ops.aten._pin_memory.default,)
_IS_PINNED = (torch.ops.aten.is_pinned.default,)
MAX_REAL = 2**22  # elements; larger tensors, weights, have no values on the host either
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)
_FAKE = torch._C._TorchDispatchModeKey.FAKE
_LIBRARIES = ("torch_attn", "alignment_sweep", "flash_attn")  # whose kernels have a shape function in their place
_COPIES = ("_to_copy", "copy_", "clone")


class FakeCudaMode(TorchDispatchMode):
    """Runs operations on fake CUDA tensors, and meters their memory and work."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu = gpu
        self.memory, self.work = MemoryMeter(), WorkMeter(gpu)
        self.phase = "load"
        self.failed: str | None = None  # the operation that raised
        self.substituted: set[str] = set()  # kernels in whose place something stood
        self.finished = False  # what comes after the last step is computed and not metered
        self.fake_mode = FakeTensorMode()
        # Values of small integer tensors that came from the host (lengths of segments), by storage.
        self._values: dict[int, tuple[Any, Tensor]] = {}

    @contextmanager
    def in_phase(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if not all(t in _PLAIN for t in types):
            return NotImplemented  # a DTensor does the same operation on its local part, which comes back here
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(_FAKE) is not None:
            return func(*args, **kwargs)  # torch asks itself for a shape (of a DTensor), with fake tensors of its own
        if func in _PIN:
            return args[0]
        if func in _IS_PINNED:
            return True
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not any(isinstance(x, FakeTensor) for x in inputs) and not _is_cuda(kwargs.get("device")):
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if func is _ITEM or func is _EQUAL:
            self.work.syncs[f"{self.phase}: {name}"] += 1
            return True if func is _EQUAL else torch.zeros((), dtype=args[0].dtype).item()
        # With out_dtype, what a product is added to has the dtype of the result.
        self._check_dtypes(name, inputs[1:3] if name == "addmm" and "dtype" in func._overloadname else inputs)
        try:
            output = self._run(func, types, args, kwargs)
        except Exception:
            self.failed = self.failed or f"{name} in {self.phase}"
            raise
        return self._record(func, name, args, kwargs, inputs, output)

    def fake_on_host(self, tensor: Tensor) -> Tensor:
        """Return a tensor of this shape and dtype on the host that has no values and takes no memory."""
        with self.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        def fake(value: Any) -> Any:
            is_real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            return self.fake_on_host(value) if is_real else value

        if func is torch.ops.aten.addmm.dtype_out:
            return kwargs["out"]  # torch 2.11 takes the dtype for another argument in its shape function
        return self.fake_mode.dispatch(func, types, *tree_map(fake, (args, kwargs)))

    def _check_dtypes(self, name: str, inputs: list[Tensor]) -> None:
        """Raise RuntimeError as cuBLAS and FlashAttention do; the shape functions of torch look at shapes alone."""
        if name not in PRODUCTS and "varlen_attn" not in name:
            return
        dtypes = {x.dtype for x in inputs if x.is_floating_point() and (x.dim() > 1 or name == "addmm")}
        if "varlen_attn" in name:
            dtypes = {x.dtype for x in inputs[: 4 if "backward" in name else 3]}
            if dtypes <= {torch.bfloat16, torch.float16} and len(dtypes) == 1:
                return
        elif len(dtypes) <= 1:
            return
        self.failed = f"{name} in {self.phase}"
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise RuntimeError(f"expected operands of one dtype{' of 16 bits' if 'varlen' in name else ''}, got {names}")

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[Tensor], output: Any) -> Any:
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if self.finished:
            to_host = outputs and outputs[0].device.type == "cpu" and any(x.device.type == "cuda" for x in inputs)
            return self._on_host(args[0] if name == "copy_" else outputs[0], name) if to_host else output
        for tensor in outputs:
            if tensor.device.type == "cuda":
                self.memory.track(tensor, self.phase, name)
        if all(x.device.type != "cuda" for x in (*inputs, *outputs)):
            return output
        if name in _COPIES:
            if any(x.device.type == "cpu" and x.dim() for x in (*inputs, *outputs)):
                to_device = outputs[0].device.type == "cuda"
                self.work.host_copies[f"{self.phase}: {'to the device' if to_device else 'to the host'}"] += 1
                if to_device:
                    self._remember(outputs[0], inputs[-1])
                    return output
                return self._on_host(args[0] if name == "copy_" else outputs[0], name)
            self._remember(outputs[0], self._value(inputs[-1]))
        pairs = self._pairs(name, args) if "varlen" in name or "flash_attn" in name else None
        kernel = self.work.kernel(func, name, self.phase, args, kwargs, inputs, outputs, pairs)
        if func.namespace in _LIBRARIES:
            self.substituted.add(func._schema.name)
        if kernel is not None:
            self.work.add(kernel, self.phase)
            if kernel.workspace:
                self.memory.needs(kernel.workspace, self.phase)
        return output

    def _on_host(self, tensor: Tensor, name: str) -> Tensor:
        """Return what a copy to the host gives: the tensor written to, or a new one of zeros."""
        if name == "copy_" or tensor.numel() > MAX_REAL:
            return tensor
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    # --- values of small integer tensors, which kernels of variable length are given on the device ---
    def _remember(self, tensor: Tensor, value: Tensor | None) -> None:
        if value is None or tensor.is_floating_point() or value.numel() > 2**24 or isinstance(value, FakeTensor):
            return
        storage = tensor.untyped_storage()
        flat = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype)
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(value)
        key = storage._cdata
        self._values[key] = (weakref.ref(storage, partial(self._forget, key)), flat)

    def _forget(self, key: int, _: Any) -> None:
        self._values.pop(key, None)

    def _value(self, tensor: Tensor) -> Tensor | None:
        if not isinstance(tensor, FakeTensor):
            return tensor
        known = self._values.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        flat = known[1].view(tensor.dtype) if known[1].dtype != tensor.dtype else known[1]
        return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _pairs(self, name: str, args: Any) -> float | None:
        bounds = [self._value(x) for x in args if isinstance(x, Tensor) and x.dtype == torch.int32 and x.dim() == 1]
        if len(bounds) < 2 or bounds[0] is None or bounds[1] is None:
            return None
        windows = [x for x in args if isinstance(x, (list, tuple)) and len(x) == 2 and all(type(n) is int for n in x)]
        left = windows[0][0] if windows else -1  # (left, right), -1 for no end
        return causal_pairs(bounds[0], bounds[1], math.inf if left < 0 else left + 1)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"
