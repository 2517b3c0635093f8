"""The packed, shared-prefix path against padded sequences with one copy of the prompt per response."""

import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from src.data.examples import Example
from src.errors import ConfigError
from src.model import attention, logprobs
from src.model.cpu.linear import OneDNNLinear
from src.model.cpu.lm_head import OneDNNHead
from src.model.lm_head import Head
from src.model.logprobs import SparseOutputLayer, iter_logps, patch_model_, sequence_logps
from src.model.numerics import FLOAT32, NumericsConfig
from src.model.packing import Layout, Segment, pack, pack_first_fit
from tests.support.padded import padded_logps
from tests.support.small_models import make_model, random_pairs, relative


def loss_and_gradient(model, logps):
    model.zero_grad()
    chosen, rejected = logps.view(-1, 2).unbind(1)
    F.softplus(-0.1 * (chosen - rejected)).mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def set_chunks(monkeypatch, tokens, vocabulary):
    """Set the sizes of blocks of logits; None: the whole vocabulary."""
    monkeypatch.setattr("src.planning.fit._HEAD_ROWS", tokens)
    monkeypatch.setattr("src.model.cpu.lm_head.TOKEN_CHUNK", tokens)
    monkeypatch.setattr("src.model.cpu.lm_head.VOCAB_CHUNK", vocabulary or 10**6)


FAMILIES = [
    (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4}),
    (Qwen2ForCausalLM, Qwen2Config, {}),
    (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
]


@pytest.mark.parametrize(("cls", "config", "changes"), FAMILIES)
@pytest.mark.parametrize(("seed", "backend"), [(0, "sdpa"), (1, "onednn"), (2, "without the CPU patch")])
def test_packed_pairs_have_the_log_probs_and_gradients_of_padded_ones(cls, config, changes, seed, backend, monkeypatch):
    for_cpu = backend != "without the CPU patch"
    if not for_cpu:  # the modules that other devices have
        monkeypatch.setattr(logprobs, "patch_for_cpu_", lambda model: None)
        backend = "sdpa"
    # Several chunks of each, the last one smaller.
    monkeypatch.setattr("src.model.cpu.linear.ROW_CHUNK", 32)
    set_chunks(monkeypatch, 50, 90)
    model, examples = make_model(cls, config, seed, patched=False, **changes), random_pairs(7, seed)
    expected = padded_logps(model, examples)
    expected_gradient = loss_and_gradient(model, expected)
    patch_model_(model)
    classes = {base for module in model.modules() for base in type(module).__mro__}
    assert {SparseOutputLayer, Head} <= classes and ({OneDNNLinear, OneDNNHead} <= classes) == for_cpu
    mlp_lengths = []
    mlp = model.base_model.layers[-1].mlp
    mlp.register_forward_hook(lambda _, inputs, output: mlp_lengths.append(inputs[0].shape[1]))
    batch = pack(examples, range(len(examples)))
    logps, tokens = sequence_logps(model, batch, NumericsConfig("fp32", backend))
    assert mlp_lengths == [len(batch.targets)], "the last MLP computes predicting positions only"
    assert relative(logps, expected) < 1e-5
    assert relative(loss_and_gradient(model, logps), expected_gradient) < 1e-5
    assert tokens.tolist() == [len(r) for e in examples for r in e.responses]


@pytest.mark.parametrize(("cls", "config", "changes"), FAMILIES)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_on_other_devices_than_a_cpu_only_embedding_last_layer_and_head_are_ours(cls, config, changes, device):
    """Liger, hub kernels, wrap policies and quantizers find modules by class. The CPU is the negative control."""
    with torch.device(device):
        upstream, model = (make_model(cls, config, patched=False, **changes) for _ in range(2))
    patch_model_(model)
    last = f"model.layers.{len(model.model.layers) - 1}"
    expected = {name: type(module) for name, module in upstream.named_modules()}
    changed = {name for name, module in model.named_modules() if type(module) is not expected[name]}
    linear = {name for name, cls in expected.items() if cls is torch.nn.Linear}
    assert changed == {last, "model.embed_tokens"} | ({"lm_head"} if device == "meta" else linear)
    assert type(model.lm_head).__mro__[:2] == (Head, torch.nn.Linear) or device == "cpu"


