"""The diagnosis of sweeps, through the command that aggregates them."""

import random
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest

from src.store.files import read_jsonl, with_checksum, write_json, write_jsonl
from src.store.integrity import DONE, describe_files
from src.store.store import METRICS_FILE, SAMPLES_FILE, STAGE_FILE, VALIDATION_FILE
from src.store.sweep_folder import SweepFolder
from sweeps.aggregate import aggregate
from tests.support.commands import SMALL, dry_run, run_in_process, train
from tests.support.fake_sweep import FakeSweep

DISPLACEMENT = "likelihood displacement"


@pytest.fixture(scope="module")
def real(shared_outputs):
    """Sweep over a learning rate that trains the model and one that does not."""
    points = ["-m", "method=dpo", "beta=0.1", "lr=1e-3,1e-9", *SMALL, "sweep.name=diagnosed"]
    train(*points, f"output_dir={shared_outputs}")
    return SweepFolder(shared_outputs / "sweeps" / "diagnosed")


def findings_of(folder):
    return pd.read_csv(folder.tables / "diagnosis.csv", keep_default_na=False)


def test_the_margin_of_dpo_is_beta_times_the_difference_of_log_ratios(real):
    largest = []
    for point in real.read()["points"]:
        rows = list(read_jsonl(real.store.root / "align" / point["stages"]["align"] / VALIDATION_FILE))
        ratios = np.array([row["logps"] for row in rows]) - np.array([row["reference_logps"] for row in rows])
        margins = point["beta"] * (ratios[:, 0] - ratios[:, 1])
        assert len(rows) == 16 and margins == pytest.approx([row["margin"] for row in rows], abs=1e-5)
        largest.append(abs(margins).max())
    assert max(largest) > 1e-2, "one of the models has learned something to be wrong about"


def part_of(real, folder, is_kept):
    """Return a sweep of some points of the real one, aggregated."""
    record = real.read()
    record["points"] = [point for point in record["points"] if is_kept(point)]
    part = SweepFolder(folder / "sweeps" / "part")
    part.write({**record, "store": str(real.store.root)})
    aggregate([part], quiet=True)
    return findings_of(part)


def test_a_learning_rate_that_is_too_small_is_named_and_the_commands_are_ones_that_run(real, tmp_path):
    table = part_of(real, tmp_path, lambda point: point["lr"] == 1e-9)
    (row,) = table[table.rule == "loss at its start"].to_dict("records")
    assert row["severity"] == "severe" and "after 8 steps" in row["finding"]
    overrides = shlex.split(row["command"])[4:]
    labels, _ = dry_run(*(override for override in overrides if not override.startswith("output_dir=")))
    assert labels == ["dpo beta=0.1 lr=3e-09", "dpo beta=0.1 lr=1e-08"]
    learned = part_of(real, tmp_path / "learned", lambda point: point["lr"] == 1e-3)
    assert "loss at its start" not in set(learned.rule)


@pytest.fixture
def fake(tmp_path):
    """Two methods over three betas whose files are those of runs in which nothing is wrong."""
    sweep = FakeSweep(tmp_path, random.Random(0))
    for point in sweep.points:
        sweep.align(point)
        sweep.evaluate(point)
        write_artifacts(sweep, point)
    return sweep


def write_artifacts(sweep, point, change=1.0, columns=("logps", "reference_logps")):
    align, generate = (sweep.store.root / kind / point["stages"][kind] for kind in ("align", "generate"))
    generate.mkdir(parents=True, exist_ok=True)
    logps = {"logps": [-10 + change, -20], "reference_logps": [-10.0, -12.0]}
    pair = {"loss": 0.5, "margin": 1.0, "correct": 1.0} | {name: logps[name] for name in columns}
    write_jsonl(align / VALIDATION_FILE, [{"prompt": i} | pair for i in range(40)])
    write_jsonl(align / METRICS_FILE, [{"step": i, "loss": 0.7 - i / 100, "grad_norm": 1.0} for i in range(20)])
    write_json(align / STAGE_FILE, {"inputs": {"model": {}, "data": {}, "init": "sft"}, "upstream": {}})
    (align / DONE).unlink(missing_ok=True)
    rows = [{"index": i, "prompt": "p", "response": "a b c d e f g", "finished": True} for i in range(40)]
    write_jsonl(generate / SAMPLES_FILE, rows)
    for folder in (align, generate):
        write_json(folder / DONE, with_checksum({"identity": folder.name, "files": describe_files(folder)}))


