"""The CUDA path of a tiny Llama, rehearsed: every kernel with every option, what is held, mistakes that it names."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest

from src.rehearsal import request as requests
from src.rehearsal.request import rehearse_all
from tests.support.commands import ROOT
from tests.support.rehearsals import (
    GENERATE,
    LONGEST,
    NUM_PARAMETERS,
    PAIRS,
    PAIRWISE,
    TINY,
    TINY_REQUEST,
    combined,
)

AUTO = replace(TINY_REQUEST, max_tokens_per_micro_batch=None, activation_checkpointing="auto", attention="auto")
DEEP = replace(AUTO, config={**TINY, "num_hidden_layers": 5})
LARGE = {**TINY, "hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64, "head_dim": 128}
TOO_LARGE = replace(AUTO, config=LARGE | {"num_hidden_layers": 40}, layers=(1, 2), examples=((600, 4000, 4000),))
OTHERS = {
    "auto": AUTO,
    "checkpointed": replace(TINY_REQUEST, activation_checkpointing="true"),
    "fused": TINY_REQUEST,
    "two ranks": replace(TINY_REQUEST, ranks=2),
    "sft": replace(TINY_REQUEST, stage="sft", examples=tuple(lengths[:2] for lengths in PAIRS), longest=LONGEST[:2]),
    "reference": replace(TINY_REQUEST, stage="reference"),
    "generate": GENERATE,
    "sliding window": replace(AUTO, config={**TINY, "model_type": "mistral", "sliding_window": 4}),
    "no window": replace(AUTO, config={**TINY, "model_type": "mistral", "sliding_window": None}),
    "candidates": replace(GENERATE, stage="candidates"),
    "zero2": replace(TINY_REQUEST, strategy="zero2", ranks=4),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all requests of the quick tier, by one process."""
    names = [*PAIRWISE, *OTHERS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "_cache_folder", lambda: tmp_path_factory.mktemp("rehearsals"))
        return dict(zip(names, rehearse_all([*(combined(*row) for row in PAIRWISE), *OTHERS.values()]), strict=True))


def test_the_selection_has_every_pair_of_options():
    values = (("varlen", "flash_attention_2", "sdpa"), ("bf16", "fp32"), *((True, False),) * 3)
    for (i, first), (j, second) in itertools.combinations(enumerate(values), 2):
        for pair in itertools.product(first, second):
            possible = pair[1] == "bf16" or pair[0] == "sdpa" if (i, j) == (0, 1) else True
            assert possible == any((row[i], row[j]) == pair for row in PAIRWISE), pair


@pytest.mark.parametrize("row", PAIRWISE, ids=str)
def test_a_step_runs_on_cuda_tensors_with_every_pair_of_options(results, row):
    attention, _, checkpointing, lora, fused = row
    result = results[row]
    assert result.error is None
    assert result.micro_batches == 2 and result.checkpointed_micro_batches == 2 * checkpointing
    assert result.seconds > result.floor_seconds > 0
    assert {"products", "elementwise", "optimizer", "attention"} <= set(result.work) or attention == "sdpa"
    names = {"varlen": "torch_attn::_varlen_attn", "flash_attention_2": "flash_attn::varlen_attn_forward"}
    for backend, name in names.items():
        assert (name in result.substituted) == (backend == attention)
    assert ("alignment_sweep::rms_norm" in result.substituted) == fused
    assert (result.held["gradients"] < 0.3 * result.held["weights"]) == lora


@pytest.mark.parametrize("name", OTHERS)
def test_every_stage_runs_on_cuda_tensors(results, name):
    assert results[name].error is None


def test_attention_of_a_window_takes_the_flops_of_the_pairs_in_it(results):
    work = {name: results[name].work["attention"].flops for name in ("sliding window", "no window", "auto")}
    assert work["no window"] == work["auto"]
    assert work["sliding window"] < 0.5 * work["auto"]


