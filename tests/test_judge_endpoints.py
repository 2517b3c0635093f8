"""What a judge's endpoint may do wrong, and where keys go: a real server on loopback that replies what a test says."""

import base64
import json
import threading

import pytest

from src.config.endpoints import check_key_name, check_url
from src.config.judge import Judge, JudgeEndpoint
from src.config.judge_rules import check_judges
from src.config.schema import Dataset, Point
from src.data.rows import text_prompt
from src.errors import ConfigError, StageError, one_line
from src.judges import Comparison
from src.judges.judge_client import JudgeClient
from src.judges.tldr import tldr
from src.planning.identity import DataInputs, EvaluateInputs, JudgeInputs, PromptInputs
from src.planning.resources import Resources
from src.store.files import write_jsonl
from tests.support.endpoint import FakeEndpoint, completion
from tests.support.judges import Attempt, ask

KEY = "sk-canary-0123+456/789"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("Verdict: A", "Verdict: A"),
        ([{"type": "text", "text": "Verdict: "}, {"type": "text", "text": "A"}], "Verdict: A"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "Verdict: B"}], "Verdict: B"),
        ([], ""),
        (None, ""),
        ("cut emoji \ud83d", "cut emoji ?"),
        ("line \u2028 and \x00 <script>", "line \u2028 and \x00 <script>"),
    ],
)
def test_an_odd_answer_is_kept_once_as_text(content, text, fake_endpoint, tmp_path):
    fake_endpoint.reply = lambda question: completion(content)
    answer = ask(fake_endpoint, tmp_path)
    assert answer["text"] == text
    assert ask(fake_endpoint, tmp_path) == answer and len(fake_endpoint.asked) == 1
    write_jsonl(tmp_path / "judgements.jsonl", [{"reason": answer["text"]}])


@pytest.mark.parametrize(
    "usage",
    ["many", None, {}, [1], {"prompt_tokens": "5"}, {"prompt_tokens": -5}, {"prompt_tokens": float("nan")}, 10**400],
)
def test_an_answer_without_numbers_of_tokens_is_kept_and_counts_none(usage, fake_endpoint, tmp_path):
    fake_endpoint.reply = lambda question: completion("Verdict: A", usage=usage)
    for _ in range(2):
        answer = ask(fake_endpoint, tmp_path, input_price=1.0, output_price=1.0, max_cost=1.0)
        assert answer["text"] == "Verdict: A" and answer["prompt_tokens"] == answer["completion_tokens"] == 0
    assert len(fake_endpoint.asked) == 1


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (completion("", choices=[]), "not a completion"),
        (completion("", choices={}), "not a completion"),
        (completion("", choices=None), "not a completion"),
        (completion(7), "its content is not text"),
        ([], "not a completion"),
        ((200, {"Content-Type": "text/html"}, b"<html>Welcome</html>"), "not a completion"),
        ((204, {}, b""), "not a completion"),
        ((200, JSON, b'{"choices": ['), "not a completion"),
        ((200, JSON, b"[" * 100_000), "not a completion"),
        ((200, JSON, b"\xff\xfe\x00"), "not a completion"),
        ((200, JSON, json.dumps(completion("x" * 5 * 2**20)).encode()), "longer than 4 MiB"),
        ((200, JSON, None), "Connection error. (Server disconnected"),
        ((500, JSON, b"[" * 100_000), "Error code: 500"),
    ],
)
def test_what_is_no_answer_is_one_line_and_is_not_kept(reply, message, fake_endpoint, tmp_path):
    fake_endpoint.reply = lambda question: reply
    with pytest.raises(StageError) as failed:
        ask(fake_endpoint, tmp_path)
    assert message in one_line(failed.value) and "\n" not in str(failed.value) and len(str(failed.value)) < 500
    assert not list(tmp_path.rglob("*.jsonl"))
    fake_endpoint.reply = lambda question: completion("Verdict: A")  # the same question, once the endpoint is well
    assert ask(fake_endpoint, tmp_path)["text"] == "Verdict: A"


def test_half_a_response_and_a_hanging_server_are_one_line(fake_endpoint, tmp_path):
    fake_endpoint.cut = True
    with pytest.raises(StageError, match="Connection error"):
        ask(fake_endpoint, tmp_path)
    given_up = threading.Event()
    fake_endpoint.cut, fake_endpoint.reply = False, lambda question: given_up.wait(60) and None
    with pytest.raises(StageError, match="failed after 1 attempt: Request timed out"):
        ask(fake_endpoint, tmp_path, timeout=0.3)
    given_up.set()


def test_refusals_are_counted_as_unparsable_and_the_models_and_dates_are_told(fake_endpoint, tmp_path):
    numbers = iter(range(9))

    def reply(question):
        number = next(numbers)
        return completion(None if number == 0 else "Verdict: A", model=["gpt-a", "gpt-b", None, {}][number])

    fake_endpoint.reply = reply
    judge = JudgeInputs("tldr", "sft", "m", temperature=0.0, max_tokens=2, base_url=fake_endpoint.url)
    prompts = PromptInputs(DataInputs("mini_tldr", 0, 160, 112), 10, None)
    inputs = EvaluateInputs("setup", "sft", prompts, judge, "win_rate", 0.5, 0)
    rows = [Comparison(text_prompt(f"post {n}"), {"response": "a"}, {"response": "b"}) for n in range(2)]
    resources = Resources(judge=JudgeEndpoint(fake_endpoint.url, concurrency=1))
    usage = tldr(inputs, resources, rows, Attempt(tmp_path)).usage
    assert (usage["answers"], usage["unparsable"], usage["models"]) == (4, 1, ["gpt-a", "gpt-b"])
    first, last = usage["answered"]
    assert first <= last and len(first) == len("2026-01-01T00:00:00Z")


