"""Check the CUDA path on the card of this machine, or rehearse the check where there is none.

`python -m benchmarks.gpu_check [--part correctness|speed] [--only NAME ...] [--wheels FOLDER] [--out FOLDER]`: exit
code 0 when every part passed or was skipped, else 1. It needs neither network nor make (docs/gpu.md).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu_check import wheels

# cuBLAS has one order of sums only with a workspace of this size (on an H100 its default), read when CUDA starts.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_MODE": "disabled",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--part", choices=("correctness", "speed", "all"), default="all", help="half of the check")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts alone")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this python lacks; installed beside --out")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_check"), help="results.json, report.md and logs")
    parser.add_argument("--minutes", type=float, help="parts not begun by then count as failed; on a card 6 for a half")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    os.environ.update(ENVIRONMENT)
    if options.wheels is not None:
        wheels.install(options.wheels, options.out / "site")
    # Imported now, because the wheels hold what they import.
    from benchmarks.gpu_check.check import check

    return check(options)


if __name__ == "__main__":
    sys.exit(main())
