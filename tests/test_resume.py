"""Killed at any moment, started twice at once: the results are those of an undisturbed run."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from src.config import ConfigError, point_from
from src.plan import make_plan
from src.store import Store
from tests.conftest import SMALL, start, train
from tests.test_config import composed

POINT = [*SMALL, "dataset.sft_size=960", "dataset.train_size=256", "trainer.align.epochs=2"]


def results(output_dir: Path) -> dict[str, object]:
    """Everything a finished run computed, without its timings."""
    found: dict[str, object] = {}
    for done in sorted((output_dir / "store").glob("*/*/DONE")):
        folder = done.parent
        for path in sorted(folder.iterdir()):
            key = f"{folder.parent.name}/{folder.name}/{path.name}"
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                found[key] = [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
            elif path.name == "result.json":
                result = json.loads(path.read_text())
                result["stages"] = [{k: v for k, v in s.items() if k != "seconds"} for s in result["stages"]]
                found[key] = result
            elif path.name == "DONE":
                found[key] = {
                    k: v for k, v in json.loads(path.read_text()).items() if k in ("stage", "identity", "tokens")
                }
            else:
                found[key] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(*POINT, f"output_dir={folder}")
    return results(folder)


def kill_when(pattern: str, folder: Path, *arguments: str) -> bool:
    """Start the command, kill -9 its whole group when a path below the store matches; False if it ended first."""
    process = start(*arguments)
    try:
        while process.poll() is None:
            if any((folder / "store").glob(pattern)):
                return True
            time.sleep(0.002)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_kill_9_at_every_stage_and_the_same_command_again_gives_identical_results(tmp_path, undisturbed):
    arguments = [*POINT, f"output_dir={tmp_path}"]
    moments = [
        "sft/.work/*/checkpoints/step-00000004",
        "sft/.work/*/checkpoints/step-0000001?",
        "sft/.work/*/attempt-*/stage.json",
        "reference/.work/*/attempt-*",
        "align/.work/*/checkpoints/step-00000006",
        "align/.work/*/checkpoints/.draft-*",
        "generate/.work/*/attempt-*",
        "evaluate/.work/*",
    ]
    killed = sum(kill_when(moment, tmp_path, *arguments) for moment in moments)
    assert killed >= 4, "the kills came too late to show anything"
    train(*arguments)
    found = results(tmp_path)
    assert found.keys() == undisturbed.keys()
    assert [k for k in found if found[k] != undisturbed[k]] == []
    assert not list((tmp_path / "store").glob("*/.work/*")), "finished stages leave nothing behind"


def test_a_resumed_run_really_resumes(tmp_path):
    arguments = [*POINT, f"output_dir={tmp_path}"]
    assert kill_when("sft/.work/*/checkpoints/step-00000010", tmp_path, *arguments)
    train(*arguments)
    logs = "".join(p.read_text() for p in (tmp_path / "runs").rglob("train.log"))
    assert "resuming from step" in logs


def test_two_processes_at_once_compute_each_stage_once(tmp_path, undisturbed):
    arguments = [*POINT, f"output_dir={tmp_path}"]
    both = [start(*arguments, f"hydra.run.dir={tmp_path}/runs/{n}") for n in range(2)]
    outputs = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    logs = [(tmp_path / "runs" / str(n) / "train.log").read_text() for n in range(2)]
    computed = [
        line.split(" INFO ")[1].split(": done in")[0]
        for log in logs
        for line in log.splitlines()
        if ": done in" in line
    ]
    assert len(computed) == len(set(computed)) == 6
    assert results(tmp_path) == undisturbed


def test_another_seed_gives_other_results(tmp_path, undisturbed):
    """The negative control of the comparisons above."""
    train(*POINT, f"output_dir={tmp_path}", "seed=1")
    metrics = [v for k, v in results(tmp_path).items() if k.endswith("metrics.jsonl")]
    assert all(m not in undisturbed.values() for m in metrics)


def test_artefacts_of_another_config_are_refused_with_the_keys_that_differ(tmp_path, undisturbed):
    point = point_from(composed(*POINT, f"output_dir={tmp_path}"))
    store = Store(tmp_path)
    stage = next(iter(make_plan([point], store).stages.values()))
    folder = store.dir(stage)
    folder.mkdir(parents=True)
    (folder / "DONE").write_text("{}")
    other = json.loads(json.dumps(stage.description))
    other["fields"]["trainer"]["lr"] = 123
    (folder / "stage.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"disagrees with this run in fields\.trainer\.lr"):
        store.artefacts(stage)
