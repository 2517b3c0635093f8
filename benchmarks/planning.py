"""Start-up times of the commands: `python -m benchmarks.planning`.

Targets: `--help` in 1.5 s, planning and validating 1,000 points in 15 s, rerunning a finished sweep in 10 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

TINY = [
    *("dataset.sft_size=64", "dataset.train_size=32", "dataset.validation_size=8", "evaluation.num_prompts=8"),
    *("trainer.align.max_steps=1", "trainer.sft.max_steps=1"),
]


def seconds(*arguments: str, times: int = 3) -> float:
    """Return the median wall time of `python -m src.train ARGUMENTS`."""
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "src.train", *arguments], check=True, capture_output=True)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def main() -> None:
    print(f"--help                              {seconds('--help'):6.2f} s")
    thousand = ["method=dpo,ipo,simpo,orpo,asft,apo_zero,nca,cal_dpo", "beta=range(1,126)"]
    print(f"plan of 1,000 points                {seconds('-m', 'dry_run=true', *thousand):6.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        sweep = ["-m", thousand[0], "beta=1,2", f"output_dir={folder}", *TINY]
        print(f"16 points of one step               {seconds(*sweep, times=1):6.2f} s")
        print(f"rerun when finished                 {seconds(*sweep):6.2f} s")


if __name__ == "__main__":
    main()