def without_restart(batch):
    return dataclasses.replace(batch, position_ids=torch.arange(batch.input_ids.numel())[None])


def leaking(batch):
    """Let the second response attend to the first: one causal segment per pair."""
    segments = []
    for s in batch.layout.segments:
        if s.prefix_end > s.prefix_start:
            segments[-1] = Segment(segments[-1].start, s.end)
        else:
            segments.append(s)
    return dataclasses.replace(batch, layout=Layout.from_segments(segments))


def across_examples(batch):
    return dataclasses.replace(batch, layout=Layout.from_segments([Segment(0, batch.input_ids.numel())]))


@pytest.mark.parametrize("break_layout", [without_restart, leaking, across_examples])
def test_the_comparison_notices_a_wrong_layout(break_layout):
    model, examples = make_model(), random_pairs(7, 0)
    expected = padded_logps(model, examples)
    logps, _ = sequence_logps(model, break_layout(pack(examples, range(len(examples)))))
    assert relative(logps, expected) > 1e-3


def all_logps(model, examples, budget, numerics=FLOAT32):
    result = torch.empty(len(examples), 2)
    for indices, logps, _ in iter_logps(model, examples, budget, numerics):
        result[indices] = logps.view(-1, 2)
    return result


def test_log_probs_do_not_depend_on_packing_order_or_token_budget():
    model, examples = make_model(), random_pairs(23, 3)
    at_once = all_logps(model, examples, 10**6)
    for budget in (1, 90, 400):
        assert relative(all_logps(model, examples, budget), at_once) < 1e-5
    shuffled = list(range(len(examples)))
    random.Random(0).shuffle(shuffled)
    assert relative(all_logps(model, [examples[i] for i in shuffled], 400), at_once[shuffled]) < 1e-5


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), [(7, None), (10**6, 23), (7, 23)])
def test_the_head_gives_the_same_in_chunks(token_chunk, vocab_chunk, monkeypatch):
    model, examples = make_model(), random_pairs(9, 4)
    batch = pack(examples, range(len(examples)))
    whole, _ = sequence_logps(model, batch)
    gradient = loss_and_gradient(model, whole)
    set_chunks(monkeypatch, token_chunk, vocab_chunk)
    chunked, _ = sequence_logps(model, batch)
    assert relative(chunked, whole) < 1e-6
    assert relative(loss_and_gradient(model, chunked), gradient) < 1e-5


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize(("token_chunk", "vocab_chunk"), [(16, None), (10**6, 500), (10**6, None)])
def test_no_tensor_has_the_size_of_tokens_times_vocabulary(token_chunk, vocab_chunk, monkeypatch):
    set_chunks(monkeypatch, token_chunk, vocab_chunk)
    model, examples = make_model(vocab_size=5000), random_pairs(12, 7)
    batch = pack(examples, range(len(examples)))
    predictions = len(batch.targets)
    with LargestTensor() as largest:
        sequence_logps(model, batch)[0].sum().backward()
    is_whole = largest.numel >= predictions * 5000
    assert is_whole == (token_chunk > predictions and vocab_chunk is None)  # the negative control: without chunks
    assert model.get_output_embeddings().weight.numel() < predictions * 5000


def test_the_head_computes_only_positions_that_predict_a_response_token():
    model, examples = make_model(), random_pairs(5, 5)
    lengths = []
    model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: lengths.append(inputs[0].shape[0]))
    with torch.no_grad():
        sequence_logps(model, pack(examples, range(len(examples))))
    assert sum(lengths) == sum(len(r) for e in examples for r in e.responses)


