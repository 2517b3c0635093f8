"""A sample depends on its prompt and seed, not on its batch or the checkpoint's generation_config."""

import pytest
import torch
from transformers import GenerationConfig

from src.model import kv_cache
from src.model.kv_cache import bf16_cache
from src.model.numerics import NumericsConfig, cast_for_inference_
from src.model.sampling import sample
from src.planning.identity import GenerationInputs
from tests.support.small_models import make_model


class Template:
    """The attributes of a template that sampling reads."""

    end_id = 2

    class tokenizer:
        bos_token_id = 1


PROMPTS = [[1, *range(3, 3 + n)] for n in (4, 9, 2, 30, 7, 7, 15)]


def generation_of(max_new_tokens=12, temperature=1.0, top_k=0, top_p=1.0):
    return GenerationInputs(temperature, top_k, top_p, max_new_tokens, seed=0, server=None)


def draw(generation, model=None, seed="s", batch_size=64):
    model = model or make_model(initializer_range=0.02)
    samples = sample(model, Template(), PROMPTS, seed, generation, batch_size=batch_size)
    return {i: ids for i, ids, _ in samples}


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_samples_do_not_depend_on_the_batch(options):
    generation = generation_of(**options)
    single = draw(generation, batch_size=1)
    assert single == draw(generation, batch_size=3) == draw(generation, batch_size=64)


def test_another_seed_draws_other_samples():
    generation = generation_of()
    assert draw(generation) == draw(generation) != draw(generation, seed="t")


def test_a_checkpoints_generation_config_changes_nothing():
    generation = generation_of()
    model = make_model(initializer_range=0.02)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert draw(generation, model) == draw(generation)


def test_tokens_are_drawn_with_the_models_own_probabilities():
    model = make_model(initializer_range=0.3)
    prompts = [[1, 5, 6]] * 4000

    def first_tokens(**options):
        samples = sample(model, Template(), prompts, "s", generation_of(1, **options), batch_size=4000)
        return [ids[0] for _, ids, _ in samples]

    with torch.no_grad():
        expected = model(torch.tensor([[1, 5, 6]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor(first_tokens()), minlength=len(expected)).double()
    error = (expected * (1 - expected) * 4000).sqrt().clamp(min=1)
    assert ((counts - expected * 4000).abs() / error).max() < 5
    assert set(first_tokens(temperature=0.0)) == {int(expected.argmax())}
    assert set(first_tokens(top_k=3)) <= set(expected.topk(3).indices.tolist())


def cache_after(num_tokens, numerics):
    """Return the cache of a batch of all prompts after `num_tokens` sampled tokens."""
    model = cast_for_inference_(make_model(initializer_range=0.02), numerics)
    caches = []
    model.model.register_forward_pre_hook(lambda _, args, kw: caches.append(kw["past_key_values"]), with_kwargs=True)
    list(sample(model, Template(), PROMPTS, "s", generation_of(num_tokens), numerics))
    return caches[-1]


def test_the_cache_of_bf16_holds_two_bytes_a_number_and_that_of_fp32_four():
    """Also keys, which rotary embeddings make float32: transformers' own cache would take values in it, too."""
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        cache = cache_after(5, NumericsConfig(precision))
        assert len(cache.layers) == 3
        assert {x.dtype for layer in cache.layers for x in (layer.keys, layer.values)} == {dtype}
        assert cache.layers[0].keys.shape == (len(PROMPTS), 2, max(map(len, PROMPTS)) + 5 - 1, 12), (
            "the last token has none"
        )


def test_keys_and_values_stay_where_they_were_written_until_a_block_is_full(monkeypatch):
    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    cache, draw_ = bf16_cache(), torch.Generator().manual_seed(0)
    steps = [torch.randn(2, 3, n, 4, generator=draw_) for n in (5, 1, 1, 1, 1, 17, 1)]
    addresses = []
    for number, step in enumerate(steps):
        keys, values = cache.update(step, -step, 0)
        expected = torch.cat(steps[: number + 1], dim=2).bfloat16()
        assert torch.equal(keys, expected) and torch.equal(values, -expected)
        assert cache.get_seq_length() == expected.shape[2]
        addresses.append(keys.data_ptr())
    assert addresses[0] == addresses[1] == addresses[2] == addresses[3] != addresses[4], "8 tokens fill a block"
    assert addresses[5] == addresses[6] != addresses[4]


def test_samples_in_bf16_are_those_of_transformers_own_cache(monkeypatch):
    model = cast_for_inference_(make_model(initializer_range=0.3), NumericsConfig("bf16"))

    def samples():
        drawn = sample(model, Template(), PROMPTS, "s", generation_of(40), NumericsConfig("bf16"))
        return {i: ids for i, ids, _ in drawn}

    monkeypatch.setattr(kv_cache, "BLOCK", 8)
    ours = samples()
    monkeypatch.setattr("src.model.sampling.bf16_cache", lambda: None)
    theirs = samples()
    same = sum(ours[i] == theirs[i] for i in ours)
    assert same >= len(ours) - 2, "rounding keys may change a draw that is close to an edge"
