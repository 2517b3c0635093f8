"""The training loop itself on fake CUDA tensors, and what is noted while it runs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from src.config.schema import Lora, Training
from src.data.examples import Example
from src.methods import METHODS, options_of
from src.model.logprobs import SequenceLogps
from src.planning.content import ContentPath
from src.planning.identity import AlignInputs, DataInputs, ModelInputs, SftInputs
from src.planning.resources import Resources
from src.rehearsal.device import FakeCudaMode
from src.rehearsal.models import config_of, load_fake
from src.rehearsal.request import Request
from src.stages.align import make_loss_fn
from src.store.attempt import Attempt
from src.training import batches, loop
from src.training.engine import TrainingEngine
from src.training.token_budget import TokenBudget

TOKEN = 5  # any; values are not computed
MICRO_BATCHES_OF_LONGEST = 2  # gradients are there in the second


@dataclass
class Notes:
    """What came to light while the loop ran; numbers are those of the last step, peaks of all but the first."""

    parameters: int = 0
    token_budget: int | None = None
    micro_batches: int = 0
    checkpointed: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    activation_bytes_per_token: float = 0.0
    held: dict[str, int] = field(default_factory=dict)
    finished_steps: int = 0
    recomputes: bool = False
    finding: str | None = None  # what is wrong although nothing raised


def examples_of(request: Request) -> list[Example]:
    """Return the examples, and last the longest one."""
    return [
        Example((TOKEN,) * prompt, tuple((TOKEN,) * length for length in responses))
        for prompt, *responses in (*request.examples, *filter(None, [request.longest]))
    ]


def copies_of_longest(request: Request, token_budget: int) -> int:
    """Return how many copies of the longest example fill MICRO_BATCHES_OF_LONGEST."""
    prompt, *responses = request.longest
    return MICRO_BATCHES_OF_LONGEST * max(1, token_budget // (prompt + sum(responses)))


def _steps(request: Request) -> int:
    """Return the steps of the loop: one after which there is an optimizer state, of the longest, of the examples."""
    return 3 if request.longest else 2


def rehearse_training(
    request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes, budget: TokenBudget | None = None
) -> None:
    """Run `src.training.loop.train` for two or three steps; fill `notes` as it goes, also until an error.

    budget: instead of the one that would be found.
    """
    examples = examples_of(request)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        if budget is not None:
            stack.enter_context(mock.patch.object(loop, "find_token_budget", lambda *_: budget))
        stack.enter_context(_watched(request, mode, notes))
        attempt = _attempt(Path(folder))
        inputs, resources = _inputs(request), resources_of(request)
        loss_fn: loop.LossFn = loop.sft_loss
        if isinstance(inputs, AlignInputs):
            needs_reference = METHODS[request.method].needs_reference
            loss_fn = make_loss_fn(inputs, torch.zeros(len(examples), 2, device="cuda") if needs_reference else None)
        loop.train(
            lambda: load_fake(config_of(request.config, layers), mode), examples, loss_fn, inputs, resources, attempt
        )


def resources_of(request: Request) -> Resources:
    switch: dict[str, bool | str] = {"auto": "auto", "true": True, "false": False}
    return Resources(
        device="cuda",
        strategy=request.strategy,
        activation_checkpointing=switch[request.activation_checkpointing],
        attention=request.attention,
        max_tokens_per_micro_batch=request.max_tokens_per_micro_batch,
        checkpoint_minutes=1e9,
        fused=switch[request.fused_kernels],
    )


def model_inputs(request: Request) -> ModelInputs:
    return ModelInputs(ContentPath("rehearsed", "rehearsed"), "plain", request.precision)


def _inputs(request: Request) -> SftInputs | AlignInputs:
    model, data = model_inputs(request), DataInputs("rehearsed", 0, 1, 1)
    # What is published then moves to the CPU, where nothing is rehearsed: merged, the model stays on the card.
    lora = None if request.lora is None else Lora(**request.lora | {"publish": "merged"})
    trainer = Training(lr=1e-6, batch_size=request.batch_size, max_steps=_steps(request), epochs=1000)
    if request.stage == "sft":
        return SftInputs(model, lora, data, trainer, 0)
    options = dict.fromkeys(
        options_of(request.method, METHODS[request.method].score), 0.4
    )  # in the range of every option
    return AlignInputs(model, "sft", lora, data, request.method, options, 0.1, 1.0, 1.0, trainer, 0)


def _attempt(folder: Path) -> Attempt:
    (folder / "checkpoints").mkdir()
    return Attempt(folder, folder / "checkpoints", None, lambda *_: None, "rehearsal", "rehearsal", folder)


@contextlib.contextmanager
def _watched(request: Request, mode: FakeCudaMode, notes: Notes) -> Iterator[None]:
    """Note phases, budget, micro-batches and the end of steps; the loop's own functions do all the work."""
    engines: list[TrainingEngine] = []
    with contextlib.ExitStack() as stack:

        def wrap(owner: Any, name: str, make: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

        def noting_engine(make_engine: Any) -> Any:
            def make(*args: Any) -> TrainingEngine:
                engine = make_engine(*args)
                engines.append(engine)
                _watch_engine(engine, mode, notes)
                return engine

            return make

        def noting_budget(find: Any) -> Any:
            def budget(*args: Any) -> Any:
                with mode.in_phase("budget"):
                    chosen = find(*args)
                notes.token_budget = chosen.tokens
                mode.memory.start_peak()
                _start_step(mode, notes)
                return chosen

            return budget

        def noting_forward(forward: Any) -> Any:
            def forward_noted(policy: Any, batch: Any) -> Any:
                before = mode.memory.live
                output = forward(policy, batch)
                num_tokens = batch.input_ids.numel()
                if mode.phase == "forward":
                    notes.micro_batches += 1
                    notes.checkpointed += notes.recomputes
                    notes.tokens += num_tokens
                    notes.supervised_tokens += batch.targets.numel()
                if not notes.recomputes:
                    notes.activation_bytes_per_token = (mode.memory.live - before) / num_tokens
                return output

            return forward_noted

        def noting_end(log_metrics: Any) -> Any:
            def log_noted(*args: Any) -> None:
                log_metrics(*args)
                notes.finished_steps += 1
                mode.finished = notes.finished_steps == _steps(request)
                if notes.finished_steps == 1:
                    mode.memory.start_peak()
                if not mode.finished:
                    _start_step(mode, notes)

            return log_noted

        def choosing(batch_indices: Any) -> Any:
            def indices(step: int, num_examples: int, batch_size: int, seed: int) -> list[int]:
                if step == 0:
                    return [i % len(request.examples) for i in range(request.ranks)]
                if step < _steps(request) - 1:
                    copies = copies_of_longest(request, notes.token_budget or 0)
                    return [num_examples - 1] * copies * request.ranks
                return [i % len(request.examples) for i in range(batch_size)]

            return indices

        wrap(batches, "batch_indices", choosing)
        wrap(loop, "make_engine", noting_engine)
        wrap(loop, "find_token_budget", noting_budget)
        wrap(loop, "log_metrics", noting_end)
        wrap(SequenceLogps, "forward", noting_forward)
        wrap(loop, "prefetch", lambda _: _in_turn)  # modes are of a thread: the next batch is prepared in this one
        yield


def _in_turn(function: Any, items: Any, *_: Any) -> Generator[Any, None, None]:
    for item in items:
        yield function(item)


def _start_step(mode: FakeCudaMode, notes: Notes) -> None:
    mode.work.reset()
    notes.micro_batches = notes.checkpointed = notes.tokens = notes.supervised_tokens = 0


def _watch_engine(engine: TrainingEngine, mode: FakeCudaMode, notes: Notes) -> None:
    """Let one engine tell the phase of what it does, and what is held when gradients are complete."""
    prepare, micro_step, backward, step = engine.prepare, engine.micro_step, engine.backward, engine.step
    checkpoint_activations = engine.checkpoint_activations

    def prepare_noted(*args: Any) -> Any:
        policy = prepare(*args)
        parameters = list(policy.parameters())
        notes.parameters = sum(p.numel() for p in parameters)
        mode.work.parameter_shapes = {_local(p).shape for p in parameters} | {p.shape for p in parameters}
        mode.memory.relabel([_local(p) for p in parameters], "weights")
        notes.held["weights"] = sum(map(_bytes, parameters))
        mode.phase = "loop"
        return policy

    @contextlib.contextmanager
    def micro_step_noted(last: bool) -> Iterator[None]:
        with micro_step(last), mode.in_phase(mode.phase if mode.phase == "budget" else "forward"):
            yield

    def backward_noted(loss: Tensor) -> None:
        with mode.in_phase(mode.phase if mode.phase == "budget" else "backward"):
            backward(loss)

    def step_noted() -> Tensor:
        parameters = list(engine.policy.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        mode.memory.relabel([_local(g) for g in gradients], "gradients")
        notes.held["gradients"] = sum(map(_bytes, gradients))
        with mode.in_phase("optimizer"):
            norm = step()
        state = [x for values in engine.optimizer.state.values() for x in values.values() if isinstance(x, Tensor)]
        mode.memory.relabel([_local(x) for x in state], "optimizer state")
        notes.held["optimizer_state"] = sum(map(_bytes, state))
        return norm

    def checkpoint_noted(enabled: bool) -> None:
        notes.recomputes = enabled
        checkpoint_activations(enabled)

    watched: Any = engine
    watched.prepare, watched.micro_step, watched.backward = prepare_noted, micro_step_noted, backward_noted
    watched.step, watched.checkpoint_activations = step_noted, checkpoint_noted


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _bytes(tensor: Tensor) -> int:
    local = _local(tensor)
    return local.numel() * local.element_size()
