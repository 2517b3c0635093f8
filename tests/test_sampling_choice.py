"""sampling=auto: where points are sampled, by the estimate, and the hours that follow the choice."""

import re

import pytest

from launchers.slurm.sampling import choose_sampling
from src.estimates import forecast
from src.estimates.forecast import Forecast
from src.planning.plan import make_plan
from src.rehearsal.request import Result
from src.store.store import Store
from tests.support.commands import run_in_process
from tests.support.configs import point
from tests.support.slurm_options import slurm_options

UF = ["setup=llama31_8b_uf", "method=dpo", "beta=0.1"]
SECONDS = 500 * 4096 * 2.0 / 50_000  # of one GPU that samples all responses, as rehearsed below
READ = 2 * 4 * 8_030_261_248 / 1e9  # seconds: policy and initial model in float32
START = 60.0


@pytest.fixture(autouse=True)
def rehearsed(monkeypatch):
    """Every rehearsal takes 2 s for 50,000 tokens; the kinds of stages that were asked for."""
    asked = []

    def rehearse_all(requests):
        asked.extend(request.stage for request in requests)
        return [Result(tokens=50_000, seconds=2.0, host_seconds=0.5, peak=60 * 2**30) for _ in requests]

    monkeypatch.setattr(forecast, "rehearse_all", rehearse_all)
    return asked


def choice(tmp_path, *overrides, launcher="slurm_8gpu", betas=(), num_aligning=1, **options):
    settings = [[f"beta={beta}"] for beta in betas] or [[]]
    plan = make_plan([point(*overrides, *own, f"output_dir={tmp_path}") for own in settings], Store(tmp_path))
    forecast = Forecast(plan, lambda _: 1, all_rehearsed=False)
    return choose_sampling(slurm_options(launcher, **options), plan, forecast, num_aligning)


def hours_in(reason):
    """Return the accelerator-hours of a job of its own, and those of the job that aligns."""
    return [
        float(number) for number in re.findall(r"takes ([\d.]+)|, ([\d.]+) in", reason) for number in number if number
    ]


def test_eight_gpus_that_wait_for_weights_leave_sampling_to_a_job_of_one(tmp_path, rehearsed):
    sampling, reason = choice(tmp_path, *UF)
    assert sampling == "own_job" and "generate" in rehearsed
    assert "in a job of 1 GPU that follows its alignment" in reason and "in the job of 8 GPUs that aligns it" in reason
    own, same = hours_in(reason)
    assert own == pytest.approx((SECONDS + READ + START) / 3600, rel=0.03)
    assert same == pytest.approx((SECONDS + 8 * READ) / 3600, rel=0.03), "eight batches for eight GPUs"


@pytest.mark.parametrize(
    ("free", "num_aligning", "sampling"), [(100e9, 1, "same_job"), (1e15, 1, "own_job"), (100e9, 4, "own_job")]
)
def test_models_that_would_not_fit_on_disk_do_not_wait_for_a_job_of_their_own(
    free, num_aligning, sampling, tmp_path, monkeypatch
):
    monkeypatch.setattr("launchers.slurm.sampling.free_bytes", lambda store: free)
    chosen = choice(tmp_path, *UF, "keep_checkpoints=best", betas=(0.01, 0.05, 0.1, 0.2), num_aligning=num_aligning)
    assert chosen.sampling == sampling
    told = "but 5 models that wait for one would take 161 GB of disk, of which 100 GB are free"
    assert chosen.reason.endswith(told) == (sampling == "same_job")


def test_fewer_batches_than_gpus_cost_what_the_others_wait(tmp_path):
    _, same = hours_in(choice(tmp_path, *UF, "evaluation.num_prompts=256").reason)
    assert same == pytest.approx((2 * SECONDS * 256 / 500 + 8 * READ) / 3600, rel=0.03), "four batches for eight GPUs"


def test_a_small_model_is_sampled_where_it_is_aligned_as_a_job_has_to_start(tmp_path):
    small = ["setup=mini_tldr", "engine=fsdp", "engine.gpu=h100"]
    sampling, reason = choice(tmp_path, *small)
    own, same = hours_in(reason)
    assert sampling == "same_job" and own - same == pytest.approx(START / 3600, rel=0.1)


@pytest.mark.parametrize(
    ("overrides", "launcher", "options", "reason"),
    [
        (UF, "slurm_1gpu", {}, "a job that aligns has 1 GPU"),
        (UF, "slurm_whole_nodes", {}, "in jobs of several points each samples its own"),
        ([*UF, "engine.gpu=null"], "slurm_8gpu", {}, "there is no estimate without engine.gpu=NAME"),
        (UF, "slurm_8gpu", {"kinds": {"sample": {"gpus_per_node": 8}}}, "a job that aligns has 8 GPUs"),
        (UF, "slurm_8gpu", {"array_parallelism": 8}, "array_parallelism bounds the points"),
    ],
)
def test_where_nothing_is_to_be_gained_or_known_one_job_does_both(overrides, launcher, options, reason, tmp_path):
    sampling, why = choice(tmp_path, *overrides, launcher=launcher, **options)
    assert sampling == "same_job" and why.startswith(reason)


def estimate(output):
    """Return stage -> (accelerator-hours, of these waiting, a point) of the table that a dry run printed."""
    rows = re.findall(r"^(sft|reference|align|generate|all) .*?([\d.]+) +([\d.]+) +([\d.]+)(?:  \w+)?$", output, re.M)
    return {stage: tuple(map(float, numbers)) for stage, *numbers in rows}


def test_a_dry_run_says_what_was_chosen_and_counts_the_hours_of_that(tmp_path):
    command = ["-m", "dry_run=true", "hydra/launcher=slurm_8gpu", *UF, f"output_dir={tmp_path}"]
    auto, own, same = (
        run_in_process(*command, *option).stdout
        for option in ([], ["hydra.launcher.sampling=own_job"], ["hydra.launcher.sampling=same_job"])
    )
    assert "sampling: own_job (hydra.launcher.sampling=auto): a point takes" in auto and "sampling:" not in own + same
    assert estimate(auto) == estimate(own) and len(estimate(auto)) == 5
    assert estimate(own)["align"] == estimate(same)["align"]
    assert estimate(own)["generate"][:2] == pytest.approx(
        [(SECONDS + READ + START) / 3600, (READ + START) / 3600], rel=0.05
    )
    assert estimate(same)["generate"][:2] == pytest.approx([(SECONDS + 8 * READ) / 3600, 8 * READ / 3600], rel=0.05)
    assert re.search(r"^generate +1 ", own.partition("memory of one process")[2], re.M), "processes that sample"
    assert re.search(r"^generate +8 ", same.partition("memory of one process")[2], re.M)