def best_of(sweep, method):
    (best,) = (row for row in sweep.best().to_dict("records") if row["method"] == method)
    return best


def displace(sweep, row, columns=("logps", "reference_logps")):
    for point in sweep.points:
        if point["identity"] in row["identities"]:
            write_artifacts(sweep, point, -30.0, columns)


def diagnosed(sweep):
    done = run_in_process(sweep.folder.path, module="sweeps.aggregate")
    assert done.returncode == 0, done.stderr
    return findings_of(sweep.folder), done


def test_of_runs_in_which_nothing_is_wrong_nothing_is_said_of_points(fake):
    table, done = diagnosed(fake)
    of_points = table[(table.beta != "") & ~table.rule.str.contains("border")]
    assert of_points.empty, of_points.to_dict("records")
    assert "diagnosis: 0 severe findings" in done.stdout


def test_displacement_of_a_selected_point_is_in_the_table_in_the_report_and_on_the_terminal(fake):
    best = best_of(fake, "dpo")
    displace(fake, best)
    table, _ = diagnosed(fake)
    (row,) = table[table.rule == DISPLACEMENT].to_dict("records")
    assert row["method"] == "dpo" and float(row["beta"]) == best["beta"] and row["selected"]
    assert "-30.0 nats" in row["finding"] and "100 % of 40" in row["finding"]
    report = fake.folder.report.read_text()
    section = re.search(r'<section id="diagnosis">(.*?)</section>', report, re.S)[1]
    assert "-30.0 nats" in section and "DPO, beta" in section


def test_a_method_without_reference_is_measured_by_the_log_probs_of_one_with_it(fake):
    best = best_of(fake, "ipo")
    for point in fake.points:
        if point["method"] == "ipo":
            write_artifacts(fake, point, columns=["logps"])
    displace(fake, best, ["logps"])
    table, _ = diagnosed(fake)
    (row,) = table[table.rule == DISPLACEMENT].to_dict("records")
    assert row["method"] == "ipo" and "-30.0 nats" in row["finding"]


def test_without_such_a_method_the_report_says_that_it_is_not_measured(fake):
    for point in fake.points:
        write_artifacts(fake, point, columns=["logps"])
    table, _ = diagnosed(fake)
    (row,) = table[table.rule == DISPLACEMENT].to_dict("records")
    assert row["severity"] == "note" and "no point of a method with a reference" in row["finding"]
    assert "not measured for DPO, IPO" in row["finding"] or "not measured for IPO, DPO" in row["finding"]


def test_results_without_log_probs_are_said_to_be_old(fake):
    for point in fake.points:
        write_artifacts(fake, point, columns=())
    table, _ = diagnosed(fake)
    (row,) = table[table.rule == DISPLACEMENT].to_dict("records")
    assert row["finding"].startswith("not measured for") and "of a version" in row["finding"] and not row["command"]


def test_a_damaged_or_missing_file_leaves_the_rest_of_the_diagnosis(fake):
    for point in fake.points:
        align, generate = (fake.store.root / kind / point["stages"][kind] for kind in ("align", "generate"))
        (align / VALIDATION_FILE).write_text('{"loss": 1}\n{"lo')
        shutil.rmtree(generate)
    table, done = diagnosed(fake)
    assert "validation.jsonl: damaged" in done.stderr and "the diagnosis is without it" in done.stderr
    assert "one seed" in set(table.rule) and fake.folder.report.exists()


def test_an_aggregation_is_the_same_bytes_twice(fake):
    diagnosed(fake)
    before = (fake.folder.tables / "diagnosis.csv").read_bytes()
    diagnosed(fake)
    assert (fake.folder.tables / "diagnosis.csv").read_bytes() == before
