"""Requests for rehearsals and the cards they name, without torch."""

import json
import subprocess
import sys
from statistics import mean

import pytest
import yaml

from src.errors import ConfigError
from src.planning.gpus import GPUS_FILE, find_device, find_gpu, gpus
from src.rehearsal.request import Request, Result, Work, draw_lengths, longest_lengths

TINY = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}


def test_every_card_has_sensible_rates_and_every_rate_has_a_unit():
    rows = yaml.safe_load(GPUS_FILE.read_text(encoding="utf-8"))
    assert set(rows) == set(gpus()) >= {"h100", "h200", "a100_80", "a100_40", "l40s"}
    for name, gpu in gpus().items():
        assert 20 * 2**30 < gpu.usable < gpu.memory < 200 * 2**30, name
        assert gpu.bf16_peak >= gpu.bf16 > gpu.attention_forward > gpu.attention_backward > gpu.fp32, name
        assert gpu.bandwidth > gpu.interconnect >= gpu.network, name
        assert gpu.exchange_rate(8) == gpu.interconnect and gpu.exchange_rate(9) == gpu.network, name
        assert (8, 0) <= gpu.capability < (10, 0) and 100 < gpu.multiprocessors < 150, name
        assert 1e-6 < gpu.least_kernel < gpu.launch < 1e-5, name
        assert set(rows[name]) == set(rows["h100"]), name


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"engine.gpu=h1000: not in conf/gpus.yaml, which has h100, h200, "):
        find_gpu("h1000")


@pytest.mark.parametrize(
    ("device", "card"),
    {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA GH200 480GB": None,
        "NVIDIA A100-SXM4-40GB": "a100_40",
        "NVIDIA A100 80GB PCIe": "a100_80",
        "Model: \t NVIDIA L40S": "l40s",
        "NVIDIA GeForce RTX 4090": "rtx_4090",
        "": None,
    }.items(),
)
def test_a_card_is_known_by_the_name_of_its_device(device, card):
    assert getattr(find_device(device), "name", None) == card


def test_requests_and_results_survive_json():
    request = Request("align", TINY, "h100", ((3, 4, 5), (6, 7, 8)), longest=(9, 9, 9), layers=(2, 4), lora={"rank": 4})
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    result = Result(peak=5, work={"products": Work(1, 2.0, 3.0, 4.0)}, rehearsed_layers=(2, 4), substituted=("a",))
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_the_identity_changes_with_the_request_and_with_nothing_else():
    request = Request("align", TINY, "h100", ((3, 4, 5),))
    assert request.identity == Request.from_json(request.to_json()).identity
    assert request.identity != Request("align", TINY, "h100", ((3, 4, 6),)).identity
    assert request.identity != Request("align", TINY, "h200", ((3, 4, 5),)).identity


def test_a_stage_that_is_not_rehearsed_and_a_single_depth_are_refused():
    with pytest.raises(ConfigError, match="stage=evaluate: must be one of sft, candidates, reference, align, generate"):
        Request("evaluate", TINY, "h100")
    with pytest.raises(ConfigError, match="two depths"):
        Request("align", TINY, "h100", layers=(2,))


def test_drawn_lengths_have_the_means_of_the_table_and_keep_within_the_cut():
    examples = draw_lengths(400, 121, 288, 2, max_tokens=1024, max_prompt_tokens=512, spread=0.8)
    assert len(examples) == 400
    assert all(len(e) == 3 and e[0] <= 512 and e[0] + max(e[1:]) <= 1024 and min(e) >= 2 for e in examples)
    assert examples == draw_lengths(400, 121, 288, 2, max_tokens=1024, max_prompt_tokens=512, spread=0.8)
    hardly_cut = draw_lengths(4000, 121, 288, 2, max_tokens=4096, max_prompt_tokens=2048, spread=0.8)
    assert mean(e[0] for e in hardly_cut) == pytest.approx(121, rel=0.03)
    assert mean(e[1] for e in hardly_cut) == pytest.approx(288, rel=0.03)


def test_the_longest_example_has_a_usual_prompt_and_responses_to_the_limit():
    assert longest_lengths(121, 2, max_tokens=1024, max_prompt_tokens=512) == (121, 903, 903)
    assert longest_lengths(700, 1, max_tokens=1024, max_prompt_tokens=512) == (512, 512)


def test_asking_for_a_rehearsal_imports_no_torch():
    code = "import sys, src.rehearsal.request, src.planning.gpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
