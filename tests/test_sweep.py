"""Sweeps through the commands users type: what runs, what is left behind, and what survives."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from tests.support.commands import ROOT, SMALL, dry_run, environment, start, train

FOUR = ["-m", "method=dpo,ipo", "beta=0.1,1", *SMALL]
CONTRACT = [
    *("setup", "method", "init", "beta", "lr", "seed", "state"),
    *("quality", "quality_se", "quality_selection", "quality_reporting"),
    *("kl_sequence", "kl_sequence_se", "kl_token", "reward_accuracy", "seconds", "identity"),
]


@pytest.fixture(scope="module")
def swept(shared_outputs):
    output = train(*FOUR, f"output_dir={shared_outputs}", "sweep.name=four").stdout
    return shared_outputs, output


def store_counts(outputs):
    return Counter(done.parent.parent.name for done in (outputs / "store").glob("*/*/DONE"))


def test_a_sweep_computes_every_stage_once_and_shared_ones_once_for_all(swept):
    outputs, _ = swept
    # Four aligned models and their samples, one SFT, its samples, one set of reference log-probs.
    assert store_counts(outputs) == {"sft": 1, "reference": 1, "align": 4, "generate": 5, "evaluate": 4}


def test_a_sweep_leaves_everything_its_contract_names(swept):
    outputs, output = swept
    folder = outputs / "sweeps" / "four"
    sweep = json.loads((folder / "sweep.json").read_text())
    assert [(p["method"], p["beta"], p["state"]) for p in sweep["points"]] == [
        ("dpo", 0.1, "done"),
        ("dpo", 1.0, "done"),
        ("ipo", 0.1, "done"),
        ("ipo", 1.0, "done"),
    ]
    points = pd.read_csv(folder / "points.csv")
    assert set(CONTRACT) <= set(points.columns) and len(points) == 4
    assert points[CONTRACT].notna().all().all()
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert set(best["mini_tldr"]) == {"dpo", "ipo"} and {"lr", "beta"} <= set(best["mini_tldr"]["dpo"])
    for name in ("quality_over_beta", "quality_over_kl", "training"):
        for suffix in ("png", "svg"):
            assert (folder / "figures" / f"mini_tldr_{name}.{suffix}").stat().st_size > 5000
    for suffix in ("md", "csv", "tex"):
        assert "DPO" in (folder / "tables" / f"best.{suffix}").read_text()
        assert (folder / "tables" / f"differences.{suffix}").stat().st_size > 0
    assert r"\toprule" in (folder / "tables" / "best.tex").read_text()
    (differences,) = pd.read_csv(folder / "tables" / "differences.csv").to_dict("records")
    assert {differences["method"], differences["other"]} == {"dpo", "ipo"}
    assert differences["low"] <= differences["difference"] <= differences["high"]
    assert len(pd.read_csv(folder / "tables" / "pareto.csv")) == 4
    assert set(pd.read_csv(folder / "tables" / "gains.csv").against) == {"beta = 1", "TRL's default"}
    report = (folder / "report.html").read_text()
    assert report.count("<svg") == 3
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", report), "report.html needs something beside it"
    assert "report.html" in output and "Win rate" in output


def test_points_agree_with_the_results_they_come_from(swept):
    outputs, _ = swept
    for row in pd.read_csv(outputs / "sweeps" / "four" / "points.csv").to_dict("records"):
        result = json.loads((outputs / "store" / "evaluate" / row["identity"] / "result.json").read_text())
        assert result["schema"] == 1
        assert row["quality"] == pytest.approx(result["quality"]["value"])
        assert row["kl_sequence"] == pytest.approx(result["kl"]["per_sequence"]["value"])
        halves = result["splits"]
        assert halves["selection"]["n"] + halves["reporting"]["n"] == result["quality"]["n"] == 16
        judged = (outputs / "store" / "evaluate" / row["identity"] / "judgements.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["verdict"] for line in judged) / 16 == pytest.approx(row["quality"])
        assert result["dropped"] == {"train": {}, "validation": {}}


def test_metrics_hold_every_step_and_dpo_starts_at_log_two(swept):
    outputs, _ = swept
    for metrics in (outputs / "store" / "align").glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(8))
        names = {"loss", "reward_accuracy", "reward_margin", "chosen_logps", "rejected_logps"}
        names |= {"lr", "grad_norm", "tokens_per_second"}
        assert all(names <= set(line) for line in lines)
        stage = json.loads((metrics.parent / "stage.json").read_text())
        if stage["fields"]["method"]["name"] == "dpo":
            assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_same_sweep_again_computes_nothing_within_ten_seconds(swept):
    outputs, _ = swept
    before = sorted((p, p.stat().st_mtime_ns) for p in (outputs / "store").rglob("*"))
    begun = time.monotonic()
    train(*FOUR, f"output_dir={outputs}", "sweep.name=four")
    assert time.monotonic() - begun < 10
    assert sorted((p, p.stat().st_mtime_ns) for p in (outputs / "store").rglob("*")) == before


def test_a_larger_sweep_computes_only_what_is_new(swept):
    outputs, _ = swept
    train("-m", "method=dpo,ipo,orpo", "beta=0.1,1", *SMALL, f"output_dir={outputs}", "sweep.name=six")
    assert store_counts(outputs)["align"] == 6 and store_counts(outputs)["sft"] == 1


def test_the_aggregator_runs_alone_and_gives_the_same_bytes(swept):
    folder = swept[0] / "sweeps" / "four"
    before = {
        p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix in (".csv", ".yaml", ".svg", ".md")
    }
    aggregate = [sys.executable, "-m", "sweeps.aggregate"]
    subprocess.run([*aggregate, str(folder)], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert {p: p.read_bytes() for p in before} == before
    rule = ["--select", "lowest_kl_in_shortlist"]
    subprocess.run([*aggregate, str(folder), *rule], cwd=ROOT, env=environment(), check=True, capture_output=True)
    points = pd.read_csv(folder / "points.csv").set_index("identity")
    for entry in yaml.safe_load((folder / "best.yaml").read_text())["mini_tldr"].values():
        (chosen,) = entry["identities"]
        others = points[points.method == points.method[chosen]]
        assert points.kl_sequence[chosen] == others.kl_sequence.min() or entry["shortlist"] == 1
    assert "the point of the lowest KL is shown" in (folder / "report.html").read_text()
    subprocess.run([*aggregate, str(folder)], cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert {p: p.read_bytes() for p in before} == before
    wrong = subprocess.run(
        [*aggregate, str(folder.parent)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "no sweep.json there" in wrong.stderr


def test_best_values_of_a_sweep_are_those_a_run_takes_from_its_file(swept):
    folder = swept[0] / "sweeps" / "four"
    best = yaml.safe_load((folder / "best.yaml").read_text())["mini_tldr"]["ipo"]
    labels, _ = dry_run("method=ipo", "seed=0,1", f"best_from={folder / 'best.yaml'}")
    assert labels[0] == f"ipo beta={best['beta']:g} lr={best['lr']:g}"


def test_one_failing_point_is_named_at_the_end_and_the_others_finish(tmp_path):
    done = train("-m", "method=dpo", "lr=1e-3,1e30", *SMALL, f"output_dir={tmp_path}", "sweep.name=bad", check=False)
    assert done.returncode == 1
    assert "1 of 2 points failed" in done.stderr and "diverged at step" in done.stdout
    assert "Traceback" not in done.stderr
    points = pd.read_csv(tmp_path / "sweeps" / "bad" / "points.csv")
    assert list(points.state) == ["done", "failed"] and "diverged" in points.error[1]
    assert "diverged" in (tmp_path / "sweeps" / "bad" / "report.html").read_text()
    assert len(yaml.safe_load((tmp_path / "sweeps" / "bad" / "best.yaml").read_text())["mini_tldr"]) == 1


def test_seeds_that_differ_in_number_are_shown(tmp_path):
    seeds = ["-m", "method=dpo,ipo", "beta=0.1", "seed=0,1", "sweep.name=seeds"]
    train(*seeds, *SMALL, f"output_dir={tmp_path}")
    folder = tmp_path / "sweeps" / "seeds"
    sweep = json.loads((folder / "sweep.json").read_text())
    (lost,) = (p for p in sweep["points"] if (p["method"], p["seed"]) == ("ipo", 1))
    shutil.rmtree(tmp_path / "store" / "evaluate" / lost["identity"])
    done = subprocess.run(
        [sys.executable, "-m", "sweeps.aggregate", str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    best = pd.read_csv(folder / "tables" / "best.csv").set_index("Method")
    assert best.Seeds.to_dict() == {"DPO": 2, "IPO": 1} and "Seeds" in done.stdout
    report = (folder / "report.html").read_text()
    assert "<th>Seeds</th>" in report and '<th class="text">Method</th>' in report


def test_a_sweep_in_which_every_point_fails_says_so(tmp_path):
    done = train("-m", "method=dpo", "lr=1e30,1e31", *SMALL, f"output_dir={tmp_path}", "sweep.name=none", check=False)
    assert done.returncode == 1 and "2 of 2 points failed" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.count("diverged at step") == 4  # when it happened, and at the end
    assert "No point is done" in (tmp_path / "sweeps" / "none" / "report.html").read_text()


def test_a_sweep_of_the_same_name_with_other_points_loses_nothing(swept, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(swept[0], outputs)
    before = (outputs / "sweeps" / "four" / "best.yaml").read_text()
    output = train("-m", "method=dpo", "beta=0.1", *SMALL, f"output_dir={outputs}", "sweep.name=four").stdout
    assert "kept as four.1" in output
    assert (outputs / "sweeps" / "four.1" / "best.yaml").read_text() == before
    assert len(pd.read_csv(outputs / "sweeps" / "four" / "points.csv")) == 1


def weights(outputs):
    return {p.parent.name for p in (outputs / "store" / "align").glob("*/model.safetensors")}


def test_keep_best_leaves_the_best_models_and_everything_measured(tmp_path):
    arguments = [
        "-m",
        "method=dpo,orpo",
        "beta=0.1,1",
        *SMALL,
        f"output_dir={tmp_path}",
        "sweep.name=kept",
        "keep_checkpoints=best",
    ]
    train(*arguments)
    best = yaml.safe_load((tmp_path / "sweeps" / "kept" / "best.yaml").read_text())["mini_tldr"]
    assert weights(tmp_path) == {Path(entry["checkpoint"]).name for entry in best.values()} and len(best) == 2
    assert len(list((tmp_path / "store" / "align").glob("*/metrics.jsonl"))) == 4
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")}
    train(*arguments)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*")} == before
    # Other samples of a model that is gone: it is made again, the same one.
    metrics = {p: p.read_text() for p in (tmp_path / "store" / "align").glob("*/validation.jsonl")}
    train(*arguments[:-2], "sweep.name=other", "keep_checkpoints=all", "evaluation.generation.temperature=0.5")
    assert len(weights(tmp_path)) == 4
    assert {p: p.read_text() for p in metrics} == metrics


@pytest.mark.parametrize("keep", ["none", "best"])
def test_points_that_share_a_model_all_get_it_before_it_goes(keep, tmp_path):
    several = "evaluation.generation.temperature=0.5,1.0,0.7"
    train("-m", "method=dpo", several, *SMALL, f"output_dir={tmp_path}", "sweep.name=shared", f"keep={keep}")
    assert len(list((tmp_path / "store" / "evaluate").glob("*/result.json"))) == 3
    assert len(weights(tmp_path)) == (1 if keep == "best" else 0)


def test_keep_none_also_frees_what_was_kept_before(tmp_path):
    train(*SMALL, f"output_dir={tmp_path}")
    assert len(weights(tmp_path)) == 1
    train(*SMALL, f"output_dir={tmp_path}", "keep_checkpoints=none")
    assert weights(tmp_path) == set() and list((tmp_path / "store" / "evaluate").glob("*/result.json"))


def workers_of(process):
    """Forked from a child of it."""
    children = psutil.Process(process.pid).children(recursive=True)
    forked = [child for child in children if any("forkserver" in word for word in child.cmdline())]
    return [child.pid for child in forked if child.ppid() != process.pid]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


LONGER = ["-m", "method=dpo,ipo", "beta=0.1,1", *SMALL, "trainer.align.epochs=8", "dataset.sft_size=64"]
LONGER += ["hydra.launcher.workers=2"]


def test_ctrl_c_stops_cleanly_says_how_to_continue_and_the_same_command_does(tmp_path):
    arguments = [*LONGER, f"output_dir={tmp_path}", "sweep.name=stopped"]
    process = start(*arguments)
    wait_for(lambda: list((tmp_path / "store" / "align").glob(".work/*/checkpoints/*/step-*")))
    workers = workers_of(process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and "the same command again continues" in output
    assert "Traceback" not in output
    assert len(workers) == 2 and not any(alive(pid) for pid in workers)
    train(*arguments)
    assert list(pd.read_csv(tmp_path / "sweeps" / "stopped" / "points.csv").state) == ["done"] * 4


def test_a_killed_worker_is_replaced_and_its_stage_resumed(tmp_path):
    process = start(*LONGER, f"output_dir={tmp_path}", "sweep.name=killed")
    wait_for(lambda: list((tmp_path / "store" / "align").glob(".work/*/checkpoints/*/step-*")))
    for worker in workers_of(process):
        os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    logs = "".join(path.read_text() for path in (tmp_path / "sweeps" / "killed" / "logs").iterdir())
    assert "resuming from step" in logs
    assert list(pd.read_csv(tmp_path / "sweeps" / "killed" / "points.csv").state) == ["done"] * 4


def test_workers_do_not_outlive_a_killed_launcher(tmp_path):
    process = start(*LONGER, f"output_dir={tmp_path}", "sweep.name=orphans")
    wait_for(lambda: list((tmp_path / "store").glob("*/.work/*/checkpoints/*/step-*")))
    workers = workers_of(process)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(pid) for pid in workers), seconds=10)
