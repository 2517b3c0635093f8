"""judge.reporting=selected: reporting prompts are judged for selected points alone, and nothing else changes."""

import json

import numpy as np
import pytest
import yaml

from src.config.validation import build_point
from src.data.evaluation_prompts import read_prompts
from src.planning.inputs import prompt_inputs
from src.planning.stage import stages_of, with_all_judged
from src.store.store import QUALITY_FILE, RESULT_SCHEMA
from sweeps.analysis import reporting_split
from sweeps.analysis.results import PromptQuality
from sweeps.analysis.selection import average_seeds, select_points
from sweeps.analysis.significance import pairwise_against_pointwise
from sweeps.report.tables import best_table
from tests.support.commands import SMALL, run_in_process, train
from tests.support.configs import composed
from tests.support.endpoint import completion
from tests.support.gold import gold_verdict
from tests.support.tables import points

JUDGE = ["judge=tldr", "judge.model=gold"]
NUM_PROMPTS = 40


def test_a_point_that_is_selected_gets_the_result_it_has_where_all_are_judged():
    judged = {r: build_point(composed(*JUDGE, f"judge.reporting={r}")) for r in ("all", "selected")}
    stages = {reporting: stages_of(point) for reporting, point in judged.items()}
    assert stages["all"][:-1] == stages["selected"][:-1] and stages["all"][-1] != stages["selected"][-1]
    assert stages_of(with_all_judged(judged["selected"])) == stages["all"]
    assert stages_of(build_point(composed(*JUDGE)))[-1].identity == stages["all"][-1].identity
    assert "judged" not in stages["all"][-1].description["inputs"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["-m", "evaluation.metric=reward_accuracy"], "judge.reporting=selected: evaluation.metric=reward_accuracy"),
        ([], "judge.reporting=selected selects among the points of a sweep: add -m"),
        (["-m", "judge.reporting=all,selected"], "judge.reporting: must be one value for a whole sweep"),
    ],
)
def test_what_it_does_not_fit_is_refused(overrides, message, tmp_path):
    reporting = [] if "judge.reporting=all,selected" in overrides else ["judge.reporting=selected"]
    done = run_in_process(*overrides, *reporting, f"output_dir={tmp_path}/out")
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "out" / "store").exists()


