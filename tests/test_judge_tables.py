"""What is said of judges, in tables and sentences: which way they lean, where they agree, how they rank points."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from src.errors import ConfigError
from sweeps.analysis import judges
from sweeps.analysis.conflicts import check_conflicts
from sweeps.analysis.selection import GROUP
from sweeps.report.judge_tables import judge_sentences, leanings_text
from tests.support.tables import points


def table(judge, values, first=None, identity="0", **columns):
    """Return verdicts of a judge on the prompts 0, 1, ... of one point."""
    count = len(values)
    rows = {"judge": judge, "metric": "win_rate", "identity": identity, "index": range(count), "sample": 0, "turn": 1}
    rows |= {"value": values, "reporting": [i % 2 == 1 for i in range(count)], "length": 1, "setup": "s", "init": "sft"}
    rows |= {"first": [0] * count if first is None else first, "questions": 0 if first is None else 2}
    return pd.DataFrame(
        rows | {"variant": "", "further": judge != "one", "method": "dpo", "beta": 0.1, "lr": 1e-3} | columns
    )


ONLY = ("s", "sft", "")  # the group of `table`


class NoUsage:
    repeated = ()


def test_kappa_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    one = rng.choice([-1, 0, 1], 300, p=[0.3, 0.2, 0.5])
    other = np.where(rng.random(300) < 0.6, one, rng.choice([-1, 0, 1], 300))
    counts = judges.confusion(np.arange(300) // 3, one, other)
    assert counts.shape == (100, 3, 3) and counts.sum() == 300
    assert judges.cohen_kappa(counts.sum(0)) == pytest.approx(metrics.cohen_kappa_score(one, other), abs=1e-12)
    assert judges.cohen_kappa(judges.confusion(np.arange(300), one, one).sum(0)) == 1


def test_a_judge_that_takes_the_first_answer_is_named_and_a_fair_one_is_not():
    rng = np.random.default_rng(0)
    fair = table("fair", rng.choice([0.0, 1.0], 200), first=np.ones(200))  # the first of two orders, whoever is better
    biased = table("biased", np.full(200, 0.5), first=np.full(200, 2.0))
    late = table("late", np.full(200, 0.5), first=np.zeros(200))
    rows = judges.leanings(pd.concat([fair, biased, late]), NoUsage)
    assert rows["first"].tolist() == [0.5, 1, 0] and rows.questions.tolist() == [400] * 3
    every = judge_sentences({ONLY: "one"}, rows, pd.DataFrame(), pd.DataFrame())
    said = [sentence for sentence in every if "reads" in sentence or "second" in sentence]
    assert said == [
        "biased prefers the answer it reads first: in 100.0 % [100.0, 100.0] of 400 questions.",
        "late prefers the second one: in 100.0 % [100.0, 100.0] of 400 questions.",
    ]


def test_a_preference_for_length_is_of_decided_comparisons_with_answers_of_different_length():
    length = [5, 5, -5, -5, 0, 5]
    (row,) = judges.leanings(table("j", [1.0, 1.0, 0.0, 1.0, 1.0, 0.5], length=length), NoUsage).to_dict("records")
    assert row["decided"] == 4 and row["longer"] == 0.75  # one of four shorter ones has won


def test_a_judge_would_select_another_point_only_where_it_is_better():
    rows = points({"beta": 0.1}, {"beta": 0.01}, {"beta": 1.0})
    qualities = {"0": (0.5, 0.7), "1": (0.5, 0.7), "2": (0.9, 0.2)}  # by the judges `one` and `other`
    verdicts = pd.concat(
        [
            table(judge, [quality[number]] * 6, identity=identity, beta=beta)
            for (identity, quality), beta in zip(qualities.items(), rows.beta, strict=True)
            for number, judge in enumerate(("one", "other"))
        ]
    )
    best = rows[:1].assign(identities=[["0"]])
    would = judges.rankings(verdicts, best).set_index("judge").beta_of_judge
    assert would.to_dict() == {"one": 1.0, "other": 0.1}  # of two that are as good the one that is selected


def test_judges_of_several_setups_inits_and_variants_are_described_for_each():
    """One judge may lean to one side in one setup and to none in another."""
    fair, biased = (
        pd.concat([table("one", np.full(200, 0.5)), table("other", np.full(200, 0.5), first=np.full(200, share))])
        for share in (1.0, 2.0)
    )
    for name, values in {"setup": ("a", "b"), "init": ("sft", "base"), "variant": ("", "seed=2")}.items():
        verdicts = pd.concat([fair.assign(**{name: values[0]}), biased.assign(**{name: values[1]})])
        groups = [tuple({**dict(zip(GROUP, ONLY, strict=True)), name: value}.values()) for value in values]
        repeated = [
            ("other", group, {"verdicts": 10, "equal": {"value": share}})
            for group, share in zip(groups, (1.0, 0.5), strict=True)
        ]
        rows = judges.leanings(verdicts, SimpleNamespace(repeated=repeated))
        of_other = rows[rows.judge == "other"].set_index(name)
        assert of_other["first"].to_dict() == dict(zip(values, (0.5, 1.0), strict=True))
        assert of_other.equal.to_dict() == dict(zip(values, (1.0, 0.5), strict=True))
        said = judge_sentences(dict.fromkeys(groups, "one"), rows, pd.DataFrame(), pd.DataFrame())
        assert said == [
            "Points were selected by one alone.",
            f"other prefers the answer it reads first ({name} {values[1]}): "
            "in 100.0 % [100.0, 100.0] of 400 questions.",
        ]
        selecting = dict(zip(groups, ("one", "reward accuracy"), strict=True))
        said = judge_sentences(selecting, rows, pd.DataFrame(), pd.DataFrame())
        assert f"Points ({name} {values[1]}) were selected by reward accuracy alone." in said
        assert list(leanings_text(rows)[name.capitalize()]) == [values[0]] * 2 + [values[1]] * 2
    alone = judges.leanings(biased, NoUsage)
    assert not {"Setup", "Init", "Variant"} & set(leanings_text(alone).columns), "the control"


def test_ranks_agreement_and_disagreement_of_two_judges():
    rng = np.random.default_rng(0)
    better, worse = (rng.random(400) < 0.8).astype(float), (rng.random(400) < 0.3).astype(float)
    by_point = {("dpo", "0"): (better, worse), ("ipo", "1"): (worse, better)}
    tables = [
        table(judge, values[number], identity=identity, method=method)
        for (method, identity), values in by_point.items()
        for number, judge in enumerate(("one", "opposite"))
    ]
    verdicts = pd.concat([*tables, *(t.assign(judge="same") for t in tables if (t.judge == "one").all())])
    rows = points({"method": "dpo"}, {"method": "ipo"})
    best = rows.assign(identities=[[i] for i in rows.identity])
    ranked = judges.rankings(verdicts, best).set_index(["judge", "method"])["rank"]
    assert ranked["one"].to_dict() == {"dpo": 1, "ipo": 2} == ranked["same"].to_dict()
    assert ranked["opposite"].to_dict() == {"dpo": 2, "ipo": 1}
    agreement = judges.agreement(verdicts).set_index(["judge", "other"])
    assert agreement.kappa["one", "same"] == 1 and agreement.kappa["one", "opposite"] < 0.1
    against = judges.disagreements(verdicts, best)
    assert {tuple(row) for row in against[["judge", "judge_other"]].to_numpy()} == {
        ("one", "opposite"),
        ("opposite", "same"),
    }
    said = judge_sentences({ONLY: "one"}, judges.leanings(verdicts, NoUsage), judges.agreement(verdicts), against[:1])
    assert any("DPO against IPO: the judges disagree beyond noise (one by +" in sentence for sentence in said)
    alike = verdicts[verdicts.judge != "opposite"]
    assert judges.disagreements(alike, best).empty
    said = judge_sentences(
        {ONLY: "one"}, judges.leanings(alike, NoUsage), judges.agreement(alike), judges.disagreements(alike, best)
    )
    assert said == [
        "Points were selected by one alone.",
        "No two methods are ordered oppositely by two judges beyond noise.",
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"generate": "g", "judge_more": "j"}, "judged by more in one of them alone .as sweeps.rejudge does."),
        ({"generate": "other", "judge_more": "j"}, "data or a model edited in place"),  # the controls
        ({"generate": "g"}, "data or a model edited in place"),
    ],
)
def test_two_results_of_the_same_settings_are_refused_with_the_reason(stages, message):
    rows = points({"beta": 0.1, "seed": 0}, {"beta": 1.0, "seed": 0}, {"beta": 0.1, "seed": 0})
    stages_of = {"0": {"generate": "g"}, "1": {"generate": "g1"}, "2": stages}
    check_conflicts(rows[:2], stages_of.__getitem__)
    with pytest.raises(ConfigError, match=message) as refused:
        check_conflicts(rows, stages_of.__getitem__)
    assert "beta=0.1 " in str(refused.value) and "\n" not in str(refused.value)
