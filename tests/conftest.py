"""Shared pieces of the suite: running the commands users type, and a setup small enough to run many times."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.slurm_cluster import Cluster, missing

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


def _on_cluster(nodeid: str) -> bool:
    return nodeid.rpartition("/")[2].startswith("test_slurm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cluster comes first, for it takes longest."""
    items.sort(key=lambda item: not _on_cluster(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run in parallel (`make test`), a file stays together for its fixtures, and the files of the cluster do."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "the cluster" if _on_cluster(nodeid.partition("::")[0]) else super()._split_scope(nodeid)

    return Together(config, log)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "src.train", *arguments]


def environment() -> dict[str, str]:
    """As a user's shell has it, with no leftover that changes what the command does; without W&B, which has tests of
    its own."""
    drop = ("HYDRA_FULL_ERROR", "OMP_NUM_THREADS")
    ours = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return {k: v for k, v in os.environ.items() if k not in drop} | ours


def train(*arguments: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`python -m src.train ARGUMENTS` from the project's root."""
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def at_once(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `python -m src.train ARGUMENTS` says, run in this process: for what takes less time than a process to start.
    Nothing is computed in it."""
    from hydra.core.global_hydra import GlobalHydra

    root, out, err, code = logging.getLogger(), io.StringIO(), io.StringIO(), 0
    handlers, level = root.handlers[:], root.level
    GlobalHydra.instance().clear()
    with (
        patch.dict(os.environ, environment(), clear=True),
        patch.object(sys, "argv", [str(ROOT / "src" / "train.py"), *arguments]),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # other modules have imported src.train before
        try:
            runpy.run_module("src.train", run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            root.handlers[:], root.level = handlers, level
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def dry_run(*arguments: str) -> tuple[list[str], str]:
    """The points a sweep would consist of, by label, and everything it printed."""
    done = at_once("-m", "dry_run=true", *arguments)
    assert done.returncode == 0, done.stderr
    output = done.stdout
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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of SmolLM2."""
    from tests.endpoint import Served, smollm2_folder

    server = Served(smollm2_folder(tmp_path_factory.mktemp("served") / "smollm2"))
    yield server
    server.kill()


@pytest.fixture
def proxy(served: Any) -> Iterator[Any]:
    """Before it, one that fails on demand."""
    from tests.endpoint import Proxy

    proxy = Proxy(served.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def shared_outputs(tmp_path_factory) -> Path:
    """One output_dir for tests that may reuse each other's finished stages."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A real SLURM cluster on loopback, for the whole suite. Skips, with the reason, where there can be none."""
    from tests.on_slurm import MAX_ARRAY

    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, max_array=MAX_ARRAY)
    cluster.up()
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = cluster.environment()["SLURM_CONF"]
    try:
        yield cluster
    finally:
        os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
        cluster.down()


@pytest.fixture
def slurm(cluster) -> Iterator[Cluster]:
    """The cluster, with nothing in its queue before and after."""
    from tests.on_slurm import queue, until

    yield cluster
    cluster.run("scancel", "--full", "--user", str(os.geteuid()), check=False)
    until(lambda: not queue(cluster))


@pytest.fixture(scope="session")
def calm(tmp_path_factory) -> Path:
    """The points of tests.on_slurm.FOUR as the local launcher computes them."""
    from tests.on_slurm import FOUR

    folder = tmp_path_factory.mktemp("calm")
    train(*FOUR, f"output_dir={folder}")
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """The point of tests.on_slurm.LONG as the local launcher computes it."""
    from tests.on_slurm import LONG

    folder = tmp_path_factory.mktemp("undisturbed")
    train("-m", "method=dpo", "beta=0.1", *LONG, f"output_dir={folder}")
    return folder
