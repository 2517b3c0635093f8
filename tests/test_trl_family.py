"""Losses and gradients against TRL's: its loss functions on log-probs, in float64, and one step of its trainers."""

import inspect
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from src.losses import LOSSES, preference_loss
from src.methods import METHODS
from tests.support.commands import ROOT

BETA = 0.3
TOKENS = ((3, 5), (7, 2), (4, 4))  # of chosen and rejected
LENGTH = 10
# method -> what TRL calls it, its options there and here
DPO_TRAINER = {
    "dpo": ({"loss_types": ["sigmoid"]}, {}),
    "hinge": ({"loss_types": ["hinge"]}, {}),
    "robust_dpo": ({"loss_types": ["robust"], "label_smoothing": 0.15}, {"label_smoothing": 0.15}),
    "exo_pair": ({"loss_types": ["exo_pair"], "label_smoothing": 0.01}, {"rejected_probability": 0.01}),
    "discopop": ({"loss_types": ["discopop"], "discopop_tau": 0.07}, {"discopop_tau": 0.07}),
    "ln_dpo": ({"loss_types": ["sigmoid_norm"]}, {}),
    "forward_kl": ({"loss_types": ["sigmoid"], "f_divergence_type": "forward_kl"}, {}),
    "sppo_hard": ({"loss_types": ["sppo_hard"]}, {}),
    "bco_pair": ({"loss_types": ["bco_pair"]}, {}),
    "apo_down": ({"loss_types": ["apo_down"]}, {}),
    "apo_zero": ({"loss_types": ["apo_zero"]}, {}),
    "nca": ({"loss_types": ["nca_pair"]}, {}),
    "ipo": ({"loss_types": ["ipo"]}, {"score": "mean_log_ratio"}),
}
ADDED = {"apo_zero": 1.0, "apo_down": 1.0}  # a constant that TRL adds


def pairs():
    """Return log-probs of tokens (2 pairs, LENGTH - 1), chosen before rejected, their mask, and reference log-probs."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([n for side in zip(*TOKENS, strict=True) for n in side])
    mask = torch.arange(LENGTH - 1) >= LENGTH - 1 - counts[:, None]
    per_token = -2 * torch.rand(len(counts), LENGTH - 1, generator=generator, dtype=torch.float64)
    references = (per_token * mask).sum(1) + torch.randn(len(counts), generator=generator, dtype=torch.float64)
    return per_token, mask, references


def trl_dpo(per_token, mask, references, settings):
    """Run the loss of TRL's DPOTrainer with a model that has these log-probs."""
    from trl import DPOTrainer

    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=settings.get("discopop_tau", 0.05)),
        beta=BETA,
        label_smoothing=0.0,
        f_divergence_type="reverse_kl",
        loss_weights=[1.0],
        ld_alpha=None,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    for name, value in settings.items():
        setattr(trainer, name, value)
    empty = torch.zeros(len(mask), LENGTH - 1)
    outputs = {"entropy": empty, "mean_logits": empty, "is_top1": empty.bool()}
    reference_chosen, reference_rejected = references.chunk(2)
    whole_mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.bool), mask], 1).long()
    inputs = {
        "input_ids": torch.zeros(len(mask), LENGTH, dtype=torch.long),
        "attention_mask": torch.ones(len(mask), LENGTH),
        "completion_mask": whole_mask,
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    return DPOTrainer._compute_loss(
        trainer, lambda **_: SimpleNamespace(log_probs=per_token * mask, **outputs), inputs, False
    )


def ours(method, per_token, mask, references, score=None, **options):
    logps, tokens, reference_logps = (
        torch.stack(values.chunk(2), 1) for values in ((per_token * mask).sum(1), mask.sum(1), references)
    )
    return preference_loss(method, BETA, logps, tokens, reference_logps, score=score, options=options).loss.mean()


def value_and_gradient(loss):
    per_token, mask, references = pairs()
    leaf = per_token.requires_grad_()
    value = loss(leaf, mask, references)
    return value.item(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("method", DPO_TRAINER)
def test_losses_and_gradients_are_those_of_trls_dpo_trainer(method):
    settings, options = DPO_TRAINER[method]
    value, gradient = value_and_gradient(lambda *inputs: trl_dpo(*inputs, settings))
    own_value, own_gradient = value_and_gradient(lambda *inputs: ours(method, *inputs, **options))
    assert own_value + ADDED.get(method, 0) == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-6, atol=1e-9)
    # The negative control: another of TRL's losses.
    other = {"loss_types": ["sigmoid" if method in ("hinge", "ln_dpo", "forward_kl", "ipo") else "hinge"]}
    assert abs(value_and_gradient(lambda *inputs: trl_dpo(*inputs, other))[0] - value) > 1e-3


def trl_cpo(per_token, mask, **settings):
    from trl.experimental.cpo import CPOTrainer

    defaults = {"beta": BETA, "label_smoothing": 0.0, "simpo_gamma": 0.0, "alpha": 0.0}
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), **defaults | settings)
    logps = (per_token * mask).sum(1)
    averaged = settings["loss_type"] in ("ipo", "simpo")  # as in the trainer's concatenated_forward
    losses, _, _ = CPOTrainer.cpo_loss(trainer, *(logps / mask.sum(1) if averaged else logps).chunk(2))
    return losses.mean()


