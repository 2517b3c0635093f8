"""Compare the training engine with TRL's trainers: same model, pairs and threads, whole optimizer steps.

`python -m benchmarks.against_trl [ROW ...]`; without rows, all of them (most of an hour on two cores). Each measurement
runs in its own process, ours and TRL's in turn. Results go to outputs/benchmarks/against_trl.json, from which
`python -m benchmarks.performance` makes tables and figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.our_side import BETA, benchmark_model, convert_model, default_numerics, ours, tokenizer
from benchmarks.pairs import SHAPES, make_pairs
from benchmarks.trl_side import trl, trl_trainer, unpatch
from src.hardware import cores
from src.model.cpu.linear import mm_nt
from src.model.loading import set_cpu_threads
from src.model.logprobs import patch_model_, sequence_logps
from src.model.packing import pack

RESULTS = Path("outputs/benchmarks/against_trl.json")

# Row -> the measurements it consists of. TRL runs with its fastest micro-batch, which on a CPU is one pair: more are
# padded to the longest (row `micro_batch`).
ROWS: dict[str, list[dict[str, Any]]] = {
    **{shape: [{"who": "ours", "shape": shape}, {"who": "trl", "shape": shape}] for shape in SHAPES},
    "micro_batch": [{"who": "trl", "shape": "tldr", "micro_batch": 2}],
    "online_reference": [{"who": "trl", "shape": "tldr", "reference": "online"}],
    "defaults": [{"who": "trl", "shape": "tldr", "checkpointing": True}],
    "bf16": [{"who": who, "shape": "tldr", "precision": "bf16"} for who in ("ours", "trl")],
    "orpo": [{"who": who, "shape": "tldr", "method": "orpo"} for who in ("ours", "trl")],
    "simpo": [{"who": who, "shape": "tldr", "method": "simpo"} for who in ("ours", "trl")],
    "ablation": [
        {"who": "ours", "shape": "tldr", "without": optimization}
        for optimization in (None, "onednn", "attention", "last_layer", "head", "prefix", "packing")
    ],
    "memory": [
        {"who": who, "shape": shape, "measure": "memory", "micro_batch": 2}
        for shape in SHAPES
        for who in ("ours", "trl")
    ],
    "gradients": [{"who": "both", "shape": "tldr", "measure": "gradients", "draw": draw} for draw in range(8)],
    "length": [{"who": "ours", "shape": "tldr", "scale": scale} for scale in (0.5, 2.0)],
    "batch": [{"who": "ours", "shape": "tldr", "pairs": pairs} for pairs in (8, 32)],
    "size": [{"who": "ours", "shape": "tldr", "layers": layers} for layers in (10, 20)],
}


def memory_status(key: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(key)
    )
    return int(line.split()[1]) * 1024


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Return the peak bytes of a micro-batch's forward and backward pass beyond weights and gradients."""
    examples = make_pairs(job["shape"], job["micro_batch"])
    if job["who"] == "ours":
        set_cpu_threads(None)
        model, numerics = benchmark_model(), default_numerics()

        def step() -> None:
            logps = sequence_logps(model, pack(examples, range(len(examples))), numerics)[0].view(-1, 2)
            (-torch.nn.functional.logsigmoid(BETA * (logps[:, 0] - logps[:, 1]))).mean().backward()
    else:
        model = unpatch(benchmark_model())
        trainer = trl_trainer(job, model, tokenizer(), examples, 1)
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> None:
            trainer.compute_loss(model, batch).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # allocated before the measurement, so not part of it
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    before = memory_status("VmRSS")
    step()
    return {"bytes": memory_status("VmHWM") - before}


def gradient_differences(job: dict[str, Any]) -> dict[str, Any]:
    """Return relative differences between gradients of one DPO step on two pairs: norm of difference over norm.

    In float64 both sides compute the same; in float32 each differs from that by its rounding.
    """
    examples = make_pairs(job["shape"], 2, draw=job["draw"])
    model, numerics = benchmark_model(), default_numerics()
    with torch.no_grad():
        logps = sequence_logps(model, pack(examples, range(2)), numerics)[0].view(-1, 2)
    rng = random.Random(0)
    # Rounded to float32, as TRL keeps them.
    references = torch.tensor([(a + rng.gauss(0, 3), b + rng.gauss(0, 3)) for a, b in logps.tolist()]).tolist()

    def rms_norm(self: Any, x: Any) -> Any:  # transformers' computes in float32 whatever its input is
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    gradients = {}
    for precision in (torch.float32, torch.float64):
        if precision == torch.float64:
            mock.patch.object(LlamaRMSNorm, "forward", rms_norm).start()  # on both sides
        patch_model_(model.to(precision)).zero_grad()
        ratios = sequence_logps(model, pack(examples, range(2)), numerics)[0].view(-1, 2) - torch.tensor(references)
        (-torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))).mean().backward()
        gradients["ours", precision] = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        model.zero_grad()
        trl_job = {**job, "micro_batch": 2, "pairs": 2, "references": references}
        trainer = trl_trainer(trl_job, unpatch(model), tokenizer(), examples, 1)
        trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
        gradients["trl", precision] = torch.cat([p.grad.flatten().double() for p in model.parameters()])

    def difference(a: Any, b: Any) -> float:
        return float((gradients[a] - gradients[b]).norm() / gradients[b].norm())

    exact = ("ours", torch.float64)
    return {
        "float64": difference(exact, ("trl", torch.float64)),
        "float32": difference(("ours", torch.float32), ("trl", torch.float32)),
        "ours_rounding": difference(("ours", torch.float32), exact),
        "trl_rounding": difference(("trl", torch.float32), exact),
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run one measurement in its own process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.against_trl", "--job", json.dumps(job)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{job}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def gemm_peak() -> float:
    """Return the FLOP/s of the fastest float32 product on this machine, the 100 % of MFU."""
    torch.set_num_threads(cores())
    a = torch.randn(2048, 2048)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        mm_nt(a, a)
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="all rows when none is named")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        torch.set_num_threads(cores())
        job = json.loads(arguments.job)
        run = {"memory": memory, "gradients": gradient_differences}.get(
            job.get("measure", ""), ours if job["who"] == "ours" else trl
        )
        print(json.dumps(run(job)))
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    convert_model()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for row in arguments.rows or ROWS:
        outcomes = []
        # In turn, so that other load on the machine affects both sides.
        jobs = ROWS[row]
        for job in [*jobs, *jobs, jobs[0]] if row in SHAPES else jobs:
            outcomes.append({**job, **measure(job)})
            print(row, outcomes[-1], flush=True)
        results[row] = {"jobs": outcomes, "peak": gemm_peak()}
        RESULTS.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
