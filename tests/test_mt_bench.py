"""MT-Bench: conversations of two turns are sampled with the model's template, rated, and compared in both orders."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from src.config.schema import Evaluation, Point
from src.config.validation import build_point
from src.data.evaluation_prompts import read_answers, read_prompts, read_references
from src.errors import ConfigError
from src.judges.mt_bench import parse_rating, scores_of
from src.judges.mt_bench_pairwise import outcome
from src.judges.mt_bench_turns import PROMPT_FILE, Turn
from src.judges.prompt_file import load_mt_bench_prompts
from src.model.loading import load_for_inference, load_template
from src.model.sampling import sample
from src.planning.identity import GenerateInputs
from src.planning.inputs import prompt_inputs
from src.planning.resources import Resources, max_sequence_tokens
from src.planning.stage import stages_of
from src.preflight import check_input_files
from src.stages import generate
from tests.support.chat_model import write_chat_model
from tests.support.commands import SMALL, run_in_process
from tests.support.configs import composed, identities
from tests.support.endpoint import FakeEndpoint, completion

CATEGORIES = ("writing", "math", "coding", "humanities", "writing", "reasoning")


def write_lines(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def mt_bench_files(folder):
    """Write questions, reference answers and a baseline's answers in the layouts of FastChat's llm_judge."""
    questions = [
        {"question_id": 81 + n, "category": category, "turns": [f"Name {n} animals.", f"Name {n} plants."]}
        for n, category in enumerate(CATEGORIES)
    ]
    questions[1]["reference"] = ["own dog", "own oak"]
    questions[2]["reference"] = ["own cat", ""]  # as some of the benchmark's are
    questions[3]["reference"] = ["not used", "in humanities"]

    def answers(name, rows):
        turns = [{"index": 0, "turns": [f"{name} {n} one", f"{name} {n} two"]} for n, _ in rows]
        return [
            {"question_id": row["question_id"], "answer_id": "x", "model_id": name, "choices": [turn], "tstamp": 1.5}
            for (_, row), turn in zip(rows, turns, strict=True)
        ]

    numbered = list(enumerate(questions))
    references = [(n, row) for n, row in numbered if row["category"] in ("math", "coding", "reasoning")]
    return (
        write_lines(folder / "question.jsonl", questions),
        write_lines(folder / "gpt-4.jsonl", answers("reference", references)),
        write_lines(folder / "gpt-3.5-turbo.jsonl", answers("base", numbered)),
    )


def overrides(folder, questions):
    """Return a run whose responses are all greedy, with a chat template."""
    return [
        *(*SMALL, "trainer.align.max_steps=2", "trainer.sft.max_steps=2", "method=dpo"),
        *(f"model.path={folder}/model", "model.template=tokenizer", "evaluation=mt_bench"),
        *(f"evaluation.prompts_file={questions}", "evaluation.num_prompts=6", f"output_dir={folder}/out"),
        *("evaluation.generation.max_new_tokens=8", "evaluation.generation.temperature=0"),
        "evaluation.generation.temperatures.humanities=0",
    ]


def samples_of(folder, role="policy"):
    for file in (folder / "out" / "store" / "generate").glob("*/samples.jsonl"):
        if json.loads((file.parent / "stage.json").read_text())["inputs"]["role"] == role:
            return [json.loads(line) for line in file.open()]
    raise AssertionError(f"no samples of {role}")


def result_of(folder, judge):
    for file in (folder / "out" / "store" / "evaluate").glob("*/result.json"):
        result = json.loads(file.read_text())
        if result["judge"]["name"] == judge:
            return result, [json.loads(line) for line in (file.parent / "judgements.jsonl").open()]
    raise AssertionError(f"no result of {judge}")


def rate(question):
    """Rate first turns 8 and second turns 3; the answer about 4 animals has no rating."""
    return completion("No." if "Name 4 animals" in question and "plants" not in question else rating_of(question))


def rating_of(question):
    return "The rating is [[3]]." if "plants" in question else "Rating: [[8]], not [[2]]."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Sample and rate: the first attempt dies once the second turns of writing are sampled, another one goes on."""
    folder = tmp_path_factory.mktemp("mt_bench")
    questions, references, _ = mt_bench_files(folder)
    write_chat_model(folder / "model")
    endpoint, sampled = FakeEndpoint(), []
    endpoint.reply = rate
    command = [*overrides(folder, questions), "judge=mt_bench", f"judge.references={references}"]
    command += [f"judge.base_url={endpoint.url}"]
    with pytest.MonkeyPatch.context() as patch:

        def recorded(model, template, prompts, seed, generation, *arguments, **options):
            if dies and generation.temperature == 0 and "plants" in template.tokenizer.decode(prompts[0]):
                raise ConfigError("killed in the second turn")
            for row in sample(model, template, prompts, seed, generation, *arguments, **options):
                sampled.append(template.tokenizer.decode(prompts[row[0]]))
                yield row

        patch.setattr(generate, "sample", recorded)
        dies = True
        died = run_in_process(*command)
        assert died.returncode and "killed in the second turn" in died.stderr, died.stderr
        num_before, dies = len(sampled), False
        done = run_in_process(*command)
    assert done.returncode == 0, done.stderr
    yield folder, endpoint, command, (sampled[:num_before], sampled[num_before:])
    endpoint.close()


