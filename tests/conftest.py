"""Shared pieces of the suite: running the commands users type, and a setup small enough to run many times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# mini_tldr cut down to seconds: a few steps of everything, the whole pipeline otherwise as it is.
SMALL = [
    "dataset.sft_size=128",
    "dataset.train_size=128",
    "dataset.validation_size=16",
    "evaluation.prompts=16",
    "evaluation.generation.max_new_tokens=24",
    "trainer.checkpoint_steps=2",
    "trainer.align.batch_size=16",
    "trainer.sft.batch_size=32",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "src.train", *arguments]


def environment() -> dict[str, str]:
    """As a user's shell has it, with no leftover that changes what the command does."""
    drop = ("HYDRA_FULL_ERROR", "OMP_NUM_THREADS")
    return {k: v for k, v in os.environ.items() if k not in drop} | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def train(*arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m src.train ARGUMENTS` from the project's root."""
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def dry_run(*arguments: str) -> tuple[list[str], str]:
    """The points a sweep would consist of, by label, and everything it printed."""
    output = train("-m", "dry_run=true", *arguments).stdout
    return re.findall(r"^(?:to do|done) +\w+  \S+  (.+)$", output, re.M), output


def start(*arguments: str) -> subprocess.Popen[str]:
    """The same in the background, in a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(scope="session")
def shared_outputs(tmp_path_factory) -> Path:
    """One output_dir for tests that may reuse each other's finished stages."""
    return tmp_path_factory.mktemp("outputs")
