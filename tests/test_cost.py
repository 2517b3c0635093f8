"""The estimate that dry_run=true prints: its arithmetic, and how finished stages calibrate it."""

import json
import math
import re
from dataclasses import replace

import pytest

from src.estimates import forecast
from src.estimates.cost import Cost
from src.estimates.disk import disk_of
from src.estimates.forecast import Forecast
from src.planning.gpus import find_gpu
from src.planning.plan import make_plan
from src.rehearsal.request import Result
from src.store.store import Store
from src.store.usage import usage_of
from tests.support.commands import SMALL, dry_run, train
from tests.support.configs import point

SIZE_3B = 3_212_749_824  # parameters


def estimates(tmp_path, *overrides):
    store = Store(tmp_path)
    plan = make_plan([point(*overrides, f"output_dir={tmp_path}")], store)
    return Cost(plan, store, Forecast(plan, lambda stage: 1, all_rehearsed=True)).estimates


def in_use(estimate):
    return estimate.hours - estimate.waiting


@pytest.fixture
def rehearsed(monkeypatch):
    """Every rehearsal takes 2 s for 50,000 tokens."""
    asked = []

    def rehearse_all(requests):
        asked.extend(requests)
        return [Result(tokens=50_000, seconds=2.0, host_seconds=0.5, peak=60 * 2**30) for _ in requests]

    monkeypatch.setattr(forecast, "rehearse_all", rehearse_all)
    return asked


def test_where_nothing_can_be_rehearsed_hours_are_those_of_the_products(tmp_path, arithmetic):
    paper = ["setup=llama32_3b_tldr", "engine.gpu=h100"]
    sums = estimates(tmp_path, *paper)
    sft_tokens, rate = (41_947 + 11_941) * 416, find_gpu("h100").bf16  # conf/dataset/tldr.yaml
    assert sums["sft"].tokens == sft_tokens and sums["sft"].source == "arithmetic"
    assert in_use(sums["sft"]) == pytest.approx(6 * SIZE_3B * sft_tokens / rate / 3600)
    assert in_use(sums["reference"]) == pytest.approx(2 * SIZE_3B * (73_396 + 2000) * 451 / rate / 3600)
    assert sums["align"].tokens == 73_396 * 451
    slower = in_use(estimates(tmp_path, *paper, "engine.gpu=a100_80")["align"]) / in_use(sums["align"])
    assert slower == pytest.approx(rate / find_gpu("a100_80").bf16)
    fewer = estimates(
        tmp_path, *paper, "trainer.align.max_steps=10", "dataset.sft_fraction=0.1", "trainer.sft.epochs=2"
    )
    assert fewer["align"].tokens == 10 * 128 * 451
    assert fewer["sft"].tokens == pytest.approx((0.1 * 2 * 41_947 + 11_941) * 416), "all are validated"
    without = estimates(tmp_path, *paper, "dataset.sft_validation_size=0")
    assert without["sft"].tokens == 41_947 * 416 and without["align"].tokens == sums["align"].tokens


def test_held_out_rows_of_a_finished_stage_are_not_scaled_with_those_that_are_trained_on(tmp_path, arithmetic):
    """1 % of the demonstrations, once a stage of all of them has finished."""
    few, everything = (
        ["setup=llama32_3b_tldr", "engine.gpu=h100", f"dataset.sft_fraction={fraction}", f"output_dir={tmp_path}"]
        for fraction in (0.01, 1.0)
    )
    store = Store(tmp_path)
    stage = next(s for s in make_plan([point(*everything)], store).stages.values() if s.kind == "sft")

    def predicted(**done):
        plan = make_plan([point(*few)], store)
        cost = Cost(plan, store, Forecast(plan, lambda stage: 1, all_rehearsed=True))
        cost.finished["sft"] = [(stage.description, {"seconds": 1.0, **done})]
        (one,) = [s for s in plan.stages.values() if s.kind == "sft"]
        return cost._tokens(one)

    assert predicted(tokens=1_300_000, validation_tokens=300_000) == pytest.approx(310_000)
    assert predicted(tokens=1_300_000) == pytest.approx(13_000), "the negative control: of a stage that does not say"


def test_hours_are_those_of_the_rehearsed_step(tmp_path, rehearsed):
    sums = estimates(tmp_path, "setup=llama32_3b_tldr", "engine.gpu=h100")
    assert {e.source for e in sums.values()} == {"rehearsed"}
    assert in_use(sums["align"]) == pytest.approx(73_396 * 451 * 2.0 / 50_000 / 3600)
    assert {request.stage for request in rehearsed} == {"sft", "reference", "align", "generate"}
    align = next(request for request in rehearsed if request.stage == "align")
    assert (align.gpu, align.precision, align.strategy, len(align.examples)) == ("h100", "bf16", "fsdp", 128)
    assert align.longest == (379, 1024 - 379, 1024 - 379)  # that the limits allow
    assert max(map(sum, align.examples)) < sum(align.longest)
    assert align.config["hidden_size"] == 3072 and align.layers == (2, 4)


def test_where_nothing_is_measured_waiting_is_that_for_weights_and_for_the_start_of_jobs(tmp_path, rehearsed):
    plan = make_plan([point("setup=llama32_3b_tldr", "beta=0.1", f"output_dir={tmp_path}")], Store(tmp_path))

    def waiting(processes, starts_job=lambda _: False):
        rehearsal = Forecast(plan, lambda _: processes, all_rehearsed=True)
        return {k: 3600 * e.waiting for k, e in Cost(plan, Store(tmp_path), rehearsal, 1, starts_job).estimates.items()}

    read = 4 * SIZE_3B / 1e9
    lasting = {"sft": 3 * read, "reference": read, "align": 3 * read, "generate": 2 * read}
    assert waiting(1) == pytest.approx(lasting), "published at half the rate"
    started = waiting(1, lambda stage: stage.kind == "align")
    assert started == pytest.approx(lasting | {"align": 3 * read + 60})
    assert waiting(4) == pytest.approx({kind: 4 * seconds for kind, seconds in lasting.items()}), "eight batches, even"


