"""What a result was made with is recorded beside it, and said once when other versions are here."""

import json
import platform
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from src.errors import warn
from src.planning.stage import stages_of
from src.stages import runner
from src.store import provenance as module
from src.store.files import read_json, with_checksum, write_json
from src.store.provenance import describe_other_versions, provenance
from src.store.store import DONE, Store
from tests.support.commands import SMALL, run_in_process, train
from tests.support.configs import point

HERE = {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")}


@pytest.fixture(autouse=True)
def no_kernels_loaded(monkeypatch):
    """Forget the optional kernels that another test loaded into this process: here none is used."""
    for kernel in module.OPTIONAL_KERNELS.values():
        monkeypatch.delitem(module.sys.modules, kernel, raising=False)


@pytest.fixture
def computed(tmp_path, monkeypatch):
    """Return a store with every stage of two points, as if they had been computed: their folders are empty."""
    monkeypatch.setattr(runner, "_run", lambda *_: None)
    for beta in ("0.1", "1"):
        for stage in stages_of(point(f"beta={beta}")):
            runner.compute_or_wait(stage, Store(tmp_path))
    return tmp_path


def test_done_has_the_versions_that_a_stage_was_computed_with(computed):
    for done in (computed / "store").glob(f"*/*/{DONE}"):
        content = read_json(done)
        assert content["versions"] == {"python": platform.python_version()} | HERE
        assert content["gpu"] is None


ENDPOINT = ["judge.model=m", "evaluation.metric=win_rate"]


@pytest.mark.parametrize(
    ("overrides", "role", "packages"),
    [
        ([], "align", ()),
        (["engine=zero2"], "align", ("deepspeed",)),
        (["engine=zero2"], "generate", ()),
        (["server=vllm"], "generate", ("vllm", "openai")),
        (["server=vllm"], "evaluate", ()),
        (["setup=llama32_3b_tldr", "judge=tldr", *ENDPOINT], "evaluate", ("openai",)),
    ],
)
def test_optional_packages_are_recorded_where_they_are_used(overrides, role, packages):
    stage = next(stage for stage in stages_of(point(*overrides)) if stage.role == role)
    assert stage.packages == packages


def test_a_package_of_another_environment_has_no_version():
    """A server's command may run in its own environment."""
    assert provenance(("no-such-package", "openai"))["versions"].keys() == {"python", *HERE, "openai"}


def test_on_a_gpu_its_name_driver_and_cuda_are_recorded(tmp_path, monkeypatch):
    cuda = SimpleNamespace(is_initialized=lambda: True, get_device_name=lambda: "NVIDIA H100")
    torch = SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="12.8"))
    monkeypatch.setitem(module.sys.modules, "torch", torch)
    (tmp_path / "version").write_text("570.86\n")
    monkeypatch.setattr(module, "DRIVER_FILE", tmp_path / "version")
    assert provenance()["gpu"] == {"name": "NVIDIA H100", "driver": "570.86", "cuda": "12.8"}


def remake(folder, **versions):
    for done in (folder / "store").glob(f"evaluate/*/{DONE}"):
        content = read_json(done)
        content.pop("checksum", None)
        content["versions"] |= versions
        write_json(done, with_checksum(content))


@pytest.mark.parametrize("command", [["beta=0.1"], ["-m", "beta=0.1,1"]])
def test_results_of_another_major_version_are_reused_and_that_is_said_once(computed, command):
    def run():
        warn.cache_clear()  # each run is a command of its own
        done = run_in_process(*command, "dry_run=true", f"output_dir={computed}")
        assert done.returncode == 0 and " 0 to do" in done.stdout, done.stdout + done.stderr
        return [line for line in done.stderr.splitlines() if "computed with" in line]

    assert run() == []
    remake(computed, torch="1.13.0", accelerate="0.1")
    (line,) = run()
    assert line.startswith(
        "warning: results that were computed with torch 1.13.0 are reused; this environment has torch"
    )


@pytest.mark.parametrize(
    ("made", "here", "other"),
    [("2.1.0", "2.9.0", False), ("1.13", "2.0", True), ("0.4.1", "0.5.0", True), ("0.4.1", "0.4.9", False)],
)
def test_the_second_number_counts_below_version_one(tmp_path, monkeypatch, made, here, other):
    monkeypatch.setattr(module, "installed_version", lambda name: here)
    (tmp_path / DONE).write_text(json.dumps({"versions": {"torch": made}}))
    assert (describe_other_versions([tmp_path]) is not None) == other


@pytest.mark.slow
def test_result_json_has_what_every_stage_was_made_with(tmp_path):
    train(*SMALL, f"output_dir={tmp_path}")
    (result,) = (tmp_path / "store").glob("evaluate/*/result.json")
    stages = read_json(result)["stages"]
    assert {stage["stage"] for stage in stages} == {"sft", "reference", "align", "generate", "evaluate"}
    assert all(stage["versions"]["torch"] == HERE["torch"] and stage["gpu"] is None for stage in stages)
