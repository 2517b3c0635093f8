"""Capability beside the stage itself: what is planned and refused, what it costs, and the change that is reported."""

import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from launchers.slurm.graph import job_arrays
from src.config import packages
from src.errors import ConfigError
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.planning.plan import make_plan, warn_of_removed_models
from src.planning.stage import stages_of
from src.preflight import check_packages
from src.store.files import with_checksum, write_json
from src.store.integrity import DONE, STAGE_FILE, describe_files
from src.store.store import CAPABILITY_FILE, RESULT_SCHEMA, Store
from sweeps.analysis.capability import ALL_TASKS, capability_changes
from tests.support.configs import TINY, point
from tests.support.tasks import asking, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


def stage_of(tasks, role, *overrides, names=("sums",)):
    stages = stages_of(point(*TINY, *asking(tasks, *names), *overrides))
    return next(stage for stage in stages if stage.role == role)


def test_the_sft_model_of_a_grid_is_asked_once_and_first_and_its_points_before_they_are_evaluated(tasks):
    grid = [stages_of(point(*TINY, *asking(tasks, "sums"), f"method={m}", "beta=0.1")) for m in ("dpo", "simpo")]
    of_sft = {stage.identity for stages in grid for stage in stages if stage.role == "sft_capability"}
    policies = {stage.identity for stages in grid for stage in stages if stage.role == "capability"}
    assert len(of_sft) == 1 and len(policies) == 2
    for stages in grid:
        assert stages[-1].kind == "evaluate"
        assert {"capability", "sft_capability"} <= stages[-1].upstream.keys()
    from_base = stages_of(point(*asking(tasks, "sums"), "init=base", "beta=0.1", "lr=1e-3"))
    assert "sft_capability" in {stage.role for stage in from_base}, "compared with the SFT model, too"
    without = {stage.identity for stage in stages_of(point(*TINY, "method=dpo", "beta=0.1"))}
    assert without - {stage.identity for stage in grid[0]} == {
        stage.identity for stage in stages_of(point(*TINY, "method=dpo", "beta=0.1")) if stage.kind == "evaluate"
    }, "asking changes nothing but the evaluation"


