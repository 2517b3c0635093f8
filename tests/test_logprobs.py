"""The packed, shared-prefix path against what it replaces: padded sequences, one prompt copy for each response."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from src.data.examples import Example
from src.errors import ConfigError
from src.model import attention
from src.model.cpu.linear import ONEDNN, Linear, product
from src.model.last_layer import GatedMLP, LastLayer, RMSNorm
from src.model.lm_head import Head
from src.model.logprobs import NumericsConfig, iter_logps, patch_model_, sequence_logps
from src.model.packing import Layout, Segment, pack, pack_first_fit
from tests.support.padded import padded_logps
from tests.support.small_models import make_model, random_pairs, relative


def loss_and_gradient(model, logps):
    model.zero_grad()
    chosen, rejected = logps.view(-1, 2).unbind(1)
    F.softplus(-0.1 * (chosen - rejected)).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("cls", "config", "changes"),
    [
        (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
        (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
        (Qwen2ForCausalLM, Qwen2Config, {}),
        (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
        (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    ],
)
@pytest.mark.parametrize(("seed", "kernel"), [(0, "sdpa"), (1, "sdpa"), (2, "onednn")])
def test_packed_pairs_have_the_log_probs_and_gradients_of_padded_ones(cls, config, changes, seed, kernel, monkeypatch):
    for piece, rows in (("linear._PIECE", 32), ("layers._NORM_ROWS", 40), ("layers._MLP_ROWS", 50), ("head.SLAB", 90)):
        monkeypatch.setattr(f"src.{piece}", rows)  # several of each, the last one smaller
    model, examples = make_model(cls, config, seed, patched=False, **changes), random_pairs(7, seed)
    expected = padded_logps(model, examples)
    expected_gradient = loss_and_gradient(model, expected)
    patch_model_(model)
    assert {LastLayer, GatedMLP, RMSNorm, Linear, Head} <= {b for m in model.modules() for b in type(m).__mro__}
    seen = []
    model.base_model.layers[-1].mlp.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[1]))
    batch = pack(examples, range(len(examples)))
    logps, tokens = sequence_logps(model, batch, NumericsConfig("fp32", kernel))
    assert seen == [len(batch.targets)], "the last layer looks at what predicts, nothing else"
    assert relative(logps, expected) < 1e-5
    assert relative(loss_and_gradient(model, logps), expected_gradient) < 1e-5
    assert tokens.tolist() == [len(r) for e in examples for r in e.responses]


def without_restart(batch):
    return dataclasses.replace(batch, position_ids=torch.arange(batch.tokens)[None])


def leaking(batch):
    """The second response also sees the first: one causal segment per pair."""
    segments = []
    for s in batch.layout.segments:
        if s.prefix_end > s.prefix_start:
            segments[-1] = Segment(segments[-1].start, s.end)
        else:
            segments.append(s)
    return dataclasses.replace(batch, layout=Layout.of(segments))


def across_examples(batch):
    return dataclasses.replace(batch, layout=Layout.of([Segment(0, batch.tokens)]))


@pytest.mark.parametrize("spoil", [without_restart, leaking, across_examples])
def test_the_comparison_would_notice_a_wrong_layout(spoil):
    model, examples = make_model(), random_pairs(7, 0)
    expected = padded_logps(model, examples)
    logps, _ = sequence_logps(model, spoil(pack(examples, range(len(examples)))))
    assert relative(logps, expected) > 1e-3


def all_logps(model, examples, budget):
    found = torch.empty(len(examples), 2)
    for indices, logps, _ in iter_logps(model, examples, budget):
        found[indices] = logps.view(-1, 2)
    return found


def test_log_probs_do_not_depend_on_packing_order_or_token_budget():
    model, examples = make_model(), random_pairs(23, 3)
    together = all_logps(model, examples, 10**6)
    for budget in (1, 90, 400):
        assert relative(all_logps(model, examples, budget), together) < 1e-5
    shuffled = list(range(len(examples)))
    random.Random(0).shuffle(shuffled)
    assert relative(all_logps(model, [examples[i] for i in shuffled], 400), together[shuffled]) < 1e-5


@pytest.mark.parametrize(("chunk", "slab"), [(7, 10**6), (10**6, 23), (7, 23)])
def test_the_head_in_parts_gives_the_head_at_once(chunk, slab, monkeypatch):
    model, examples = make_model(), random_pairs(9, 4)
    batch = pack(examples, range(len(examples)))
    whole, _ = sequence_logps(model, batch)
    gradient = loss_and_gradient(model, whole)
    monkeypatch.setattr("src.model.lm_head.CHUNK", chunk)
    monkeypatch.setattr("src.model.lm_head.SLAB", slab)
    chunked, _ = sequence_logps(model, batch)
    assert relative(chunked, whole) < 1e-6
    assert relative(loss_and_gradient(model, chunked), gradient) < 1e-5


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.seen = max(self.seen, tensor.numel())
        return out


@pytest.mark.parametrize(("chunk", "slab"), [(16, 10**6), (10**6, 500), (10**6, 10**6)])
def test_nothing_of_tokens_times_vocabulary_is_ever_whole(chunk, slab, monkeypatch):
    monkeypatch.setattr("src.model.lm_head.CHUNK", chunk)
    monkeypatch.setattr("src.model.lm_head.SLAB", slab)
    model, examples = make_model(vocab_size=5000), random_pairs(12, 7)
    batch = pack(examples, range(len(examples)))
    predictions = len(batch.targets)
    with Largest() as largest:
        sequence_logps(model, batch)[0].sum().backward()
    whole = largest.seen >= predictions * 5000
    assert whole == (chunk > predictions and slab > 5000), "and the control: in one part it is"
    assert model.get_output_embeddings().weight.numel() < predictions * 5000


def test_the_head_sees_only_positions_that_predict_a_response_token():
    model, examples = make_model(), random_pairs(5, 5)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape[0]))
    with torch.no_grad():
        sequence_logps(model, pack(examples, range(len(examples))))
    assert sum(seen) == sum(len(r) for e in examples for r in e.responses)


def test_single_responses_and_one_token_responses_are_examples_too():
    model = make_model()
    examples = [Example((5, 6, 7), ((8,),)), Example((9,), ((4, 5, 6),)), Example((3, 4), ((5,), (6,)))]
    for example in examples:
        expected = padded_logps(model, [example])
        logps, _ = sequence_logps(model, pack([example], [0]))
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-6)


def test_partition_keeps_every_example_once_within_the_budget():
    lengths = [random.Random(i).randint(1, 50) for i in range(200)]
    batches = pack_first_fit(lengths, range(200), 64)
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(sum(lengths[i] for i in b) <= 64 for b in batches)
    assert len(batches) < 1.15 * sum(lengths) / 64 + 1
    assert pack_first_fit(lengths, range(200), 64) == batches
    assert pack_first_fit([100, 3], [0, 1], 64) == [[0], [1]]  # a longer example goes alone


def test_policy_and_reference_agree_in_bf16_as_they_do_in_fp32():
    """Both go through one path in one precision: at step 0 log-ratios are rounding noise and DPO's loss is log 2."""
    model, examples = make_model(initializer_range=0.02), random_pairs(16, 6)
    reference = torch.empty(len(examples), 2)
    for indices, logps, _ in iter_logps(model, examples, 200, NumericsConfig("bf16")):
        reference[indices] = logps.view(-1, 2)
    policy, _ = sequence_logps(model, pack(examples, range(len(examples))), NumericsConfig("bf16"))
    margin = (policy.view(-1, 2) - reference).detach()
    loss = F.softplus(-0.1 * (margin[:, 0] - margin[:, 1])).mean()
    assert loss.item() == pytest.approx(0.693147, abs=1e-3)
    # The control: against a reference in float32 the two roundings would differ.
    exact = torch.empty_like(reference)
    for indices, logps, _ in iter_logps(model, examples, 200):
        exact[indices] = logps.view(-1, 2)
    assert (policy.view(-1, 2) - exact).abs().mean() > 2 * margin.abs().mean()


