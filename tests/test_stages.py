"""A stage whose disk fills up, and one that another process takes over."""

import os
import subprocess

import pytest

from src.config.validation import build_point
from src.planning.plan import make_plan
from src.stages import runner
from src.store.files import write_json
from src.store.lease import LeaseLost
from src.store.store import Store
from tests.support.commands import SMALL, train
from tests.support.configs import composed


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_the_same_command_resumes_with_more_space(small_disk):
    arguments = [*SMALL, "trainer.checkpoint_minutes=0", f"output_dir={small_disk}"]
    done = train(*arguments, f"hydra.run.dir={small_disk.parent}/run", check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed: disk full while computing mini_tldr sft" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((small_disk / "store").glob("*/*/DONE"))
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert "result:" in train(*arguments, f"hydra.run.dir={small_disk.parent}/run").stdout


def test_a_stage_taken_over_by_another_process_is_waited_for(tmp_path, monkeypatch):
    point = build_point(composed(f"output_dir={tmp_path}"))
    store = Store(tmp_path)
    stage = next(iter(make_plan([point], store).stages.values()))
    calls = []

    class Module:
        @staticmethod
        def run(_inputs, _resources, _upstream, attempt):
            calls.append(attempt.lease.number)
            if len(calls) == 1:
                raise LeaseLost("taken over")
            write_json(attempt.out / "made.json", 1)

    monkeypatch.setattr(runner.importlib, "import_module", lambda name: Module)
    assert (runner.compute_or_wait(stage, store) / "made.json").exists()
    assert len(calls) == 2
    runner.compute_or_wait(stage, store)
    assert len(calls) == 2
