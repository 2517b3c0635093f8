"""The paper's setups on a SLURM cluster from SFT to report, with a tiny Llama and small local copies of the data."""

import json

import pytest

from tests.support import tiny_llama
from tests.support.commands import start
from tests.support.on_slurm import SLURM, sweep, task_statuses

SMALLER = [
    *("trainer.sft.batch_size=8", "trainer.align.batch_size=8", "dataset.validation_size=16"),
    *("evaluation.num_prompts=8", "evaluation.generation.max_new_tokens=12", "engine=zero3"),
]
TASKS = ["hydra.launcher.gpus_per_node=2", "hydra.launcher.wait=true"]
SETUPS = {"llama32_3b_tldr": tiny_llama.tldr, "llama31_8b_uf": tiny_llama.ultrachat_ultrafeedback}


def test_both_setups_complete_on_two_tasks_with_zero3(slurm, tmp_path):
    pytest.importorskip("deepspeed")
    model, running = tiny_llama.model(tmp_path / "model"), {}
    for setup, data in SETUPS.items():
        paths = [f"model.path={model}", f"dataset.path={data(tmp_path / setup)}", f"output_dir={tmp_path / 'out'}"]
        arguments = ["-m", f"setup={setup}", "method=dpo", f"sweep.name={setup}", *SMALLER, *paths, *SLURM, *TASKS]
        running[setup] = start(*arguments)
    for setup, process in running.items():
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output
        folder = sweep(tmp_path / "out", setup)
        assert [point["state"] for point in folder.read()["points"]] == ["done"]
        assert folder.report.exists() and folder.best_yaml.exists()
        gpus = [(status["cuda_visible_devices"] or "").split(",") for status in task_statuses(folder)]
        assert any(len(devices) == 2 for devices in gpus), "no job had two tasks"
    done = [json.loads(path.read_text()) for path in (tmp_path / "out" / "store").glob("*/*/DONE")]
    assert sorted(d["stage"] for d in done) == sorted(2 * ["sft", "reference", "align", "generate", "evaluate"])
    assert {d["processes"] for d in done if d["stage"] in ("sft", "align")} == {2}
    # The rows of Reddit TL;DR that pass the filters, and every row of the other datasets.
    counts = [json.loads(path.read_text()) for path in (tmp_path / "out" / "store").glob("*/*/data.json")]
    assert sorted(d["rows"] for d in counts if "rows" in d) == [30, 32]
    assert sorted(d["pairs"] for d in counts if "pairs" in d) == [32, 34]
