"""Several judges of the same samples: plan, results, what is said of them, and judging a finished sweep again."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml

from src.config.validation import build_point
from src.data.evaluation_prompts import read_prompts
from src.planning.inputs import prompt_inputs
from src.planning.stage import stages_of, with_all_judged
from sweeps.analysis import judges
from sweeps.report.judge_tables import judge_sentences
from sweeps.search.successive_halving import with_stop
from tests.support.commands import SMALL, environment, run_in_process, train
from tests.support.configs import composed, point
from tests.support.endpoint import FakeEndpoint, completion
from tests.support.gold import gold_verdict
from tests.support.tables import points

PANEL = ["+judge@judges.other=tldr", "judges.other.model=m"]


def test_a_further_judge_is_a_stage_of_its_own_and_the_others_stay_what_they_were():
    alone, panel = (stages_of(point("beta=0.1", *options)) for options in ([], PANEL))
    assert [stage.role for stage in panel if stage not in alone] == ["judge_other", "evaluate"]
    assert [stage.role for stage in alone if stage not in panel] == ["evaluate"]
    of_judge = panel[-2]
    assert set(of_judge.upstream) == {"samples", "baseline"} and panel[-1].upstream["judge_other"] == of_judge
    assert of_judge.resources.judge.concurrency == 8 and of_judge.packages == ("openai",)
    limited = stages_of(point("beta=0.1", *PANEL, "judges.other.max_calls=7"))
    assert limited[-1] == panel[-1] and limited[-2].resources.judge.max_calls == 7


def test_all_judges_of_a_selected_point_judge_all_its_prompts():
    options = [*PANEL, "judges.other.reporting=selected", "beta=0.1"]
    selected = build_point(composed(*options))
    assert stages_of(with_all_judged(selected)) == stages_of(point("beta=0.1", *PANEL))
    assert stages_of(selected)[-1] != stages_of(point("beta=0.1", *PANEL))[-1]


def test_further_judges_are_asked_of_points_that_were_trained_to_their_end():
    panel = point("beta=0.1", *PANEL)
    assert stages_of(with_stop(panel, 1.0)) == stages_of(panel)
    assert stages_of(with_stop(panel, 0.5)) == stages_of(with_stop(point("beta=0.1"), 0.5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+judge@judges.gold=tldr", "judges.gold.model=m"], "judges.gold: is the name of the judge that selects"),
        (["+judge@judges.a b=tldr"], "judges.a b"),
        (
            [*PANEL, "+judge@judges.third=tldr", "judges.third.model=m"],
            "judges.third: is the same judge as judges.other",
        ),
        (["+judge@judges.again=gold"], "judges.again: is the same judge as judge"),
        (["+judge@judges.chat=mt_bench"], "judges.chat"),
        (
            [*PANEL, "judges.other.model=null"],
            "judges.other.model is not set: judge=tldr needs judges.other.model=NAME",
        ),
        ([*PANEL, "judges.other.baseline=/nowhere"], "judges.other.baseline=/nowhere: no such file"),
        ([*PANEL, "judges.other.temperature=-1"], "judges.other.temperature=-1"),
        ([*PANEL, "judges.other.modell=x"], "modell"),
        (["judge.repeated_prompts=5"], "judge.repeated_prompts: judge=gold never changes a verdict"),
    ],
)
def test_wrong_panels_are_refused_in_one_line(overrides, message, tmp_path):
    done = run_in_process("-m", *overrides, f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "store").exists()


def test_judges_are_the_same_for_all_points_of_a_sweep(tmp_path):
    done = run_in_process("-m", *PANEL[:1], "judges.other.model=a,b", f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and "judges.other.model: must be one value for a whole sweep" in done.stderr


def table(judge, values, first=None, identity="0", **columns):
    """Return verdicts of a judge on the prompts 0, 1, ... of one point."""
    count = len(values)
    rows = {"judge": judge, "metric": "win_rate", "identity": identity, "index": range(count), "sample": 0, "turn": 1}
    rows |= {"value": values, "reporting": [i % 2 == 1 for i in range(count)], "length": 1, "setup": "s", "init": "sft"}
    rows |= {"first": [0] * count if first is None else first, "questions": 0 if first is None else 2}
    return pd.DataFrame(
        rows | {"variant": "", "further": judge != "one", "method": "dpo", "beta": 0.1, "lr": 1e-3} | columns
    )


class NoUsage:
    usages = ()


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
    said = [s for s in judge_sentences("one", rows, pd.DataFrame(), pd.DataFrame()) if "reads" in s or "second" in s]
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
    said = judge_sentences("one", judges.leanings(verdicts, NoUsage), judges.agreement(verdicts), against[:1])
    assert any("DPO against IPO: the judges disagree beyond noise (one by +" in sentence for sentence in said)
    alike = verdicts[verdicts.judge != "opposite"]
    assert judges.disagreements(alike, best).empty
    said = judge_sentences(
        "one", judges.leanings(alike, NoUsage), judges.agreement(alike), judges.disagreements(alike, best)
    )
    assert said == [
        "Points were selected by one alone.",
        "No two methods are ordered oppositely by two judges beyond noise.",
    ]


@pytest.fixture(scope="module")
def endpoints():
    """Yield three endpoints: two with the gold judge's verdicts, one of which errs at times, and one that says A."""
    facts = {e.prompt.text: e.prompt.facts for e in read_prompts(prompt_inputs(build_point(composed(*SMALL))))}
    servers = {name: FakeEndpoint() for name in ("good", "noisy", "first")}

    def noisy(question):
        verdict = gold_verdict(question, facts)
        errs = hashlib.sha256(question.encode()).digest()[0] < 13  # one in twenty
        return completion(f"Verdict: {({'A': 'B', 'B': 'A', 'C': 'C'}[verdict]) if errs else verdict}")

    servers["good"].reply = lambda question: completion(f"Verdict: {gold_verdict(question, facts)}")
    servers["noisy"].reply = noisy
    yield servers
    for server in servers.values():
        server.close()


