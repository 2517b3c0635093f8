"""Fifty steps in bf16 next to float32, and next to plain autocast over float32 weights: transformers' model alone."""

import math
from contextlib import closing

import pytest
import torch
from torch.nn.functional import cosine_similarity, logsigmoid
from torch.nn.utils.rnn import pad_sequence

from src.config.schema import Training
from src.distributed import destroy_distributed
from src.model.numerics import NumericsConfig
from src.model.packing import pack
from src.planning.resources import Resources
from src.training.strategies import make_engine
from tests.support.small_models import random_pairs
from tests.support.training_runs import moved, start

NUM_STEPS, LR, BETA = 50, 1e-4, 0.1
PAIRS = random_pairs(8, 0)


@pytest.fixture(autouse=True)
def _no_group_remains(one_thread):
    yield
    destroy_distributed()


def trainer(lr=LR):
    return Training(lr=lr, max_grad_norm=1.0)


def dpo(logps, references):
    margins = (logps - references).view(-1, 2)
    return -logsigmoid(BETA * (margins[:, 0] - margins[:, 1])).mean()


def with_engine(strategy, precision, num_steps=NUM_STEPS, lr=LR):
    """Return the losses and the trained weights, by an engine of the project."""
    with closing(make_engine(Resources(device="cpu", strategy=strategy), trainer(lr), None, 0)) as engine:
        engine.prepare(start, NumericsConfig(precision))
        losses, references, batch = [], None, pack(PAIRS, range(len(PAIRS)))
        for _ in range(num_steps):
            with engine.micro_step(last=True):
                logps, _ = engine.policy(batch)
                references = logps.detach() if references is None else references
                loss = dpo(logps, references)
                engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        weights = {name: p.detach() for name, p in engine.gather_model().named_parameters()}
    return torch.tensor(losses), weights


def with_autocast(also_rounded=()):
    """Return the same of the usual recipe: transformers' model in torch.autocast, on padded sequences.

    also_rounded: parts of names of weights that are rounded to bf16 for the computation, though autocast does not.
    """
    model = start().train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, trainer().adam_betas, weight_decay=0.0)
    rounded = [p for name, p in model.named_parameters() if any(part in name for part in also_rounded)]
    sequences = [(pair.prompt, response) for pair in PAIRS for response in pair.responses]
    ids = pad_sequence([torch.tensor([*prompt, *response]) for prompt, response in sequences], batch_first=True)
    in_response = torch.zeros(ids[:, 1:].shape)
    for row, (prompt, response) in zip(in_response, sequences, strict=True):
        row[len(prompt) - 1 :][: len(response)] = 1
    losses, references = [], None
    for _ in range(NUM_STEPS):
        exact = [p.detach().clone() for p in rounded]
        for p in rounded:
            p.data.copy_(p.data.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[:, :-1]
        logps = (logits.float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2) * in_response).sum(1)
        references = logps.detach() if references is None else references
        loss = dpo(logps, references)
        loss.backward()
        for p, weight in zip(rounded, exact, strict=True):
            p.data.copy_(weight)
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer().max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses), dict(model.named_parameters())


def degrees(a, b):
    return math.degrees(math.acos(min(1.0, float(cosine_similarity(a, b, dim=0)))))


@pytest.mark.slow
def test_fifty_steps_in_bf16_follow_float32_as_autocast_does_with_the_same_weights_rounded():
    """Plain autocast keeps embeddings and the weights of norms in float32, which `bf16` rounds as all others."""
    exact_losses, exact = with_engine("none", "fp32")
    assert exact_losses[-1] < 0.8 * exact_losses[0], "the control: it learns"
    runs = {"ours": with_engine("fsdp", "bf16"), "plain autocast": with_autocast()}
    runs["autocast, rounded"] = with_autocast(("norm", "embed"))
    angles, differences = {}, {}
    for name, (losses, weights) in runs.items():
        angles[name] = degrees(moved(weights), moved(exact))
        differences[name] = float(((losses - exact_losses).abs() / exact_losses).mean())
        print(f"{name}: angle {angles[name]:.3f}, mean difference of a loss {100 * differences[name]:.4f} %")
    assert angles["ours"] < 1.05 * angles["autocast, rounded"]
    # Another order of sums changes this difference by an eighth, and the angle by a fiftieth.
    assert differences["ours"] < 1.2 * max(differences["plain autocast"], differences["autocast, rounded"])
    assert angles["ours"] < 1.5 * angles["plain autocast"], "what the rounding of norms and embeddings costs"


def test_steps_of_3e_7_move_weights_in_bf16_as_they_do_in_float32():
    """Master weights are float32: in bf16 ones such a step is below half of the last place, and nothing would move."""
    before = dict(start().named_parameters())
    (_, exact), (_, weights) = (
        with_engine(*how, num_steps=10, lr=3e-7) for how in (("none", "fp32"), ("fsdp", "bf16"))
    )
    rounded = [(weights[name].bfloat16() != before[name].bfloat16()).flatten() for name in before]
    assert torch.cat(rounded).double().mean() < 0.1, "the control"
    assert float(moved(weights).norm()) == pytest.approx(float(moved(exact).norm()), rel=0.02)
    assert degrees(moved(weights), moved(exact)) < 10
