"""What bf16 means: weights rounded once, a float32 residual stream, the same for training, reference and samples."""

import contextlib
import copy

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from src.config.schema import Training
from src.distributed import destroy_distributed
from src.model.loading import load_for_inference, load_weights, numerics_of
from src.model.logprobs import patch_model_, sequence_logps
from src.model.numerics import FLOAT32, NumericsConfig, cast_for_inference_
from src.model.packing import pack
from src.planning.content import ContentPath
from src.planning.identity import ModelInputs
from src.planning.resources import Resources
from src.training.strategies import make_engine
from tests.support import tiny_llama
from tests.support.small_models import make_model, random_pairs, relative

BF16 = NumericsConfig("bf16")


def num_bytes(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def test_a_model_for_scoring_has_the_rounded_weights_of_the_one_for_training_and_half_of_its_bytes(tmp_path):
    path = ContentPath.of(str(tiny_llama.model(tmp_path)), "model.path")
    inputs, resources = ModelInputs(path, "plain", "bf16"), Resources(device="cpu")
    trained, scored = load_weights(inputs, resources), load_for_inference(inputs, resources)
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert num_bytes(scored) * 2 == num_bytes(trained)
    for (name, exact), (_, rounded) in zip(trained.named_parameters(), scored.named_parameters(), strict=True):
        assert torch.equal(exact.bfloat16(), rounded), name
    for (name, exact), (_, same) in zip(trained.named_buffers(), scored.named_buffers(), strict=True):
        assert torch.equal(exact, same) and exact.dtype == same.dtype, f"{name}: positions are not rounded"
    assert scored.lm_head.weight is scored.model.embed_tokens.weight, "tied weights stay tied"


def test_fp32_casts_nothing():
    model = make_model()
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    cast_for_inference_(model, FLOAT32)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before


def embedded(model):
    return model.get_input_embeddings()(torch.arange(3, 60))


@pytest.mark.parametrize(("cls", "config"), [(LlamaForCausalLM, LlamaConfig), (GemmaForCausalLM, GemmaConfig)])
def test_the_residual_stream_begins_in_float32_and_gemma_scales_it_there(cls, config):
    model = cast_for_inference_(make_model(cls, config, patched=False, head_dim=12), BF16)
    assert embedded(model).dtype == torch.bfloat16, "the negative control: as transformers has it"
    rounded = embedded(patch_model_(copy.deepcopy(model)))
    assert rounded.dtype == torch.float32
    rows, scale = model.get_input_embeddings().weight[3:60].float(), 48**0.5 if cls is GemmaForCausalLM else 1
    assert torch.equal(rounded, rows * torch.tensor(scale).bfloat16().float())
    assert patch_model_(model).get_input_embeddings().state_dict().keys() == {"weight"}


def test_a_residual_stream_in_bf16_has_a_larger_error():
    """Why the embedding returns float32: every layer would round the sum of all layers before it."""
    examples = random_pairs(16, 0)
    batch = pack(examples, range(len(examples)))
    model = make_model(num_hidden_layers=24, initializer_range=0.05, patched=False)
    cast_for_inference_(model, BF16)
    rounded = patch_model_(copy.deepcopy(model))
    exact, _ = sequence_logps(patch_model_(copy.deepcopy(model).double()), batch)
    ours, _ = sequence_logps(rounded, batch, BF16)
    rounded.get_input_embeddings().__class__ = torch.nn.Embedding
    theirs, _ = sequence_logps(rounded, batch, BF16)
    assert relative(ours.double(), exact) < 0.7 * relative(theirs.double(), exact)


@pytest.fixture
def process_group():
    yield
    destroy_distributed()


@pytest.mark.parametrize("strategy", ["fsdp"])
@torch.no_grad()
def test_log_probs_of_training_and_of_scoring_are_the_same_bits(tmp_path, strategy, process_group):
    """A policy that has not moved has log-ratios of exactly zero, in bf16 too, on every loading path."""
    path = ContentPath.of(str(tiny_llama.model(tmp_path)), "model.path")
    inputs, resources = ModelInputs(path, "plain", "bf16"), Resources(device="cpu", strategy=strategy)
    numerics, batch = numerics_of(inputs, resources), pack(random_pairs(12, 0), range(12))
    reference, _ = sequence_logps(load_for_inference(inputs, resources), batch, numerics)
    with contextlib.closing(make_engine(resources, Training(lr=1e-6), None, seed=0)) as engine:
        engine.prepare(lambda: load_weights(inputs, resources), numerics)
        with engine.micro_step(last=True):
            policy, _ = engine.policy(batch)
    assert torch.equal(policy, reference)
    autocast, _ = sequence_logps(patch_model_(load_weights(inputs, resources)), batch, numerics)
    assert not torch.equal(autocast, reference), "the control: float32 weights that every product rounds"
