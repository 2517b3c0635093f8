"""Shared pieces of the suite: running the commands users type, and a setup small enough to run many times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import train
from tests.support.slurm_cluster import Cluster, missing


def _on_cluster(nodeid: str) -> bool:
    return nodeid.rpartition("/")[2].startswith("test_slurm")


SLOW_FIXTURES = {"cluster", "served", "browser"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that use the cluster, a server or a browser are slow; those of the cluster take longest and come first."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: not _on_cluster(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run in parallel (`make test`), a file stays together for its fixtures, and the files of the cluster do."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "the cluster" if _on_cluster(nodeid.partition("::")[0]) else super()._split_scope(nodeid)

    return Together(config, log)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of SmolLM2."""
    from tests.support.endpoint import Served, smollm2_folder

    server = Served(smollm2_folder(tmp_path_factory.mktemp("served") / "smollm2"))
    yield server
    server.kill()


@pytest.fixture
def proxy(served: Any) -> Iterator[Any]:
    """Before it, one that fails on demand."""
    from tests.support.endpoint import Proxy

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
    from tests.support.on_slurm import MAX_ARRAY

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
    from tests.support.on_slurm import queue, until

    yield cluster
    cluster.run("scancel", "--full", "--user", str(os.geteuid()), check=False)
    until(lambda: not queue(cluster))


@pytest.fixture(scope="session")
def calm(tmp_path_factory) -> Path:
    """The points of tests.support.on_slurm.FOUR as the local launcher computes them."""
    from tests.support.on_slurm import FOUR

    folder = tmp_path_factory.mktemp("calm")
    train(*FOUR, f"output_dir={folder}")
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory) -> Path:
    """The point of tests.support.on_slurm.LONG as the local launcher computes it."""
    from tests.support.on_slurm import LONG

    folder = tmp_path_factory.mktemp("undisturbed")
    train("-m", "method=dpo", "beta=0.1", *LONG, f"output_dir={folder}")
    return folder
