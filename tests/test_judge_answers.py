"""Answers are those of one judge, and of the right shape, whatever is in the store."""

import json
from dataclasses import replace

import pytest

from src.config.validation import build_point
from src.judges.answers import Answers, is_number
from src.planning.content import ContentPath
from src.planning.identity import JudgeInputs
from src.planning.stage import stages_of
from src.store.store import Store
from tests.support.commands import SMALL, train
from tests.support.configs import composed
from tests.support.endpoint import FakeEndpoint, completion
from tests.support.judges import ask

LONG = "o" * 120


@pytest.mark.parametrize(
    ("model", "other"),
    [("org/m", "org_m"), ("org/m", "org:m"), (f"a/{LONG}", f"b/{LONG}"), ("m", "M"), ("...", "___"), ("é", "ü")],
)
def test_another_model_is_asked_again_however_its_name_looks(model, other, fake_endpoint, tmp_path):
    fake_endpoint.reply = lambda question: completion(f"answer {len(fake_endpoint.asked)}")
    assert ask(fake_endpoint, tmp_path, model=model)["text"] == "answer 1"
    assert ask(fake_endpoint, tmp_path, model=other)["text"] == "answer 2"
    assert ask(fake_endpoint, tmp_path, model=model)["text"] == "answer 1" and len(fake_endpoint.asked) == 2


def test_another_server_is_asked_again(fake_endpoint, tmp_path):
    other = FakeEndpoint()
    other.reply = lambda question: completion("Verdict: B")
    assert ask(fake_endpoint, tmp_path)["text"] == "Verdict: A"
    assert ask(other, tmp_path)["text"] == "Verdict: B"
    other.close()


def test_the_address_is_in_the_identity_in_one_spelling():
    point = build_point(composed("judge=tldr", "judge.model=default"))

    def identity(url):
        return stages_of(replace(point, judge=replace(point.judge, base_url=url)))[-1].identity

    same = ["http://Node7:80/v1", "HTTP://node7/v1/", "http://node7/v1"]
    assert len(set(map(identity, same))) == 1
    others = [None, "http://node8/v1", "https://node7/v1", "http://node7:8000/v1", "http://node7/V1"]
    assert len(set(map(identity, [same[0], *others]))) == 6


def test_reward_models_are_told_apart_by_content(tmp_path):
    folders = []
    for parent, content in (("a", "1"), ("b", "2"), ("c", "1")):
        folder = tmp_path / parent / "reward"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(content)
        judge = JudgeInputs("reward_model", "sft", ContentPath.of(str(folder), "judge.model"))
        answers = Answers.of_judge(judge, tmp_path, {"reward": is_number})
        answers.add("question", {"reward": len(folders)})
        folders.append(answers)
    for number, answers in enumerate(folders):
        answers.refresh()
        assert answers.known["question"]["reward"] == number
    assert len(list(Store(tmp_path).root.glob("answers/*/*"))) == 3


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"7",
        b'{"key": "KEY"}',
        b'{"key": ["KEY"], "answer": ANSWER}',
        b'{"key": "KEY", "answer": "text"}',
        b'{"key": "KEY", "answer": {"text": ["part"], "prompt_tokens": 1, "completion_tokens": 1, "by": "x"}}',
        b'{"key": "KEY", "answer": {"text": "\\ud83d", "prompt_tokens": 1, "completion_tokens": 1, "by": "x"}}',
        b'{"key": "KEY", "answer": {"text": "x", "prompt_tokens": NaN, "completion_tokens": 1, "by": "x"}}',
        b'{"key": "KEY", "answer": {"text": "x", "prompt_tokens": "1", "completion_tokens": 1, "by": "x"}}',
        b'{"key": "KEY", "answer": {"text": "Verdict: B", "by": "x"}}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"key": ' + b"1" * 5000 + b"}",
    ],
)
def test_a_line_of_another_shape_is_skipped_with_one_warning_and_asked_again(line, fake_endpoint, tmp_path, caplog):
    ask(fake_endpoint, tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    row = json.loads(file.read_text())
    good = file.read_bytes()
    other = json.dumps(row | {"key": "another"}).encode()
    answer = json.dumps(row["answer"]).encode()
    file.write_bytes(line.replace(b"KEY", row["key"].encode()).replace(b"ANSWER", answer) + b"\n" + other + b"\n")
    assert ask(fake_endpoint, tmp_path)["text"] == "Verdict: A" and len(fake_endpoint.asked) == 2
    (warning,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert f"{file}: 1 of 2 lines have no answer" in warning
    caplog.clear()
    file.write_bytes(good)  # the control: a good line is neither skipped nor asked again
    assert ask(fake_endpoint, tmp_path)["text"] == "Verdict: A" and len(fake_endpoint.asked) == 2 and not caplog.records


def test_a_file_that_cannot_be_read_does_not_stop_a_judge(fake_endpoint, tmp_path, caplog):
    ask(fake_endpoint, tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    file.unlink()
    file.mkdir()
    assert ask(fake_endpoint, tmp_path)["text"] == "Verdict: A" and len(fake_endpoint.asked) == 2
    assert f"{file} cannot be read (Is a directory)" in caplog.text


@pytest.mark.slow
def test_a_run_with_another_judge_asks_it_and_says_which_models_answered(fake_endpoint, tmp_path):
    other = FakeEndpoint()
    other.reply = lambda question: completion("Verdict: C", model="another-model")

    def run(endpoint, model):
        judge = ["judge=tldr", f"judge.base_url={endpoint.url}", f"judge.model={model}"]
        done = train("-m", "method=dpo", "beta=0.1", *SMALL, *judge, f"output_dir={tmp_path}", "sweep.name=s")
        assert "Traceback" not in done.stderr
        results = [json.loads(path.read_text()) for path in (tmp_path / "store" / "evaluate").glob("*/result.json")]
        return results, (tmp_path / "sweeps" / "s" / "report.html").read_text()

    _, page = run(fake_endpoint, "org/m")
    assert len(fake_endpoint.asked) > 10 and "Answered by served-model-7" in page
    num_asked = len(fake_endpoint.asked)
    run(fake_endpoint, "org_m")
    assert len(fake_endpoint.asked) == 2 * num_asked
    results, page = run(other, "org_m")
    assert len(other.asked) == num_asked and "Answered by another-model" in page
    assert sorted(result["judge"]["models"] for result in results) == [["another-model"], *[["served-model-7"]] * 2]
    assert {result["quality"]["value"] for result in results} == {0.5}
    assert all(result["judge"]["answered"][0] <= result["judge"]["answered"][1] for result in results)
    run(fake_endpoint, "org/m")
    assert len(fake_endpoint.asked) == 2 * num_asked  # the control: the first judge has its answers
    other.close()
