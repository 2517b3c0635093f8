"""A single run on several ranks, started by torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.support.commands import ROOT, environment


def start_ranks(*arguments: str, num_ranks: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "--standalone"]
    return subprocess.Popen(
        [*launcher, "-m", "src.train", *arguments],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def kill_last_rank(process: subprocess.Popen[str]) -> None:
    """Kill one of the ranks with SIGKILL; return when torchrun has ended the others."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
