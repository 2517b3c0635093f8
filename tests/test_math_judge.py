"""judge=math: answers written by hand, answers that sympy cannot stand, and problems in published layouts."""

import json
import time

import pyarrow
import pytest
from pyarrow import parquet

from src.config.validation import build_point
from src.data.boxes import last_box
from src.data.evaluation_prompts import read_prompts
from src.data.rows import text_prompt
from src.errors import ConfigError, StageError
from src.judges import Comparison, math
from src.judges.math import Question, check_answers
from src.judges.math_answers import final_answer
from src.planning.content import ContentPath
from src.planning.identity import DataInputs, PromptInputs
from src.planning.resources import Resources
from src.preflight import check_input_files
from tests.support.configs import composed

# expected answer, response, whether it is right
ANSWERS = [
    # GSM8K's mark, and plain words
    ("72", "48 / 2 = 24 in May.\n48 + 24 = 72\n#### 72", True),
    ("72", "48 / 2 = 24 in May.\n#### 24", False),
    ("1,200", "#### 1200", True),
    ("1200", "#### $1,200\nThat was it.", True),
    ("1200", "The answer is 1,200.", True),
    ("540", "I do not know.", False),
    ("540", "", False),
    # cut off: what is there counts, unless it is half a box
    ("12", "We have 5 + 7 = 12", True),
    ("12", r"We have 5 + 7 = 12 , so \boxed{12", False),
    # boxes: the last one counts
    ("5", r"so \boxed{5}.", True),
    ("5", r"so \boxed{6}.", False),
    ("540", r"First \boxed{12}, no: \boxed{540}", True),
    ("540", r"First \boxed{540}, no: \boxed{12}", False),
    ("540", r"\boxed{12} #### 540", False),
    ("025", r"\boxed{25}", True),
    # fractions and decimals
    (r"\frac{1}{2}", r"\boxed{\frac12}", True),
    (r"\frac{1}{2}", r"\boxed{0.5}", True),
    (r"\frac{3}{4}", r"thus \boxed{3/4}", True),
    (r"\frac{1}{3}", r"\boxed{0.33}", False),
    (r"\frac{14}{3}", r"\boxed{\dfrac{14}{3}}", True),
    (r"\frac{14}{3}", r"\boxed{4\frac{2}{3}}", True),
    ("18.90", r"\boxed{\$18.9}", True),
    ("18.90", r"\boxed{19.8}", False),
    # units
    (r"10 \text{ cm}", r"\boxed{10}", True),
    (r"90^\circ", r"\boxed{90}", True),
    (r"50\%", r"\boxed{50\%}", True),
    (r"50\%", r"\boxed{5\%}", False),
    # sets, intervals, tuples, matrices
    (r"\{1,2,3\}", r"\boxed{\{3,2,1\}}", True),
    ("1,-2", r"\boxed{-2, 1}", True),
    ("1,-2", r"\boxed{2, -1}", False),
    ("[2,5)", r"\boxed{[2,5)}", True),
    ("[2,5)", r"\boxed{[2,5]}", False),
    (r"(-\infty, 2) \cup (3, \infty)", r"\boxed{(-\infty,2)\cup(3,\infty)}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
    (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(\pi/2, 3)}", False),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", True),
    # expressions and text
    (r"2\sqrt{13}", r"\boxed{\sqrt{52}}", True),
    (r"2\sqrt{13}", r"\boxed{2\sqrt{3}}", False),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", True),
    ("x^2+2x+1", r"\boxed{(x-1)^2}", False),
    ("x=3", r"\boxed{3}", True),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
    (r"\text{Evelyn}", r"\boxed{\text{Carla}}", False),
    (r"\text{(C)}", r"\boxed{C}", True),
    (r"\text{(C)}", r"\boxed{\text{(B)}}", False),
]


@pytest.fixture
def attempt():
    class Attempt:
        label, steps = "here", []

        def step(self, step, total):
            self.steps.append((step, total))

    return Attempt()


def test_answers_written_by_hand_are_right_or_wrong_as_a_person_would_say():
    assert sum(right for *_, right in ANSWERS) > 20 < len(ANSWERS) - 15
    results = list(check_answers([Question(expected, response) for expected, response, _ in ANSWERS]))
    said = [(*question, result.is_right) for (*question, _), result in zip(ANSWERS, results, strict=True)]
    assert said == ANSWERS
    assert [r.answer for (_, response, _), r in zip(ANSWERS, results, strict=True) if "know" in response] == [None]


@pytest.mark.parametrize(
    ("response", "part"),
    [
        (r"\boxed{1} and \boxed{2}.", r"\boxed{2}"),
        (r"#### 7 \boxed{1} and \boxed{2", r"\boxed{}"),
        ("a #### 1\n#### 2 \nb", "2"),
        ("no mark", "no mark"),
        ("", ""),
    ],
)
def test_the_last_box_or_mark_has_the_answer(response, part):
    assert final_answer(response) == part


HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "\x00\ud800 \n\\boxed{" + "{" * 5000,
    r"\boxed{__import__('os')._exit(0)}",
]


