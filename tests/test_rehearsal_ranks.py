"""What one rank of FSDP2 holds: rehearsed, against a measured rank on gloo."""

from dataclasses import replace

from src.config.schema import Training
from src.data.examples import Example
from src.model.numerics import NumericsConfig
from src.model.packing import pack
from src.planning.resources import Resources
from src.rehearsal.request import rehearse_all
from tests.support.ranks import on_ranks
from tests.support.rehearsals import PAIRS, TINY, TINY_REQUEST


def held_on_a_rank():
    """Return the bytes of weights, gradients and optimizer state of this rank after a step."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from src.training.strategies import make_engine

    engine = make_engine(
        Resources(device="cpu", strategy="fsdp", activation_checkpointing=False), Training(lr=1e-6), None, 0
    )
    config = AutoConfig.for_model(**TINY)
    policy = engine.prepare(lambda: AutoModelForCausalLM.from_config(config), NumericsConfig("fp32", "sdpa"))
    examples = [Example((5,) * prompt, tuple((5,) * r for r in responses)) for prompt, *responses in PAIRS]

    def size(tensors):
        local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    with engine.micro_step(last=True):
        engine.backward(policy(pack(examples, range(4)))[0].sum())
    weights, gradients = size(policy.parameters()), size(p.grad for p in policy.parameters())
    engine.step()
    state = size(t for values in engine.optimizer.state.values() for t in values.values())
    return {"weights": weights, "gradients": gradients, "optimizer_state": state}


def test_a_rehearsed_rank_holds_what_a_real_one_holds():
    rehearsed = rehearse_all([replace(TINY_REQUEST, ranks=ranks) for ranks in (2, 4)])
    assert [result.error for result in rehearsed] == [None, None]
    measured = [on_ranks(ranks, "fsdp", held_on_a_rank)[0] for ranks in (2, 4)]
    assert [result.held for result in rehearsed] == measured
