"""The search that halves, over a store: what runs and what is said of it, in one go or in many."""

import json
import pkgutil
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from src.config.validation import build_point
from src.errors import PointFailure, SweepFailed
from src.planning.plan import Plan, make_plan
from src.stages.runner import compute_or_wait
from src.store.store import Store
from sweeps.aggregate import aggregate
from sweeps.search.record import read_sweep
from sweeps.search.search import Search
from tests.support.commands import at_once, kill_when, train
from tests.support.configs import composed
from tests.test_prolonging import TINY


class Here:
    """A launcher that computes a plan in this process, and stops like Ctrl-C after some stages."""

    runs_in_process = False

    def __init__(self, stages: int = 10**9) -> None:
        self.left, self.computed = stages, []

    def check(self, plan: Plan) -> None:
        pass

    def launch_plan(self, plan, folder, finalize):
        from src.model.loading import set_cpu_threads

        set_cpu_threads(plan.points[0].engine.cpu_threads)
        for identity, stage in plan.stages.items():
            if identity in plan.needed:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                compute_or_wait(stage, folder.store)
                self.computed.append(stage.kind)
        return {}


HALVING = [
    *("sweep.search=successive_halving", "sweep.rungs=[0.5,1]", "trainer.align.epochs=3"),
    *("judge=none", "evaluation.metric=reward_accuracy", "dataset.validation_size=48", "lr=0.005"),  # they differ
]
BETAS = (0.01, 0.5, 1.0, 10.0)


def search(folder: Path, launcher, *overrides: str, betas=BETAS) -> dict:
    """One call of a search over DPO's betas; sweep.json after it."""
    point = build_point(composed(*TINY, *HALVING, f"output_dir={folder}", *overrides))
    store = Store(folder)
    plan = make_plan([replace(point, beta=beta) for beta in betas], store)
    try:
        Search(plan, store).run(launcher, "h", "command")
    finally:
        found = read_sweep(store.sweep_dir("h"))
    return found


def final(folder: Path) -> dict[str, object]:
    """What a search ends with, without what it took."""
    points = pd.read_csv(folder / "sweeps" / "h" / "points.csv")
    table = (folder / "sweeps" / "h" / "tables" / "best.csv").read_text()
    return {"points": points.drop(columns=["seconds", "checkpoint"]).to_csv(), "best": table}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Searches in this process draw no figures; those of the command do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.report.figures.draw", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("searched")
    launcher = Here()
    search(folder, launcher)
    assert Counter(launcher.computed)["align"] == 6, "four halves, and two of them to their end"
    assert pd.read_csv(folder / "sweeps" / "h" / "points.csv").quality_selection.nunique() > 2, "they can be told apart"
    return folder


def test_the_same_search_again_computes_nothing(searched):
    before = sorted((p, p.stat().st_mtime_ns) for p in (searched / "store").rglob("*"))
    again, table = Here(), final(searched)
    search(searched, again)
    assert again.computed == [] and final(searched) == table
    assert sorted((p, p.stat().st_mtime_ns) for p in (searched / "store").rglob("*")) == before


def test_models_stay_and_nothing_to_go_on_from_when_it_is_over(searched):
    assert not list((searched / "store").glob("*/.work/*"))
    assert len(list((searched / "store").glob("align/*/model.safetensors"))) == 6


def test_stopped_anywhere_and_called_again_it_computes_each_stage_once_and_ends_the_same(tmp_path, searched):
    calls: list[Here] = []
    while not calls or calls[-1].left == 0:
        calls.append(Here(stages=4))
        try:
            search(tmp_path, calls[-1])
        except KeyboardInterrupt:
            assert read_sweep(tmp_path / "sweeps" / "h")["finished"] is None
    assert len(calls) > 4 and final(tmp_path) == final(searched)
    computed = Counter(kind for call in calls for kind in call.computed)
    assert computed == {"sft": 1, "reference": 1, "align": 6, "generate": 6, "evaluate": 6}
    assert not list(tmp_path.glob("sweeps/h.*")), "one search is one record, whatever its rung"


def aggregated(folder: Path, to: Path, label: str) -> pd.DataFrame:
    """The search again in a copy in which one point is made far the best on the prompts that choose."""
    shutil.copytree(folder, to)
    (point,) = (p for p in read_sweep(to / "sweeps" / "h")["points"] if p["label"] == label)
    path = to / "store" / "evaluate" / point["identity"] / "result.json"
    result = json.loads(path.read_text())
    result["splits"]["selection"]["value"] = 2.0
    path.write_text(json.dumps(result))
    return aggregate([to / "sweeps" / "h"], quiet=True)


def test_only_points_of_the_last_rung_can_be_chosen_and_the_report_counts_the_rungs(tmp_path, searched):
    points = read_sweep(searched / "sweeps" / "h")["points"]
    assert [p["stop"] for p in points].count(0.5) == 2
    left, last = (next(p for p in points if p["stop"] == stop) for stop in (0.5, 1.0))
    assert aggregated(searched, tmp_path / "a", left["label"]).beta[0] != left["beta"]
    assert aggregated(searched, tmp_path / "b", last["label"]).beta[0] == last["beta"]
    for other in (p for p in points if p["stop"] == 1.0):  # the negative control, of either of them
        best = aggregated(searched, tmp_path / f"c{other['beta']}", other["label"])
        assert list(best.beta) == [other["beta"]] and best.seeds[0] == 1
    report = (searched / "sweeps" / "h" / "report.html").read_text()
    assert "halving: points at each share of the steps: 4 at 0.5, 2 at the end" in report
    assert '<td class="text">DPO</td><td>4</td><td>2</td>' in report
    costs = dict(re.findall(r'<td class="text">(align|generate)</td><td>(\d+)</td>', report))
    assert costs == {"align": "4", "generate": "6"}, "a prolonged run is one; samples of every rung count"


