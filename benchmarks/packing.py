"""Measure the CPU time of packing a step of 128 pairs: `python -m benchmarks.packing`."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.pairs import SHAPES, make_pairs
from benchmarks.performance import NAMES
from src.data.tokenization import RowCounts, TokenizedDataset
from src.model.packing import pack

PAIRS, REPEATS = 128, 30


def main() -> None:
    torch.set_num_threads(1)
    print("| 128 pairs | tokens | ms of CPU |\n|---|---:|---:|")
    for shape in SHAPES:
        examples = TokenizedDataset.collect(make_pairs(shape, PAIRS), RowCounts()).examples  # as a run reads them
        milliseconds = []
        for _ in range(REPEATS):
            started = time.process_time()
            batch = pack(examples, range(PAIRS))
            milliseconds.append(1000 * (time.process_time() - started))
        print(f"| {NAMES[shape]} | {batch.input_ids.numel()} | {statistics.median(milliseconds):.1f} |")


if __name__ == "__main__":
    main()
