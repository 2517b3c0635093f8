"""Rehearsals of a whole depth and of every combination of options. The paper's setups: test_forecast_rehearsed.py."""

from __future__ import annotations

import pytest

from src.planning.model_shape import hub_configs
from src.rehearsal.request import Request, draw_lengths, rehearse, rehearse_all
from tests.support.rehearsals import combined

pytestmark = pytest.mark.slow

# Mean tokens of prompt and response.
TLDR = draw_lengths(16, 381, 35, 2, max_tokens=1024, max_prompt_tokens=896)


def test_a_line_through_two_depths_gives_the_whole_depth_of_3b_parameters():
    request = Request(
        "align",
        hub_configs()["meta-llama/Llama-3.2-3B"],
        "h100",
        TLDR,
        strategy="fsdp",
        batch_size=16,
        max_tokens_per_micro_batch=4096,
    )
    line, whole = rehearse(Request(**{**vars(request), "layers": (2, 4)})), rehearse(request)
    assert line.parameters == whole.parameters == 3_212_749_824
    assert line.held == whole.held
    assert line.peak == pytest.approx(whole.peak, rel=0.01)
    assert line.seconds == pytest.approx(whole.seconds, rel=0.01)


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