CPO_TRAINER = [
    ("alphapo", {"loss_type": "simpo", "alpha": 0.25}, {"alpha": 0.25}),
    (
        "simpo",
        {"loss_type": "simpo", "alpha": 0.25, "simpo_gamma": 0.1},
        {"score": "alpha", "alpha": 0.25, "gamma_beta_ratio": 0.1 / BETA},
    ),
    ("simpo", {"loss_type": "simpo", "simpo_gamma": 0.1}, {"gamma_beta_ratio": 0.1 / BETA}),
    ("cdpo", {"loss_type": "sigmoid", "label_smoothing": 0.2}, {"score": "log_prob", "label_smoothing": 0.2}),
    ("hinge", {"loss_type": "hinge"}, {"score": "log_prob"}),
    ("ipo", {"loss_type": "ipo"}, {"score": "mean_log_prob"}),
    ("dpo", {"loss_type": "sigmoid"}, {"score": "log_prob"}),
]


@pytest.mark.parametrize(
    ("method", "settings", "options"), CPO_TRAINER, ids=lambda value: value if isinstance(value, str) else ""
)
def test_losses_and_gradients_are_those_of_trls_cpo_trainer(method, settings, options):
    value, gradient = value_and_gradient(lambda per_token, mask, _: trl_cpo(per_token, mask, **settings))
    own_value, own_gradient = value_and_gradient(lambda *inputs: ours(method, *inputs, **options))
    assert own_value == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close(own_gradient, gradient, rtol=1e-6, atol=1e-9)
    changed = value_and_gradient(lambda per_token, mask, _: trl_cpo(per_token, mask, **settings | {"beta": 0.31}))
    assert abs(changed[0] - value) > 1e-4


def loss_types(function):
    """Return the loss types that the error of TRL's function for an unknown one lists."""
    listed = inspect.getsource(function).rpartition("Should be one of [")[2].partition("]")[0]
    return set(re.findall(r"'(\w+)'", listed))


