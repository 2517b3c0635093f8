"""Sweeps through the commands users type: what runs, which files are written, and recovery from failures."""

import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml

from src.store.store import RESULT_SCHEMA
from src.store.sweep_folder import SweepFolder
from src.store.usage import usage_by_kind
from tests.support.commands import SMALL, SMALL_SWEEP, dry_run, run_in_process, start, train
from tests.support.kills import kill_at

COLUMNS = [
    *("setup", "method", "init", "beta", "lr", "seed", "state"),
    *("quality", "quality_se", "quality_selection", "quality_reporting"),
    *("kl_sequence", "kl_sequence_se", "kl_token", "reward_accuracy", "seconds", "identity"),
]


def store_counts(folder):
    return Counter(done.parts[-3] for done in folder.store.root.glob("*/*/DONE"))


def aggregate(*arguments):
    return run_in_process(*arguments, module="sweeps.aggregate")


def test_a_sweep_computes_every_stage_once(swept):
    folder, _ = swept
    # Four aligned models and their samples, one SFT, its samples, one set of reference log-probs.
    assert store_counts(folder) == {"sft": 1, "reference": 1, "align": 4, "generate": 5, "evaluate": 4}


def test_a_sweep_writes_every_documented_file(swept):
    folder, output = swept
    sweep = folder.read()
    assert [(p["method"], p["beta"], p["state"]) for p in sweep["points"]] == [
        ("dpo", 0.1, "done"),
        ("dpo", 1.0, "done"),
        ("ipo", 0.1, "done"),
        ("ipo", 1.0, "done"),
    ]
    points = pd.read_csv(folder.points_csv)
    assert set(COLUMNS) <= set(points.columns) and len(points) == 4
    assert points[COLUMNS].notna().all().all()
    best = yaml.safe_load(folder.best_yaml.read_text())
    assert set(best["mini_tldr"]) == {"dpo", "ipo"} and {"lr", "beta"} <= set(best["mini_tldr"]["dpo"])
    for name in ("quality_over_beta", "quality_over_kl", "win_tie_lose", "training"):
        for suffix in ("png", "svg"):
            assert (folder.figures / f"mini_tldr_{name}.{suffix}").stat().st_size > 5000
    for suffix in ("md", "csv", "tex"):
        assert "DPO" in (folder.tables / f"best.{suffix}").read_text()
        assert (folder.tables / f"differences.{suffix}").stat().st_size > 0
    assert r"\toprule" in (folder.tables / "best.tex").read_text()
    (differences,) = pd.read_csv(folder.tables / "differences.csv").to_dict("records")
    assert {differences["method"], differences["other"]} == {"dpo", "ipo"}
    assert differences["low"] <= differences["difference"] <= differences["high"]
    assert len(pd.read_csv(folder.tables / "pareto.csv")) == 4
    verdicts = pd.read_csv(folder.tables / "verdicts.csv").set_index("Method")
    best = points.loc[points.groupby("method").quality_selection.idxmax()].set_index("method").quality_reporting
    win_rate = verdicts["Win %"] + verdicts["Tie %"] / 2
    assert [win_rate["DPO"], win_rate["IPO"]] == pytest.approx([100 * best["dpo"], 100 * best["ipo"]])
    assert list(verdicts["Win rate"]) == pytest.approx(list(win_rate / 100))
    quality = json.loads((folder.store.root / "evaluate" / points.identity[0] / "quality.json").read_text())
    num_reporting = quality["selection"].count(False)
    counts = verdicts[["Win %", "Tie %", "Lose %"]] * num_reporting / 100
    assert (counts - counts.round()).abs().to_numpy().max() < 1e-9, "whole prompts"
    assert list(counts.round().sum(axis=1)) == list(verdicts["Prompts"]) == [num_reporting, num_reporting]
    assert list(pd.read_csv(folder.tables / "paper_table_2.csv")) == ["Method", "WR% (std)"]
    assert set(pd.read_csv(folder.tables / "gains.csv").against) == {"beta = 1", "TRL's default"}
    report = folder.report.read_text()
    assert report.count("<svg") == 4
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", report), "report.html refers to other files"
    assert "report.html" in output and "Win rate" in output


def test_a_sweep_tells_what_it_took_of_accelerators_in_use_and_waiting(swept):
    folder, _ = swept
    sweep = folder.read()
    cost = {row["stage"]: row for row in sweep["cost"]}
    computed = {"sft": 1, "reference": 1, "align": 4, "generate": 5, "evaluate": 4}
    assert {kind: row["computed"] for kind, row in cost.items()} == computed
    stages = {identity for point in sweep["points"] for identity in point["stages"].items()}
    usage = usage_by_kind(folder.store, stages)
    for kind in ("sft", "reference", "align", "generate"):
        assert cost[kind]["hours"] == pytest.approx((usage[kind].in_use + usage[kind].waiting) / 3600), kind
        assert cost[kind]["waiting"] == pytest.approx(usage[kind].waiting / 3600), kind
        assert 0 < cost[kind]["waiting"] < cost[kind]["hours"], kind
    status = run_in_process(folder.path, module="sweeps.status").stdout
    assert re.search(r"finished stages: \S+ \+ \S+ waiting \(sft \S+ \+ \S+ waiting, .*generate ", status), status
    assert "Of them waiting" in folder.report.read_text()


