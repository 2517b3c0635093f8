"""The training engine against TRL's trainers, same model, pairs, threads and whole optimizer steps:
`python -m benchmarks.against_trl [ROW ...]`; without rows, all of them (most of an hour on two cores).

Each measurement is a process of its own, ours and TRL's taking turns; results are kept in
outputs/benchmarks/against_trl.json, from which `python -m benchmarks.performance` makes tables and figures.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.our_side import BETA, model_of, ours, tokenizer, unpack
from benchmarks.pairs import SHAPES, make_pairs
from benchmarks.trl_side import plain, trl, trl_trainer
from src.hardware import cores
from src.model.logprobs import patch_model_

RESULTS = Path("outputs/benchmarks/against_trl.json")

# ROW: what is compared with what, on which pairs. TRL's figure is that of its fastest micro-batch, which on a CPU is
# one pair: more are padded to the longest (row `micro_batch`).
ROWS: dict[str, list[dict[str, Any]]] = {
    **{shape: [{"who": "ours", "shape": shape}, {"who": "trl", "shape": shape}] for shape in SHAPES},
    "micro_batch": [{"who": "trl", "shape": "tldr", "micro_batch": 2}],
    "online_reference": [{"who": "trl", "shape": "tldr", "reference": "online"}],
    "defaults": [{"who": "trl", "shape": "tldr", "checkpointing": True}],
    "bf16": [{"who": who, "shape": "tldr", "precision": "bf16"} for who in ("ours", "trl")],
    "orpo": [{"who": who, "shape": "tldr", "method": "orpo"} for who in ("ours", "trl")],
    "simpo": [{"who": who, "shape": "tldr", "method": "simpo"} for who in ("ours", "trl")],
    "ablation": [
        {"who": "ours", "shape": "tldr", "without": lever}
        for lever in (None, "onednn", "attention", "mlp", "norm", "last_layer", "head", "prefix", "packing")
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


def status(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of a micro-batch's forward and backward pass beyond weights and gradients, the same pairs for both."""
    import torch

    examples = make_pairs(job["shape"], job["micro_batch"])
    if job["who"] == "ours":
        from src.config.schema import Point
        from src.model.loading import numerics_of, set_cpu_threads
        from src.model.logprobs import sequence_logps
        from src.model.packing import pack

        set_cpu_threads(Point().engine)
        model, compute = model_of(), numerics_of(Point())

        def step() -> None:
            logps = sequence_logps(model, pack(examples, range(len(examples))), compute)[0].view(-1, 2)
            (-torch.nn.functional.logsigmoid(BETA * (logps[:, 0] - logps[:, 1]))).mean().backward()
    else:
        model = plain(model_of())
        trainer = trl_trainer(job, model, tokenizer(), examples, 1)
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> None:
            trainer.compute_loss(model, batch).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # there from the start: not part of the difference
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    step()
    return {"bytes": status("VmHWM") - before}


def gradients(job: dict[str, Any]) -> dict[str, Any]:
    """Of one DPO step on two pairs: norm of the difference over the norm. In float64 both compute the same; in float32
    each is as far from that as its rounding."""
    import random
    from unittest import mock

    import torch
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from src.config.schema import Point
    from src.model.loading import numerics_of
    from src.model.logprobs import sequence_logps
    from src.model.packing import pack

    examples = make_pairs(job["shape"], 2, draw=job["draw"])
    model, compute = model_of(), numerics_of(Point())
    with torch.no_grad():
        logps = sequence_logps(model, pack(examples, range(2)), compute)[0].view(-1, 2)
    rng = random.Random(0)
    # float32's own values: TRL takes them as float32
    references = torch.tensor([(a + rng.gauss(0, 3), b + rng.gauss(0, 3)) for a, b in logps.tolist()]).tolist()

    def norm(self: Any, x: Any) -> Any:  # transformers' own goes through float32 whatever comes in
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    found = {}
    for precision in (torch.float32, torch.float64):
        if precision == torch.float64:
            mock.patch.object(LlamaRMSNorm, "forward", norm).start()  # on both sides
        patch_model_(model.to(precision)).zero_grad()
        ratios = sequence_logps(model, pack(examples, range(2)), compute)[0].view(-1, 2) - torch.tensor(references)
        (-torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))).mean().backward()
        found["ours", precision] = torch.cat([p.grad.flatten().double() for p in model.parameters()])
        model.zero_grad()
        same = {**job, "micro_batch": 2, "pairs": 2, "references": references}
        trainer = trl_trainer(same, plain(model), tokenizer(), examples, 1)
        trainer.compute_loss(model, next(iter(trainer.get_train_dataloader()))).backward()
        found["trl", precision] = torch.cat([p.grad.flatten().double() for p in model.parameters()])

    def difference(a: Any, b: Any) -> float:
        return float((found[a] - found[b]).norm() / found[b].norm())

    exact = ("ours", torch.float64)
    return {
        "float64": difference(exact, ("trl", torch.float64)),
        "float32": difference(("ours", torch.float32), ("trl", torch.float32)),
        "ours_rounding": difference(("ours", torch.float32), exact),
        "trl_rounding": difference(("trl", torch.float32), exact),
    }


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own."""
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
    """FLOP/s of the fastest float32 product there is here: what 100 % would be."""
    import torch

    from src.model.cpu.linear import product

    torch.set_num_threads(cores())
    a = torch.randn(2048, 2048)
    taken = []
    for _ in range(20):
        begun = time.perf_counter()
        product(a, a)
        taken.append(time.perf_counter() - begun)
    return 2 * 2048**3 / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="which; all when none is named")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        import torch

        torch.set_num_threads(cores())
        job = json.loads(arguments.job)
        what = {"memory": memory, "gradients": gradients}.get(
            job.get("measure", ""), ours if job["who"] == "ours" else trl
        )
        print(json.dumps(what(job)))
        return
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    unpack()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for row in arguments.rows or ROWS:
        found = []
        # In turn: what the machine does meanwhile meets both.
        jobs = ROWS[row]
        for job in [*jobs, *jobs, jobs[0]] if row in SHAPES else jobs:
            outcome = measure(job)
            found.append({**job, **outcome})
            print(row, found[-1], flush=True)
        results[row] = {"jobs": found, "peak": gemm_peak()}
        RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