@pytest.mark.slow
def test_the_second_turn_is_asked_with_the_first_response_in_the_models_template(run):
    folder, *_ = run
    samples = samples_of(folder)
    assert [(row["index"], row["turn"]) for row in samples] == [(n, turn) for n in range(6) for turn in (1, 2)]
    point = build_point(composed(*run[2]))
    stages = {stage.role: stage for stage in stages_of(point)}
    inputs = stages["generate"].inputs
    template = load_template(inputs.model)
    checkpoint = folder / "out" / "store" / "align" / stages["align"].identity
    model = load_for_inference(inputs.model, Resources(device="cpu"), checkpoint)
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        n = first["index"]
        assert first["prompt"] == f"Name {n} animals." and first["source"] == second["source"] == CATEGORIES[n]
        assert second["prompt"] == f"Name {n} animals.\n\n{first['response']}\n\nName {n} plants."
        # Greedy decoding of the conversation, rendered here by hand, is the response that was kept.
        text = "".join(
            f"<|im_start|>{role}\n{content}<|im_end|>\n"
            for role, content in (("user", f"Name {n} animals."), ("assistant", first["response"]))
        )
        text += f"<|im_start|>user\nName {n} plants.<|im_end|>\n<|im_start|>assistant\n"
        if CATEGORIES[n] == "writing":
            continue
        ids = template.tokenizer(text, add_special_tokens=False)["input_ids"]
        generation = inputs.generation
        ((_, response, _),) = sample(model, template, [ids], "any", generation)
        assert template.text(response) == second["response"]
    assert any(row["response"] for row in samples)


@pytest.mark.slow
def test_a_killed_run_samples_only_the_turns_that_are_missing_and_equals_an_undisturbed_one(run):
    folder, _, command, (before, after) = run
    assert ["plants" in prompt for prompt in before] == [False] * 6 + [True] * 2
    assert ["plants" in prompt for prompt in after] == [True] * 4 and not set(before) & set(after)
    samples = samples_of(folder)
    for kind in ("generate", "evaluate"):
        shutil.rmtree(folder / "out" / "store" / kind)
    asked = len(run[1].asked)
    assert run_in_process(*command).returncode == 0
    assert samples_of(folder) == samples and len(run[1].asked) == asked  # nor is anything asked again


@pytest.mark.slow
def test_ratings_are_averaged_by_turn_and_questions_are_observations(run):
    folder, endpoint, *_ = run
    result, judgements = result_of(folder, "mt_bench")
    assert len(endpoint.asked) == 12 and result["judge"]["unparsable"] == 1
    values = {(row["index"], row["turn"]): row["verdict"] for row in judgements}
    assert values == {(n, t): 0.5 if (n, t) == (4, 1) else (0.8, 0.3)[t - 1] for n in range(6) for t in (1, 2)}
    scores = result["judge"]["scores"]
    assert scores["first_turn_rating"] == {"value": 8.0, "se": 0.0}
    assert scores["second_turn_rating"] == {"value": 3.0, "se": 0.0}
    means = [3.0 if n == 4 else 5.5 for n in range(6)]
    error = np.std(means, ddof=1) / math.sqrt(6)
    assert scores["mt_bench_rating"] == {"value": pytest.approx((5 * 8 + 6 * 3) / 11), "se": pytest.approx(error)}
    assert result["quality"]["metric"] == "rating" and result["quality"]["n"] == 6
    assert "samples_per_prompt" not in result["quality"]
    assert result["quality"]["value"] == pytest.approx((5 * 0.55 + 0.4) / 6)
    assert result["kl"]["per_sequence"]["n"] == 6 and set(result["sources"]) <= set(CATEGORIES)


