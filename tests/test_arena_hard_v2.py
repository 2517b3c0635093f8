"""Arena-Hard v2: labels, scores of both categories, intervals and style control; its files in their layouts."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.linear_model import LogisticRegression

from src.config.schema import Evaluation, Point
from src.config.validation import build_point
from src.data.evaluation_prompts import read_answers, read_prompts
from src.data.rows import text_prompt
from src.errors import ConfigError
from src.judges import Comparison
from src.judges.arena_hard import Game
from src.judges.arena_hard_v2 import PROMPT_FILE, arena_hard_v2, build_chats, category_scores, parse_game
from src.judges.judge_client import JudgeClient
from src.judges.prompt_file import CATEGORIES, load_category_prompts
from src.judges.style_control import style_difference
from src.planning.identity import DataInputs, EvaluateInputs, JudgeInputs, PromptInputs
from src.planning.inputs import prompt_inputs
from src.planning.resources import Resources
from src.preflight import check_input_files
from tests.support.commands import SMALL, run_in_process
from tests.support.configs import composed
from tests.support.endpoint import completion
from tests.support.judges import Attempt

VERDICTS = ["[[A>>B]]", "[[A>B]]", "[[A=B]]", "[[B>A]]", "[[B>>A]]"]
POINTS_OF_A = {"A>>B": [1] * 3, "A>B": [1], "A=B": [0.5], "B>A": [0], "B>>A": [0] * 3}


@pytest.mark.parametrize(
    ("text", "as_a"),
    [
        ("so [[A>>B]]", Game(1.0, 3)),
        ("[[A>B]] at first, then [[B>>A]].", Game(0.0, 3)),  # the last one counts
        ("my verdict: [[a=b]]", Game(0.5, 1)),
        ("[[B<<A]] and [[A<B]]", Game(0.0, 1)),
        ("[[B<A]]", Game(1.0, 1)),
        ("[A<<B]", Game(0.0, 3)),  # in single brackets where no other is
        ("[A>B] or rather [[B>A]]", Game(0.0, 1)),
        ("[[B=A]]", Game(0.5, 1)),
        ("[[A>>>B]]", None),
        ("[[A>B]] [[A]]", None),  # the benchmark has no score for its last match
        ("A>>B", None),
        ("", None),
    ],
)
def test_the_last_label_is_scored_for_either_side(text, as_a):
    assert parse_game(text, "A") == as_a
    assert parse_game(text, "B") == (as_a and Game(1 - as_a.points, as_a.weight))


def answer(rng, words):
    """Return some text with markdown: a random share of the lines are headers, list items, bold or code."""
    lines = [
        rng.choice(["", "# ", "### ", "- ", "3. ", "**Note** ", "__so__ "]) + "word " * rng.randint(1, 9)
        for _ in range(words // 5)
    ]
    if rng.random() < 0.3:
        lines.append("```\n# a comment\n- no item\n```")
    return "\n".join(lines)


def count_style(text):
    tokens, prose = len(text.encode()) / 4, re.sub("```[^`]*```", "", text)
    headers = sum(len(re.findall(rf"^#{{{n}}}\s", prose, re.M)) for n in range(1, 7))
    items = len(re.findall(r"^\s*\d+\.\s", prose, re.M)) + len(re.findall(r"^\s*[-*+]\s", prose, re.M))
    bold = len(re.findall(r"\*\*[^*\n]+\*\*", prose)) + len(re.findall(r"__[^_\n]+__", prose))
    return tokens, np.array([headers, items, bold]) / (tokens + 1)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Judge 750 responses of which the longer ones win more often; 1 of 40 answers of the judge has no label."""
    rng, comparisons, texts = random.Random(0), [], []
    for n in range(750):
        category = CATEGORIES[n >= 500]
        response, baseline = answer(rng, rng.randint(40, 160)), answer(rng, rng.randint(20, 120))
        prompt = text_prompt(f"question {n}", {"category": category})
        comparisons.append(Comparison(prompt, {"response": response}, {"response": baseline}))
        longer = len(response) > len(baseline)
        for side in "BA":
            weights = [3, 4, 3, 2, 1] if longer == (side == "A") else [1, 2, 3, 4, 3]
            label = rng.choices(VERDICTS, weights)[0]
            texts.append("no idea" if rng.random() < 1 / 40 else f"[[A=B]] I thought, but it is {label}.")
    judge = JudgeInputs("arena_hard_v2", "sft", "m", temperature=0.0, max_tokens=2)
    prompts = PromptInputs(DataInputs("mini_tldr", 0, 160, 112), 750, None)
    inputs = EvaluateInputs("setup", "sft", prompts, judge, "win_rate", 0.5, 0)
    replies = [
        {"text": text, "by": "here", "prompt_tokens": 1, "completion_tokens": 1, "model": None} for text in texts
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "none")
        patch.setattr(JudgeClient, "complete", lambda self, chats, attempt: [r | {"date": ""} for r in replies])
        judged = arena_hard_v2(inputs, Resources(), comparisons, Attempt(tmp_path_factory.mktemp("judge")))
    return comparisons, texts, judged


