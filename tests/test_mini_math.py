"""mini math: the generated task is what it says, and a run of it measures the accuracy of its own samples."""

import json
import re

import pandas as pd
import pytest

from src.data import mini_math
from src.data.sources import open_source
from src.judges.math import Question, check_answers
from src.planning.identity import DataInputs
from tests.support.commands import train

SMALL_MATH = [
    *("setup=mini_math", "method=dpo,ipo", "beta=0.1", "dataset.sft_size=6400", "dataset.train_size=32"),
    *("dataset.validation_size=16", "evaluation.num_prompts=12", "trainer.align.batch_size=16", "lr=1e-5"),
    *("evaluation.generation.samples_per_prompt=2", "evaluation.generation.temperature=0.5", "sweep.name=small"),
]


def test_problems_are_answered_by_the_sum_of_their_numbers_none_of_them_large():
    for problem in mini_math.problems(500, seed=1):
        start = int(re.search(r"had (\d+)", problem.text)[1])
        events = re.findall(f"({'|'.join(mini_math.GAINS + mini_math.LOSSES)}) (\\d+)", problem.text)
        changes = [int(number) if verb in mini_math.GAINS else -int(number) for verb, number in events]
        assert len(changes) == 2 and problem.answer == start + sum(changes)
        assert all(0 <= n <= mini_math.LARGEST for n in (start, start + changes[0], problem.answer))


def test_a_skilled_person_is_always_right_and_others_go_on_with_their_mistakes():
    rows = mini_math.demonstrations(300, seed=2, skill=1.0)
    assert all(mini_math.is_right(problem, answer) for problem, answer in rows)
    shares = {}
    for skill in (0.5, 0.9):
        shares[skill] = sum(mini_math.is_right(*row) for row in mini_math.demonstrations(1000, 3, skill)) / 1000
    assert shares[0.5] < 0.45 < 0.75 < shares[0.9] < 0.95
    for _, answer in mini_math.demonstrations(300, seed=2, skill=0.3):
        first, second = re.findall(r"(\d+) [+-] \d+ = (\d+)", answer)
        assert first[1] == second[0] and answer.endswith(f"\\boxed{{{second[1]}}}")


def test_pairs_have_a_right_and_a_wrong_answer_and_held_out_problems_are_never_trained_on():
    source = open_source(DataInputs("mini_math", 0, 64, 32, sft_size=3000, train_size=1000, validation_size=300))
    pairs = [*source.pairs("train"), *source.pairs("validation")]
    for pair in pairs:
        right = f"\\boxed{{{pair.prompt.facts['answer']}}}"
        assert pair.chosen.endswith(right) and not pair.rejected.endswith(right)
    trained = {row.prompt.text for row in (*source.demonstrations(), *source.pairs("train"))}
    held_out = {prompt.text for prompt in source.prompts(300)} | {
        pair.prompt.text for pair in source.pairs("validation")
    }
    assert not trained & held_out and len(trained) > 3000
    again = open_source(DataInputs("mini_math", 0, 64, 32, sft_size=4000, train_size=1000, validation_size=300))
    assert again.pairs("train") == source.pairs("train") and again.demonstrations()[:3000] == source.demonstrations()


def test_the_exact_checker_and_math_verify_agree():
    rows = [(problem, answer) for problem, *answers in mini_math.preferences(40, seed=4) for answer in answers]
    results = check_answers([Question(str(problem.answer), answer) for problem, answer in rows])
    assert [r.is_right for r in results] == [mini_math.is_right(*row) for row in rows] == [True, False] * 40


@pytest.mark.slow
def test_a_sweep_reports_the_accuracy_of_its_samples_each_problem_being_one_observation(tmp_path):
    done = train("-m", *SMALL_MATH, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    points = pd.read_csv(tmp_path / "sweeps" / "small" / "points.csv")
    assert list(points.metric) == ["accuracy (avg@2)"] * 2
    store = tmp_path / "store"
    assert len(list((store / "generate").glob("*/samples.jsonl"))) == 2, "no baseline is sampled"
    problems = mini_math.problems(12, seed=4)
    for identity, quality in zip(points.identity, points.quality, strict=True):
        stage = json.loads((store / "evaluate" / identity / "stage.json").read_text())
        samples = store / "generate" / stage["upstream"]["samples"] / "samples.jsonl"
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        assert [(row["index"], row["sample"]) for row in rows] == [(i, j) for i in range(12) for j in range(2)]
        answers = check_answers([Question(str(problems[row["index"]].answer), row["response"]) for row in rows])
        assert quality == pytest.approx(sum(bool(answer.is_right) for answer in answers) / 24) and quality > 0
        result = json.loads((store / "evaluate" / identity / "result.json").read_text())
        assert result["quality"]["n"] == 12 == result["kl"]["per_sequence"]["n"]
        assert result["quality"]["samples_per_prompt"] == 2 and result["quality"]["se_samples"] < 1
    tables = tmp_path / "sweeps" / "small" / "tables"
    for text in (done.stdout, *((tables / f"best.{end}").read_text() for end in ("csv", "md", "tex"))):
        assert "Accuracy (avg@2)" in text and "Win rate" not in text
    page = (tmp_path / "sweeps" / "small" / "report.html").read_text()
    assert "Accuracy (avg@2)" in page and ">wrong<" in page and ">loss<" not in page and "Baseline" not in page