@pytest.mark.slow
def test_each_turn_is_judged_with_its_own_prompt_and_reference(run):
    folder, endpoint, *_ = run
    samples = {(row["index"], row["turn"]): row["response"] for row in samples_of(folder)}
    prompts = load_mt_bench_prompts("single", PROMPT_FILE)
    for n, category in enumerate(CATEGORIES):
        has_reference = category in ("math", "coding", "reasoning")
        math_ = "-math" if has_reference else ""
        texts = {"question": f"Name {n} animals.", "answer": samples[n, 1], "ref_answer_1": f"reference {n} one"}
        assert prompts[f"single{math_}-v1"][1].format(**texts) in endpoint.asked
        texts = {f"question_{t}": f"Name {n} {what}." for t, what in ((1, "animals"), (2, "plants"))}
        texts |= {f"answer_{t}": samples[n, t] for t in (1, 2)}
        texts |= {"ref_answer_1": f"reference {n} one", "ref_answer_2": f"reference {n} two"}
        assert prompts[f"single{math_}-v1-multi-turn"][1].format(**texts) in endpoint.asked


@pytest.mark.slow
def test_a_pairwise_judge_plays_both_orders_with_the_baselines_own_conversation(run):
    folder, *_ = run
    endpoint = FakeEndpoint()
    baseline = folder / "gpt-3.5-turbo.jsonl"

    def reply(question):
        """Prefer the baseline's first answers in both orders, then always assistant A; say nothing of question 0."""
        if "Name 0" in question:
            return completion("I cannot say.")
        if "plants" in question:
            return completion("[[A]]")
        return completion("[[A]]" if question.index("base") < question.index("Answer of B") else "[[B]]")

    endpoint.reply = reply
    command = [*overrides(folder, folder / "question.jsonl"), "evaluation.metric=win_rate", "judge=mt_bench_pairwise"]
    done = run_in_process(*command, f"judge.baseline={baseline}", f"judge.base_url={endpoint.url}")
    endpoint.close()
    assert done.returncode == 0, done.stderr
    assert len(endpoint.asked) == 24
    result, judgements = result_of(folder, "mt_bench_pairwise")
    assert [row["baseline"] for row in judgements] == [f"base {n} {t}" for n in range(6) for t in ("one", "two")]
    expected = [0.5, 0.5, *[0.0, 0.5] * 5]
    assert [row["verdict"] for row in judgements] == expected
    assert result["judge"]["unparsable"] == 4  # and they are not in the score:
    assert result["judge"]["scores"] == {"mt_bench_win_rate": {"value": 25.0, "se": 0.0}}
    seconds = [question for question in endpoint.asked if "plants" in question and "Name 1" in question]
    assert len(seconds) == 2 and all("base 1 one" in text and "base 1 two" in text for text in seconds)
    # Without judge.references those of the questions count, where both turns have one.
    assert all("own dog" in text and "own oak" in text for text in seconds)
    coding = [question for question in endpoint.asked if "Name 2 plants" in question]
    assert not any("own cat" in text for text in coding) and not any("not used" in text for text in endpoint.asked)


