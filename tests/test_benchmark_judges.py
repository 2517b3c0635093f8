"""AlpacaEval 2 and Arena-Hard: their files, their scores, no question asked twice; the endpoint is a real one."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from src.config.judge import Judge
from src.config.schema import Dataset, Evaluation, Point
from src.data.evaluation_prompts import read_answers, read_prompts
from src.errors import ConfigError
from src.planning.inputs import prompt_inputs
from src.preflight import check_input_files
from tests.support.commands import SMALL, run_in_process, train
from tests.support.endpoint import completion

NUM_PROMPTS = 10
POINT = [*SMALL, "trainer.align.max_steps=2", "trainer.sft.max_steps=2", "method=dpo"]


def write(file, rows, lines=False):
    file.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
    return file


def alpaca_questions(folder, count=NUM_PROMPTS):
    """Write the benchmark's file: instructions with the baseline's outputs."""
    rows = [
        {
            "dataset": "helpful_base",
            "instruction": f"Name {n + 2} animals.",
            "output": f"Here are {n + 2} animals: dog, cat, horse and more of them.",
            "generator": "gpt4_1106_preview",
        }
        for n in range(count)
    ]
    return write(folder / "alpaca_eval_gpt4_baseline.json", rows)


def arena_files(folder, count=NUM_PROMPTS):
    questions = [
        {"question_id": f"q{n}", "category": "arena-hard-v0.1", "turns": [{"content": f"What is {n} plus {n}?"}]}
        for n in range(count)
    ]
    answers = [
        {
            "question_id": f"q{n}",
            "model_id": "gpt-4-0314",
            "choices": [{"index": 0, "turns": [{"content": str(2 * n)}]}],
        }
        for n in reversed(range(count))  # matched by id, not by position
    ]
    return write(folder / "question.jsonl", questions, lines=True), write(folder / "gpt4.jsonl", answers, lines=True)


def annotator(folder, model, parsed=r"(?s)^\W*[A-Ma-m0-9].*"):
    """Write an annotator of alpaca-eval that asks SmolLM2; an answer that matches `parsed` prefers the first output."""
    home = folder / "annotators" / "smollm2"
    home.mkdir(parents=True)
    (home / "prompt.txt").write_text(
        "<|im_start|>user\nWhich answer to '{instruction}' do you prefer?\n1: {output_1}\n2: {output_2}\n<|im_end|>"
    )
    (home / "configs.yaml").write_text(
        yaml.safe_dump(
            {
                "smollm2": {
                    "prompt_template": "smollm2/prompt.txt",
                    "fn_completions": "openai_completions",
                    "completions_kwargs": {"model_name": str(model), "max_tokens": 4, "temperature": 0},
                    "fn_completion_parser": "regex_parser",
                    "completion_parser_kwargs": {"outputs_to_match": {1: parsed, 2: r"(?s)^\W*[N-Zn-z].*"}},
                    "batch_size": 1,
                }
            }
        )
    )
    return home


def alpaca(proxy, served, folder, *more, **annotator_options):
    home = folder / "annotators" / "smollm2"
    if not home.exists():
        annotator(folder, served.model, **annotator_options)
        alpaca_questions(folder)
    return [
        *POINT,
        "evaluation=alpaca_eval",
        f"evaluation.prompts_file={folder}/alpaca_eval_gpt4_baseline.json",
        f"evaluation.num_prompts={NUM_PROMPTS}",
        "evaluation.generation.max_new_tokens=8",
        "judge=alpaca_eval",
        f"judge.model={home}",
        f"judge.base_url={proxy.url}",
        "judge.concurrency=2",
        "judge.max_retries=0",
        f"output_dir={folder}/out",
        *more,
    ]


def result_of(folder):
    """Return the only point's result and its folder."""
    (file,) = (folder / "out" / "store" / "evaluate").glob("*/result.json")
    return json.loads(file.read_text()), file.parent


