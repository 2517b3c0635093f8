"""What an endpoint may do wrong, for the judges of Arena-Hard v2 and MT-Bench: a real server on loopback."""

import json
from collections import Counter

import pytest

from src.config.endpoints import normalize_url
from src.config.judge import JudgeEndpoint
from src.data.evaluation_prompts import next_turn, read_prompts
from src.errors import StageError, one_line
from src.judges import Comparison, judge_function
from src.planning.content import ContentPath
from src.planning.identity import DataInputs, EvaluateInputs, JudgeInputs, PromptInputs
from src.planning.resources import Resources
from tests.support.endpoint import FakeEndpoint, completion
from tests.support.judges import Attempt

KEY = "sk-canary-0123456789"
ANSWERS = {"arena_hard_v2": "[[A>B]]", "mt_bench": "[[7]]", "mt_bench_pairwise": "[[A]]"}
QUESTIONS = {"arena_hard_v2": 6, "mt_bench": 6, "mt_bench_pairwise": 12}  # that three prompts make

JSON = {"Content-Type": "application/json"}
FAULTS = [
    (429, {"Retry-After": "0"}, b'{"error": {"message": "made to fail"}}'),
    (500, {}, b"{}"),
    (200, JSON, b'{"choices": ['),
    (200, {"Content-Type": "text/html"}, b"<html>"),
    completion("", choices=[]),
    (200, JSON, None),  # the connection is closed
]


@pytest.fixture(params=ANSWERS)
def judged(request, fake_endpoint, tmp_path):
    """Return (name, function that judges three prompts at this endpoint with these options)."""
    name = request.param
    turns = [
        {"turns": [f"Question {n}?", f"And {n}?"]} if "mt_bench" in name else {"prompt": f"Q {n}?"} for n in range(3)
    ]
    categories = ("hard_prompt", "creative_writing", "hard_prompt")
    rows = [{"uid": f"q{n}", "category": categories[n], **row} for n, row in enumerate(turns)]
    file = tmp_path / "question.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    data = DataInputs("mini_tldr", 0, 160, 112)
    prompts = PromptInputs(
        data, 3, ContentPath.of(str(file), "evaluation.prompts_file"), 2 if "mt_bench" in name else 1
    )
    comparisons = []
    for index, entry in enumerate(read_prompts(prompts)):
        prompt = entry.prompt
        for turn in range(1, 2 + len(entry.prompt.follow_ups)):
            row = {"index": index, "turn": turn, "response": f"mine {index} {turn}"}
            comparisons.append(Comparison(prompt, row, {"response": f"theirs {index} {turn}"}))
            prompt = next_turn(prompt, row["response"]) if prompt.follow_ups else prompt
    url = normalize_url(fake_endpoint.url)
    judge = JudgeInputs(name, "sft", "m", temperature=0.0, max_tokens=9, base_url=url)
    inputs = EvaluateInputs("setup", "sft", prompts, judge, "win_rate", 0.5, 0)
    fake_endpoint.reply = lambda question: completion(ANSWERS[name])

    def run(**options):
        endpoint = JudgeEndpoint(url, **{"timeout": 60.0, "max_retries": 0, "concurrency": 1, **options})
        return judge_function(name)(inputs, Resources(judge=endpoint), comparisons, Attempt(tmp_path))

    return name, run


def test_every_question_is_answered_once_despite_any_fault(judged, fake_endpoint):
    name, run = judged
    faults, asked = iter(FAULTS), Counter()

    def reply(question):
        asked[question] += 1
        return next(faults, completion(ANSWERS[name])) if asked[question] == 1 else completion(ANSWERS[name])

    fake_endpoint.reply = reply
    result = run(max_retries=3, concurrency=12)
    assert sorted(asked.values(), reverse=True)[: len(FAULTS)] == [2] * len(FAULTS)
    assert len(fake_endpoint.asked) == QUESTIONS[name] + len(FAULTS)
    assert result.usage["answers"] == result.usage["calls"] == QUESTIONS[name] and result.usage["unparsable"] == 0
    assert result.usage["models"] == ["served-model-7"] and result.scores
    again = run()
    assert again.verdicts == result.verdicts and again.scores == result.scores
    assert len(fake_endpoint.asked) == QUESTIONS[name] + len(FAULTS)


@pytest.mark.parametrize("content", [None, [], "no verdict", "cut \ud83d", "nul \x00 <script>", "[[", "[[Z]]"])
def test_an_answer_without_a_verdict_is_kept_and_counted_and_has_no_score(content, judged, fake_endpoint):
    name, run = judged
    fake_endpoint.reply = lambda question: completion(content)
    for _ in range(2):
        result = run()
        assert result.usage["unparsable"] == result.usage["answers"] == QUESTIONS[name] == len(fake_endpoint.asked)
        assert result.scores == {} and {verdict.value for verdict in result.verdicts} == {0.5}
    json.dumps([verdict.reason for verdict in result.verdicts], ensure_ascii=False).encode()


def test_parts_of_an_answer_are_read_as_one_text(judged, fake_endpoint):
    name, run = judged
    parts = [{"type": "thinking", "thinking": "hm"}, *({"type": "text", "text": text} for text in ANSWERS[name])]
    fake_endpoint.reply = lambda question: completion(parts, usage=None)
    assert run().usage["unparsable"] == 0


def test_an_endpoint_that_dies_or_a_spent_budget_keeps_answers_and_asks_only_the_others(judged, fake_endpoint):
    name, run = judged
    replies = iter([completion(ANSWERS[name])] * 2)
    fake_endpoint.reply = lambda question: next(replies, (503, {}, b"{}"))
    total = QUESTIONS[name]
    with pytest.raises(
        StageError, match=rf"failed after 1 attempt: .*503.*; 2 of {total} answers were saved"
    ) as failed:
        run()
    assert "\n" not in one_line(failed.value)
    fake_endpoint.asked.clear()
    fake_endpoint.reply = lambda question: completion(ANSWERS[name])
    with pytest.raises(StageError, match=rf"judge\.max_calls=4 reached.*4 of {total} answers were saved"):
        run(max_calls=4)
    assert len(fake_endpoint.asked) == 2
    run()
    assert len(fake_endpoint.asked) == total - 2


def test_no_key_is_written_or_follows_a_redirect(judged, fake_endpoint, tmp_path, monkeypatch, caplog):
    name, run = judged
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    other = FakeEndpoint()
    fake_endpoint.reply = lambda question: (307, {"Location": f"{other.url}/chat/completions?key={KEY}"}, b"")
    with caplog.at_level("INFO"), pytest.raises(StageError, match="redirects to") as redirected:
        run(api_key_env="MY_KEY")
    other.close()
    assert not other.asked
    error = json.dumps({"error": {"message": f"you said {KEY}"}}).encode()
    fake_endpoint.reply = lambda question: (401, {}, error)
    with caplog.at_level("INFO"), pytest.raises(StageError, match="you said") as refused:
        run(api_key_env="MY_KEY")
    fake_endpoint.reply = lambda question: completion(f"{ANSWERS[name]} by {KEY}", model=KEY)
    result = run(api_key_env="MY_KEY")
    assert fake_endpoint.headers[-1]["authorization"] == f"Bearer {KEY}"  # the control: it was there
    told = one_line(redirected.value) + one_line(refused.value) + caplog.text + repr(result)
    assert KEY not in told
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
