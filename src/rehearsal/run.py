"""One request -> its result."""

from __future__ import annotations

import contextlib
import logging
import traceback
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from src.errors import ConfigError, describe_failure
from src.planning.fit import training_bytes
from src.planning.gpus import find_gpu
from src.planning.resources import KeptWhole, fsdp_keeps_whole
from src.rehearsal.depth import BudgetProbe, Probed, at_depth, peak_of
from src.rehearsal.device import FakeCudaMode
from src.rehearsal.fake_cuda import fake_cuda
from src.rehearsal.fake_ranks import fake_ranks
from src.rehearsal.inference import rehearse_candidates, rehearse_generate, rehearse_reference
from src.rehearsal.models import config_of, num_parameters
from src.rehearsal.request import ROOT, Request, Result
from src.rehearsal.substitutes import flash_attn_installed
from src.rehearsal.training import Notes, rehearse_training
from src.training import fsdp_engine, token_budget

_REHEARSALS = {
    "sft": rehearse_training,
    "candidates": rehearse_candidates,
    "align": rehearse_training,
    "reference": rehearse_reference,
    "generate": rehearse_generate,
}

# DDP and DeepSpeed do not run on fake tensors: their steps are rehearsed with an engine that computes the same, and the
# bytes that last are exchanged for `training_bytes`. strategy -> (the one that is rehearsed, whether with all ranks)
STAND_INS = {
    "ddp": ("none", False),
    "zero1": ("fsdp", False),
    "zero2": ("fsdp", False),
    "zero3": ("fsdp", True),
    "zero3_offload": ("fsdp", True),
}

log = logging.getLogger(__name__)


def run(request: Request) -> Result:
    """Rehearse a request at its whole depth, or at two depths and draw a line. What goes wrong is in the result."""
    try:
        stand_in, with_ranks = STAND_INS.get(request.strategy, (request.strategy, True))
        rehearsed = replace(request, strategy=stand_in, ranks=request.ranks if with_ranks else 1)
        stands_in = stand_in != request.strategy
        with _keeping_nothing() if stands_in else contextlib.nullcontext():
            result = _run_at_two_depths(rehearsed, stands_in) if request.layers else run_at(rehearsed)
    except ConfigError as error:
        return Result(error=str(error), rehearsed_layers=request.layers)
    return _exchange_held(result, request, stand_in) if stands_in else result


def _run_at_two_depths(request: Request, stands_in: bool) -> Result:
    layers = request.layers[0], request.layers[-1]
    depth = config_of(request.config).num_hidden_layers
    with contextlib.nullcontext() if stands_in else _keeping_as_the_whole_model(request):
        return _draw_line(request, layers, depth)


def _keeping_as_the_whole_model(request: Request) -> AbstractContextManager[Any]:
    """Let FSDP2 choose what it keeps by the size of the whole model, not of the layers that are rehearsed."""
    size = num_parameters(config_of(request.config))
    return mock.patch.object(fsdp_engine, "fsdp_keeps_whole", lambda _, *limits: fsdp_keeps_whole(size, *limits))


def _keeping_nothing() -> AbstractContextManager[Any]:
    """Let FSDP2 gather and exchange in every micro-batch, as ZeRO-3 does, in whose place it is rehearsed."""
    return mock.patch.object(fsdp_engine, "fsdp_keeps_whole", lambda *_: KeptWhole(weights=False, gradients=False))


def _draw_line(request: Request, layers: tuple[int, int], depth: int) -> Result:
    budget, probe = None, BudgetProbe()
    if request.stage in ("sft", "align"):
        with mock.patch.object(token_budget, "choose_token_budget", probe.measure):
            for number in layers:
                probed = run_at(request, number)
                if probed.error:
                    return replace(probed, rehearsed_layers=layers)
        budget = probe.choose(layers, depth) if probe.passes else None
    results = [run_at(request, number, budget=budget) for number in layers]
    failed = next((result for result in results if result.error), None)
    return replace(failed, rehearsed_layers=layers) if failed else at_depth(results[0], results[1], layers, depth)