def test_attention_the_packed_path_cannot_express_is_refused_by_name():
    with pytest.raises(ConfigError, match="mistral: its sliding window of 128"):
        attention.check_supported(MistralConfig(sliding_window=128), longest=1024)
    with pytest.raises(ConfigError, match="granite: logits_scaling=8"):
        attention.check_supported(GraniteConfig(logits_scaling=8.0), longest=1024)
    with pytest.raises(ConfigError, match=r"gemma2: (soft-capped|its sliding window)"):
        attention.check_supported(Gemma2Config(), longest=8000)
    with pytest.raises(ConfigError, match="llama: it has 512 positions"):
        attention.check_supported(LlamaConfig(max_position_embeddings=512), longest=1024)
    attention.check_supported(MistralConfig(sliding_window=4096), longest=1024)
    attention.check_supported(Qwen2Config(sliding_window=128, use_sliding_window=False), longest=1024)


@pytest.mark.skipif(not ONEDNN, reason="careful products are oneDNN's")
@pytest.mark.parametrize("terms", [576, 1536])
def test_careful_products_round_half_as_much_and_the_first_layers_have_them(terms):
    generator = torch.Generator().manual_seed(0)
    rows, weight = (torch.randn(size, terms, generator=generator) for size in (300, 200))
    exact = rows.double() @ weight.double().T
    errors = [(product(rows, weight, careful=careful) - exact).norm() for careful in (False, True)]
    assert errors[1] < 0.7 * errors[0]

    layers = make_model(num_hidden_layers=5).model.layers
    careful = [{module.careful for module in layer.modules() if isinstance(module, Linear)} for layer in layers]
    assert careful == [{True}] * 3 + [{False}] * 2
