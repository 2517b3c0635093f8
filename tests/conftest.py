"""Fixtures of the suite: servers, a SLURM cluster, and results that several tests compare with."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError
from src.store.sweep_folder import SweepFolder
from tests.support.commands import SMALL_SWEEP, kill_what_is_left, train
from tests.support.slurm_cluster import Cluster, missing

# A suite that a shell started in the background inherits an ignored SIGINT, and so would the commands it interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# OpenMP's threads spin while they wait for each other. Two processes of the suite that each have as many threads as
# there are cores then take the cores from one another, and a run takes twice as long. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _on_cluster(nodeid: str) -> bool:
    return nodeid.rpartition("/")[2].startswith("test_slurm")


SLOW_FIXTURES = {"cluster", "served", "browser"}


# Files whose tests share a sweep that takes seconds to compute.
SHARING = dict.fromkeys(("tests/test_pack.py", "tests/test_reproduce.py"), "studies")
SHARING |= dict.fromkeys(("tests/test_sweep.py", "tests/test_notebook.py"), "the small sweep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that use the cluster, a server or a browser as slow, and put slow files first, the cluster's foremost.

    A slow file that starts last would keep one process busy while the other has nothing left to do.
    """
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (not _on_cluster(item.nodeid), item.path not in slow_files))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep each file on one process for its fixtures, and on one those that use the cluster, or share a sweep."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            group = "the cluster" if _on_cluster(file) else SHARING.get(file)
            return group or super()._split_scope(nodeid)

    return Together(config, log)


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    """Forget the rank that FSDP2 and DeepSpeed give to a single process: commands would take it for one of several."""
    yield
    os.environ.pop("LOCAL_RANK", None)


@pytest.fixture(autouse=True)
def no_command_is_left() -> Iterator[None]:
    """Kill the commands that a failed test has left running: they would slow the others down."""
    yield
    kill_what_is_left()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Serve SmolLM2."""
    from tests.support.endpoint import Served, smollm2_folder

    server = Served(smollm2_folder(tmp_path_factory.mktemp("served") / "smollm2"))
    yield server
    server.kill()


@pytest.fixture
def proxy(served: Any) -> Iterator[Any]:
    """Put a proxy that fails on demand before the server."""
    from tests.support.endpoint import Proxy

    proxy = Proxy(served.port)
    yield proxy
    proxy.close()


@pytest.fixture
def fake_endpoint() -> Iterator[Any]:
    """Start an endpoint that replies whatever the test says."""
    from tests.support.endpoint import FakeEndpoint

    endpoint = FakeEndpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start Chromium; skip where it is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if executable is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing be rehearsed, as where there is no compiler."""

    def refuse(requests: Any) -> None:
        raise ConfigError("g++ is not on PATH")

    monkeypatch.setattr("src.estimates.forecast.rehearse_all", refuse)


@pytest.fixture(scope="session")
def shared_outputs(tmp_path_factory) -> Path:
    """Return an output_dir for tests that may reuse each other's finished stages."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def swept(shared_outputs) -> tuple[SweepFolder, str]:
    """Compute a small sweep of four points; return its folder and what the command printed."""
    output = train(*SMALL_SWEEP, f"output_dir={shared_outputs}", "sweep.name=four").stdout
    return SweepFolder(shared_outputs / "sweeps" / "four"), output


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Start a real SLURM cluster on loopback for the whole suite; skip, with the reason, where that is impossible."""
    from tests.support.on_slurm import MAX_ARRAY

    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=2, max_array=MAX_ARRAY)
    cluster.up()
    previous = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = cluster.environment()["SLURM_CONF"]
    try:
        yield cluster
    finally:
        os.environ.pop("SLURM_CONF") if previous is None else os.environ.update(SLURM_CONF=previous)
        cluster.down()


@pytest.fixture
def slurm(cluster) -> Iterator[Cluster]:
    """Return the cluster; its queue is empty before and after the test."""
    from tests.support.on_slurm import wait_queue_empty

    yield cluster
    cluster.run("scancel", "--full", "--user", str(os.geteuid()), check=False)
    wait_queue_empty(cluster)


@pytest.fixture(scope="session")
def local_four_points(tmp_path_factory) -> Path:
    """Return an output_dir with tests.support.on_slurm.FOUR_POINTS, computed by the local launcher."""
    from tests.support.on_slurm import FOUR_POINTS

    output_dir = tmp_path_factory.mktemp("local")
    train(*FOUR_POINTS, f"output_dir={output_dir}")
    return output_dir


@pytest.fixture(scope="session")
def local_long_run(tmp_path_factory) -> Path:
    """Return an output_dir with the point of tests.support.on_slurm.LONG, computed without interruption."""
    from tests.support.on_slurm import LONG

    output_dir = tmp_path_factory.mktemp("long")
    train("-m", "method=dpo", "beta=0.1", *LONG, f"output_dir={output_dir}")
    return output_dir


@pytest.fixture
def one_thread():
    """Compute with one thread: small models are much slower on several when the machine has other work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