def outcomes_of(category, comparisons, texts):
    """Return the points of the games of a category and their comparisons, computed without the judge's code."""
    points, rows = [], []
    for n, comparison in enumerate(comparisons):
        labels = [re.findall(r"\[\[(.+?)\]\]", text)[-1:] for text in texts[2 * n : 2 * n + 2]]
        if comparison.prompt.facts["category"] != category or not all(labels):
            continue
        (as_b,), (as_a,) = labels
        outcome = [1 - p for p in POINTS_OF_A[as_b]] + POINTS_OF_A[as_a]
        points += outcome
        rows += [comparison] * len(outcome)
    return np.array(points, float), rows


@pytest.mark.parametrize("category", CATEGORIES)
def test_scores_and_intervals_equal_an_independent_computation(category, played):
    comparisons, texts, judged = played
    points, rows = outcomes_of(category, comparisons, texts)
    rng = np.random.default_rng(42)
    means = [float(np.mean(rng.choice(points, len(points)))) for _ in range(100)]
    expected = {"value": np.mean(means), "low": np.quantile(means, 0.05), "high": np.quantile(means, 0.95)}
    score = judged.scores[category]
    assert score == {name: pytest.approx(100 * value, abs=1e-9) for name, value in expected.items()}
    error = 100 * points.std() / np.sqrt(len(points))
    assert score["value"] == pytest.approx(100 * points.mean(), abs=0.5 * error)
    assert score["high"] - score["low"] == pytest.approx(2 * 1.645 * error, rel=0.3)  # 90 %, not 95
    assert len({id(row) for row in rows}) < sum(c.prompt.facts["category"] == category for c in comparisons)


@pytest.mark.parametrize("category", CATEGORIES)
def test_style_controlled_scores_equal_those_of_scikit_learn(category, played):
    comparisons, texts, judged = played
    points, rows = outcomes_of(category, comparisons, texts)
    styles = [(count_style(c.response["response"]), count_style(c.baseline["response"])) for c in rows]
    features = np.array([[(a - b) / (a + b), *((d - e) / (d + e + 1))] for (a, d), (b, e) in styles])
    twice = np.repeat([1, 0], len(points))  # half a win and half a loss where it is a tie

    def win_rates(features):
        rng = np.random.default_rng(42)
        for _ in range(100):
            indices = rng.integers(0, len(points), len(points))
            chosen, weights = features[indices], np.concatenate([points[indices], 1 - points[indices]])
            model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12)
            model.fit(np.vstack([chosen, chosen]), twice, weights)
            yield 100 / (1 + np.exp(-model.intercept_[0]))

    scaled = features / features.std(0, ddof=1)
    rounds = list(win_rates(scaled))
    score = judged.scores[f"{category}_style_controlled"]
    expected = [np.median(rounds), *np.quantile(rounds, [0.05, 0.95])]
    assert [score["value"], score["low"], score["high"]] == pytest.approx(expected, abs=1e-6)
    # Length has helped, and centering the features of one model would hide that.
    raw = judged.scores[category]["value"]
    centered = np.median(list(win_rates(scaled - scaled.mean(0))))
    assert abs(centered - raw) < 1 < 4 < raw - score["value"]


