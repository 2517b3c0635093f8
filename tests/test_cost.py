"""The estimate that dry_run=true prints: its arithmetic, and how finished stages calibrate it."""

import json
import math
import re

import pytest
from safetensors import safe_open

from src.config.validation import build_point
from src.planning.cost import Cost
from src.planning.plan import make_plan
from src.store.store import Store
from tests.support.commands import ROOT, SMALL, dry_run, train
from tests.support.configs import composed


def planned(tmp_path, *overrides):
    store = Store(tmp_path)
    point = build_point(composed(*overrides, f"output_dir={tmp_path}"))
    return make_plan([point], store), store


def test_before_anything_was_measured_hours_are_flops_over_the_stated_speed(tmp_path):
    plan, store = planned(tmp_path, "setup=llama32_3b_tldr")
    estimates = Cost(plan, store).estimates
    sft_tokens = 41_947 * 416  # conf/dataset/tldr.yaml
    assert estimates["sft"].tokens == sft_tokens and not estimates["sft"].measured
    assert estimates["sft"].hours == pytest.approx(6 * 3.21e9 * sft_tokens / (0.4 * 312e12) / 3600)
    assert estimates["reference"].hours == pytest.approx(2 * 3.21e9 * (73_396 + 2000) * 451 / (0.4 * 312e12) / 3600)
    assert estimates["align"].tokens == 73_396 * 451
    faster = Cost(*planned(tmp_path, "setup=llama32_3b_tldr", "engine.tflops=624")).estimates
    assert faster["align"].hours == pytest.approx(estimates["align"].hours / 2)
    stepped = ["trainer.align.max_steps=10", "dataset.sft_fraction=0.1", "trainer.sft.epochs=2"]
    fewer = Cost(*planned(tmp_path, "setup=llama32_3b_tldr", *stepped)).estimates
    assert fewer["align"].tokens == 10 * 128 * 451
    assert fewer["sft"].tokens == pytest.approx(0.1 * 2 * sft_tokens)


def test_a_sweeps_estimate_counts_shared_stages_once(tmp_path):
    _, output = dry_run("+sweep=paper_tldr_3b", f"output_dir={tmp_path}")
    num_stages = dict(re.findall(r"^(sft|reference|align|generate) +(\d+) .*assumed$", output, re.M))
    assert num_stages == {"sft": "1", "reference": "1", "align": "200", "generate": "200"}
    assert re.search(
        r"^disk: 2\.58 TB for the weights of 201 models until the sweep ends and keep_checkpoints=best", output, re.M
    )


@pytest.mark.slow
def test_estimates_are_measured_once_a_stage_of_the_same_data_and_model_has_finished(tmp_path):
    labels, before = dry_run(*SMALL, "method=dpo", "beta=0.1", f"output_dir={tmp_path}")
    assert labels and '"-" = no estimate yet' in before  # a CPU has no stated peak
    train(*SMALL, "method=dpo", "beta=0.1", f"output_dir={tmp_path}")
    output = dry_run(*SMALL, "method=dpo", "beta=0.2,0.3", f"output_dir={tmp_path}")[1]
    assert re.search(r"^align +2 .* measured$", output, re.M) and "sft " not in output.partition("cost")[2]

    plan, store = planned(tmp_path, *SMALL, "method=ipo", "beta=0.1", "trainer.align.epochs=2")
    estimate = Cost(plan, store).estimates["align"]
    ((done,),) = [[json.loads(p.read_text()) for p in (tmp_path / "store" / "align").glob("*/DONE")]]
    assert estimate.tokens == 2 * done["tokens"] and estimate.measured
    assert estimate.hours == pytest.approx(2 * done["seconds"] / 3600)
    other = Cost(*planned(tmp_path, *SMALL, "method=ipo", "engine=fsdp")).estimates["align"]
    assert math.isnan(other.hours) and not other.measured  # another computation has another speed


def test_the_config_of_the_mini_model_states_its_number_of_parameters():
    with safe_open(ROOT / "src" / "data" / "mini_tldr_base" / "model.safetensors", "pt") as file:
        num_parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert build_point(composed()).model.parameters == pytest.approx(num_parameters, rel=0.001)
