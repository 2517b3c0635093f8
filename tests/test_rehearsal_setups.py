"""The paper's setups at their size, rehearsed from 2 and 4 layers: they run, and fit into a card of 80 GB."""

from __future__ import annotations

import pytest

from src.planning.model_shape import hub_configs
from src.rehearsal.request import Request, draw_lengths, rehearse, rehearse_all
from tests.support.rehearsals import combined

pytestmark = pytest.mark.slow

GIB = 2**30
LIMIT = 72 * GIB
CONFIGS = {
    "3b": hub_configs()["meta-llama/Llama-3.2-3B"],
    "8b": hub_configs()["meta-llama/Llama-3.1-8B"],
    "7b": hub_configs()["mistralai/Mistral-7B-v0.3"],
}
# Medians of prompt and response of benchmarks.pairs, in tokens; the first example is the longest that the cut allows.
TLDR = draw_lengths(128, 381, 35, 2, max_tokens=1024, max_prompt_tokens=896)
UF = draw_lengths(128, 121, 288, 2, max_tokens=4096, max_prompt_tokens=2048)
TLDR_SFT = draw_lengths(128, 381, 35, 1, max_tokens=1024, max_prompt_tokens=896)
UF_SFT = draw_lengths(128, 121, 1080, 1, max_tokens=4096, max_prompt_tokens=2048, spread=0.5)


def setup_requests(model, ranks, pairs, demonstrations, prompt_tokens, new_tokens):
    """Return stage -> request with the default settings of a paper setup."""
    training = {"strategy": "fsdp", "ranks": ranks, "layers": (2, 4)}
    return {
        "sft": Request("sft", CONFIGS[model], "h100", demonstrations, **training),
        "align": Request("align", CONFIGS[model], "h100", pairs, **training),
        "reference": Request("reference", CONFIGS[model], "h100", pairs, layers=(2, 4)),
        "generate": Request(
            "generate",
            CONFIGS[model],
            "h100",
            rows=64,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            layers=(2, 4),
        ),
    }


SETUPS = {
    "llama32_3b_tldr": setup_requests("3b", 1, TLDR, TLDR_SFT, 896, 256),
    "llama32_3b_uf": setup_requests("3b", 1, UF, UF_SFT, 2048, 4096),
    "llama31_8b_uf": setup_requests("8b", 8, UF, UF_SFT, 2048, 4096),
    "mistral_7b_uf": setup_requests("7b", 8, UF, UF_SFT, 2048, 4096),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_stage_of_a_paper_setup_runs_and_fits_into_a_card_of_80_gb(setup):
    results = dict(zip(SETUPS[setup], rehearse_all(list(SETUPS[setup].values())), strict=True))
    for stage, result in results.items():
        assert result.error is None, stage
        assert result.peak <= LIMIT, f"{stage}: {result.peak / GIB:.1f} GiB, of which {result.held_at_peak}"


def test_a_line_through_two_depths_gives_the_whole_depth_of_3b_parameters():
    request = Request(
        "align", CONFIGS["3b"], "h100", TLDR[:16], strategy="fsdp", batch_size=16, max_tokens_per_micro_batch=4096
    )
    line, whole = rehearse(Request(**{**vars(request), "layers": (2, 4)})), rehearse(request)
    assert line.parameters == whole.parameters == 3_212_749_824
    assert line.held == whole.held
    assert line.peak == pytest.approx(whole.peak, rel=0.01)
    assert line.seconds == pytest.approx(whole.seconds, rel=0.01)


def test_3b_parameters_are_refused_on_one_card_of_40_gb_and_fit_on_two():
    one, two = rehearse_all(
        [
            Request("align", CONFIGS["3b"], "a100_40", TLDR, strategy="fsdp", ranks=ranks, layers=(2, 4))
            for ranks in (1, 2)
        ]
    )
    assert "does not fit into the memory of the GPU" in one.error
    assert two.error is None and two.peak <= 0.9 * 40 * GIB


MATRIX = [
    (attention, precision, checkpointing, lora, fused)
    for attention in ("varlen", "flash_attention_2", "sdpa")
    for precision in ("bf16", "fp32")
    for checkpointing in (True, False)
    for lora in (True, False)
    for fused in (True, False)
    if precision == "bf16" or attention == "sdpa"
]


def test_a_step_runs_with_every_combination_of_options():
    results = rehearse_all([combined(*row) for row in MATRIX])
    assert {row: result.error for row, result in zip(MATRIX, results, strict=True) if result.error} == {}
    assert len(results) == 32
