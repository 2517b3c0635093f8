"""On-policy pairs: one sampling and one grading stage for a grid, and what they make of grades."""

import json
import re
from collections import Counter
from dataclasses import replace

import pytest

from launchers.slurm.graph import job_arrays
from src.config.schema import Pairs, Sweep
from src.data.sources import open_source
from src.data.training_prompts import training_prompts
from src.errors import ConfigError
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.estimates.load import load_of
from src.planning.plan import make_plan
from src.planning.stage import stages_of
from src.preflight import check_input_files
from src.stages import pairs
from src.store.store import Store
from sweeps.search.variants import name_variants, studies
from tests.support.configs import ON_POLICY, identities, point
from tests.support.recorded_sbatch import plan_of, record_sbatch, status_reader, submit_plan

METHODS = ("dpo", "ipo", "simpo", "orpo", "asft", "apo_zero", "nca", "cal_dpo")


@pytest.fixture(scope="module")
def points():
    """Return 8 methods x 3 betas with on-policy pairs."""
    of_methods = [point(f"method={method}", "beta=1", "pairs=onpolicy") for method in METHODS]
    return [replace(p, beta=beta) for p in of_methods for beta in (0.01, 0.1, 1.0)]


def test_a_grid_has_one_sampling_and_one_grading_stage(points, tmp_path):
    plan = make_plan(points, Store(tmp_path))
    roles = Counter(stage.role for stage in plan.stages.values())
    assert roles == Counter(sft=1, candidates=1, pairs=1, reference=1, baseline=1, align=24, generate=24, evaluate=24)
    of_dataset = make_plan([replace(p, pairs=Pairs(name="dataset")) for p in points], Store(tmp_path))
    assert roles - Counter(stage.role for stage in of_dataset.stages.values()) == Counter(candidates=1, pairs=1)
    assert re.search(r"^candidates +1 +0$", plan.text(), re.M) and re.search(r"^pairs +1 +0$", plan.text(), re.M)


def test_pairs_of_both_kinds_are_variants_of_a_sweep(points):
    both = [replace(points[0], sweep=Sweep()), replace(points[0], pairs=Pairs(name="dataset"), sweep=Sweep())]
    name_variants(both)
    assert [p.sweep.variant for p in both] == ["pairs.name=onpolicy", "pairs.name=dataset"]
    (study,) = studies(both)
    assert "pairs.name" not in study["settings"] and study["settings"]["evaluation.metric"] == "win_rate"


def test_jobs_sample_after_sft_and_before_the_reference(points, tmp_path):
    plan = make_plan(points[:2], Store(tmp_path))
    waits_for = {
        array.kind: {plan.stages[identity].role for identity in array.upstream}
        for array in job_arrays(plan, (), (), max_array_size=1000)
    }
    assert list(waits_for) == ["sft", "candidates", "pairs", "reference", "baseline", "align"]
    assert waits_for["candidates"] == {"sft"} == waits_for["baseline"] and waits_for["pairs"] == {"candidates"}
    assert waits_for["reference"] == {"sft", "pairs"} and waits_for["align"] >= {"reference", "pairs"}


def test_the_status_lists_both_stages_and_what_waits_for_them(monkeypatch, tmp_path):
    record_sbatch(monkeypatch, tmp_path)
    plan = plan_of(tmp_path, "pairs=onpolicy", num_betas=2)
    submissions = submit_plan(plan, tmp_path)
    jobs = {submission.kind: submission.jobs[0] for submission in submissions}
    monkeypatch.setattr(Store, "is_done", lambda self, stage: stage.kind == "sft")
    queue = {jobs["candidates"]: "RUNNING", jobs["pairs"]: "PENDING", jobs["reference"]: "PENDING"}
    shared = {row.label: (row.state, row.detail) for row in status_reader(submissions, plan, queue).shared_stages()}
    assert shared["mini_tldr candidates"] == ("running", "candidates")
    assert shared["mini_tldr pairs"] == ("queued", "after candidates")
    assert shared["mini_tldr reference"] == ("queued", "after candidates and pairs")


def test_the_estimate_has_candidates_and_a_smaller_batch_of_them_is_a_remedy(tmp_path):
    plan = make_plan([point(*ON_POLICY, "method=dpo", "engine.gpu=h100")], Store(tmp_path))
    forecast = Forecast(plan, lambda stage: 1, all_rehearsed=False)
    estimates = Cost(plan, Store(tmp_path), forecast).estimates
    assert estimates["candidates"].tokens == 24 * 3 * 16 and estimates["candidates"].hours > 0
    load = load_of(next(stage for stage in plan.stages.values() if stage.kind == "candidates"), 1)
    remedy, smaller = next(load.remedies(str))
    assert remedy == "pairs.generation.batch_size=4" and 2 * smaller.held.kv_cache == load.held.kv_cache > 0
    assert load.request.stage == "candidates" and (load.request.rows, load.request.new_tokens) == (8, 16)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("pairs.generation.temperature=1", {"candidates", "pairs"}),
        ("pairs.generation.samples_per_prompt=4", {"candidates", "pairs"}),
        ("pairs.margin=0.5", {"pairs"}),
        ("pairs.selection=all", {"pairs"}),
        ("trainer.sft.lr=2e-3", {"sft", "baseline", "candidates", "pairs"}),
        ("trainer.align.max_steps=10", set()),
        ("pairs.generation.batch_size=1", None),
        ("engine=single", None),
    ],
)
def test_a_change_reaches_the_stages_that_depend_on_it(override, changed):
    before, after = identities("pairs=onpolicy"), identities("pairs=onpolicy", override)
    differ = {role for role in before if before[role] != after[role]}
    if changed is None:
        assert not differ
    else:
        downstream = {"reference"} if changed else set()
        assert differ == changed | downstream | {"align", "generate", "evaluate"}


