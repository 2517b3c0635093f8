"""Judges: verdicts, retries, budget, and answers that are kept; the endpoint is a real one."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from src.config.judge import JudgeEndpoint
from src.data.rows import text_prompt
from src.errors import StageError
from src.judges import Comparison
from src.judges.answers import Answers, is_text
from src.judges.judge_client import JudgeClient
from src.judges.tldr import average_games, build_chats, parse_winner
from src.planning.content import ContentPath
from src.planning.identity import DataInputs, EvaluateInputs, JudgeInputs, PromptInputs
from src.planning.resources import Resources
from tests.support.commands import SMALL, run_in_process, start, train
from tests.support.small_models import write_reward_model

NUM_PROMPTS = 12  # two questions each


class Attempt:
    identity = "here"

    def step(self, step, total):
        pass


def client(proxy, served, folder, **options):
    judge = JudgeInputs("tldr", "sft", str(served.model), temperature=0.0, max_tokens=2)
    options = {"timeout": 30 if "slow" in proxy.faults else 60, "concurrency": 2, **options}
    return JudgeClient(judge, JudgeEndpoint(proxy.url, **options), folder)


def chats(count):
    return [[{"role": "user", "content": f"Say the number {n}."}] for n in range(count)]


def test_a_verdict_is_the_mean_of_both_orders():
    assert average_games("A is better.\nVerdict: A", "Verdict: B").value == 1.0
    assert average_games("Verdict: B", "Verdict: A").value == 0.0
    assert average_games("Verdict: A", "Verdict: A").value == 0.5  # whatever comes first wins
    assert average_games("Verdict: C", "**Verdict:** B").value == 0.75
    assert average_games("Both are fine, who knows?", "Verdict: B").value == 1.0  # one game was played
    assert average_games("", "no idea").value == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Verdict: A", "A"),
        ("verdict: **b**", "B"),
        ("C.", "C"),
        ("(B)", "B"),
        ("A because B", None),
        ("", None),
        ("Verdict: Apples", None),
        ("Verdict: Summary B", "B"),
        ("Final verdict: a tie", None),
        ("Verdict: A tie", None),
        ("As asked I end with 'Verdict: A' or 'Verdict: B'.\nVerdict: C", "C"),
    ],
)
def test_the_last_verdict_of_an_answer_counts(text, expected):
    assert parse_winner(text) == expected


def test_a_judge_sees_both_summaries_in_both_orders_and_not_whose_they_are():
    first, second = build_chats(Comparison(text_prompt("the post"), {"response": "mine {x}"}, {"response": "other"}))
    for text, a, b in ((first[0]["content"], "mine {x}", "other"), (second[0]["content"], "other", "mine {x}")):
        assert text.index("the post") < text.index(a) < text.index(b)
    assert "baseline" not in first[0]["content"] and "policy" not in first[0]["content"]


def test_every_question_is_answered_once_despite_any_fault(proxy, served, tmp_path):
    proxy.faults.extend([429, 500, "slow", "cut", "garbage", "empty", 503, None, 429])
    answers = client(proxy, served, tmp_path).complete(chats(8), Attempt())
    assert len(answers) == 8 and all(answer["prompt_tokens"] > 0 for answer in answers)
    assert sorted(proxy.answered) == sorted(question[0]["content"] for question in chats(8))
    assert len(proxy.asked) == 8 + 8  # one retry for every fault
    assert client(proxy, served, tmp_path).complete(chats(8), Attempt()) == answers
    assert len(proxy.asked) == 16


def test_a_spent_budget_stops_questions_and_keeps_answers(proxy, served, tmp_path):
    with pytest.raises(StageError, match=r"judge\.max_calls=5 reached.*5 of 8 answers were saved"):
        client(proxy, served, tmp_path, max_calls=5).complete(chats(8), Attempt())
    assert len(proxy.asked) == 5
    prices = {"input_price": 1e6, "output_price": 1e6}  # per million tokens: a dollar per token
    spent = sum(answer["prompt_tokens"] + answer["completion_tokens"] for answer in _saved(tmp_path))
    most = len("Say the number 5.") / 3 + 2
    with pytest.raises(StageError, match=rf"judge\.max_cost=.* reached \({spent:.3g} spent.*5 of 8 answers were saved"):
        client(proxy, served, tmp_path, max_cost=spent + 0.9 * most, **prices).complete(chats(8), Attempt())
    with pytest.raises(StageError, match=r"judge\.max_cost=.* reached.*6 of 8 answers were saved"):
        client(proxy, served, tmp_path, max_cost=spent + 1.1 * most, **prices).complete(chats(8), Attempt())
    assert len(proxy.asked) == 6
    assert len(client(proxy, served, tmp_path, max_calls=8).complete(chats(8), Attempt())) == 8
    assert len(proxy.asked) == 8


def _saved(folder):
    return [json.loads(line)["answer"] for file in folder.rglob("*.jsonl") for line in file.open()]


def test_answers_of_other_processes_are_read_and_half_lines_are_not(tmp_path):
    answers, others = (Answers(tmp_path, {"text": is_text}) for _ in range(2))
    others.add("a", {"text": "x", "prompt_tokens": 3})
    answers.refresh()
    assert answers.known == {"a": {"text": "x", "prompt_tokens": 3}} and answers.totals["prompt_tokens"] == 3
    (torn,) = tmp_path.glob("*.jsonl")
    with torn.open("a") as handle:
        handle.write('{"key": "b", "answer": {"te')
    answers.refresh()
    assert set(answers.known) == {"a"}
    with torn.open("a") as handle:  # with space on the disk again, the next answer continues the torn line
        handle.write('{"key": "c", "answer": {}}\n{"key": "d", "answer": {"text": ""}}\n')
    answers.refresh()
    assert set(answers.known) == {"a", "d"}


def judge_options(proxy, served, folder, *more):
    return [
        *("method=dpo", "beta=0.1", *SMALL, f"evaluation.num_prompts={NUM_PROMPTS}", f"output_dir={folder}"),
        *("judge=tldr", f"judge.base_url={proxy.url}", f"judge.model={served.model}", "judge.max_tokens=2"),
        *("judge.max_retries=1", "judge.concurrency=2", *more),
    ]


def test_an_endpoint_that_dies_is_asked_only_for_missing_answers(proxy, served, tmp_path):
    def die_at_nine():
        if len(proxy.answered) == 9:
            served.kill()

    proxy.on_answer = die_at_nine
    died = train(*judge_options(proxy, served, tmp_path), check=False)
    assert died.returncode == 1 and "Traceback" not in died.stderr, died.stderr
    assert f"{proxy.url} failed after 2 attempts" in died.stderr
    assert "rerun to request the remaining ones" in died.stderr
    known = list(proxy.answered)
    assert 9 <= len(known) <= 10

    proxy.on_answer = lambda: None
    proxy.asked.clear()
    served.start()
    done = train(*judge_options(proxy, served, tmp_path))
    assert "win_rate" in done.stdout
    assert len(set(proxy.asked)) == len(proxy.asked) and not set(proxy.asked) & set(known)

    (result,) = (tmp_path / "store" / "evaluate").glob("*/result.json")
    values = json.loads(result.read_text())
    assert values["judge"]["answers"] == 2 * NUM_PROMPTS and values["judge"]["calls"] == len(proxy.asked) + len(known)
    assert values["quality"]["n"] == NUM_PROMPTS
    lines = [json.loads(line) for line in (result.parent / "judgements.jsonl").open()]
    assert len(lines) == NUM_PROMPTS and all(line["reason"].startswith("as A: ") for line in lines)


def test_an_interrupted_judge_keeps_its_answers(proxy, served, tmp_path):
    process = start(*judge_options(proxy, served, tmp_path))
    proxy.on_answer = lambda: len(proxy.answered) == 5 and os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    proxy.on_answer = lambda: None
    known = list(proxy.answered)
    assert 5 <= len(known) < 2 * NUM_PROMPTS - 4
    proxy.asked.clear()
    train(*judge_options(proxy, served, tmp_path))
    assert proxy.asked and not set(proxy.asked) & set(known)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge=tldr"], "OPENAI_API_KEY is not set"),
        (["judge=tldr", "judge.base_url=localhost:8000"], "must begin with http"),
        (["judge=tldr", "judge.base_url=http://x", "judge.model=null"], "judge.model is not set"),
        (["judge=tldr", "judge.base_url='http://[::1'"], "judge.base_url='http://[::1': not an address"),
        (["judge=tldr", "judge.base_url=http://x:99999/v1"], "not an address; must be like http://localhost:8000/v1"),
        (["judge=tldr", "judge.base_url=http://x", "judge.api_key_env=MY_KEY"], "would be sent unencrypted"),
        (
            ["judge=tldr", "judge.base_url=http://127.0.0.1:1", "judge.api_key_env=MY_KEY"],
            "MY_KEY: this variable is not",
        ),
        (["judge=tldr", "judge.max_cost=5", "judge.input_price=null"], "needs judge.input_price"),
        (["judge=gold", "judge.base_url=http://x"], "judge=gold has no such field"),
        (["judge=reward_model"], "judge.model is not set"),
        (["judge=reward_model", "judge.model=./nowhere"], "judge.model=./nowhere: no such file or folder"),
        (["judge=tldr", "judge.baseline=chosen"], "has no pairs on its held-out prompts"),
        (["judge=none"], "evaluation.metric=win_rate needs a judge"),
    ],
)
def test_a_wrong_judge_is_an_error_before_anything_runs(overrides, message, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    done = run_in_process(*overrides, f"output_dir={tmp_path}")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    return write_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.mark.slow
def test_the_higher_reward_wins_whatever_shares_a_batch(reward_folder, tmp_path):
    run = ["method=dpo", "beta=0.1", *SMALL, "judge=reward_model", f"judge.model={reward_folder}"]
    train(*run, f"output_dir={tmp_path}")
    (folder,) = (path.parent for path in (tmp_path / "store" / "evaluate").glob("*/DONE"))
    upstream = json.loads((folder / "stage.json").read_text())["upstream"]
    samples, baseline = (
        [json.loads(line) for line in (tmp_path / "store" / "generate" / upstream[role] / "samples.jsonl").open()]
        for role in ("samples", "baseline")
    )
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = LlamaForSequenceClassification.from_pretrained(reward_folder).eval()

    def reward(row):
        with torch.no_grad():
            return model(**tokenizer(f"{row['prompt']}\n\n{row['response']}", return_tensors="pt")).logits.item()

    verdicts = [json.loads(line)["verdict"] for line in (folder / "judgements.jsonl").open()]
    expected = []
    for sample, other in zip(samples, baseline, strict=True):
        same = sample["response"] == other["response"]
        expected.append(0.5 if same else float(reward(sample) > reward(other)))
    assert verdicts == expected and {0.0, 1.0} <= set(verdicts)


def test_rewards_of_the_baseline_are_computed_once(reward_folder, tmp_path):
    from src.judges.reward_model import reward_model

    judge = JudgeInputs("reward_model", "sft", ContentPath.of(str(reward_folder), "judge.model"))
    prompts = PromptInputs(DataInputs("mini_tldr", 0, 160, 112), 10, None)
    inputs = EvaluateInputs("setup", "sft", prompts, judge, "win_rate", 0.5, 0)
    attempt = Attempt()
    attempt.output_dir = tmp_path
    rows = [{"response": f"my cat number {n} ran"} for n in range(20)]
    first = [Comparison(text_prompt("a post"), row, {"response": "a baseline"}) for row in rows[:10]]
    second = [Comparison(text_prompt("a post"), row, {"response": "a baseline"}) for row in rows[5:]]
    assert reward_model(inputs, Resources(), first, attempt).usage["calls"] == 11
    attempt.identity = "there"
    assert reward_model(inputs, Resources(), second, attempt).usage == {"answers": 30, "calls": 10}