def test_results_of_whole_runs_are_reused(tmp_path, searched):
    """A grid before the search: half of the points have nothing left to save, the others go their way."""
    grid_first, then = Here(), Here()
    search(tmp_path, grid_first, "sweep.search=grid", "sweep.name=grid", betas=BETAS[:2])
    sweep = search(tmp_path, then)
    assert Counter(then.computed)["align"] == 2 + 1, "two halves, and the better of them to its end"
    assert [(p["stop"], p["earlier"]) for p in sweep["points"][:2]] == [(1.0, [])] * 2
    everything = Here()
    search(tmp_path, everything, "sweep.search=grid")
    assert Counter(everything.computed)["align"] == 1, "nor does the grid run again what the search has run"


def test_models_stay_as_keep_says_and_checkpoints_as_long_as_a_later_rung_may_need_them(tmp_path):
    seen: list[int] = []

    class Watching(Here):
        def launch_plan(self, plan, folder, finalize):
            seen.append(len(list(folder.store.root.glob("align/.work/*/checkpoints/full/step-*"))))
            return super().launch_plan(plan, folder, finalize)

    search(tmp_path, Watching(), "keep_checkpoints=best")
    assert seen == [0, 2], "those that go on, and no others"
    best = yaml.safe_load((tmp_path / "sweeps" / "h" / "best.yaml").read_text())["mini_tldr"]["dpo"]["checkpoint"]
    assert [str(p.parent) for p in (tmp_path / "store").glob("align/*/model.safetensors")] == [best]


class Failing(Here):
    """Of which one point fails."""

    def launch_plan(self, plan, folder, finalize):
        bad = [r for r, p in zip(plan.results, plan.points, strict=True) if p.beta == 0.5 and r in plan.needed]
        plan.abandoned |= set(bad)
        plan.refresh(folder.store)
        self.failed = [*getattr(self, "failed", []), *bad]
        super().launch_plan(plan, folder, finalize)
        return {result: PointFailure("failed", "diverged") for result in bad}


def test_a_point_that_fails_is_left_behind_named_and_tried_again_once_all_is_over(tmp_path):
    launcher = Failing()
    with pytest.raises(SweepFailed, match="1 of 4 points failed"):
        search(tmp_path, launcher)
    assert len(launcher.failed) == 1, "no later rung tries it"
    (lost,) = (p for p in read_sweep(tmp_path / "sweeps" / "h")["points"] if p["state"] == "failed")
    assert (lost["beta"], lost["error"], lost["rung"]) == (0.5, "diverged", 1)
    again = Here()
    search(tmp_path, again)
    assert again.computed.count("align") >= 1 and read_sweep(tmp_path / "sweeps" / "h")["state"] == "done"


class Jobs(Here):
    """Submits and returns, as on a cluster; the jobs run when the test says so."""

    jobs = None

    def launch_plan(self, plan, folder, finalize):
        if not plan.needed:
            return {}

        def jobs():
            Here.launch_plan(self, plan, folder, finalize)
            pkgutil.resolve_name(finalize)(folder.path, {})

        self.jobs = jobs
        return None


def test_where_jobs_run_each_call_submits_the_rung_that_is_next(tmp_path, searched, capsys):
    first, second, third = Jobs(), Jobs(), Jobs()
    assert search(tmp_path, first)["search"]["rung"] == 1
    assert "rerun the same command to start rung 2" in capsys.readouterr().out
    assert second.jobs is None and search(tmp_path, second)["search"]["rung"] == 1, "before it has ended: no other"
    first.jobs()
    assert "rung 1 is done" in capsys.readouterr().out
    assert not (tmp_path / "sweeps" / "h" / "best.yaml").exists(), "nothing is chosen between rungs"
    assert search(tmp_path, third)["search"]["rung"] == 2
    third.jobs()
    assert final(tmp_path) == final(searched)
    assert Counter(third.computed) == {"align": 2, "generate": 2, "evaluate": 2}


def test_the_command_killed_in_the_last_rung_and_given_again_ends_as_undisturbed(tmp_path, searched):
    betas = f"beta={','.join(map(str, BETAS))}"
    command = ["-m", "method=dpo", betas, *TINY, *HALVING, "sweep.name=h", f"output_dir={tmp_path}"]
    plan = at_once(*command, "dry_run=true").stdout
    assert re.search(r"^ +1 +0.5 +4\n +2 +1 +2$", plan, re.M), plan
    assert "the steps of 3 whole runs, 75 % of the 4 of the full grid; 6 times sampled" in plan
    later = {f"step-{step:08d}" for step in range(13, 24)}  # the first rung stops at 12
    there = lambda store: any(p.name in later for p in store.glob("align/.work/*/checkpoints/full/*"))  # noqa: E731
    assert kill_when(there, tmp_path, *command), "the kill came too late"
    output = train(*command).stdout
    assert "rung 1 of" not in output and "h: rung 2 of 2: 2 points to the end" in output
    assert final(tmp_path) == final(searched)
    assert "halving: points at each share of the steps: 4 at 0.5, 2 at the end" in output
