"""Every supported architecture, as a small random model: the packed log-prob path gives what the model itself gives."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from src.model import attention
from src.model.files import ARCHITECTURES, WINDOWED, why_not_supported, why_too_long
from src.model.logprobs import patch_model_, sequence_logps
from src.model.numerics import NumericsConfig, cast_for_inference_
from src.model.packing import pack
from tests.support.padded import padded_logps
from tests.support.small_models import VOCABULARY, random_pairs, relative

BF16 = NumericsConfig("bf16")

# The names that configs have for the same sizes.
SIZES = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "word_embed_proj_dim"), 48),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "sliding_window"), 256),
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# A window far shorter than the sequences, in one of two layers where layers may differ. Qwen counts from the bottom.
WINDOW = 8
SLIDING = {
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "layer_types": ["sliding_attention", "full_attention"],
}


def small_model(model_type, changes=None):
    config = CONFIG_MAPPING[model_type]
    fields = config.__dataclass_fields__
    torch.manual_seed(0)
    sizes = SIZES | (changes or {})
    model = AutoModelForCausalLM.from_config(config(**{name: v for name, v in sizes.items() if name in fields})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from uniform attention, so that attending to a wrong position shows.
            parameter.uniform_(0.5, 1.5) if "norm" in name or "ln" in name else parameter.normal_(0, 0.2)
    return model


def errors(model_type):
    """Return the relative error of packed log-probs, and that of a batch whose pairs see each other."""
    model, examples = small_model(model_type), random_pairs(5, 0)
    expected = padded_logps(model, examples)
    patch_model_(model)
    batch = pack(examples, range(len(examples)))
    first = examples[0]
    alone = padded_logps(model, [first])
    joined = type(first)((*first.prompt, *examples[1].prompt), first.responses)
    return relative(sequence_logps(model, batch)[0], expected), relative(padded_logps(model, [joined]), alone)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_packed_log_probs_are_those_of_the_model_itself(model_type):
    error, with_another_prompt = errors(model_type)
    assert error < 1e-5 < with_another_prompt, "the second is the control: log-probs depend on what is attended to"


@pytest.mark.parametrize("model_type", WINDOWED)
@torch.no_grad()
def test_a_packed_batch_with_sliding_windows_is_the_model_itself_on_padded_sequences(model_type, monkeypatch):
    """The second response of a pair lies behind the first, and its window is of the prompt and itself."""
    model, examples = small_model(model_type, SLIDING), random_pairs(5, 0)
    assert max(len(e.prompt) for e in examples) > 2 * WINDOW
    expected = padded_logps(model, examples)
    everything = padded_logps(small_model(model_type), examples)
    patch_model_(model)
    batch = pack(examples, range(len(examples)))
    for backend in ("sdpa", "onednn"):
        monkeypatch.setattr("src.model.attention.ONEDNN_MIN_MEAN_SEGMENT", 1)
        logps, _ = sequence_logps(model, batch, NumericsConfig("fp32", backend))
        assert relative(logps, expected) < 1e-5 < relative(everything, expected)
    # The control: a layer that is not told its window.
    ignoring = {name: lambda *args, f=f: f(*args[:5]) for name, f in attention.ATTENTION_BACKENDS.items()}
    monkeypatch.setattr(attention, "ATTENTION_BACKENDS", ignoring)
    assert relative(sequence_logps(model, batch)[0], expected) > 1e-3


def test_windows_that_are_not_computed_are_refused_by_name():
    """qwen2_moe keeps its window in a mask. Its log-probs would be others without an error."""
    config = {"model_type": "qwen2_moe", "sliding_window": WINDOW, "use_sliding_window": True}
    assert "qwen2_moe: its sliding window of 8 tokens is shorter than sequences of 64" in why_too_long(config, 64)
    assert why_too_long(config | {"model_type": "qwen2"}, 64) is None
    assert why_too_long(config, WINDOW) is None and why_too_long(config | {"use_sliding_window": False}, 64) is None
    with torch.no_grad():
        model, examples = small_model("qwen2_moe", SLIDING), random_pairs(5, 0)
        expected = padded_logps(model, examples)
        logps = sequence_logps(patch_model_(model), pack(examples, range(len(examples))))[0]
    assert relative(logps, expected) > 1e-3


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@torch.no_grad()
def test_with_bf16_weights_the_residual_stream_stays_float32(model_type):
    model, examples = small_model(model_type), random_pairs(5, 0)
    expected = padded_logps(model, examples)
    patch_model_(cast_for_inference_(model, BF16))
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    dtypes = []

    def record(_module, _inputs, output):
        dtypes.append((output[0] if isinstance(output, tuple) else output).dtype)

    for module in (*layers, *(m for m in model.modules() if isinstance(m, torch.nn.Embedding))):
        module.register_forward_hook(record)
    logps, _ = sequence_logps(model, pack(examples, range(len(examples))), BF16)
    assert len(dtypes) > len(layers) and set(dtypes) == {torch.float32} == {logps.dtype}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert 1e-5 < relative(logps, expected) < 0.01, "rounded, and by no more than products in bf16 are"


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "bert"])
@torch.no_grad()
def test_architectures_that_would_give_wrong_numbers_without_an_error_are_not_supported(model_type):
    assert errors(model_type)[0] > 1e-3
    assert f"model_type {model_type} are not supported" in why_not_supported({"model_type": model_type})
