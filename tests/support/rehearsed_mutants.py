"""`python -m tests.support.rehearsed_mutants`: rehearse code with one mistake each; print what is found, as JSON."""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

from src.planning.gpus import find_gpu
from src.rehearsal.guard import load_guard
from tests.support.rehearsals import GENERATE, TINY_REQUEST

finish = load_guard()
import torch  # noqa: E402

finish()

from transformers import DynamicCache  # noqa: E402

from src.model import attention, lm_head, sampling  # noqa: E402
from src.model.packing import PackedBatch  # noqa: E402
from src.rehearsal import run as run_module  # noqa: E402
from src.rehearsal.run import run  # noqa: E402
from src.stages import align  # noqa: E402
from tests.support.torch_releases import torch_of  # noqa: E402


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


@contextlib.contextmanager
def cpu_tensor_in_the_loss() -> Iterator[None]:
    right = align.preference_loss

    def wrong(*args, **kwargs):
        pairs = right(*args, **kwargs)
        return pairs._replace(loss=pairs.loss + torch.ones(len(pairs.loss)))

    with mock.patch.object(align, "preference_loss", wrong):
        yield


@contextlib.contextmanager
def forgotten_copy_to_the_device() -> Iterator[None]:
    with mock.patch.object(PackedBatch, "to", lambda batch, device: batch):
        yield


@contextlib.contextmanager
def dtype_that_autocast_does_not_cast() -> Iterator[None]:
    right = lm_head.Head.forward

    def wrong(head, x, targets=None):
        with torch.autocast("cuda", enabled=False):
            torch.mm(x.float(), head.weight.t())
        return right(head, x, targets)

    with mock.patch.object(lm_head.Head, "forward", wrong):
        yield


@contextlib.contextmanager
def float32_cache() -> Iterator[None]:
    with mock.patch.object(sampling, "bf16_cache", DynamicCache):
        yield


MUTANTS: dict[str, tuple] = {
    "none": (nothing, TINY_REQUEST),
    "cpu tensor": (cpu_tensor_in_the_loss, TINY_REQUEST),
    "forgotten copy": (forgotten_copy_to_the_device, TINY_REQUEST),
    "dtype": (dtype_that_autocast_does_not_cast, TINY_REQUEST),
    "no cache mutant": (nothing, replace(GENERATE, fused_kernels="false")),
    "float32 cache": (float32_cache, replace(GENERATE, fused_kernels="false")),
}


def exchanges() -> list[list[float]]:
    """Return all and exposed seconds of exchange, and of the step: with links as they are and 20,000 times slower."""
    rows = []
    for factor in (1.0, 20_000.0):
        gpu = find_gpu(TINY_REQUEST.gpu)
        slow = replace(gpu, interconnect=gpu.interconnect / factor)
        with mock.patch.object(run_module, "find_gpu", lambda _, slow=slow: slow):
            result = run_module.run(replace(TINY_REQUEST, ranks=2))
        rows.append([result.work["communication"].seconds, result.exposed_exchange_seconds, result.seconds])
    return rows


def main() -> None:
    errors: dict[str, object] = {"exchanges": exchanges()}
    for name, (mutant, request) in MUTANTS.items():
        with mutant():
            errors[name] = run(request).error
    for release in ("2.10", "2.11", "2.12", "2.13"):
        with torch_of(release):
            errors[f"torch {release}"] = run(TINY_REQUEST).error
    # The mistake of an earlier version: an argument that torch 2.11 does not have.
    has_enable_gqa = SimpleNamespace(signature=lambda _: inspect.signature(lambda enable_gqa: None))
    with mock.patch.object(attention, "inspect", has_enable_gqa), torch_of("2.11"):
        errors["enable_gqa"] = run(TINY_REQUEST).error
    json.dump(errors, sys.stdout)


if __name__ == "__main__":
    main()
