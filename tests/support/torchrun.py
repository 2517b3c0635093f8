"""A single run on several ranks, started by torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

from tests.support.commands import environment, start_command
from tests.support.kills import stopping_at, wait_until_stopped


def start_ranks(*arguments: str, num_ranks: int = 2, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `torchrun -m src.train ARGUMENTS` without waiting for it. env: `environment()`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone"]
    return start_command([*launcher, "-m", "src.train", *arguments], env or environment())


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_rank_at(pattern: str, number: int, *arguments: str) -> None:
    """Start two ranks, kill -9 the first that stops (see `stopping_at`), and wait for torchrun to end the other."""
    process = start_ranks(*arguments, env=stopping_at(pattern, number))
    wait_until_stopped(process).kill()
    process.communicate(timeout=300)
    assert process.returncode != 0