def run_at(request: Request, layers: int | None = None, budget: token_budget.TokenBudget | None = None) -> Result:
    """Rehearse a request with so many layers; None: all. budget: instead of the one that would be found."""
    notes, error = Notes(), None
    with contextlib.ExitStack() as stack:
        mode = stack.enter_context(fake_cuda(find_gpu(request.gpu)))
        stack.enter_context(fake_ranks(request.ranks))
        if request.attention == "flash_attention_2":
            stack.enter_context(flash_attn_installed())
        mode.work.ranks = request.ranks
        try:
            if budget is not None and request.stage in ("sft", "align"):
                rehearse_training(request, mode, layers, notes, budget)
            else:
                _REHEARSALS[request.stage](request, mode, layers, notes)
        except Probed:
            pass
        except Exception as exception:
            log.info("rehearsal", exc_info=exception)
            error = explain(exception, mode)
    return _result(request, mode, notes, error or notes.finding)


def _result(request: Request, mode: FakeCudaMode, notes: Notes, error: str | None) -> Result:
    work, exposed = mode.work.work, mode.work.exposed_exchange
    computed = sum(row.seconds for kind, row in work.items() if kind != "communication")
    by_phase = dict(mode.memory.peak_by_phase)
    rate = mode.gpu.bf16_peak if request.precision == "bf16" else mode.gpu.fp32
    return Result(
        error=error,
        parameters=notes.parameters,
        held=notes.held,
        peak_by_phase=by_phase,
        peak=peak_of(by_phase),
        held_at_peak=mode.memory.held_at_peak,
        activation_bytes_per_token=notes.activation_bytes_per_token,
        token_budget=notes.token_budget,
        micro_batches=notes.micro_batches,
        checkpointed_micro_batches=notes.checkpointed,
        tokens=notes.tokens,
        supervised_tokens=notes.supervised_tokens,
        work=work,
        seconds=computed + exposed,
        exposed_exchange_seconds=exposed,
        host_seconds=sum(row.kernels for row in work.values()) * mode.gpu.launch,
        floor_seconds=mode.work.floor(rate, request.lora is not None),
        host_copies=dict(mode.work.host_copies),
        syncs=dict(mode.work.syncs),
        substituted=tuple(sorted(mode.substituted)),
    )


def _exchange_held(result: Result, request: Request, stand_in: str) -> Result:
    """Return the result with what a rank of the strategy holds in place of what the rehearsed engine held."""
    trained = result.held.get("gradients", 0) // 4 * (request.ranks if STAND_INS[request.strategy][1] else 1)
    computed = 2 if request.precision == "bf16" else 4
    sizes = training_bytes(result.parameters, trained, request.strategy, computed, request.ranks)
    held = dict(zip(("weights", "gradients", "optimizer_state"), sizes, strict=True))
    gathered = 0
    if stand_in == "fsdp" and not STAND_INS[request.strategy][1] and request.precision == "bf16":
        gathered = 2 * result.parameters  # its copies of the float32 weights
    difference = sum(held.values()) - sum(result.held.get(name, 0) for name in held) - gathered
    by_phase = {phase: size + difference for phase, size in result.peak_by_phase.items()}
    substituted = (*result.substituted, f"engine.strategy={request.strategy}: the step of {stand_in}")
    return replace(result, held=held, peak_by_phase=by_phase, peak=peak_of(by_phase), substituted=substituted)


def explain(error: Exception, mode: FakeCudaMode) -> str:
    """Return one line: what the error says, in which operation, and the innermost line of ours or of transformers."""
    if isinstance(error, ConfigError):
        return describe_failure(error)
    frames = traceback.extract_tb(error.__traceback__)
    named = [frame for frame in frames if _is_named(frame.filename)]
    place = f" at {_short(named[-1].filename)}:{named[-1].lineno}" if named else ""
    operation = f" in {mode.failed}" if mode.failed else ""
    return f"{describe_failure(error)[:400]}{operation}{place}"


def _is_named(filename: str) -> bool:
    path = Path(filename)
    if path.is_relative_to(ROOT) and "site-packages" not in path.parts:
        return "rehearsal" not in path.parts[len(ROOT.parts) :]
    return any(part in path.parts for part in ("transformers", "peft", "accelerate", "liger_kernel"))


def _short(filename: str) -> str:
    path = Path(filename)
    if "site-packages" in path.parts:
        return "/".join(path.parts[path.parts.index("site-packages") + 1 :])
    return str(path.relative_to(ROOT))
