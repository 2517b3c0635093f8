"""Fifty steps in bf16 next to float32, and next to plain autocast over float32 weights: transformers' model alone."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity, logsigmoid

from src.config.schema import Training
from src.distributed import destroy_distributed
from src.model.numerics import NumericsConfig
from src.model.packing import pack
from src.planning.resources import Resources
from src.training.strategies import make_engine
from tests.support.small_models import random_pairs
from tests.support.training_runs import moved, start

NUM_STEPS, LR, BETA = 50, 1e-4, 0.1
TRAINER = Training(lr=LR, max_grad_norm=1.0)
PAIRS = random_pairs(8, 0)


@pytest.fixture(autouse=True)
def _one_thread_and_no_group():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    destroy_distributed()


def dpo(logps, references):
    margins = (logps - references).view(-1, 2)
    return -logsigmoid(BETA * (margins[:, 0] - margins[:, 1])).mean()


def with_engine(strategy, precision):
    """Return the losses and the movement of the weights, by an engine of the project."""
    engine = make_engine(Resources(device="cpu", strategy=strategy), TRAINER, None, 0)
    engine.prepare(start, NumericsConfig(precision))
    losses, references, batch = [], None, pack(PAIRS, range(len(PAIRS)))
    for _ in range(NUM_STEPS):
        with engine.micro_step(last=True):
            logps, _ = engine.policy(batch)
            references = logps.detach() if references is None else references
            loss = dpo(logps, references)
            engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    weights = {name: p.detach() for name, p in engine.gather_model().named_parameters()}
    engine.close()
    return torch.tensor(losses), moved(weights)


def with_autocast():
    """Return the same of the usual recipe: transformers' model in torch.autocast, sequence by sequence."""
    model = start().train()
    optimizer = torch.optim.AdamW(model.parameters(), LR, TRAINER.adam_betas, weight_decay=0.0)
    losses, references = [], None
    for _ in range(NUM_STEPS):
        logps = []
        for pair in PAIRS:
            for response in pair.responses:
                ids, first = torch.tensor([[*pair.prompt, *response]]), len(pair.prompt)
                with torch.autocast("cpu", torch.bfloat16):
                    logits = model(input_ids=ids).logits[0, first - 1 : -1]
                logps.append(logits.float().log_softmax(-1).gather(1, ids[0, first:, None]).sum())
        stacked = torch.stack(logps)
        references = stacked.detach() if references is None else references
        loss = dpo(stacked, references)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return torch.tensor(losses), moved(dict(model.named_parameters()))


@pytest.mark.slow
def test_fifty_steps_in_bf16_follow_float32_about_as_plain_autocast_does():
    exact_losses, exact = with_engine("none", "fp32")
    losses, movement = with_engine("fsdp", "bf16")
    autocast_losses, autocast = with_autocast()
    assert exact_losses[-1] < 0.8 * exact_losses[0], "the control: it learns"
    directions = [float(cosine_similarity(m, exact, dim=0)) for m in (movement, autocast)]
    angles = [math.acos(min(1.0, direction)) for direction in directions]
    differences = [float(((x - exact_losses).abs() / exact_losses).max()) for x in (losses, autocast_losses)]
    print(f"largest difference of a loss: {differences}, angle to the movement in float32: {angles}")
    assert differences[0] < 0.02 and directions[0] > 0.8
    # Autocast keeps embeddings and the weights of norms in float32, which bf16 weights round as all others.
    assert differences[0] < 1.2 * differences[1] and angles[0] < 2 * angles[1]
