"""What is asked of a judge's endpoint before anything runs; the endpoint is a real one on loopback."""

import pytest

from src.config.validation import build_point
from src.errors import ConfigError
from src.judges.annotators import models_asked
from src.judges.endpoint_check import QUESTION, Unreachable, check_endpoint, check_judges, retired_models
from src.planning.content import hashable
from src.planning.plan import make_plan
from src.store.store import Store
from tests.support.commands import SMALL, run_in_process
from tests.support.configs import composed
from tests.support.endpoint import completion
from tests.support.judges import ask
from tests.support.ports import free_port

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
SERVED_ALPACA = ["judge=alpaca_eval", "judge.baseline=sft", "server=vllm", "judge.base_url=server"]
KEY = "sk-canary-0123+456/789"


def judge_of(*overrides):
    """Return the inputs of the judge and its endpoint."""
    stage = make_plan([build_point(composed(*overrides))], Store("nowhere")).stages.popitem()[1]
    return stage.inputs.judge, stage.resources.judge


def warnings_of(endpoint, *overrides, judge="tldr", model="m"):
    options = [f"judge={judge}", f"judge.model='{model}'", f"judge.base_url={endpoint.url}", *overrides]
    return list(check_endpoint(*judge_of(*options, "judge.baseline=sft", "judge.timeout=60")))


def with_logprobs(request):
    assert (request["logprobs"], request["top_logprobs"], request["max_tokens"]) == (True, 5, 1)
    token = {"token": "m", "logprob": -0.1, "bytes": None, "top_logprobs": [{"token": "m", "logprob": -0.1}]}
    reply = completion("m")
    reply["choices"][0]["logprobs"] = {"content": [token]}
    return reply


def test_a_model_on_the_list_is_not_asked_and_one_without_a_list_gets_a_question_of_one_token(fake_endpoint):
    fake_endpoint.models = [{"id": "m", "object": "model"}]
    assert warnings_of(fake_endpoint) == [] and not fake_endpoint.checks
    fake_endpoint.models = None
    assert warnings_of(fake_endpoint) == []
    (question,) = fake_endpoint.checks
    assert question["max_tokens"] == 1 and question["messages"] == [{"role": "user", "content": QUESTION}]
    assert not fake_endpoint.asked


@pytest.mark.parametrize("models", [{}, 7, [7], [{"id": ["m"]}], [None]])
def test_an_odd_list_is_no_list(models, fake_endpoint):
    fake_endpoint.models = models
    assert warnings_of(fake_endpoint) == [] and len(fake_endpoint.checks) == 1


def test_a_model_that_is_refused_is_named_with_those_that_are_there(fake_endpoint):
    fake_endpoint.models = [{"id": f"model-{n}"} for n in range(9)]
    fake_endpoint.check = lambda request: (404, {}, b'{"error": {"message": "The model does not exist"}}')
    with pytest.raises(
        ConfigError, match=r"^judge\.model=m: http.* refuses a question to m: .*does not exist"
    ) as failed:
        warnings_of(fake_endpoint)
    assert "it lists model-0, model-1," in str(failed.value) and "model-5" not in str(failed.value)
    assert not isinstance(failed.value, Unreachable) and "\n" not in str(failed.value)


@pytest.mark.parametrize("reply", [completion("", choices=[]), [], (200, {}, b"<html>"), (204, {}, b"")])
def test_what_is_no_completion_is_an_error_before_anything_runs(reply, fake_endpoint):
    fake_endpoint.check = lambda request: reply
    with pytest.raises(ConfigError, match="gives no chat completion"):
        warnings_of(fake_endpoint)


def test_an_endpoint_that_does_not_answer_is_told_from_one_that_refuses(fake_endpoint):
    fake_endpoint.check = lambda request: (503, {"retry-after-ms": "1"}, b"{}")
    with pytest.raises(Unreachable, match="does not answer: Error code: 503"):
        warnings_of(fake_endpoint)
    assert len(fake_endpoint.checks) == 3
    options = ["judge=tldr", "judge.model=m", f"judge.base_url=http://127.0.0.1:{free_port()}/v1"]
    with pytest.raises(Unreachable, match="does not answer: Connection error"):
        list(check_endpoint(*judge_of(*options)))