@pytest.mark.slow
def test_the_sft_model_as_baseline_has_conversations_of_its_own(run):
    folder, *_ = run
    policy = samples_of(folder)
    endpoint = FakeEndpoint()
    endpoint.reply = lambda question: completion("[[C]]")
    command = [*overrides(folder, folder / "question.jsonl"), "evaluation.metric=win_rate", "judge=mt_bench_pairwise"]
    done = run_in_process(*command, "judge.baseline=sft", f"judge.base_url={endpoint.url}")
    endpoint.close()
    assert done.returncode == 0, done.stderr
    assert samples_of(folder) == policy  # rated, and compared: the same samples
    baseline = samples_of(folder, "baseline")
    assert [(row["index"], row["turn"]) for row in baseline] == [(row["index"], row["turn"]) for row in policy]
    for n, category in enumerate(CATEGORIES):
        if category in ("math", "coding", "reasoning"):
            continue
        prompt = load_mt_bench_prompts("pair", PROMPT_FILE)["pair-v2-multi-turn"][1]
        (a_1, a_2), (b_1, b_2) = ([row["response"] for row in rows if row["index"] == n] for rows in (policy, baseline))
        texts = {"question_1": f"Name {n} animals.", "question_2": f"Name {n} plants."}
        own = texts | {"answer_a_1": a_1, "answer_a_2": a_2, "answer_b_1": b_1, "answer_b_2": b_2}
        swapped = texts | {"answer_a_1": b_1, "answer_a_2": b_2, "answer_b_1": a_1, "answer_b_2": a_2}
        assert {prompt.format(**own), prompt.format(**swapped)} <= set(endpoint.asked)


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[7.5]] and then [[2]]", 7.5),  # the benchmark takes the first
        ("Rating: [6]", 6.0),
        ("[3] or [[9]]", 9.0),
        ("[[10]]", 10.0),
        ("[[0]]", 0.0),
        ("[[11]]", None),
        ("in [2023] it was", None),
        ("[[rating]]", None),
        ("seven", None),
        ("", None),
    ],
)
def test_a_rating_is_the_first_number_in_double_brackets_or_else_in_single_ones(text, rating):
    assert parse_rating(text) == rating


@pytest.mark.parametrize(
    ("as_a", "as_b", "value"),
    [
        ("[[A]]", "[[B]]", 1.0),
        ("[[B]]", "[[A]]", 0.0),
        ("[[A]]", "[[A]]", 0.5),  # whatever comes first wins
        ("[[A]]", "[[C]]", 0.5),
        ("[[C]]", "[[C]]", 0.5),
        ("[[A]]", "B", None),
        ("[[A]] or [[B]]", "[[B]]", None),
    ],
)
def test_a_response_wins_when_it_does_in_both_orders(as_a, as_b, value):
    assert outcome(as_a, as_b) == value


def test_a_question_without_any_rating_is_no_observation():
    assert scores_of([]) == {} and "second_turn_rating" not in scores_of([(0, 1, 5.0), (1, 1, 6.0)])
    assert scores_of([(0, 1, 5.0), (1, 1, 6.0)])["mt_bench_rating"] == {"value": 5.5, "se": 0.5}


def test_texts_with_braces_are_asked_as_they_are():
    turn = Turn(2, ["{a}", "{b}"], ["{c}", "{d}"], ["", ""], [])
    content = turn.chat(load_mt_bench_prompts("single", PROMPT_FILE), "single", answer=turn.responses)[1]["content"]
    assert re.findall(r"\{\w\}", content) == ["{a}", "{b}", "{c}", "{d}"]