def test_points_agree_with_the_results_they_come_from(swept):
    folder, _ = swept
    for row in pd.read_csv(folder.points_csv).to_dict("records"):
        stage = folder.store.root / "evaluate" / row["identity"]
        result = json.loads((stage / "result.json").read_text())
        assert result["schema"] == RESULT_SCHEMA
        assert row["quality"] == pytest.approx(result["quality"]["value"])
        assert row["kl_sequence"] == pytest.approx(result["kl"]["per_sequence"]["value"])
        splits = result["splits"]
        assert splits["selection"]["n"] + splits["reporting"]["n"] == result["quality"]["n"] == 16
        judgements = (stage / "judgements.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["verdict"] for line in judgements) / 16 == pytest.approx(row["quality"])
        assert result["dropped"] == {"train": {}, "validation": {}}


def test_metrics_hold_every_step_and_dpo_starts_at_log_two(swept):
    folder, _ = swept
    for metrics in folder.store.root.glob("align/*/metrics.jsonl"):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(8))
        names = {"loss", "grad_norm", "learning_rate", "tokens_per_second", "logps/chosen", "logps/rejected"}
        names |= {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
        assert all(names <= set(line) for line in lines)
        stage = json.loads((metrics.parent / "stage.json").read_text())
        if stage["inputs"]["method"] == "dpo":
            assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def modification_times(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.store.root.rglob("*"))


def test_the_same_sweep_again_computes_nothing(swept):
    folder, _ = swept
    before = modification_times(folder)
    train(*SMALL_SWEEP, f"output_dir={folder.output_dir}", "sweep.name=four")
    assert modification_times(folder) == before


@pytest.mark.timing
def test_the_same_sweep_again_takes_at_most_ten_seconds(swept):
    start_time = time.monotonic()
    train(*SMALL_SWEEP, f"output_dir={swept[0].output_dir}", "sweep.name=four")
    assert time.monotonic() - start_time < 10


def test_a_larger_sweep_computes_only_the_new_stages(swept):
    folder, _ = swept
    train("-m", "method=dpo,ipo,orpo", "beta=0.1,1", *SMALL, f"output_dir={folder.output_dir}", "sweep.name=six")
    assert store_counts(folder)["align"] == 6 and store_counts(folder)["sft"] == 1


def test_the_aggregator_run_again_writes_the_same_bytes(swept):
    folder, _ = swept

    def contents():
        suffixes = (".csv", ".yaml", ".svg", ".md")
        return {p: p.read_bytes() for p in folder.path.rglob("*") if p.suffix in suffixes and p.is_file()}

    before = contents()
    assert aggregate(folder.path).returncode == 0
    assert contents() == before
    assert aggregate(folder.path, "--select", "lowest_kl_in_shortlist").returncode == 0
    points = pd.read_csv(folder.points_csv).set_index("identity")
    for entry in yaml.safe_load(folder.best_yaml.read_text())["mini_tldr"].values():
        (selected,) = entry["identities"]
        of_method = points[points.method == points.method[selected]]
        assert points.kl_sequence[selected] == of_method.kl_sequence.min() or entry["shortlist"] == 1
    assert "the point with the lowest KL was selected" in folder.report.read_text()
    assert aggregate(folder.path).returncode == 0
    assert contents() == before
    wrong = aggregate(folder.path.with_name("missing"))
    assert wrong.returncode == 2 and "no sweep.json in it" in wrong.stderr


def test_a_run_takes_its_values_from_the_best_yaml_of_a_sweep(swept):
    path = swept[0].best_yaml
    best = yaml.safe_load(path.read_text())["mini_tldr"]["ipo"]
    labels, _ = dry_run("method=ipo", "seed=0,1", f"best_from={path}")
    assert labels[0] == f"ipo beta={best['beta']:g} lr={best['lr']:g}"


@pytest.mark.slow
def test_a_failed_point_is_named_at_the_end_and_the_others_finish(tmp_path):
    done = train("-m", "method=dpo", "lr=1e-3,1e5", *SMALL, f"output_dir={tmp_path}", "sweep.name=bad", check=False)
    assert done.returncode == 1
    assert "1 of 2 points failed" in done.stderr and "diverged at step" in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    points = pd.read_csv(tmp_path / "sweeps" / "bad" / "points.csv")
    assert list(points.state) == ["done", "failed"] and "diverged" in points.error[1]
    assert "diverged" in (tmp_path / "sweeps" / "bad" / "report.html").read_text()
    assert len(yaml.safe_load((tmp_path / "sweeps" / "bad" / "best.yaml").read_text())["mini_tldr"]) == 1


@pytest.mark.slow
def test_the_number_of_seeds_is_a_column_where_it_differs(tmp_path):
    seeds = ["-m", "method=dpo,ipo", "beta=0.1", "seed=0,1", "sweep.name=seeds"]
    train(*seeds, *SMALL, f"output_dir={tmp_path}")
    folder = SweepFolder(tmp_path / "sweeps" / "seeds")
    (missing,) = (p for p in folder.read()["points"] if (p["method"], p["seed"]) == ("ipo", 1))
    shutil.rmtree(tmp_path / "store" / "evaluate" / missing["identity"])
    done = aggregate(folder.path)
    assert done.returncode == 0, done.stderr
    best = pd.read_csv(folder.tables / "best.csv").set_index("Method")
    assert best.Seeds.to_dict() == {"DPO": 2, "IPO": 1} and "Seeds" in done.stdout
    report = folder.report.read_text()
    assert "<th>Seeds</th>" in report and '<th class="text">Method</th>' in report


def test_a_sweep_of_the_same_name_with_other_points_archives_the_old_results(swept, tmp_path):
    outputs = tmp_path / "outputs"
    shutil.copytree(swept[0].output_dir, outputs)
    before = (outputs / "sweeps" / "four" / "best.yaml").read_text()
    output = train("-m", "method=dpo", "beta=0.1", *SMALL, f"output_dir={outputs}", "sweep.name=four").stdout
    assert "the old results were moved to four.1" in output
    assert (outputs / "sweeps" / "four.1" / "best.yaml").read_text() == before
    assert len(pd.read_csv(outputs / "sweeps" / "four" / "points.csv")) == 1


def weights(outputs):
    return {p.parent.name for p in (outputs / "store" / "align").glob("*/model.safetensors")}


@pytest.mark.slow
def test_keep_best_keeps_the_best_models_and_all_measurements(tmp_path):
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
    # Other samples need a removed model: it is recomputed, and is the same.
    metrics = {p: p.read_text() for p in (tmp_path / "store" / "align").glob("*/validation.jsonl")}
    train(*arguments[:-2], "sweep.name=other", "keep_checkpoints=all", "evaluation.generation.temperature=0.5")
    assert len(weights(tmp_path)) == 4
    assert {p: p.read_text() for p in metrics} == metrics


@pytest.mark.slow
def test_keep_best_holds_a_model_for_each_method_and_worker_while_the_sweep_runs(tmp_path):
    sweep = ["-m", "method=dpo,orpo", "beta=0.01,0.1,0.3,1", *SMALL, f"output_dir={tmp_path}", "sweep.name=kept"]
    launcher = start(*sweep, "keep_checkpoints=best", "hydra.launcher.workers=2")
    most = 0
    while launcher.poll() is None:
        most = max(most, len(weights(tmp_path)))
        time.sleep(0.05)
    assert launcher.returncode == 0 and 2 < most <= 2 + 2
    best = yaml.safe_load((tmp_path / "sweeps" / "kept" / "best.yaml").read_text())["mini_tldr"]
    assert weights(tmp_path) == {Path(entry["checkpoint"]).name for entry in best.values()}


@pytest.mark.slow
@pytest.mark.parametrize("points_of_worker", [1, 2, 3])  # that one of the two workers has finished
def test_a_sweep_killed_while_it_runs_keeps_the_models_it_selects_later(points_of_worker, tmp_path):
    sweep = ["-m", "method=dpo,orpo", "beta=0.01,0.1,0.3,1", *SMALL, f"output_dir={tmp_path}", "sweep.name=kept"]
    sweep += ["keep_checkpoints=best", "hydra.launcher.workers=2"]
    kill_at("evaluate/.work/*/attempt-*", points_of_worker + 1, *sweep)
    train(*sweep)
    best = yaml.safe_load((tmp_path / "sweeps" / "kept" / "best.yaml").read_text())["mini_tldr"]
    assert weights(tmp_path) == {Path(entry["checkpoint"]).name for entry in best.values()} and len(best) == 2


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["none", "best"])
def test_a_shared_model_is_removed_after_its_last_point(keep, tmp_path):
    temperatures = "evaluation.generation.temperature=0.5,1.0,0.7"
    train(
        "-m",
        "method=dpo",
        temperatures,
        *SMALL,
        f"output_dir={tmp_path}",
        "sweep.name=shared",
        f"keep_checkpoints={keep}",
    )
    assert len(list((tmp_path / "store" / "evaluate").glob("*/result.json"))) == 3
    assert len(weights(tmp_path)) == (1 if keep == "best" else 0)


@pytest.mark.slow
def test_keep_none_also_removes_models_of_earlier_runs(tmp_path):
    train(*SMALL, f"output_dir={tmp_path}")
    assert len(weights(tmp_path)) == 1
    train(*SMALL, f"output_dir={tmp_path}", "keep_checkpoints=none")
    assert weights(tmp_path) == set() and list((tmp_path / "store" / "evaluate").glob("*/result.json"))