def test_a_task_of_ones_own_is_identified_by_its_content_and_not_by_its_place(tasks, tmp_path):
    copied = write_tasks(tmp_path / "copy")
    assert stage_of(copied, "capability").identity == stage_of(tasks, "capability").identity
    with (copied / "sums.jsonl").open("a") as data:
        data.write('{"question": "What is 1 plus 1? A: 2, B: 3, C: 4, D: 5.", "answer": 0}\n')
    assert stage_of(copied, "capability").identity != stage_of(tasks, "capability").identity


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["capability.tasks=[sum]"], "capability.tasks: lm-eval has no task sum, nor has .*did you mean sums[?]"),
        (["+capability.metrics.sums=accuracy"], "capability.metrics.sums=accuracy: its metrics are acc, acc_norm"),
        (["capability.tasks=[]"], "name at least one task"),
        (["capability.tasks=[sums,sums]"], "sums is named twice"),
        (["capability.task_files=/nowhere"], "capability.task_files=/nowhere: no such folder"),
        (["capability.task_files=/"], "capability.task_files=/: no task, a file that ends in .yaml"),
        (["capability=none"], "capability.tasks=.*: capability=none measures nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(overrides, message, tasks, monkeypatch):
    # lm-eval's own tasks take seconds to list; a task of the folder is as near.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "manager.py"))
    with pytest.raises(ConfigError, match=message):
        check_packages([point(*asking(tasks, "sums"), *overrides)])


def test_data_outside_the_folder_of_tasks_are_refused(tmp_path):
    folder = write_tasks(tmp_path / "own")
    (folder / "sums.jsonl").rename(tmp_path / "sums.jsonl")
    text = (folder / "sums.yaml").read_text()
    (folder / "sums.yaml").write_text(text.replace("sums.jsonl", str(tmp_path / "sums.jsonl")))
    with pytest.raises(ConfigError, match="which is no file in that folder"):
        check_packages([point(*asking(folder, "sums"))])


def test_without_lm_eval_one_line_says_how_to_install_it(tasks, monkeypatch):
    monkeypatch.setattr(packages, "package_folder", lambda package: None)
    with pytest.raises(
        ConfigError, match=r"capability=subset needs the package lm_eval: pip install '.\[capability\]'"
    ):
        check_packages([point(*asking(tasks, "sums"))])


@pytest.fixture
def planned(tasks, tmp_path):
    """Two points of one grid that are asked, in an empty store."""
    common = [*TINY, *asking(tasks, "sums"), "method=dpo", f"output_dir={tmp_path}"]
    return [point(*common, f"beta={beta}") for beta in (0.1, 1)], Store(tmp_path)


def finish(store, stage, **done):
    folder = store.dir(stage)
    folder.mkdir(parents=True)
    write_json(folder / STAGE_FILE, stage.description)
    record = {"identity": stage.identity, "stage": stage.kind, "files": describe_files(folder), **done}
    write_json(folder / DONE, with_checksum(record))


def test_a_job_of_its_own_asks_the_sft_model_while_points_wait_for_it(planned):
    plan = make_plan(*planned)
    waits_for = {
        array.kind: {plan.stages[identity].role for identity in array.upstream}
        for array in job_arrays(plan, (), (), max_array_size=1000)
    }
    assert waits_for["sft_capability"] == {"sft"} and "sft_capability" in waits_for["align"]
    assert re.search(r"^sft_capability +1 +0$", plan.text(), re.M) and re.search(
        r"^capability +2 +0$", plan.text(), re.M
    )


def test_a_removed_model_is_made_again_for_new_questions_and_one_line_says_so(planned, capfd):
    points, store = planned
    plan = make_plan(points, store)
    warn_of_removed_models(plan)
    assert not capfd.readouterr().err
    for stage in plan.stages.values():
        if stage.kind not in ("capability", "evaluate"):
            finish(store, stage)
        if stage.kind == "align":
            store.remove_weights(stage)
    plan = make_plan(points, store)
    assert {plan.stages[i].kind for i in plan.needed} == {"align", "capability", "evaluate"}
    warn_of_removed_models(plan)
    (line,) = capfd.readouterr().err.splitlines()
    assert "the weights of 2 models that capability must have: this command trains them again" in line


def test_a_dry_run_knows_what_it_costs_once_the_same_was_asked_and_sums_up_the_rest_before(planned):
    points, store = planned

    def cost():
        plan = make_plan(points, store)
        return Cost(plan, store, Forecast(plan, lambda stage: 1, all_rehearsed=False))

    (sft_capability,) = (s for s in make_plan(points, store).stages.values() if s.role == "sft_capability")
    assert math.isnan(cost().estimates["capability"].hours)
    for stage in make_plan(points, store).stages.values():
        if stage.kind in ("sft", "reference", "generate", "align") and stage.point.beta == 0.1:
            finish(store, stage, seconds=3.6, tokens=100)
    text = cost().text()
    assert re.search(r"^all ", text, re.M) and "capability: known once" in text
    finish(store, sft_capability, seconds=36.0, tokens=500)
    known = cost().estimates["capability"]
    assert (known.num_stages, known.tokens, known.source) == (2, 1000, "measured")
    assert known.hours == pytest.approx(2 * 0.01) and "capability: known once" not in cost().text()
    whole = [replace(p, capability=replace(p.capability, limit=None)) for p in points]
    points[:] = whole
    assert math.isnan(cost().estimates["capability"].hours), "the control: other documents take other times"


class Results:
    """Two seeds of a point, whose scores follow those of their SFT models."""

    def __init__(self, folder):
        self.folder, rng = folder, np.random.default_rng(0)
        self.scores = {}
        for seed in ("a", "b"):
            tasks = {}
            for name, size in (("easy", 300), ("hard", 30)):
                sft = rng.random(size)
                values = sft + 0.05 + 0.01 * rng.standard_normal(size)
                scores = {"documents": [*map(str, range(size))], "values": values.tolist(), "sft": sft.tolist()}
                tasks[name] = {"metric": "acc,none", **scores}
            (folder / seed).mkdir()
            write_json(folder / seed / CAPABILITY_FILE, {"schema": RESULT_SCHEMA, "tasks": tasks})
            self.scores[seed] = tasks

    def artifacts(self, result, role):
        assert role == "evaluate"
        return self.folder / result


def test_the_change_of_a_point_is_paired_by_document_and_averaged_over_seeds(tmp_path):
    results = Results(tmp_path)
    row = {"setup": "s", "method": "dpo", "init": "sft", "variant": "", "beta": 0.1, "lr": 1e-6}
    best = pd.DataFrame([row | {"identities": ["a", "b"]}])
    table = capability_changes(best, results).set_index("task")
    assert list(table.index) == ["easy", "hard", ALL_TASKS]
    for name in ("easy", "hard"):
        pairs = [np.subtract(seed[name]["values"], seed[name]["sft"]) for seed in results.scores.values()]
        difference = np.mean(pairs, axis=0)
        assert table.difference[name] == pytest.approx(difference.mean())
        half_width = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
        assert (table.high[name] - table.low[name]) / 2 == pytest.approx(half_width, rel=0.1)
        unpaired = math.hypot(
            *(np.mean([s[name][k] for s in results.scores.values()], axis=0).std() for k in ("values", "sft"))
        )
        assert half_width < 0.2 * 1.96 * unpaired / math.sqrt(len(difference)), "the control: unpaired it is wider"
    # Both tasks weigh the same, though one has ten times the documents.
    assert table.difference[ALL_TASKS] == pytest.approx((table.difference["easy"] + table.difference["hard"]) / 2)
    assert table.low[ALL_TASKS] < table.difference[ALL_TASKS] < table.high[ALL_TASKS] and table.p[ALL_TASKS] < 1e-6
    assert capability_changes(best.iloc[:0], results).columns.empty, "and without any there is no table"