def test_a_question_without_both_verdicts_is_a_tie_and_not_in_the_score(played):
    comparisons, texts, judged = played
    unlabeled = {n // 2 for n, text in enumerate(texts) if text == "no idea"}
    assert judged.usage["unparsable"] == texts.count("no idea") > len(CATEGORIES)
    assert all(judged.verdicts[n].value == 0.5 for n in unlabeled)
    decided = [verdict.value for n, verdict in enumerate(judged.verdicts) if n not in unlabeled]
    assert len(decided) + len(unlabeled) == len(comparisons) and np.std(decided) > 0.2
    assert dict(category_scores("hard_prompt", [])) == {}


def test_the_first_word_wins_nothing_when_orders_are_swapped():
    comparison = Comparison(text_prompt("why {x}?"), {"response": "mine {y}"}, {"response": "other"})
    systems, template = load_category_prompts(PROMPT_FILE)
    first, second = build_chats(comparison, systems["creative_writing"], template)
    for chat, a, b in ((first, "other", "mine {y}"), (second, "mine {y}", "other")):
        assert chat[0] == {"role": "system", "content": systems["creative_writing"]}
        text = chat[1]["content"]
        assert text.index("why {x}?") < text.index(a) < text.index(b)
    games = [parse_game("[[A>B]]", side) for side in "BA"]
    assert [game.points for game in games] == [0.0, 1.0]
    assert systems["hard_prompt"] != systems["creative_writing"]


def test_style_is_relative_and_code_has_none():
    same = style_difference("# a\n- b\n**c**", "# a\n- b\n**c**")
    assert (same == 0).all() and (style_difference("", "") == 0).all()
    longer = style_difference("word " * 30, "word " * 10)
    assert longer[0] == pytest.approx(0.5) and (longer[1:] == 0).all()
    assert (style_difference("```\n# x\n- y\n**z**\n```", "`" * 20)[1:] == 0).all()
    assert (style_difference("# x\n- y\n**z**", "plain words")[1:] > 0).all()
    assert (style_difference("a \ud83d", "b") != 0).any()  # half an emoji has a length


def v2_files(folder, count=6):
    """Write questions and answers of both baselines in one file, in the benchmark's layout."""
    questions = [
        {"uid": f"q{n}", "category": CATEGORIES[n % 2], "subcategory": "x", "prompt": f"What is {n}?"}
        for n in range(count)
    ]
    answers = [
        {
            "uid": f"q{n}",
            "ans_id": "x",
            "model": model,
            "messages": [
                {"role": "user", "content": f"What is {n}?"},
                {"role": "assistant", "content": {"answer": f"{n}, says {model}"}},
            ],
        }
        for model in ("o3-mini-2025-01-31", "gemini-2.0-flash-001")
        for n in range(count)
    ]
    files = folder / "question.jsonl", folder / "baselines.jsonl"
    for file, rows in zip(files, (questions, answers), strict=True):
        file.write_text("\n".join(map(json.dumps, rows)))
    return files


def test_answers_are_those_of_the_baseline_of_each_category(tmp_path):
    questions, answers = v2_files(tmp_path)
    point = Point(evaluation=Evaluation(prompts_file=str(questions), num_prompts=6))
    prompts = read_prompts(prompt_inputs(point))
    baselines = ["o3-mini-2025-01-31", "gemini-2.0-flash-001"] * 3
    rows = read_answers(str(answers), prompts, "judge.baseline")
    assert rows == [{"response": f"{n}, says {model}", "generator": model} for n, model in enumerate(baselines)]
    answers.write_text(answers.read_text().replace("gemini-2.0-flash-001", "another"))
    with pytest.raises(ConfigError, match=r"answers of o3-mini-2025-01-31, another to 'q1'; give one for each"):
        read_answers(str(answers), prompts, "judge.baseline")
    answers.write_text(answers.read_text().replace('"content": {"answer"', '"content": {"text"'))
    with pytest.raises(ConfigError, match=r"line 1: needs the text of an answer in one of choices, messages, output"):
        read_answers(str(answers), prompts, "judge.baseline")


def test_questions_of_other_categories_are_refused_by_name(tmp_path):
    questions, answers = v2_files(tmp_path)
    overrides = ["evaluation.num_prompts=6", "judge=arena_hard_v2", f"judge.baseline={answers}"]
    overrides += [f"evaluation.prompts_file={questions}", "judge.base_url=http://localhost:1/v1"]
    check_input_files([build_point(composed(*overrides))])
    questions.write_text(questions.read_text().replace("creative_writing", "arena-hard-v0.1"))
    with pytest.raises(ConfigError, match=r"needs questions of the category hard_prompt or creative_writing, that of"):
        check_input_files([build_point(composed(*overrides))])
    with pytest.raises(ConfigError, match="needs the benchmark's questions: evaluation=arena_hard_v2"):
        build_point(composed("judge=arena_hard_v2", "judge.baseline=sft"))


@pytest.mark.parametrize(
    "content",
    [
        "prompt_template: '{QUESTION} {ANSWER_A} {ANSWER_B}'",  # the benchmark's yaml alone
        "{prompt_template: '{QUESTION} {ANSWER_A}', system_prompts: {hard_prompt: a, creative_writing: b}}",
        "{prompt_template: '{QUESTION} {ANSWER_A} {ANSWER_B}', system_prompts: {hard_prompt: a}}",
        "{prompt_template: '{QUESTION} {ANSWER_A} {ANSWER_B}', system_prompts: {hard_prompt: a, creative_writing: 7}}",
    ],
)
def test_prompts_without_both_system_prompts_are_one_line(content, tmp_path):
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=rf"^judge\.prompt_file={file}: needs system_prompts with .*judge_utils\.py"):
        load_category_prompts(str(file))
    good = yaml.safe_load(Path(PROMPT_FILE).read_text())
    file.write_text(yaml.safe_dump(good))
    assert load_category_prompts(str(file))[0] == good["system_prompts"]


