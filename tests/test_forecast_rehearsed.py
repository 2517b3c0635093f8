"""Dry runs of the paper's setups, rehearsed: what they hold, and that they fit the card they are planned for."""

import os
import re

import pytest

from tests.support import commands
from tests.support.commands import ROOT, run_in_process
from tests.support.forecasts import memory_table

pytestmark = pytest.mark.slow

EIGHT = ["hydra/launcher=slurm_8gpu"]
SETUPS = {
    "llama32_3b_tldr": ["beta=0.1"],
    "llama32_3b_uf": ["beta=0.1"],
    "llama31_8b_uf": ["beta=0.1", *EIGHT],
    "mistral_7b_uf": ["beta=0.1", "lr=1e-6", *EIGHT],
}


def dry_run(tmp_path, *overrides):
    return run_in_process("-m", "dry_run=true", f"output_dir={tmp_path}", *overrides)


@pytest.mark.parametrize("setup", SETUPS)
def test_every_stage_of_a_paper_setup_peaks_at_72_gib_of_an_80_gb_card(setup, tmp_path):
    done = dry_run(tmp_path, f"setup={setup}", *SETUPS[setup])
    assert done.returncode == 0, done.stderr
    assert "rehearsed: the stages' own code" in done.stdout
    table = memory_table(done.stdout)
    assert set(table) == {"sft", "reference", "align", "generate"}
    for stage, row in table.items():
        assert 1 < float(row["peak"]) <= 72 and float(row["s a step"]) > 0, stage
    hours = dict(re.findall(r"^(sft|reference|align|generate) .* (\S+)  rehearsed$", done.stdout, re.M))
    assert set(hours) == set(table) and "-" not in hours.values()


def test_a_3b_model_is_refused_on_one_card_of_40_gb_and_fits_on_the_two_that_are_named(tmp_path):
    paper = ["setup=llama32_3b_tldr", "beta=0.1", "engine.gpu=a100_40"]
    done = dry_run(tmp_path, *paper)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "does not fit on one a100_40 (39.4 GiB)" in line
    (remedy,) = re.findall(r"; (.*) fits, with \S+ GiB in each process or model.lora.rank=16 fits", line)
    assert remedy.endswith(" hydra.launcher.gpus_per_node=2")
    two = dry_run(tmp_path, *paper, *remedy.split())
    assert two.returncode == 0, two.stderr
    assert float(memory_table(two.stdout)["align"]["peak"]) <= 0.9 * 39.4 + 0.1


def test_arithmetic_is_near_what_the_rehearsal_holds(tmp_path, monkeypatch):
    paper = ["setup=llama32_3b_tldr", "beta=0.1"]
    without_compiler = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    rehearsed = memory_table(dry_run(tmp_path, *paper).stdout)
    monkeypatch.setattr(commands, "environment", lambda: os.environ | without_compiler)
    done = dry_run(tmp_path, *paper)
    assert "\narithmetic: " in done.stdout
    computed = memory_table(done.stdout)
    for stage in ("sft", "align", "generate"):
        for column in ("weights", "gradients", "optimizer", "KV cache", "MB a token", "peak"):
            if rehearsed[stage][column] != "-":
                tolerance = 0.25 if column == "peak" else 0.1
                assert float(computed[stage][column]) == pytest.approx(float(rehearsed[stage][column]), rel=tolerance)


@pytest.mark.parametrize("number", [0, 1], ids=["3b", "8b"])
def test_a_dry_run_in_the_docs_prints_what_the_docs_show(number, tmp_path):
    page = (ROOT / "docs" / "cost.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python -m src\.train .* dry_run=true$", page, re.M)
    assert len(commands) == 2
    done = run_in_process(*commands[number].split()[3:], f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    shown = page.split(commands[number])[1].split("```\n")[2]  # the block after that of the command
    assert len(hours_table(shown)) == 4
    for printed, expected in zip(hours_table(done.stdout), hours_table(shown), strict=True):
        assert printed[:2] == expected[:2]
        assert [float(cell) for cell in printed[2:]] == pytest.approx([float(cell) for cell in expected[2:]], rel=0.15)
    choice = r"^sampling: (own_job|same_job)"
    assert re.findall(choice, done.stdout, re.M) == re.findall(choice, shown, re.M)
    if "memory of one process" in shown:
        memory, printed = memory_table(shown), memory_table(done.stdout)
        assert memory.keys() == printed.keys()
        for stage, row in memory.items():
            for column in ("weights", "gradients", "optimizer", "KV cache", "processes"):
                assert printed[stage][column] == row[column], (stage, column)
            assert float(printed[stage]["peak"]) == pytest.approx(float(row["peak"]), rel=0.1)
            assert float(printed[stage]["s a step"]) == pytest.approx(float(row["s a step"]), rel=0.15)


def hours_table(text):
    """Return stage, number to run, accelerator-hours, those waiting, and those of a point, for each stage."""
    rows = text.split("accelerator-hours  waiting")[1]
    return re.findall(r"^(sft|reference|align|generate) +(\d+) .* (\S+) +(\S+) +(\S+)  rehearsed$", rows, re.M)