def judged_by(endpoint, name):
    """Return the overrides of a judge of the panel."""
    key = f"judges.{name}"
    return [f"+judge@{key}=tldr", f"{key}.model={name}", f"{key}.base_url={endpoint.url}"]


@pytest.fixture(scope="module")
def panel(endpoints, tmp_path_factory):
    """Return the folder of a sweep judged by three endpoints."""
    out = tmp_path_factory.mktemp("panel")
    judge = ["judge=tldr", "judge.model=good", f"judge.base_url={endpoints['good'].url}"]
    further = [*judged_by(endpoints["noisy"], "noisy"), *judged_by(endpoints["first"], "first")]
    sweep = ["-m", "method=dpo,nca", "beta=0.05,1", *SMALL, *judge, *further, "judges.noisy.repeated_prompts=4"]
    train(*sweep, "sweep.name=panel", "hydra.launcher.workers=1", f"output_dir={out}")
    return out / "sweeps" / "panel"


@pytest.mark.slow
def test_the_report_names_the_judge_that_always_takes_the_first_answer_and_the_others_agree(panel, endpoints):
    page = (panel / "report.html").read_text()
    assert "first prefers the answer it reads first: in 100.0 % [100.0, 100.0] of 128 questions." in page
    assert not re.search("(tldr|noisy) prefers the answer it reads first", page)
    agreement = pd.read_csv(panel / "tables" / "judge_agreement.csv").set_index(["judge", "other"])
    assert agreement.kappa["tldr", "noisy"] > 0.7 and abs(agreement.kappa["tldr", "first"]) < 0.01
    leanings = pd.read_csv(panel / "tables" / "judges.csv").set_index("judge")
    assert leanings.repeated["noisy"] == 4 * 4 and leanings.equal["noisy"] == 1 and leanings.repeated["tldr"] == 0
    asked = endpoints["noisy"].asked
    assert 0 < len(asked) - len(set(asked)) <= 2 * 4 * 4  # both questions of the prompts that were asked twice
    assert "Points were selected by tldr alone." in page and "tldr (rank)" in page
    best = yaml.safe_load((panel / "best.yaml").read_text())["mini_tldr"]["dpo"]
    ranking = pd.read_csv(panel / "tables" / "judge_rankings.csv").set_index(["judge", "method"])
    assert ranking.quality["tldr", "dpo"] == pytest.approx(best["quality_reporting"])
    assert ranking.quality["first", "dpo"] == 0.5
    outcomes = pd.read_csv(panel / "tables" / "verdicts.csv").set_index(["Judge", "Method"])
    assert outcomes["Tie %"]["first", "DPO"] == 100 and outcomes["Win rate"]["tldr", "DPO"] == best["quality_reporting"]
    assert len(outcomes) == 3 * 2 and (outcomes[["Win %", "Tie %", "Lose %"]].sum(axis=1).round(9) == 100).all()
    assert (panel / "figures" / "mini_tldr_win_tie_lose_first.png").exists()


def rejudge(*arguments):
    """Run the command in a process of its own: it becomes that of src.train."""
    command = [sys.executable, "-m", "sweeps.rejudge", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_sweep_is_judged_again_without_training_and_its_own_results_stay(panel, endpoints):
    record, asked = (panel / "sweep.json").read_bytes(), len(endpoints["good"].asked)
    judge = ["judge=tldr", "judge.model=another", f"judge.base_url={endpoints['first'].url}"]
    done = rejudge(panel, *judge, "--as", "another")
    assert done.returncode == 0, done.stderr
    again = panel.with_name("panel_another")
    assert (panel / "sweep.json").read_bytes() == record and len(endpoints["good"].asked) == asked
    one, other = (pd.read_csv(folder / "points.csv") for folder in (panel, again))
    assert one.quality.equals(other.quality) and one.checkpoint.equals(other.checkpoint)
    ranking = pd.read_csv(again / "tables" / "judge_rankings.csv")
    assert set(ranking.judge) == {"tldr", "noisy", "first", "another"}
    stages = [p["stages"] for p in json.loads((again / "sweep.json").read_text())["points"]]
    old = [p["stages"] for p in json.loads(record)["points"]]
    assert [s["generate"] for s in stages] == [s["generate"] for s in old]


@pytest.mark.slow
def test_what_cannot_be_judged_again_is_refused_with_the_command_that_makes_it(panel):
    refused = rejudge(panel, "judge=tldr", "judge.model=x", "dataset.seed=9", "--as", "more")
    assert (
        refused.returncode == 2
        and "judge_only=true: other stages are missing (sft 1, reference 1, align 4" in refused.stderr
    )
    assert not panel.with_name("panel_more").exists()
    refused = rejudge(panel, "judge=tldr", "--as", "noisy")
    assert refused.returncode == 2 and "has a judge noisy already" in refused.stderr
    refused = rejudge(panel, "sweep.name=x")
    assert refused.returncode == 2 and "which judge? Add judge=NAME" in refused.stderr
    refused = rejudge(panel.parent, "judge=tldr")
    assert refused.returncode == 2 and "no sweep.json in it" in refused.stderr