def test_single_responses_and_one_token_responses_have_the_padded_log_probs():
    model = make_model()
    examples = [Example((5, 6, 7), ((8,),)), Example((9,), ((4, 5, 6),)), Example((3, 4), ((5,), (6,)))]
    for example in examples:
        expected = padded_logps(model, [example])
        logps, _ = sequence_logps(model, pack([example], [0]))
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-6)


def test_an_example_is_packed_as_its_prompt_once_and_responses_without_their_last_token():
    example = Example((5, 6, 7), ((8, 9), (4, 3, 2)))
    batch = pack([example], [0])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 4, 3]] and batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert batch.targets.tolist() == [8, 9, 4, 3, 2] and batch.predict_positions.tolist() == [2, 3, 2, 4, 5]
    assert batch.layout.segments == (Segment(0, 4), Segment(4, 6, 0, 3))
    for other in (example, Example((1,), ((2,),)), *random_pairs(5, 0)):
        assert other.length == pack([other], [0]).input_ids.numel(), "token budgets count what is packed"


def test_first_fit_packing_has_every_example_once_within_the_budget():
    lengths = [random.Random(i).randint(1, 50) for i in range(200)]
    batches = pack_first_fit(lengths, range(200), 64)
    assert sorted(i for b in batches for i in b) == list(range(200))
    assert all(sum(lengths[i] for i in b) <= 64 for b in batches)
    assert len(batches) < 1.15 * sum(lengths) / 64 + 1
    assert pack_first_fit(lengths, range(200), 64) == batches
    assert pack_first_fit([100, 3], [0, 1], 64) == [[0], [1]]  # a longer example is a micro-batch by itself


def test_policy_and_reference_agree_in_bf16_as_they_do_in_fp32():
    """Both use one path in one precision: at step 0 log-ratios are rounding noise and DPO's loss is log 2."""
    model, examples = make_model(initializer_range=0.02), random_pairs(16, 6)
    reference = all_logps(model, examples, 200, NumericsConfig("bf16"))
    policy, _ = sequence_logps(model, pack(examples, range(len(examples))), NumericsConfig("bf16"))
    margin = (policy.view(-1, 2) - reference).detach()
    loss = F.softplus(-0.1 * (margin[:, 0] - margin[:, 1])).mean()
    assert loss.item() == pytest.approx(0.693147, abs=1e-3)
    # The negative control: against a reference in float32 the two roundings differ.
    exact = all_logps(model, examples, 200)
    assert (policy.view(-1, 2) - exact).abs().mean() > 2 * margin.abs().mean()


def test_an_architecture_the_packed_path_cannot_compute_is_refused_by_name():
    with pytest.raises(ConfigError, match="qwen2_moe: its sliding window of 128"):
        config = Qwen2MoeConfig(sliding_window=128, use_sliding_window=True)
        attention.check_supported(config, max_sequence_tokens=1024)
    with pytest.raises(ConfigError, match="gemma3_text: use_bidirectional_attention attends to later tokens"):
        attention.check_supported(Gemma3TextConfig(use_bidirectional_attention=True), max_sequence_tokens=1024)
    with pytest.raises(ConfigError, match="gemma3_text: soft-capped attention scores are not supported"):
        attention.check_supported(Gemma3TextConfig(attn_logit_softcapping=50.0), max_sequence_tokens=1024)
    with pytest.raises(ConfigError, match="granite: logits_scaling=8"):
        attention.check_supported(GraniteConfig(logits_scaling=8.0), max_sequence_tokens=1024)
    with pytest.raises(ConfigError, match=r"log-probs of model_type gemma2 are not supported; use one of .*llama"):
        attention.check_supported(Gemma2Config(), max_sequence_tokens=1024)
    with pytest.raises(ConfigError, match="llama: it has 512 positions"):
        attention.check_supported(LlamaConfig(max_position_embeddings=512), max_sequence_tokens=1024)
    for window in (128, 4096):
        attention.check_supported(MistralConfig(sliding_window=window), max_sequence_tokens=1024)
    attention.check_supported(Qwen2Config(sliding_window=128, use_sliding_window=False), max_sequence_tokens=1024)
