"""Run the commands users type, on a setup small enough to run many times."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).resolve().parents[2]

# mini_tldr cut down to seconds: a few steps of everything, the whole pipeline otherwise as it is.
SMALL = [
    "dataset.sft_size=128",
    "dataset.train_size=128",
    "dataset.validation_size=16",
    "evaluation.num_prompts=16",
    "evaluation.generation.max_new_tokens=24",
    "trainer.checkpoint_minutes=0",
    "trainer.align.batch_size=16",
    "trainer.sft.batch_size=32",
]

SMALL_SWEEP = ["-m", "method=dpo,ipo", "beta=0.1,1", *SMALL]

_started: list[subprocess.Popen[str]] = []  # by start_command, in the test that runs


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "src.train", *arguments]


def environment() -> dict[str, str]:
    """Return the environment of a user's shell, without variables that change the command, and with W&B disabled."""
    drop = ("HYDRA_FULL_ERROR", "OMP_NUM_THREADS")
    overrides = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return {k: v for k, v in os.environ.items() if k not in drop} | overrides


def train(*arguments: str, check: bool = True, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """Run `python -m src.train ARGUMENTS` from the project's root."""
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_in_process(*arguments: object, module: str = "src.train") -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in this process, where starting one would take most of the time.

    For commands that print, are refused, or only read results: nothing is computed.
    """
    root, out, err, code = logging.getLogger(), io.StringIO(), io.StringIO(), 0
    handlers, level = root.handlers[:], root.level
    GlobalHydra.instance().clear()
    with (
        patch.dict(os.environ, environment(), clear=True),
        patch.object(sys, "argv", [str(ROOT / f"{module.replace('.', '/')}.py"), *map(str, arguments)]),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # src.train has been imported already
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as system_exit:
            code = int(system_exit.code or 0)
        finally:
            root.handlers[:], root.level = handlers, level
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def dry_run(*arguments: str) -> tuple[list[str], str]:
    """Return the labels of the points that a sweep would consist of, and everything it printed.

    The store is empty unless `arguments` name another: results of a checkout's own runs are not to be found. No card is
    planned for unless they name one: rehearsals take seconds.
    """
    with TemporaryDirectory() as empty:
        has_store = any(argument.startswith("output_dir=") for argument in arguments)
        card = [] if any(argument.startswith("engine.gpu=") for argument in arguments) else ["engine.gpu=null"]
        store = [] if has_store else [f"output_dir={empty}"]
        done = run_in_process("-m", "dry_run=true", *card, *arguments, *store)
    assert done.returncode == 0, done.stderr
    return re.findall(r"^(?:to do|done) +\w+  \S+  (.+)$", done.stdout, re.M), done.stdout


def start(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `python -m src.train ARGUMENTS` in a new process group, without waiting for it. env: `environment()`."""
    return start_command(command(*arguments), env or environment())


def start_command(command: list[str], env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a command in a new process group; what is left of it when the test ends is killed."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _started.append(process)
    return process


def kill_what_is_left() -> None:
    """Kill the commands of `start_command` that have not ended: a test has failed before it could end them."""
    for process in _started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    _started.clear()