def test_files_of_the_benchmark_are_read_with_both_turns(tmp_path):
    questions, references, answers = mt_bench_files(tmp_path)
    point = build_point(
        composed("evaluation=mt_bench", f"evaluation.prompts_file={questions}", "evaluation.num_prompts=6",
                 "judge=mt_bench", "judge.base_url=http://localhost:1/v1", "evaluation.generation.max_new_tokens=8"),
    )  # fmt: skip
    prompts = read_prompts(prompt_inputs(point))
    assert [entry.prompt.follow_ups for entry in prompts] == [(f"Name {n} plants.",) for n in range(6)]
    rows = read_answers(str(answers), prompts, "judge.baseline")
    assert [row["responses"] for row in rows] == [[f"base {n} one", f"base {n} two"] for n in range(6)]
    assert list(read_references(str(references), prompts)) == ["82", "83", "86"]
    check_input_files([point])
    references.write_text("\n".join(references.read_text().splitlines()[1:]))
    with pytest.raises(ConfigError, match=r"judge\.references=.*: no answer to '82'"):
        read_references(str(references), prompts)
    answers.write_text(answers.read_text().replace(', "base 3 two"', ""))
    with pytest.raises(ConfigError, match=r"judge\.baseline=.*: 1 answer to the 2 turns of '84'"):
        read_answers(str(answers), prompts, "judge.baseline")
    other = Point(evaluation=Evaluation(prompts_file=str(questions), num_prompts=6))
    with pytest.raises(ConfigError, match=r"turns must be one user message, .*; judge=mt_bench"):
        read_prompts(prompt_inputs(other))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["judge=mt_bench"], "evaluation.metric=win_rate: judge=mt_bench compares with no baseline; use rating"),
        (["judge=mt_bench", "evaluation.metric=rating"], "judge=mt_bench needs the benchmark's questions"),
        (["evaluation.metric=rating"], "evaluation.metric=rating: judge=gold gives no ratings; use judge=mt_bench"),
        (["judge=mt_bench_pairwise", "judge.baseline=sft"], "judge=mt_bench_pairwise needs the benchmark's questions"),
        (["judge=mt_bench", "evaluation=mt_bench", "{file}", "judge.baseline=sft"], "judge.baseline: judge=mt_bench"),
        (["judge=mt_bench", "evaluation=mt_bench", "{file}", "judge.references=no"], "judge.references=no: no such"),
        (["judge=arena_hard", "judge.references=README.md"], "judge.references: judge=arena_hard has no such field"),
        (["+evaluation.generation.temperatures.a=1"], "evaluation.generation.temperatures: only the questions"),
        (["+evaluation.generation.temperatures.a=-1"], "evaluation.generation.temperatures.a=-1"),
        (
            ["judge=mt_bench", "evaluation=mt_bench", "{file}", "evaluation.generation.samples_per_prompt=2"],
            "evaluation.generation.samples_per_prompt=2: judge=mt_bench scores one answer",
        ),
        (["judge=mt_bench", "evaluation=mt_bench", "{file}", "judge.max_cost=1"], "judge.max_cost needs judge."),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_refused_in_one_line(given, message, tmp_path):
    questions, *_ = mt_bench_files(tmp_path)
    with pytest.raises(ConfigError) as refused:
        build_point(composed(*(text.format(file=f"evaluation.prompts_file={questions}") if text == "{file}" else text
                               for text in given)))  # fmt: skip
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_prompts_of_another_layout_are_one_line_that_names_the_missing_one(tmp_path):
    rows = json.loads(Path(PROMPT_FILE).read_text())
    file = write_lines(tmp_path / "judge_prompts.jsonl", rows)
    assert set(load_mt_bench_prompts("pair", str(file))) == {row["name"] for row in rows if row["name"][:4] == "pair"}
    write_lines(file, [row for row in rows if row["name"] != "single-math-v1"])
    load_mt_bench_prompts("pair", str(file))
    with pytest.raises(ConfigError, match=rf"^judge\.prompt_file={file}: needs single-math-v1 with system_prompt"):
        load_mt_bench_prompts("single", str(file))
    rows[0]["prompt_template"] = "{question}"
    write_lines(file, rows)
    with pytest.raises(ConfigError, match=r"needs single-v1 .*no answer"):
        load_mt_bench_prompts("single", str(file))


def test_two_turns_and_temperatures_are_of_the_identity_and_one_turn_is_what_it_was(tmp_path):
    questions, references, _ = mt_bench_files(tmp_path)
    single = [json.loads(line) | {"turns": ["a" * n]} for n, line in enumerate(questions.open(), 1)]
    one_turn = write_lines(tmp_path / "single.jsonl", single)
    common = [f"evaluation.prompts_file={one_turn}", "evaluation.num_prompts=6", "judge.base_url=http://localhost:1/v1"]
    mt_bench = [*common, "evaluation=mt_bench", "judge=mt_bench"]
    ids = [
        identities(*mt_bench, *more)
        for more in ([], ["evaluation.generation.temperatures.stem=0.2"], [f"judge.references={references}"])
    ]
    assert ids[0]["generate"] != ids[1]["generate"] and ids[0]["generate"] == ids[2]["generate"]
    assert ids[0]["evaluate"] != ids[2]["evaluate"] and ids[0]["align"] == ids[1]["align"]
    assert GenerateInputs.num_samples.fget(stage_inputs(mt_bench)) == 12
    point = build_point(composed(*mt_bench))
    limit, new = point.dataset.max_prompt_tokens, point.evaluation.generation.max_new_tokens
    assert max_sequence_tokens(point) == 2 * (limit + new)
    other = build_point(composed(*common, "evaluation=mt_bench", "judge=tldr", "judge.model=m", "judge.baseline=sft",
                                 "evaluation.metric=win_rate"))  # fmt: skip
    assert max_sequence_tokens(other) == limit + new


def stage_inputs(arguments):
    return next(s.inputs for s in stages_of(build_point(composed(*arguments))) if s.role == "generate")