@pytest.mark.slow
def test_answers_that_sympy_cannot_stand_are_wrong_and_the_others_are_judged(attempt, monkeypatch):
    monkeypatch.setattr(math, "CPU_SECONDS", 1.0)
    responses = [r"\boxed{5}", *HOSTILE, r"\boxed{5}", r"\boxed{6}"]
    comparisons = [Comparison(text_prompt("2 + 3", {"answer": "5"}), {"response": r}, {}) for r in responses]
    judged = math.math(None, Resources(cpu_threads=1), comparisons, attempt)
    assert [v.value for v in judged.verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert "could not be compared" in judged.verdicts[1].reason and judged.verdicts[-1].reason == "answer 6, expected 5"
    assert len(attempt.steps) == 6, "equal questions are asked once"


def test_an_interrupted_judge_leaves_no_process(attempt, monkeypatch):
    started = []
    start = math._Checker._start
    monkeypatch.setattr(math._Checker, "_start", lambda self: started.append(start(self)) or started[-1])

    def stop(step, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(attempt, "step", stop)
    rows = [Comparison(text_prompt("p", {"answer": "5"}), {"response": f"\\boxed{{{n}}}"}, {}) for n in range(50)]
    with pytest.raises(KeyboardInterrupt):
        math.math(None, Resources(cpu_threads=1), rows, attempt)
    assert len(started) == 1 and started[0].poll() is not None


def test_a_program_that_does_not_start_is_an_error_in_one_line(attempt, monkeypatch):
    monkeypatch.setattr(math, "MODULE", "src.judges.nosuch")
    row = Comparison(text_prompt("p", {"answer": "5"}), {"response": "5"}, {})
    begin = time.monotonic()
    with pytest.raises(StageError, match="judge=math: the program that compares answers does not start"):
        math.math(None, Resources(), [row], attempt)
    assert time.monotonic() - begin < 60


LAYOUTS = {
    "gsm8k": ({"question": "2 and 1,198?", "answer": "2 + 1198 = <<2+1198=1200>>1,200\n#### 1,200"}, "1,200"),
    "math500": (
        {"problem": "Half?", "solution": "x", "answer": r"\frac{1}{2}", "unique_id": "t/1.json"},
        r"\frac{1}{2}",
    ),
    "math": ({"problem": "Half?", "level": "Level 1", "solution": r"It is $\boxed{\frac{1}{2}}$."}, r"\frac{1}{2}"),
    "math, other boxes": ({"problem": "Two?", "solution": r"One, \fbox{1}. Or $\boxed 2$."}, "2"),
    "aime2024": ({"ID": "2024-I-1", "Problem": "Walk?", "Solution": "s", "Answer": 25}, "25"),
    "aime2025": ({"id": "0", "problem": "Base?", "answer": "070"}, "070"),
}


@pytest.mark.parametrize("box", [r"\boxed{2}", r"\boxed {2}", r"$\boxed 2$", r"\boxed2", r"\fbox{2}", r"\fbox{\{2\}}"])
def test_problems_and_responses_have_their_answers_in_the_same_boxes(box):
    answer = last_box(f"so {box}, I think")
    assert answer in ("2", r"\{2\}", "2, I think")
    assert final_answer(f"so {box}, I think") == f"\\boxed{{{answer}}}"


@pytest.mark.parametrize("text", [r"\boxed{2", r"\boxed{}", r"\boxed", r"\boxed{1} or \boxed{2"])
def test_a_box_that_is_empty_or_cut_off_has_no_answer(text):
    assert last_box(text) == "" and last_box("no box 2") is None


def inputs(path):
    data = DataInputs("mini_math", 0, 64, 32)
    return PromptInputs(data, 1, ContentPath.of(str(path), "evaluation.prompts_file"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_problems_are_read_in_their_published_layouts(layout, tmp_path):
    row, answer = LAYOUTS[layout]
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(row))
    (entry,) = read_prompts(inputs(path))
    assert entry.prompt.text in row.values() and entry.prompt.text.endswith("?")
    assert entry.prompt.facts == {"answer": answer}


def test_a_parquet_file_has_the_problems_of_the_same_lines_of_json(tmp_path):
    row, _ = LAYOUTS["aime2024"]
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    (tmp_path / "train.jsonl").write_text(json.dumps(row))
    entries = [read_prompts(inputs(tmp_path / f"train.{end}")) for end in ("parquet", "jsonl")]
    assert entries[0] == entries[1] and entries[0][0].prompt.facts == {"answer": "25"}
    (tmp_path / "train.parquet").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=r"train.parquet: cannot be read as Parquet"):
        read_prompts(inputs(tmp_path / "train.parquet"))


def test_a_problem_without_an_answer_is_refused_before_anything_runs(tmp_path):
    path = tmp_path / "test.jsonl"
    rows = [{"problem": "1 + 1?", "answer": "2"}, {"problem": "Prove it.", "solution": r"Clear. \boxed{"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    point = build_point(composed("setup=mini_math", f"evaluation.prompts_file={path}", "evaluation.num_prompts=2"))
    with pytest.raises(ConfigError, match=r"judge=math needs the answer to every problem .* none to 'Prove it.'"):
        check_input_files([point])
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"problem": "2 + 2?", "answer": "4"}))
    check_input_files([point])