@pytest.fixture
def results(tmp_path):
    """Return points.csv and the store of two methods over two betas: (judged everywhere, others on selection alone)."""
    selection, tables = np.arange(NUM_PROMPTS) % 2 == 0, {}
    rng = np.random.default_rng(0)
    qualities = [rng.random(NUM_PROMPTS) < ability for ability in (0.9, 0.4, 0.8, 0.3)]
    for name, judged_alone in (("all", ()), ("selected", (1, 3))):
        rows = []
        for number, values in enumerate(qualities):
            asked = selection if number in judged_alone else np.full(NUM_PROMPTS, True)
            stage = tmp_path / name / "evaluate" / str(number)
            stage.mkdir(parents=True)
            quality = {"prompts": np.flatnonzero(asked), "values": values[asked].astype(float)}
            quality = {key: value.tolist() for key, value in quality.items()} | {"selection": selection[asked].tolist()}
            (stage / QUALITY_FILE).write_text(json.dumps({"schema": RESULT_SCHEMA, **quality}))
            reporting = float("nan") if number in judged_alone else values[~selection].mean()
            row = {"method": ("dpo", "ipo")[number // 2], "beta": (0.1, 1.0)[number % 2], "metric": "win_rate"}
            row |= {"kind": "pairwise", "quality_selection": values[selection].mean(), "quality_reporting": reporting}
            rows.append(row)
        tables[name] = points(*rows), PromptQuality(tmp_path / name)
    return tables


def test_tables_of_selected_points_are_those_where_all_are_judged(results):
    tables = {}
    for name, (rows, prompts) in results.items():
        averages = average_seeds(rows)
        best = reporting_split.with_intervals(select_points(averages, "best", prompts), averages, prompts)
        differences = reporting_split.differences(best, prompts)
        tables[name] = best_table(best, differences), differences, reporting_split.verdicts(best, prompts)
        of_others = len(reporting_split.gains(averages, best, prompts)), len(reporting_split.pareto_fronts(averages))
        assert of_others == ((3, 4) if name == "all" else (1, 2))  # what needs points that were not judged is left out
    for one, other in zip(*tables.values(), strict=True):
        assert one.equals(other) and len(one)


def test_a_selected_point_that_is_not_judged_yet_is_named_and_compared_with_nothing(results):
    rows, prompts = results["selected"]
    averages = average_seeds(rows[rows.identity != "0"])  # of DPO the other point is selected
    best = reporting_split.with_intervals(select_points(averages, "best", prompts), averages, prompts)
    differences = reporting_split.differences(best, prompts)
    table = best_table(best, differences).set_index("Method")
    assert table.loc["DPO", "Win rate"] == "not judged" and table.loc["DPO", "Gap to best"] == "-"
    assert table.loc["IPO", "Gap to best"] == "best" and differences.empty
    assert list(reporting_split.verdicts(best, prompts).method) == ["ipo"]
    assert pairwise_against_pointwise(reporting_split.reported(best)).empty


def test_seeds_of_which_one_is_not_judged_have_no_mean_on_the_reporting_split(results):
    rows, _ = results["selected"]
    seeds = rows[rows.identity.isin(("0", "1"))].assign(beta=0.1, seed=[0, 1])
    (row,) = average_seeds(seeds).to_dict("records")
    assert np.isnan(row["quality_reporting"]) and not np.isnan(row["quality_selection"])
    (control,) = average_seeds(seeds.assign(quality_reporting=0.5)).to_dict("records")
    assert control["quality_reporting"] == 0.5


@pytest.mark.slow
def test_selected_points_alone_are_asked_for_and_best_yaml_stays(fake_endpoint, tmp_path):
    sweep = ["-m", "method=dpo", "beta=0.01,0.05,0.1,0.3,1,3", "lr=1e-2", *SMALL, *JUDGE, "sweep.name=s"]
    sweep += ["hydra.launcher.workers=1"]  # of several, two may ask the same question at the same time
    prompts = read_prompts(prompt_inputs(build_point(composed(*SMALL))))
    facts = {entry.prompt.text: entry.prompt.facts for entry in prompts}
    fake_endpoint.reply = lambda question: completion(f"Verdict: {gold_verdict(question, facts)}")

    def run(folder, *options):
        """Return what was asked, best.yaml and the report."""
        fake_endpoint.asked.clear()
        done = train(*sweep, f"judge.base_url={fake_endpoint.url}", f"output_dir={folder}", *options)
        best = yaml.safe_load((folder / "sweeps" / "s" / "best.yaml").read_text())["mini_tldr"]["dpo"]
        return list(fake_endpoint.asked), best, done.stdout, (folder / "sweeps" / "s" / "report.html").read_text()

    every, expected, _, page = run(tmp_path / "all")
    assert "were judged on the selection prompts alone" not in page
    (tmp_path / "selected" / "store").mkdir(parents=True)
    for kind in ("sft", "reference", "align", "generate"):  # the same models and samples
        (tmp_path / "selected" / "store" / kind).symlink_to(tmp_path / "all" / "store" / kind)
    asked, best, stdout, page = run(tmp_path / "selected", "judge.reporting=selected")
    assert len(asked) <= 0.6 * len(every) and set(asked) < set(every) and len(set(asked)) == len(asked)
    assert best["top3_reporting"] is None and expected["top3_reporting"] is not None
    for entry in (best, expected):
        del entry["top3_reporting"], entry["checkpoint"]
    assert best == expected
    line = "5 of 6 points were judged on the selection prompts alone"
    assert line in stdout and line in page
    assert run(tmp_path / "selected", "judge.reporting=selected")[0] == []
    other = ["judge.reporting=selected", "sweep.select=lowest_kl_in_shortlist"]
    missing, changed, *_ = run(tmp_path / "selected", *other)
    assert changed["identities"] != best["identities"] and changed["quality_reporting"] is not None
    assert 0 < len(missing) <= 16 and not set(missing) & set(asked)
    rest, *_ = run(tmp_path / "selected", "judge.reporting=all")
    assert sorted(rest) == sorted(set(every) - {*asked, *missing})