def test_the_words_of_an_endpoint_are_told_without_the_key(fake_endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    fake_endpoint.models = [{"id": KEY}]
    fake_endpoint.check = lambda request: (401, {}, f'{{"error": {{"message": "no: {KEY}"}}}}'.encode())
    with pytest.raises(ConfigError, match=r"Error code: 401.*it lists \[key\]") as failed:
        warnings_of(fake_endpoint, "judge.api_key_env=MY_KEY")
    assert KEY not in str(failed.value)
    assert {headers.get("authorization") for headers in fake_endpoint.headers} == {f"Bearer {KEY}"}


def test_an_annotator_with_log_probs_needs_an_endpoint_that_returns_them(fake_endpoint):
    fake_endpoint.models = [{"id": "mine"}]
    fake_endpoint.check = with_logprobs
    assert warnings_of(fake_endpoint, judge="alpaca_eval", model=f"{ANNOTATOR}:mine") == []
    assert [request["model"] for request in fake_endpoint.checks] == ["mine"]
    fake_endpoint.check = lambda request: completion("m")
    with pytest.raises(ConfigError, match="returns no log-probs of mine, which this annotator needs"):
        warnings_of(fake_endpoint, judge="alpaca_eval", model=f"{ANNOTATOR}:mine")
    assert warnings_of(fake_endpoint, model="mine") == []  # the control: a judge that needs none


def test_retired_models_work_by_name_with_a_warning_that_names_the_successor(fake_endpoint):
    fake_endpoint.check = lambda request: with_logprobs(request) if "logprobs" in request else completion("A")
    for judge, model in (("alpaca_eval", ANNOTATOR), ("arena_hard", "gpt-4-1106-preview")):
        (warning,) = warnings_of(fake_endpoint, judge=judge, model=model)
        assert "gpt-4-1106-preview is switched off" in warning and "judge is gpt-4.1-2025-04-14" in warning
    assert {request["model"] for request in fake_endpoint.checks} == {"gpt-4-1106-preview"}


def test_what_an_endpoint_says_of_its_models_end_is_passed_on(fake_endpoint):
    fake_endpoint.models = [{"id": "m", "shutdown_date": "2031-01-14"}, {"id": "n", "shutdown_date": None}]
    (warning,) = warnings_of(fake_endpoint)
    assert warning.endswith("switches m off on 2031-01-14")
    assert warnings_of(fake_endpoint, model="n") == []


def test_the_defaults_ask_models_that_are_not_retired():
    for judge in ("tldr", "alpaca_eval", "arena_hard"):
        models = models_asked(judge_of(f"judge={judge}", "judge.baseline=sft")[0])
        assert models and not set(models) & set(retired_models())
        assert (5 in models.values()) == (judge == "alpaca_eval")


def test_an_annotator_by_name_has_the_identity_it_had_before_models_could_be_named():
    judge, _ = judge_of("judge=alpaca_eval", "judge.baseline=sft", f"judge.model={ANNOTATOR}")
    before = {"name": "alpaca_eval", "baseline": "sft", "model": f"hub:{ANNOTATOR}@default"}
    assert hashable(judge) == dict.fromkeys(("temperature", "max_tokens", "prompt_file", "base_url")) | before
    assert judge.model_name == ANNOTATOR
    other, _ = judge_of("judge=alpaca_eval", "judge.baseline=sft", f"judge.model={ANNOTATOR}:a:b")
    assert (other.asked, other.model_name) == ("a:b", f"{ANNOTATOR}:a:b")


def test_a_judge_that_answered_before_is_asked_again_only_where_samples_are_missing(fake_endpoint, tmp_path):
    options = ["judge=tldr", "judge.model=m", f"judge.base_url={fake_endpoint.url}", "judge.timeout=60"]
    plan = make_plan([build_point(composed(*options, f"output_dir={tmp_path}"))], Store(tmp_path))
    fake_endpoint.check = lambda request: (404, {}, b"{}")

    def is_checked():
        try:
            check_judges(plan, Store(tmp_path), runs_here=True)
        except ConfigError:
            return True
        return False

    assert is_checked()  # nothing is there
    plan.done = {stage.identity for stage in plan.stages.values() if stage.kind != "evaluate"}
    assert is_checked()  # samples alone: a judge that is new to them
    ask(fake_endpoint, tmp_path)
    assert not is_checked()
    plan.done = set()
    assert is_checked()
    plan.needed = set()
    assert not is_checked()


def test_an_endpoint_that_other_machines_reach_is_a_warning(tmp_path, capsys):
    url = f"http://127.0.0.1:{free_port()}/v1"
    point = build_point(composed("judge=tldr", "judge.model=m", f"judge.base_url={url}", f"output_dir={tmp_path}"))
    plan = make_plan([point], Store(tmp_path))
    with pytest.raises(ConfigError, match="does not answer"):
        check_judges(plan, Store(tmp_path), runs_here=True)
    check_judges(plan, Store(tmp_path), runs_here=False)
    assert "does not answer" in (said := capsys.readouterr().err) and "compute nodes must reach it" in said


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_an_unknown_model_stops_a_run_before_anything_is_written(sweep, fake_endpoint, tmp_path):
    fake_endpoint.check = lambda request: (404, {}, b"{}")
    judge = ["judge=tldr", "judge.model=m", f"judge.base_url={fake_endpoint.url}", f"output_dir={tmp_path}/out"]
    done = run_in_process(*sweep, *SMALL, "method=dpo", *judge)
    assert done.returncode == 2 and "refuses a question to m" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list((tmp_path / "out").rglob("*.json")) and not fake_endpoint.asked


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge=open"], "judge.base_url=server: the job serves the judge by server.command; add server=vllm"),
        (["judge=open", "server=vllm", "judge.api_key_env=MY_KEY"], "judge.api_key_env: judge.base_url=server needs"),
        ([*SERVED_ALPACA, f"judge.model={ANNOTATOR}"], f"needs to know the model: judge.model={ANNOTATOR}:MODEL"),
        (["judge=open", "server=vllm", "judge.model=./nowhere"], "judge.model=./nowhere: no such file or folder"),
    ],
)
def test_a_judge_that_cannot_be_served_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        judge_of(*overrides)


def test_the_open_judge_is_the_served_model_and_the_program_that_serves_it(tmp_path):
    judge, _ = judge_of("judge=open", "server=vllm")
    assert judge.server == ("vllm", judge.server[1]) and judge.server[1].startswith("vllm serve {checkpoint}")
    assert judge.asked_name == judge.model_name == "Qwen/Qwen2.5-32B-Instruct"
    annotator, _ = judge_of(*SERVED_ALPACA, f"judge.model={ANNOTATOR}:Qwen/Qwen2.5-32B-Instruct")
    assert annotator.asked_name == judge.asked_name and models_asked(annotator) == {judge.asked_name: 5}
    for name in ("a", "b"):  # local weights count by content
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text(name)
    local = [judge_of("judge=open", "server=vllm", f"judge.model={tmp_path}/{name}")[0].model for name in "ab"]
    assert local[0].fingerprint != local[1].fingerprint