def test_every_loss_type_of_trl_is_one_of_the_table_or_named_here():
    """A release of TRL with another loss is noticed."""
    from trl import DPOTrainer
    from trl.experimental.cpo import CPOTrainer

    settings = [settings for settings, _ in DPO_TRAINER.values()]
    # `aot` compares sorted scores of a batch, which a function of one pair cannot; `sft` is init.sft_weight.
    other = {"aot", "aot_unpaired", "sft"}
    assert loss_types(DPOTrainer._compute_loss) == {name for s in settings for name in s["loss_types"]} | other
    divergences = set(re.findall(r'f_divergence_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    compared = {s.get("f_divergence_type", "reverse_kl") for s in settings}
    assert divergences == compared | {"js_divergence", "alpha_divergence"}  # no score of the table
    assert loss_types(CPOTrainer.cpo_loss) == {settings["loss_type"] for _, settings, _ in CPO_TRAINER}
    assert set(DPO_TRAINER) <= set(METHODS)


def mini():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "src/data/mini_tldr_base"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def token_logps(model, prompt, response):
    """(prompt + response - 1,) of every token but the first."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, ids[0, 1:, None])[:, 0]


@pytest.mark.slow
def test_trls_losses_differ_as_the_page_says():
    """One step of TRL's own trainers on two pairs of different lengths, and what this project computes of them."""
    from benchmarks.trl_side import trl_trainer

    beta, references = 0.3, [(-40.0, -31.0), (-37.0, -52.0)]
    pairs = [
        SimpleNamespace(prompt=[5, 6, 7], responses=[[8, 9, 10, 11, 12], [13, 14, 15]]),
        SimpleNamespace(prompt=[20, 21], responses=[[22, 23, 24], [25, 26, 27, 28, 29, 30]]),
    ]
    model, _ = mini()
    per_token = [[token_logps(model, p.prompt, r) for r in p.responses] for p in pairs]
    w, lo = (
        torch.stack([logps[i][len(p.prompt) - 1 :].sum() for logps, p in zip(per_token, pairs, strict=True)])
        for i in (0, 1)
    )
    n_w, n_l = (torch.tensor([float(len(p.responses[i])) for p in pairs]) for i in (0, 1))
    reference_w, reference_l = torch.tensor(references).T

    def ours(method, beta=beta, **options):
        logps, tokens = torch.stack([w, lo], 1), torch.stack([n_w, n_l], 1)
        references_of = torch.tensor(references) if METHODS[method].needs_reference else None
        return preference_loss(method, beta, logps, tokens, references_of, options=options).loss.mean().item()

    def theirs(method, then=lambda trainer: None, **changes):
        job = {"method": method, "micro_batch": 2, "pairs": 2, "references": references}
        trainer, losses = trl_trainer(job, *mini(), pairs, 1, beta=beta, **changes), []
        then(trainer)
        compute = trainer.compute_loss
        trainer.compute_loss = lambda *a, **k: losses.append(loss := compute(*a, **k)) or loss
        trainer.train()
        return losses[0].item()

    assert theirs("dpo", loss_type="nca_pair") == pytest.approx(ours("nca"), rel=1e-4)
    assert theirs("dpo", loss_type="apo_zero") == pytest.approx(ours("apo_zero") + 1, rel=1e-4)
    means = ((w - reference_w) / n_w - (lo - reference_l) / n_l - 1 / (2 * beta)) ** 2
    assert theirs("dpo", loss_type="ipo") == pytest.approx(means.mean().item(), rel=1e-4)
    assert abs(means.mean().item() - ours("ipo")) > 1

    def gamma(trainer):
        trainer.simpo_gamma = 0.06

    def gamma_and_sft(trainer):
        trainer.simpo_gamma, trainer.cpo_alpha = 0.06, 0.7

    chosen = [logps[0][len(p.prompt) - 1 :] for logps, p in zip(per_token, pairs, strict=True)]
    simpo = ours("simpo", gamma_beta_ratio=0.06 / beta)
    assert theirs("simpo", gamma) == pytest.approx(simpo, rel=1e-4)
    assert theirs("simpo", gamma_and_sft) == pytest.approx(simpo - 0.7 * torch.cat(chosen).mean().item(), rel=1e-4)
    all_tokens = -torch.cat([logps[0] for logps in per_token]).mean().item()  # the prompt, too
    assert theirs("orpo") == pytest.approx(all_tokens + beta * ours("orpo", beta=1.0), rel=1e-4)

    # Where both responses have T tokens: T^-2 times the loss of sums with beta / T.
    even, tokens = torch.tensor([-3.0, -9.0]), 4.0
    loss_of_means = LOSSES["ipo"](even[:1] / tokens, even[1:] / tokens, beta)
    torch.testing.assert_close(loss_of_means, LOSSES["ipo"](even[:1], even[1:], beta / tokens) / tokens**2)