def test_alpaca_eval_annotates_each_question_once_even_when_its_endpoint_dies(proxy, served, tmp_path):
    proxy.on_answer = lambda: len(proxy.answered) == 4 and served.kill()
    died = train(*alpaca(proxy, served, tmp_path), check=False)
    assert died.returncode == 1 and "Traceback" not in died.stderr, died.stderr
    assert f"{proxy.url} failed after 1 attempt" in died.stderr
    known = list(proxy.answered)
    assert 4 <= len(known) <= 5 and f"{len(known)} of {NUM_PROMPTS} answers were saved" in died.stderr

    proxy.on_answer = lambda: None
    proxy.asked.clear()
    served.start()
    done = train(*alpaca(proxy, served, tmp_path))
    assert "win_rate" in done.stdout
    assert len(proxy.asked) == NUM_PROMPTS - len(known) and not set(proxy.asked) & set(known)

    result, folder = result_of(tmp_path)
    rows = json.loads((folder / "annotations.json").read_text())
    questions = json.loads((tmp_path / "alpaca_eval_gpt4_baseline.json").read_text())
    assert [row["instruction"] for row in rows] == [row["instruction"] for row in questions]
    assert [row["output_1"] for row in rows] == [row["output"] for row in questions]
    outputs = json.loads((folder / "model_outputs.json").read_text())
    assert [row["output"] for row in outputs] == [row["output_2"] for row in rows]
    assert {frozenset(row) for row in outputs} == {frozenset({"dataset", "instruction", "output", "generator"})}

    wins = np.array([row["preference"] - 1 for row in rows])
    judge = result["judge"]
    error = 100 * wins.std(ddof=1) / math.sqrt(NUM_PROMPTS)
    assert judge["scores"] == {"win_rate": {"value": pytest.approx(100 * wins.mean()), "se": pytest.approx(error)}}
    assert judge["answers"] == judge["calls"] == NUM_PROMPTS and judge["unparsable"] == 0
    assert judge["prompt_tokens"] > 10 * NUM_PROMPTS
    assert result["quality"]["value"] == pytest.approx(wins.mean())

    proxy.asked.clear()
    train("-m", *alpaca(proxy, served, tmp_path, "evaluation.split_seed=1"))  # another evaluation of the same samples
    assert not proxy.asked
    (table,) = (tmp_path / "out" / "sweeps").glob("*/tables/benchmark.csv")
    shown = f"{100 * wins.mean():.1f} ± {error:.1f}"
    assert pd.read_csv(table)["Win rate %"].tolist() == [shown]
    page = (table.parents[1] / "report.html").read_text()
    assert "Benchmark scores" in page and shown in page


def test_annotations_without_a_preference_are_asked_for_twice_and_then_ties(proxy, served, tmp_path):
    done = train(*alpaca(proxy, served, tmp_path, parsed="^never"), check=False)
    asked = len(proxy.asked)
    if done.returncode:  # no answer of SmolLM2 began with N to Z
        assert f"not one of {NUM_PROMPTS} annotations has a preference" in done.stderr
        assert asked == 2 * NUM_PROMPTS
    else:
        result, folder = result_of(tmp_path)
        rows = json.loads((folder / "annotations.json").read_text())
        missing = sum(row["preference"] is None for row in rows)
        assert result["judge"]["unparsable"] == missing > 0 and asked == NUM_PROMPTS + missing
        assert result["quality"]["n"] == NUM_PROMPTS