def test_only_the_key_that_is_named_is_sent_to_an_endpoint_of_ones_own(fake_endpoint, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nx-api-key: {KEY}")
    ask(fake_endpoint, tmp_path)
    assert not any(KEY in value for value in fake_endpoint.headers[0].values())
    assert "authorization" not in fake_endpoint.headers[0]
    monkeypatch.setenv("MY_KEY", "mine-0123456789")
    ask(fake_endpoint, tmp_path / "other", api_key_env="MY_KEY")
    assert fake_endpoint.headers[1]["authorization"] == "Bearer mine-0123456789"
    assert not any(KEY in value for value in fake_endpoint.headers[1].values())


def test_a_redirect_is_refused_and_neither_key_nor_question_follows_it(fake_endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    other = FakeEndpoint()
    fake_endpoint.reply = lambda question: (307, {"Location": f"{other.url}/chat/completions?key={KEY}"}, b"")
    with pytest.raises(StageError, match=r"redirects to 127\.0\.0\.1; set judge\.base_url") as failed:
        ask(fake_endpoint, tmp_path, api_key_env="MY_KEY", max_retries=3)
    other.close()
    assert len(fake_endpoint.asked) == 1 and not other.asked and KEY not in one_line(failed.value)


@pytest.mark.parametrize(
    "words",
    [
        KEY,
        KEY.upper(),
        KEY.replace("+", "%2B").replace("/", "%2F"),
        base64.b64encode(f"Bearer {KEY}".encode()).decode(),
        base64.urlsafe_b64encode(f"user:{KEY}".encode()).decode(),
    ],
)
def test_the_endpoints_words_are_told_without_the_key(words, fake_endpoint, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    core = words[len(words) // 2 - 5 : len(words) // 2 + 5]
    fake_endpoint.reason = KEY
    error = json.dumps({"error": {"message": f"you said {words}"}}).encode()
    fake_endpoint.reply = lambda question: (401, {"x-key": KEY}, error)
    with caplog.at_level("INFO"), pytest.raises(StageError, match="you said") as failed:
        ask(fake_endpoint, tmp_path, api_key_env="MY_KEY")
    assert core.lower() not in (one_line(failed.value) + caplog.text).lower()
    fake_endpoint.reply = lambda question: completion(f"Verdict: A, {words}", model=words)
    answer = ask(fake_endpoint, tmp_path, api_key_env="MY_KEY")
    assert answer["text"].startswith("Verdict: A") and core.lower() not in json.dumps(answer).lower()
    assert not any(core.lower() in path.read_text().lower() for path in tmp_path.rglob("*.jsonl"))


def test_a_value_that_is_no_key_is_refused_and_not_repeated(fake_endpoint, tmp_path, monkeypatch):
    for value, message in (("canary\nx: y", "no key has"), ("canaré", "no key has"), ("", "is not set")):
        monkeypatch.setenv("MY_KEY", value)
        with pytest.raises(StageError, match=message) as failed:
            ask(fake_endpoint, tmp_path, api_key_env="MY_KEY")
        assert "canar" not in str(failed.value)
    assert not fake_endpoint.asked


def judged_by(**options):
    return Point(dataset=Dataset("mini_tldr", "mini_tldr"), judge=Judge(name="tldr", model="m", **options))


def test_a_key_crosses_a_network_encrypted_only():
    for host in ("localhost", "127.0.0.1", "127.8.9.1", "[::1]", "a.localhost"):
        check_judges(judged_by(base_url=f"http://{host}:8000/v1", api_key_env="MY_KEY"))
    check_judges(judged_by(base_url="https://node7/v1", api_key_env="MY_KEY"))
    check_judges(judged_by(base_url="http://node7/v1"))
    for host in ("node7", "10.0.0.1", "localhost.example.org", "[2001:db8::1]", "128.0.0.1"):
        with pytest.raises(ConfigError, match="would be sent unencrypted"):
            check_judges(judged_by(base_url=f"http://{host}:8000/v1", api_key_env="MY_KEY"))


@pytest.mark.parametrize(
    "url",
    [
        "https://me:canary@h/v1",
        "https://me:ca/nary@h",
        "https://h/v1?api-key=canary",
        "https://h/v1#canary",
        "https://canary@h",
    ],
)
def test_an_address_that_may_hold_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError) as refused:
        check_url("judge.base_url", url)
    assert str(refused.value).startswith("judge.base_url: ") and "canary" not in str(refused.value)


@pytest.mark.parametrize("name", ["hf_canary", "sk-canary", "AKIAIOSFODNN7EXAMPLE", "1KEY", "", "MY KEY", "KEY\n"])
def test_the_name_of_a_key_is_not_a_key(name):
    with pytest.raises(ConfigError) as refused:
        check_key_name("judge.api_key_env", name)
    assert str(refused.value).startswith("judge.api_key_env: must be") and (not name or name not in str(refused.value))
    for good in ("OPENAI_API_KEY", "MY_KEY_2", "_K", "HUGGINGFACEHUB_API_TOKEN"):
        check_key_name("judge.api_key_env", good)


def test_an_address_in_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    judge = JudgeInputs("tldr", "sft", "m", temperature=0.0, max_tokens=2)
    JudgeClient(judge, JudgeEndpoint(), tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    with pytest.raises(StageError, match="OPENAI_BASE_URL is set"):
        JudgeClient(judge, JudgeEndpoint(), tmp_path)
