"""Ranks of one run in forked processes, connected by gloo: torch is imported once, so that eight start in a second."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch

from src.distributed import destroy_distributed, init_distributed
from tests.support.ports import free_port


def on_ranks(num_ranks: int, strategy: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(*arguments)` returns on each of `num_ranks` ranks. Raises RuntimeError when one fails."""
    context = multiprocessing.get_context("fork")
    results, port = context.SimpleQueue(), free_port()
    processes = [
        context.Process(target=_rank, args=(results, rank, num_ranks, port, strategy, function, arguments), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    try:
        received = [pickle.loads(results.get()) for _ in processes]
    finally:
        for process in processes:
            process.join(30)
            process.kill()
    if errors := [error for _, _, error in received if error]:
        raise RuntimeError("\n".join(errors))
    return [result for _, result, _ in sorted(received, key=lambda entry: entry[0])]


def _rank(results: Any, rank: int, num_ranks: int, port: int, strategy: str, function: Any, arguments: Any) -> None:
    result, error = None, None
    try:
        torch.set_num_threads(1)
        numbers = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
        os.environ.update({name: str(number) for name, number in numbers.items()})
        # accelerate sets threads itself without the last one: a second thread waits for ever in a forked process.
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        init_distributed(strategy)
        result = function(*arguments)
        destroy_distributed()
    except BaseException:
        error = f"rank {rank}: {traceback.format_exc()}"
    results.put(pickle.dumps((rank, result, error)))  # by value: tensors would be in memory of this process
    os._exit(0)  # without the exit handlers of the process that was forked
