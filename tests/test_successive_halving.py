"""Successive halving over a store: what is computed and reported, in one invocation or in many."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml

from launchers.protocol import PlanLauncher
from src.errors import PointFailure, SweepFailed
from src.planning.plan import Plan, make_plan
from src.stages.runner import compute_or_wait
from src.store.files import read_checksummed_json, with_checksum, write_json
from src.store.integrity import DONE, describe_files
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from sweeps.aggregate import aggregate, finalize
from sweeps.search.search import Search
from tests.support.commands import run_in_process, train
from tests.support.configs import TINY, point
from tests.support.kills import kill_at


class InProcessLauncher(PlanLauncher):
    """Computes a plan in this process; after `max_stages` stages it stops as Ctrl-C would."""

    runs_in_process = True

    def __init__(self, max_stages: int = 10**9) -> None:
        self.remaining, self.computed = max_stages, []

    def check(self, plan: Plan) -> None:
        pass

    def num_processes(self, stage):
        return 1

    def launch_plan(self, plan, folder, finalize):
        from src.model.loading import set_cpu_threads

        set_cpu_threads(plan.points[0].engine.cpu_threads)
        for identity, stage in plan.stages.items():
            if identity in plan.needed:
                if self.remaining == 0:
                    raise KeyboardInterrupt
                self.remaining -= 1
                compute_or_wait(stage, folder.store)
                self.computed.append(stage.kind)
        return {}


HALVING = [
    *("sweep.search=successive_halving", "sweep.rungs=[0.5,1]", "trainer.align.epochs=3"),
    # With these settings the points differ in quality.
    *("judge=none", "evaluation.metric=reward_accuracy", "dataset.validation_size=48", "lr=0.005"),
]
BETAS = (0.01, 0.5, 1.0, 10.0)


def sweep_folder(output_dir: Path) -> SweepFolder:
    return SweepFolder(output_dir / "sweeps" / "h")


def search(output_dir: Path, launcher, *overrides: str, betas=BETAS) -> dict:
    """Invoke a search over DPO's betas once, and return sweep.json."""
    base = point(*TINY, *HALVING, f"output_dir={output_dir}", *overrides)
    store = Store(output_dir)
    plan = make_plan([replace(base, beta=beta) for beta in betas], store)
    Search(plan, store).run(launcher, "h", "command")
    return sweep_folder(output_dir).read()