def test_a_run_has_the_scores_of_both_categories(fake_endpoint, tmp_path):
    questions, answers = v2_files(tmp_path, 8)
    # The baseline wins as assistant A, and is as good as the response as assistant B.
    fake_endpoint.reply = lambda text: completion("[[A>>B]]" if text.index("says") < text.index("B:") else "[[A=B]]")
    done = run_in_process(
        *(*SMALL, "trainer.align.max_steps=2", "trainer.sft.max_steps=2", "method=dpo"),
        *("evaluation=arena_hard_v2", f"evaluation.prompts_file={questions}", "evaluation.num_prompts=8"),
        *("evaluation.generation.max_new_tokens=8", "judge=arena_hard_v2", f"judge.baseline={answers}"),
        *(f"judge.base_url={fake_endpoint.url}", f"output_dir={tmp_path}/out"),
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out" / "store" / "evaluate").glob("*/result.json")
    result = json.loads(file.read_text())
    assert len(fake_endpoint.asked) == 16 and result["quality"]["value"] == pytest.approx(0.5 / 4)
    scores = result["judge"]["scores"]
    assert set(scores) == {f"{category}{suffix}" for category in CATEGORIES for suffix in ("", "_style_controlled")}
    assert all(0 < scores[category]["low"] < scores[category]["high"] < 50 for category in CATEGORIES)
