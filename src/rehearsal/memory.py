"""Bytes that fake CUDA tensors hold: live, by phase, at the peak, and by what allocated them."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from functools import partial
from typing import Any

from torch import Tensor, UntypedStorage

BLOCK = 512  # bytes: torch's allocator rounds every allocation up to a multiple of it


class MemoryMeter:
    """Follows the storages of tensors from their first use until nothing refers to them."""

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self.reserved = 0  # the highest live so far, which torch's allocator keeps until it is told to empty its cache
        self.peak_by_phase: dict[str, int] = defaultdict(int)
        self.held_at_peak: dict[str, int] = {}
        self._sizes: dict[int, int] = {}
        self._labels: dict[int, str] = {}
        self._references: dict[int, Any] = {}
        self._noted = 0

    def track(self, tensor: Tensor, phase: str, operation: str) -> None:
        """Count the tensor's storage, unless it is counted already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = _allocated(storage)
        # The storage is referred to, not the tensor: `swap_tensors` refuses tensors that have weak references.
        self._references[key] = weakref.ref(storage, partial(self._free, key))
        self._sizes[key], self._labels[key] = size, f"{phase}: {operation}"
        self.live += size
        self._note(self.live, phase)

    def resized(self, storage: UntypedStorage, phase: str) -> None:
        """Count a storage, if it is one that is counted, by its present size."""
        if (key := storage._cdata) in self._sizes:
            size = _allocated(storage)
            self.live += size - self._sizes[key]
            self._sizes[key] = size
            self._note(self.live, phase)

    def _free(self, key: int, _: Any) -> None:
        if self._references.pop(key, None) is not None:
            self.live -= self._sizes.pop(key)
            del self._labels[key]

    def needs(self, more: int, phase: str) -> None:
        """Count bytes that a kernel allocates for itself and frees when it ends."""
        self._note(self.live + more, phase)

    def _note(self, size: int, phase: str) -> None:
        self.reserved = max(self.reserved, size)
        self.peak_by_phase[phase] = max(self.peak_by_phase[phase], size)
        if size > self.peak:
            self.peak = size
            if size > 1.005 * self._noted:  # the summary takes longer than a kernel
                self._noted, self.held_at_peak = size, self.holders()

    def holders(self, top: int = 12) -> dict[str, int]:
        """Return phase and operation -> bytes of the live storages that it allocated, largest first."""
        sizes: Counter[str] = Counter()
        for key, size in self._sizes.items():
            sizes[self._labels[key]] += size
        return dict(sizes.most_common(top))

    def relabel(self, tensors: list[Tensor], label: str) -> None:
        """Name what the storages of these tensors are for, instead of what allocated them."""
        for tensor in tensors:
            if (key := tensor.untyped_storage()._cdata) in self._labels:
                self._labels[key] = label

    def start_peak(self) -> None:
        """Forget the peaks before this moment."""
        self.peak = self._noted = self.live
        self.held_at_peak = self.holders()
        self.peak_by_phase.clear()

    def empty_cache(self) -> None:
        self.reserved = self.live


def _allocated(storage: UntypedStorage) -> int:
    return -(-int(storage.nbytes()) // BLOCK) * BLOCK