def final(output_dir: Path) -> dict[str, object]:
    """Return the outcome of a search without its costs and paths."""
    folder = sweep_folder(output_dir)
    points = pd.read_csv(folder.points_csv).drop(columns=["seconds", "checkpoint"])
    return {"points": points.to_csv(), "best": (folder.tables / "best.csv").read_text()}


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """Skip the figures of searches in this process; those of the command are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sweeps.report.figures.draw", lambda *_: [])
        yield


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("searched")
    launcher = InProcessLauncher()
    search(output_dir, launcher)
    assert Counter(launcher.computed)["align"] == 6, "four halves, and two of them to their end"
    points = pd.read_csv(sweep_folder(output_dir).points_csv)
    assert points.quality_selection.nunique() > 2, "the points differ in quality"
    return output_dir


@pytest.mark.slow
def test_the_same_search_again_computes_nothing(searched):
    before = sorted((p, p.stat().st_mtime_ns) for p in (searched / "store").rglob("*"))
    again, table = InProcessLauncher(), final(searched)
    search(searched, again)
    assert again.computed == [] and final(searched) == table
    assert sorted((p, p.stat().st_mtime_ns) for p in (searched / "store").rglob("*")) == before


@pytest.mark.slow
def test_a_finished_search_keeps_models_and_no_checkpoints(searched):
    assert not list((searched / "store").glob("*/.work/*"))
    assert len(list((searched / "store").glob("align/*/model.safetensors"))) == 6


@pytest.mark.slow
def test_a_search_interrupted_anywhere_computes_each_stage_once_and_ends_the_same(tmp_path, searched):
    launchers: list[InProcessLauncher] = []
    while not launchers or launchers[-1].remaining == 0:
        launchers.append(InProcessLauncher(max_stages=4))
        try:
            search(tmp_path, launchers[-1])
        except KeyboardInterrupt:
            assert sweep_folder(tmp_path).read()["finished"] is None
    assert len(launchers) > 4 and final(tmp_path) == final(searched)
    computed = Counter(kind for launcher in launchers for kind in launcher.computed)
    assert computed == {"sft": 1, "reference": 1, "align": 6, "generate": 6, "evaluate": 6}
    assert not list(tmp_path.glob("sweeps/h.*")), "no rung archives the record of another"


def aggregate_copy(output_dir: Path, copy: Path, label: str) -> pd.DataFrame:
    """Aggregate a copy of the search in which one point has by far the best quality on the selection split."""
    shutil.copytree(output_dir, copy)
    (row,) = (p for p in sweep_folder(copy).read()["points"] if p["label"] == label)
    path = copy / "store" / "evaluate" / row["identity"] / "result.json"
    result = json.loads(path.read_text())
    result["splits"]["selection"]["value"] = 2.0
    path.write_text(json.dumps(result))
    done = read_checksummed_json(path.parent / DONE)
    del done["checksum"]
    done["files"]["result.json"] = describe_files(path.parent)["result.json"]
    write_json(path.parent / DONE, with_checksum(done))
    return aggregate([sweep_folder(copy)], quiet=True)


COUNTS = "successive_halving: points trained to each fraction of the steps: 4 at 0.5, 2 at 1"


@pytest.mark.slow
def test_only_points_of_the_last_rung_can_be_selected_and_the_report_counts_the_rungs(tmp_path, searched):
    points = sweep_folder(searched).read()["points"]
    assert [p["stop_fraction"] for p in points].count(0.5) == 2
    rejected = next(p for p in points if p["stop_fraction"] == 0.5)
    assert aggregate_copy(searched, tmp_path / "rejected", rejected["label"]).beta[0] != rejected["beta"]
    for promoted in (p for p in points if p["stop_fraction"] == 1.0):  # the negative control, for both of them
        best = aggregate_copy(searched, tmp_path / f"promoted{promoted['beta']}", promoted["label"])
        assert list(best.beta) == [promoted["beta"]] and best.seeds[0] == 1
    report = sweep_folder(searched).report.read_text()
    assert COUNTS in report
    assert '<td class="text">DPO</td><td>4</td><td>2</td>' in report
    costs = dict(re.findall(r'<td class="text">(align|generate)</td><td>(\d+)</td>', report))
    assert costs == {"align": "4", "generate": "6"}, "a resumed run counts once, samples of every rung count"


def test_results_of_full_runs_are_reused(tmp_path):
    """After a grid over half of the points these enter at the last rung; the others are searched."""
    grid_first, then = InProcessLauncher(), InProcessLauncher()
    search(tmp_path, grid_first, "sweep.search=grid", "sweep.name=grid", betas=BETAS[:2])
    sweep = search(tmp_path, then)
    assert Counter(then.computed)["align"] == 2 + 1, "two halves, and the better of them to its end"
    assert [(p["stop_fraction"], p["earlier"]) for p in sweep["points"][:2]] == [(1.0, [])] * 2
    full_grid = InProcessLauncher()
    search(tmp_path, full_grid, "sweep.search=grid")
    assert Counter(full_grid.computed)["align"] == 1, "the grid reuses the full runs of the search"


def test_between_rungs_only_models_to_keep_and_checkpoints_of_promoted_points_stay(tmp_path):
    num_checkpoints: list[int] = []

    class CountingLauncher(InProcessLauncher):
        def launch_plan(self, plan, folder, finalize):
            checkpoints = folder.store.root.glob("align/.work/*/checkpoints/sharded/step-*")
            num_checkpoints.append(len(list(checkpoints)))
            return super().launch_plan(plan, folder, finalize)

    search(tmp_path, CountingLauncher(), "keep_checkpoints=best")
    assert num_checkpoints == [0, 2], "those of the promoted points"
    best = yaml.safe_load(sweep_folder(tmp_path).best_yaml.read_text())["mini_tldr"]["dpo"]["checkpoint"]
    assert [str(p.parent) for p in (tmp_path / "store").glob("align/*/model.safetensors")] == [best]


class FailingLauncher(InProcessLauncher):
    """Fails the point with beta = 0.5."""

    def launch_plan(self, plan, folder, finalize):
        failed = [r for r, p in zip(plan.results, plan.points, strict=True) if p.beta == 0.5 and r in plan.needed]
        plan.abandoned |= set(failed)
        plan.refresh(folder.store)
        self.failed = [*getattr(self, "failed", []), *failed]
        super().launch_plan(plan, folder, finalize)
        return {result: PointFailure("failed", "diverged") for result in failed}


def test_a_failed_point_is_skipped_by_later_rungs_named_and_retried_by_the_next_search(tmp_path):
    launcher = FailingLauncher()
    with pytest.raises(SweepFailed, match="1 of 4 points failed"):
        search(tmp_path, launcher)
    assert len(launcher.failed) == 1, "no later rung tries it"
    (failed,) = (p for p in sweep_folder(tmp_path).read()["points"] if p["state"] == "failed")
    assert (failed["beta"], failed["error"], failed["rung"]) == (0.5, "diverged", 1)
    again = InProcessLauncher()
    assert search(tmp_path, again)["state"] == "done"
    assert again.computed.count("align") >= 1


class JobLauncher(InProcessLauncher):
    """Submits jobs and returns, as on a cluster; the jobs run when the test calls them."""

    runs_in_process, jobs = False, None

    def launch_plan(self, plan, folder, finalize_name):
        if not plan.needed:
            return {}

        def jobs():
            InProcessLauncher.launch_plan(self, plan, folder, finalize_name)
            finalize(folder.path, {})

        self.jobs = jobs
        return None


@pytest.mark.slow
def test_where_jobs_run_each_invocation_submits_the_next_rung(tmp_path, searched, capsys):
    first, second, third = JobLauncher(), JobLauncher(), JobLauncher()
    assert search(tmp_path, first)["search"]["rung"] == 1
    assert "rerun the same command to start rung 2" in capsys.readouterr().out
    assert search(tmp_path, second)["search"]["rung"] == 1, "no other rung is submitted before it is done"
    first.jobs()
    assert "rung 1 is done" in capsys.readouterr().out
    assert not sweep_folder(tmp_path).best_yaml.exists(), "nothing is selected between rungs"
    assert search(tmp_path, third)["search"]["rung"] == 2
    third.jobs()
    assert final(tmp_path) == final(searched)
    assert Counter(third.computed) == {"align": 2, "generate": 2, "evaluate": 2}


@pytest.mark.slow
def test_a_command_killed_in_the_last_rung_and_rerun_ends_as_an_uninterrupted_one(tmp_path, searched):
    betas = f"beta={','.join(map(str, BETAS))}"
    command = ["-m", "method=dpo", betas, *TINY, *HALVING, "sweep.name=h", f"output_dir={tmp_path}"]
    plan = run_in_process(*command, "dry_run=true").stdout
    assert re.search(r"^ +1 +0.5 +4\n +2 +1 +2$", plan, re.M), plan
    assert "the steps of 3 full runs, 75 % of the 4 of the full grid; 6 models sampled" in plan
    last_rung = "align/.work/*/checkpoints/sharded/step-0000001[3-9]"  # the first rung stops at 12
    kill_at(last_rung, 2, *command)
    output = train(*command).stdout
    assert "rung 1 of" not in output and "h: rung 2 of 2: 2 points to 100 % of their steps" in output
    assert final(tmp_path) == final(searched)
    assert COUNTS in output