def test_what_lasts_is_counted_to_the_byte(results):
    held = results[PAIRWISE[1]].held
    assert held["weights"] == held["gradients"] == 4 * NUM_PARAMETERS
    assert 0 < held["optimizer_state"] - 8 * NUM_PARAMETERS < 4 * 50, "two moments, and a step count of each tensor"
    assert results["reference"].held == {"weights": 2 * NUM_PARAMETERS}
    cache = 2 * 2 * 2 * 2 * 16 * 4  # bytes x keys and values x layers x heads x width x rows
    assert results["generate"].held["kv_cache"] == pytest.approx(cache * 60, abs=cache)
    sampled = {name: size for name, size in results["generate"].held.items() if name != "reference_weights"}
    assert results["candidates"].held == sampled != results["generate"].held, "candidates are not scored"
    assert results["zero2"].held == {
        "weights": 2 * NUM_PARAMETERS + 4 * NUM_PARAMETERS // 4,
        "gradients": 4 * NUM_PARAMETERS // 4,
        "optimizer_state": 8 * NUM_PARAMETERS // 4,
    }


def test_checkpointing_and_fused_kernels_hold_less_and_launch_fewer_kernels(results):
    plain, fused, checkpointed = results[PAIRWISE[1]], results["fused"], results["checkpointed"]
    assert checkpointed.peak < fused.peak < plain.peak
    assert sum(w.kernels for w in fused.work.values()) < sum(w.kernels for w in plain.work.values())
    assert checkpointed.work["products"].flops > plain.work["products"].flops == fused.work["products"].flops
    assert fused.activation_bytes_per_token < 0.8 * plain.activation_bytes_per_token


@pytest.mark.slow
def test_two_depths_give_the_whole_depth():
    whole, line = rehearse_all([DEEP, replace(DEEP, layers=(1, 2))])
    assert line.parameters == whole.parameters and line.held == whole.held
    assert line.peak == pytest.approx(whole.peak, rel=0.01)
    assert line.seconds == pytest.approx(whole.seconds, rel=0.01)
    assert line.token_budget == whole.token_budget
    assert (line.rehearsed_layers, whole.rehearsed_layers) == ((1, 2), ())


@pytest.mark.slow
def test_what_does_not_fit_is_refused_as_the_run_would_refuse_it():
    (result,) = rehearse_all([TOO_LARGE])
    assert "does not fit into the memory of the GPU" in result.error


@cache
def mutants():
    command = [sys.executable, "-m", "tests.support.rehearsed_mutants"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_without_a_mistake_nothing_is_found():
    assert {name: mutants()[name] for name in ("none", "no cache mutant")} == {"none": None, "no cache mutant": None}


@pytest.mark.parametrize(
    ("mutant", "named"),
    {
        "cpu tensor": ("cuda:0 and cpu", "in add in forward", "rehearsed_mutants.py:"),
        "forgotten copy": ("cuda:0 and cpu", "in embedding in forward", "src/model/grad_sums.py:"),
        "dtype": ("one dtype, got bfloat16, float32", "in mm in forward", "rehearsed_mutants.py:"),
        "float32 cache": ("KV cache holds float32", "engine.precision=bf16"),
        "enable_gqa": ("varlen_attn() got an unexpected keyword argument 'enable_gqa'", "torch_releases.py:"),
    }.items(),
)
def test_a_mistake_of_the_cuda_path_is_named_with_its_operation_and_line(mutant, named):
    assert all(part in (mutants()[mutant] or "") for part in named), mutants()[mutant]


def test_the_exchange_of_two_ranks_is_hidden_by_what_they_compute_unless_it_is_slower():
    fast, slow = (dict(zip(("total", "exposed", "seconds"), row, strict=True)) for row in mutants()["exchanges"])
    assert 0 < fast["exposed"] < 0.5 * fast["total"]
    computed = fast["seconds"] - fast["exposed"]
    assert slow["total"] > 10 * computed, "the control"
    assert slow["total"] - computed < slow["exposed"] <= slow["total"]
    assert slow["seconds"] - slow["exposed"] == pytest.approx(computed)


def test_the_signatures_of_torch_since_2_11_accept_what_the_project_passes():
    assert "varlen_attn()" in mutants()["torch 2.10"], "which pyproject excludes"
    assert [mutants()[f"torch {release}"] for release in ("2.11", "2.12", "2.13")] == [None] * 3


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path):
    code = (
        "from src.errors import report_errors\n"
        "from src.rehearsal.guard import load_guard\n"
        "with report_errors(): load_guard('no-such-compiler')"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: a rehearsal needs a C++ compiler, and no-such-compiler is not installed")