def test_without_a_card_hours_are_unknown_until_they_are_measured(tmp_path, rehearsed):
    sums = estimates(tmp_path, "setup=llama32_3b_tldr", "engine.gpu=null")
    assert all(math.isnan(e.hours) for e in sums.values()) and not rehearsed


def test_a_sweeps_estimate_counts_shared_stages_once(tmp_path):
    sweep = ["+sweep=paper_tldr_3b", f"output_dir={tmp_path}", "engine.gpu=null"]
    _, output = dry_run(*sweep, "keep_checkpoints=all")
    num_stages = dict(re.findall(r"^(sft|reference|align|generate) +(\d+) +\S+ [MG] +- +0 +-$", output, re.M))
    assert num_stages == {"sft": "1", "reference": "1", "align": "200", "generate": "200"}
    assert re.search(r"^disk: 2\.58 TB for the weights of 201 models, 38\.6 GB for each", output, re.M)


def most_models(tmp_path, *overrides, num_running=4, seeds=(0,), betas=(0.1, 1.0, 3.0)):
    """Return the models of a plan of two methods that are on disk at once, and their bytes."""
    common = ["setup=llama32_3b_tldr", "lr=1e-6", "keep_checkpoints=best", f"output_dir={tmp_path}"]
    first = [point(*common, f"method={method}", "beta=1", *overrides) for method in ("dpo", "ipo")]
    points = [replace(p, beta=beta, seed=seed) for p in first for beta in betas for seed in seeds]
    disk = disk_of(make_plan(points, Store(tmp_path)), num_running)
    return disk.num_models, disk.model_bytes, disk.checkpoint_bytes


def test_the_most_on_disk_is_a_model_for_each_method_and_running_point_and_sft(tmp_path):
    one = 4 * SIZE_3B
    assert most_models(tmp_path, num_running=2) == (1 + 2 + 2, 5 * one, 3 * one)
    assert most_models(tmp_path, num_running=100)[0] == 1 + 6, "no more than there are"
    assert most_models(tmp_path, "keep_checkpoints=none", num_running=2)[0] == 1 + 2
    assert most_models(tmp_path, "keep_checkpoints=all", num_running=2)[0] == 1 + 6
    assert most_models(tmp_path, "sweep.select=lowest_kl_in_shortlist", num_running=2)[0] == 1 + 6
    assert most_models(tmp_path, num_running=1, seeds=(0, 1))[0] == 2 + (2 + 1) * 2, "SFT has a seed, too"
    assert most_models(tmp_path, "model.save_dtype=bfloat16", num_running=2)[1] == one + 4 * one / 2
    _, adapters, checkpoint = most_models(tmp_path, "model.lora.rank=16", num_running=2)
    assert one < adapters < 1.05 * one and checkpoint < 0.05 * one
    merged = most_models(tmp_path, "model.lora.rank=16", "model.lora.publish=merged", num_running=2)
    assert merged[1] == 5 * one and merged[2] == checkpoint


def test_dry_run_says_how_many_models_are_on_disk_at_once(tmp_path):
    sweep = ["+sweep=paper_tldr_3b", f"output_dir={tmp_path}", "engine.gpu=null", "hydra.launcher.workers=2"]
    line = r"^disk: 141 GB for the weights of at most 11 of 201 models at any moment \(keep_checkpoints=best, 2 points"
    assert re.search(line, dry_run(*sweep)[1], re.M)


@pytest.mark.slow
def test_estimates_are_measured_once_a_stage_of_the_same_data_and_model_has_finished(tmp_path):
    labels, before = dry_run(*SMALL, "method=dpo", "beta=0.1", f"output_dir={tmp_path}")
    assert labels and '"-" = not known' in before  # a CPU is no card of conf/gpus.yaml
    train(*SMALL, "method=dpo", "beta=0.1", f"output_dir={tmp_path}")
    output = dry_run(*SMALL, "method=dpo", "beta=0.2,0.3", f"output_dir={tmp_path}")[1]
    assert re.search(r"^align +2 .* measured$", output, re.M) and "sft " not in output.partition("cost")[2]

    estimate = estimates(tmp_path, *SMALL, "method=ipo", "beta=0.1", "trainer.align.epochs=2")["align"]
    ((done,),) = [[json.loads(p.read_text()) for p in (tmp_path / "store" / "align").glob("*/DONE")]]
    validation = done["validation_tokens"]  # once, whatever the epochs
    assert 0 < validation < done["tokens"] / 4
    assert estimate.tokens == 2 * done["tokens"] - validation
    assert estimate.source == "measured"
    usage = usage_of(done)
    assert usage.in_use + usage.waiting == pytest.approx(done["seconds"] + done["waited_seconds"])
    assert usage.waiting > 0
    assert estimate.hours == pytest.approx((estimate.tokens / done["tokens"] * usage.in_use + usage.waiting) / 3600)
    assert estimate.waiting == pytest.approx(usage.waiting / 3600) and "waiting: as finished stages did" in output
    other = estimates(tmp_path, *SMALL, "method=ipo", "engine=fsdp")["align"]
    assert math.isnan(other.hours) and not other.source  # another computation has another speed
