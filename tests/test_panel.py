"""Several judges of the same samples: plan, results, what is said of them, and judging a finished sweep again."""

import hashlib
import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from src.config.validation import build_point
from src.data.evaluation_prompts import read_prompts
from src.errors import ConfigError
from src.judges.endpoint_check import check_judges
from src.planning.inputs import prompt_inputs
from src.planning.plan import make_plan
from src.planning.stage import stages_of, with_all_judged
from src.store.store import Store
from sweeps.search.successive_halving import with_stop
from tests.support.commands import SMALL, environment, run_in_process, train
from tests.support.configs import composed, point
from tests.support.endpoint import FakeEndpoint, completion
from tests.support.gold import gold_verdict

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
            "judges.other.model is not set: judge@judges.other=tldr needs judges.other.model=NAME",
        ),
        ([*PANEL, "judges.other.baseline=/nowhere"], "judges.other.baseline=/nowhere: no such file"),
        ([*PANEL, "judges.other.temperature=-1"], "judges.other.temperature=-1"),
        ([*PANEL, "judges.other.modell=x"], "modell"),
        (
            [*PANEL, "judges.other.api_key_env=NOT_SET"],
            "(judges.other.api_key_env names another",
        ),
        (["judge.repeated_prompts=5"], "judge.repeated_prompts: judge=gold never changes a verdict"),
    ],
)
def test_wrong_panels_are_refused_in_one_line(overrides, message, tmp_path):
    done = run_in_process("-m", *overrides, f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "store").exists()


def test_a_further_judge_is_named_by_its_key_by_a_single_run_and_its_endpoint(fake_endpoint, tmp_path, capfd):
    done = run_in_process(*PANEL, "judges.other.reporting=selected", f"output_dir={tmp_path}")
    assert done.returncode == 2 and "error: judges.other.reporting=selected selects among the points" in done.stderr
    fake_endpoint.check = lambda request: (404, {}, b'{"error": {"message": "no such model"}}')
    url = f"judges.other.base_url={fake_endpoint.url}"
    plan = make_plan([point("beta=0.1", *PANEL, url)], Store(tmp_path))
    with pytest.raises(ConfigError, match=r"^judges\.other\.model=m: http.* refuses a question to m"):
        check_judges(plan, Store(tmp_path), runs_here=True)
    answering = completion("A")
    fake_endpoint.check = lambda request: answering
    retired = make_plan([point("beta=0.1", *PANEL, url, "judges.other.model=gpt-4-1106-preview")], Store(tmp_path))
    check_judges(retired, Store(tmp_path), runs_here=True)
    assert "judges.other.model=gpt-4-1106-preview: gpt-4-1106-preview is switched off" in capfd.readouterr().err
    selecting = ["judge=tldr", "judge.model=m", f"judge.base_url={fake_endpoint.url}"]  # the control
    fake_endpoint.check = lambda request: (404, {}, b"{}")
    with pytest.raises(ConfigError, match=r"^judge\.model=m: http"):
        check_judges(make_plan([point("beta=0.1", *selecting)], Store(tmp_path)), Store(tmp_path), runs_here=True)


def test_judges_are_the_same_for_all_points_of_a_sweep(tmp_path):
    done = run_in_process("-m", *PANEL[:1], "judges.other.model=a,b", f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and "judges.other.model: must be one value for a whole sweep" in done.stderr


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
    both = run_in_process(panel, again, "--out", panel.with_name("both"), module="sweeps.aggregate")
    assert both.returncode == 2 and "judged by another in one of them alone" in both.stderr
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