@pytest.mark.slow
def test_annotators_ask_the_configured_endpoint_alone_and_keep_odd_answers_out(fake_endpoint, tmp_path, monkeypatch):
    key = "sk-canary-0123456789"
    clients = tmp_path / "clients.yaml"
    clients.write_text("default:\n  - api_key: " + key + "\n    base_url: http://127.0.0.1:9/v1\n")
    monkeypatch.setenv("OPENAI_CLIENT_CONFIG_PATH", str(clients))
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setenv("OPENAI_ORGANIZATION_IDS", "somebody")
    odd = [
        completion("A", choices=[]),
        completion([{"type": "text", "text": "A"}]),
        completion("A", usage=None),
        completion("A", usage={"total_tokens": float("nan")}),
        completion("A", choices=[{"index": 0, "message": {"role": "user", "content": "A"}}]),
        (200, {}, b"<html>"),
    ]
    fake_endpoint.reply = lambda question: odd.pop(0) if odd else completion("A" if "2 animals" in question else "Z")
    options = alpaca(fake_endpoint, SimpleNamespace(model="judge"), tmp_path, "judge.max_retries=3")
    done = train(*options, "judge.concurrency=1")
    assert "Traceback" not in done.stderr and key not in done.stdout + done.stderr
    assert not any({"authorization", "openai-organization"} & headers.keys() for headers in fake_endpoint.headers)
    result, folder = result_of(tmp_path)
    preferences = [row["preference"] for row in json.loads((folder / "annotations.json").read_text())]
    assert set(preferences) <= {1.0, 2.0, None} and preferences.count(None) <= 1
    assert result["judge"]["models"] == ["served-model-7"] and len(result["judge"]["answered"]) == 2
    assert not any(key.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_arena_hard_plays_two_games_per_prompt_with_the_prompt_of_its_config(proxy, served, tmp_path):
    questions, answers = arena_files(tmp_path)
    config = {"system_prompt": "Be fair.", "prompt_template": ["Q {question_1} first {answer_1} second {answer_2}."]}
    prompt_file = write(tmp_path / "judge_config.yaml", config)
    train(
        *POINT,
        "evaluation=arena_hard",
        f"evaluation.prompts_file={questions}",
        f"evaluation.num_prompts={NUM_PROMPTS}",
        "evaluation.generation.max_new_tokens=8",
        "judge=arena_hard",
        f"judge.baseline={answers}",
        f"judge.prompt_file={prompt_file}",
        f"judge.model={served.model}",
        f"judge.base_url={proxy.url}",
        "judge.max_tokens=8",
        f"output_dir={tmp_path}/out",
    )
    result, folder = result_of(tmp_path)
    lines = [json.loads(line) for line in (folder / "judgements.jsonl").open()]
    assert [line["baseline"] for line in lines] == [str(2 * n) for n in range(NUM_PROMPTS)]
    (samples,) = (tmp_path / "out" / "store" / "generate").glob("*/samples.jsonl")
    responses = [json.loads(line)["response"] for line in samples.open()]
    expected = {
        f"Q What is {n} plus {n}? first {a} second {b}."
        for n in range(NUM_PROMPTS)
        for a, b in ((responses[n], str(2 * n)), (str(2 * n), responses[n]))
    }
    assert set(proxy.asked) == expected
    # SmolLM2 writes no label: every comparison is a tie, and the result counts its answers as unparsable.
    judge = result["judge"]
    assert judge["answers"] == 2 * NUM_PROMPTS and 0 < judge["unparsable"] <= 2 * NUM_PROMPTS
    if judge["unparsable"] == 2 * NUM_PROMPTS:
        assert judge["scores"] == {} and result["quality"]["value"] == 0.5


@pytest.mark.parametrize(
    ("rows", "num_prompts", "message"),
    [
        (
            [{"text": "hello"}],
            1,
            "entry 0: needs turns, instruction, prompt, question, problem or Problem; it has 'text'",
        ),
        ([{"instruction": "a", "output": "b"}], 2, "1 prompts and evaluation.num_prompts=2"),
        ([{"instruction": "a", "output": "b"}] * 2, 2, "a prompt occurs twice: 'a'"),
        ([{"instruction": "a"}], 1, "entry 0: needs the text of an answer"),
        ([{"question_id": "1", "turns": [{"content": "a"}, {"content": "b"}]}], 1, "turns must be one user message"),
    ],
)
def test_prompts_that_cannot_be_read_or_compared_are_errors_that_name_them(rows, num_prompts, message, tmp_path):
    file = str(write(tmp_path / "questions.json", rows))
    point = Point(
        dataset=Dataset("mini_tldr", "mini_tldr"),
        evaluation=Evaluation(prompts_file=file, num_prompts=num_prompts),
        judge=Judge(name="tldr", baseline=file),
    )
    with pytest.raises(ConfigError, match=message):
        check_input_files([point])


@pytest.mark.parametrize(
    ("row", "key", "text"),
    [
        ({"question_id": 7, "question": "What is 2+2?", "answer": "4"}, "7", "What is 2+2?"),
        ({"uid": "aime-1", "problem": "What is 2+3?", "answer": "5"}, "aime-1", "What is 2+3?"),
        ({"question_id": "q", "turns": [{"content": "Hello?"}], "prompt": "other"}, "q", "Hello?"),
        ({"instruction": "Hello?", "output": "x"}, "Hello?", "Hello?"),
    ],
)
def test_an_id_matches_answers_and_is_never_the_text_that_is_asked(row, key, text, tmp_path):
    file = str(write(tmp_path / "questions.json", [row]))
    inputs = prompt_inputs(Point(evaluation=Evaluation(prompts_file=file, num_prompts=1)))
    (entry,) = read_prompts(inputs)
    assert (entry.key, entry.prompt.text) == (key, text)
    write(tmp_path / "questions.json", [{"question_id": 7, "answer": "4"}])
    with pytest.raises(ConfigError, match=r"needs turns, instruction, .*; it has 'question_id', 'answer'"):
        read_prompts(prompt_inputs(Point(evaluation=Evaluation(prompts_file=file, num_prompts=1))))


def test_a_prompt_without_an_answer_of_the_baseline_is_named(tmp_path):
    questions, answers = arena_files(tmp_path)
    point = Point(evaluation=Evaluation(prompts_file=str(questions), num_prompts=NUM_PROMPTS))
    prompts = read_prompts(prompt_inputs(point))
    rows = read_answers(str(answers), prompts, "judge.baseline")
    assert [row["response"] for row in rows] == [str(2 * n) for n in range(NUM_PROMPTS)]
    answers.write_text("\n".join(answers.read_text().splitlines()[1:]))
    with pytest.raises(ConfigError, match=r"judge\.baseline=.*: no answer to 'q9'"):
        read_answers(str(answers), prompts, "judge.baseline")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation=alpaca_eval", "judge=alpaca_eval"], "evaluation.prompts_file is not set: evaluation=alpaca_eval"),
        (["judge=alpaca_eval"], "judge.baseline is not set"),
        (["evaluation.prompts_file=nowhere.json", "judge=none"], "evaluation.prompts_file=nowhere.json: no such file"),
        (["judge=arena_hard"], "judge.baseline is not set"),
        (["judge=arena_hard", "judge.baseline=nowhere"], "judge.baseline=nowhere: no such file; it is sft, chosen or"),
        (
            ["judge=arena_hard", "judge.baseline=sft", "judge.prompt_file=README.md"],
            "judge.prompt_file=README.md: needs system_",
        ),
        (["judge=tldr", "judge.base_url=http://x", "judge.prompt_file=README.md"], "judge=tldr has no such field"),
        (["judge=alpaca_eval", "judge.baseline=sft", "judge.model=gpt5"], "judge.model=gpt5: unknown annotator"),
        (
            ["evaluation.prompts_file=README.md"],
            "evaluation.prompts_file: judge=gold knows only the posts of dataset=mini_tldr",
        ),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_an_error_before_anything_runs(overrides, message, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    done = run_in_process(*overrides, f"output_dir={tmp_path}")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()
