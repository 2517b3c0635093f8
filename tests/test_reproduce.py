"""`python -m sweeps.reproduce study.zip` computes a study's results again from its rows, and says what differs."""

import csv
import hashlib
import json
import shutil
import zipfile

import pandas as pd
import pytest
import yaml

from src.store.files import with_checksum
from src.store.sweep_folder import SweepFolder
from sweeps.study.archive import STUDY_FILE, write_archive
from sweeps.study.comparison import Comparison, compare_tables
from sweeps.study.recompute import differences
from sweeps.study.rerun import compare_with_intervals
from tests.support.commands import run_in_process
from tests.support.studies import edited
from tests.test_sweep_commands import assert_one_line

BEST = "sweeps/four/best.yaml"


def reproduce(*arguments):
    return run_in_process(*arguments, module="sweeps.reproduce")


@pytest.fixture(scope="module")
def study(local_four_points, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.zip"
    write_archive(SweepFolder(local_four_points / "sweeps" / "four"), path)
    return path


@pytest.fixture(scope="module")
def best(study):
    with zipfile.ZipFile(study) as archive:
        return yaml.safe_load(archive.read(BEST))["mini_tldr"]


def flip_first_verdict(text):
    first, rest = text.split("\n", 1)
    row = json.loads(first)
    return json.dumps(row | {"verdict": 1.0 - row["verdict"] if row["verdict"] != 0.5 else 1.0}) + "\n" + rest


def judgements(result):
    return f"store/evaluate/{result}/judgements.jsonl"


def test_a_study_gives_its_results_without_a_store(study, tmp_path):
    alone = shutil.copy(study, tmp_path / "study.zip")
    done = reproduce(alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: the study's rows give its results" in done.stdout and "4 of 4 points" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["study.zip"]


def test_one_verdict_changed_by_hand_is_named_with_what_it_moves(study, best, tmp_path):
    result = best["dpo"]["identities"][0]
    forged = edited(study, tmp_path / "forged.zip", {judgements(result): flip_first_verdict})
    done = reproduce(forged)
    assert done.returncode == 1
    assert f"not as it was packed: {judgements(result)} was changed" in done.stdout
    assert f"not what its rows give: store/evaluate/{result}/quality.json, values[0]: " in done.stdout
    label = f"points.csv, mini_tldr dpo sft beta={best['dpo']['beta']} "
    assert f"different: {label}" in done.stdout and ", quality: " in done.stdout
    other = [line for line in done.stdout.splitlines() if line.startswith("different: points.csv") and "orpo" in line]
    assert not other, "the negative control: no number of another point moves"


def test_a_number_changed_in_every_place_but_the_rows_is_found(study, best, tmp_path):
    """Whoever changes tables, results and all digests in study.json still has other rows."""
    names = ("sweeps/four/points.csv", STUDY_FILE)
    with zipfile.ZipFile(study) as archive:
        rows = list(csv.reader(archive.read(names[0]).decode().splitlines()))
    column = rows[0].index("quality")

    def raised(text):
        table = [row.split(",") for row in text.splitlines()]
        table[1][column] = "0.99"
        return "\n".join(map(",".join, table)) + "\n"

    forged = edited(study, tmp_path / "forged.zip", {names[0]: raised})
    with zipfile.ZipFile(forged) as archive:
        digest = hashlib.sha256(archive.read(names[0])).hexdigest()

    def resealed(text):
        described = json.loads(text)
        described.pop("checksum")
        described["files"][names[0]]["sha256"] = digest
        return json.dumps(with_checksum(described))

    done = reproduce(edited(forged, tmp_path / "resealed.zip", {STUDY_FILE: resealed}))
    assert done.returncode == 1 and "not as it was packed" not in done.stdout
    assert ", quality: 0.99 in the study, " in done.stdout and done.stdout.count("different: ") == 1


def test_rows_that_are_gone_are_one_line(study, best, tmp_path):
    gone = judgements(best["orpo"]["identities"][0])
    line = assert_one_line(reproduce(edited(study, tmp_path / "gone.zip", {gone: lambda text: None})))
    assert "judgements.jsonl: missing" in line


def test_options_that_do_nothing_or_name_nothing_are_refused(study, tmp_path):
    assert "go with --points" in assert_one_line(reproduce(study, "--methods", "dpo"))
    done = reproduce(study, "--points", "best", "--methods", "ipo", "--output-dir", tmp_path / "new")
    assert done.returncode == 2 and "--methods ipo: the study has dpo, orpo" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_the_best_points_run_again_lie_in_the_intervals(study, best, tmp_path):
    arguments = ("--points", "best", "--methods", "orpo", "--output-dir", tmp_path)
    done = reproduce(study, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 values inside" in done.stdout and "warning" not in done.stderr
    points = pd.read_csv(tmp_path / "sweeps" / "four_again" / "points.csv")
    assert points.identity.tolist() == best["orpo"]["identities"], "the same stages, by the packed config"
    again = reproduce(study, *arguments)
    assert "0 of them not done yet" in again.stdout and again.returncode == 0


def test_values_outside_of_an_interval_are_told():
    row = {"method": "dpo", "beta": 0.1, "lr": 0.001, "metric": "win_rate", "identities": ["a", "b"]}
    row |= {"quality_reporting": 0.6, "quality_reporting_low": 0.5, "quality_reporting_high": 0.7}
    row |= {"kl_sequence": 2.0, "kl_sequence_se": 0.1}
    here = pd.DataFrame({"identity": ["x", "y"], "quality_reporting": [0.6, 0.7], "kl_sequence": [2.1, 2.7]})
    pairs = {"a": "x", "b": "y"}
    _, is_inside = compare_with_intervals(pd.DataFrame([row]), here.set_index("identity"), pairs)
    assert is_inside == [True, False]


def test_rounding_is_counted_and_no_difference():
    comparison = Comparison()
    comparison.value("a", "0.10", 0.1)
    comparison.value("a", "0.3", "0.30000000000000004")
    comparison.value("a", "nan", "nan")
    assert not comparison.lines and comparison.rounded == 1 and comparison.numbers == 3
    comparison.value("b", "0.3", "0.3000001")
    comparison.value("c", "", "0.5")
    assert comparison.lines == [
        "b: 0.3 in the study, 0.3000001 computed again",
        "c: nothing in the study, 0.5 computed again",
    ]


def test_rows_are_found_by_their_labels_and_not_by_their_order():
    one = [["method", "beta", "x"], ["dpo", "1", "2"], ["ipo", "1", "3"], ["ipo", "1", "4"]]
    comparison = Comparison()
    compare_tables(comparison, one, [one[0], one[2], one[3], one[1]], "t")
    assert not comparison.lines and comparison.numbers == 6
    compare_tables(comparison, one, [one[0], ["dpo", "1", "5"], one[2]], "t")
    assert comparison.lines == [
        "t, dpo beta=1, x: 2 in the study, 5 computed again",
        "t, ipo beta=1 (2): in the study, but not in the one that was made again",
    ]
    compare_tables(comparison, one, [["method", "beta", "y"]], "t")
    assert comparison.lines[2:] == ["t: other columns (x, y)"]


def test_studies_are_aggregated_beside_folders(study, local_four_points, tmp_path):
    alone = shutil.copy(study, tmp_path / "alone.zip")
    done = run_in_process(alone, module="sweeps.aggregate")
    assert done.returncode == 0, done.stderr
    points = pd.read_csv(tmp_path / "alone" / "points.csv")
    original = pd.read_csv(local_four_points / "sweeps" / "four" / "points.csv")
    assert points.checkpoint.isna().all() and original.checkpoint.notna().all()
    pd.testing.assert_frame_equal(points.drop(columns="checkpoint"), original.drop(columns="checkpoint"))
    folder = local_four_points / "sweeps" / "four"
    done = run_in_process(alone, folder, "--out", tmp_path / "both", module="sweeps.aggregate")
    assert done.returncode == 0 and len(pd.read_csv(tmp_path / "both" / "points.csv")) == 4, done.stderr


def test_a_changed_study_is_not_aggregated(study, best, tmp_path):
    forged = edited(study, tmp_path / "forged.zip", {judgements(best["dpo"]["identities"][0]): flip_first_verdict})
    line = assert_one_line(run_in_process(forged, module="sweeps.aggregate"))
    assert "judgements.jsonl was changed" in line and "sweeps.reproduce" in line
    assert [path.name for path in tmp_path.iterdir()] == ["forged.zip"]


def test_results_of_a_study_do_not_replace_those_of_a_sweep(study, local_four_points, tmp_path):
    shutil.copytree(local_four_points / "sweeps", tmp_path / "sweeps")
    named = shutil.copy(study, tmp_path / "sweeps" / "four.zip")
    assert "--out FOLDER" in assert_one_line(run_in_process(named, module="sweeps.aggregate"))


def test_a_measurement_may_differ_by_the_rounding_of_another_processor():
    assert differences("result.json", {"kl": [0.1 + 0.2]}, {"kl": [0.3]}) == []
    assert [one.place for one in differences("result.json", {"kl": [0.3001]}, {"kl": [0.3]})] == ["kl[0]"]