def test_points_that_train_on_the_dataset_do_not_depend_on_these_settings():
    for role in ("sft", "baseline"):
        assert identities()[role] == identities("pairs=onpolicy")[role]
    assert "pairs" not in identities() and "candidates" not in identities()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pairs.generation.samples_per_prompt=1"], r"samples_per_prompt=1: a pair needs two responses .* at least 2"),
        (["pairs.margin=null"], r"pairs.margin has no value: add pairs.margin=VALUE"),
        (["init=base", "lr=1e-3"], r"with init=base there is none; use init=sft"),
        (["dataset.sft_fraction=0"], r"with dataset.sft_fraction=0 there is none; use a larger fraction"),
        (["pairs.generation.temperature=0"], r"pairs.generation.temperature=0: makes all samples of a prompt the same"),
        (["pairs.generation.top_k=1"], r"pairs.generation.top_k=1: makes all samples of a prompt the same"),
        (["judge=tldr"], r"pairs.judge=tldr: gives a response no number, .* add pairs.judge=gold"),
        (["judge=none", "evaluation=preference"], r"pairs.judge=none: gives a response no number"),
        (["judge=tldr", "pairs.judge=reward_model"], r"pairs.model is not set: pairs.judge=reward_model needs"),
        (["pairs.model=org/rewards"], r"pairs.model: pairs.judge=gold has no such field"),
        (["setup=smollm2_jsonl", "pairs.judge=gold", "dataset.path=README.md"], r"works only with dataset=mini_tldr"),
        (["pairs=dataset", "pairs.margin=1"], r"pairs.margin: pairs=dataset has no such field; choose pairs=onpolicy"),
    ],
)
def test_what_makes_no_pairs_is_refused_before_anything_runs(overrides, message):
    with pytest.raises(ConfigError, match=message):
        point("pairs=onpolicy", "beta=0.1", *overrides)


def test_a_judge_that_compares_may_evaluate_what_another_has_graded():
    both = ("pairs=onpolicy", "judge=reward_model", "judge.model=org/rewards")
    models = [point(*both, *other).pairs.model for other in ([], ["pairs.model=org/other"])]
    assert models == ["org/rewards", "org/other"]
    assert point(*both, "pairs.judge=gold").pairs.model is None
    with pytest.raises(ConfigError, match=r"pairs.model: pairs.judge=gold has no such field"):
        point(*both, "pairs.judge=gold", "pairs.model=org/rewards")
    scored = point("pairs=onpolicy", "judge=tldr", "pairs.judge=gold")
    assert (scored.judge.name, scored.pairs.judge) == ("tldr", "gold")


@pytest.mark.parametrize("selection", ["best_worst", "all"])
def test_pairs_are_those_whose_grades_differ_by_more_than_the_margin(selection):
    scores = [1.0, 3.0, 3.0, 2.5, 0.5, 0.5]
    for margin in (0.0, 0.5, 2.0, 2.5):
        selected = pairs.select_pairs(scores, selection, margin)
        expected = [(a, b) for a in range(6) for b in range(6) if scores[a] - scores[b] > margin]
        assert set(selected) == ({(1, 4)} & set(expected) if selection == "best_worst" else set(expected))
        assert len(selected) == len(set(selected))
    assert pairs.select_pairs([2.0, 2.0], selection, 0.0) == [] and pairs.why_no_pair([2.0, 2.0]) == "all grades equal"
    assert pairs.why_no_pair([2.0, 1.0]) != "all grades equal"


def test_prompts_are_those_of_the_training_pairs_each_once_and_fewer_are_a_subset():
    stage = next(s for s in stages_of(point(*ON_POLICY)) if s.kind == "candidates")
    prompts = training_prompts(stage.inputs.prompts)
    assert [p.key for p in prompts] == [
        pair.prompt.key for pair in open_source(stage.inputs.prompts.data).pairs("train")
    ]
    fewer, more, too_many = (
        next(s for s in stages_of(point(*ON_POLICY, f"pairs.num_prompts={n}")) if s.kind == "candidates").inputs.prompts
        for n in (5, 12, 25)
    )
    keys = [{p.key for p in training_prompts(inputs)} for inputs in (fewer, more)]
    assert list(map(len, keys)) == [5, 12] and keys[0] < keys[1]
    with pytest.raises(
        ConfigError, match=r"pairs.num_prompts=25: .* have 24 prompts; give at most pairs.num_prompts=24"
    ):
        training_prompts(too_many)


def test_more_prompts_than_a_table_has_pairs_are_refused_before_anything_runs(tmp_path):
    for name in ("sft", "preference"):
        (tmp_path / name / "data").mkdir(parents=True)
        rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(30)]
        for split in ("train_prefs", "test_prefs"):
            (tmp_path / name / "data" / f"{split}-00000-of-00001.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = (
        *("setup=smollm2_jsonl", "model=mini", "dataset=ultrafeedback", "pairs=onpolicy"),
        *("pairs.judge=reward_model", "pairs.model=a/b"),
        *("dataset.max_tokens=160", "dataset.max_prompt_tokens=112", "evaluation.generation.max_new_tokens=8"),
    )
    local = f"dataset.path={tmp_path}"
    for overrides, at_most in (([local], 30), ([], 61_135), ([local, "dataset.train_size=12"], 12)):
        for count in (at_most, at_most + 1):
            tested = point(*common, *overrides, f"pairs.num_prompts={count}")
            if count == at_most:
                check_input_files([tested])
                continue
            with pytest.raises(ConfigError, match=f"pairs.num_prompts={count}: .* at most {at_most} training pairs"):
                check_input_files([tested])
