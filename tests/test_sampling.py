"""A sample depends on its prompt and seed, not on its batch or the checkpoint's generation_config."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig

from src.distributed import Share
from src.model import kv_cache, sampling, sampling_memory
from src.model.kv_cache import bf16_cache
from src.model.numerics import NumericsConfig, cast_for_inference_
from src.model.sampling import sample
from src.model.sampling_memory import bytes_per_row, parts_that_fit, split_evenly
from src.planning.identity import GenerationInputs
from tests.support.small_models import make_model


class Template:
    """The attributes of a template that sampling reads."""

    end_id, end_ids = 2, (2,)

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


def test_samples_of_one_prompt_differ_and_the_first_is_that_of_a_single_one():
    one, several = generation_of(), replace(generation_of(), samples_per_prompt=3)
    model = make_model(initializer_range=0.02)
    repeated = [prompt for prompt in PROMPTS for _ in range(3)]
    drawn = {i: ids for i, ids, _ in sample(model, Template(), repeated, "s", several, batch_size=4)}
    assert [drawn[3 * i] for i in range(len(PROMPTS))] == [draw(one, model)[i] for i in range(len(PROMPTS))]
    assert all(drawn[3 * i] != drawn[3 * i + 1] != drawn[3 * i + 2] for i in range(len(PROMPTS)))
    # Two prompts that are equal draw apart as well: numbers 4 and 5.
    assert len({tuple(drawn[i]) for i in (*range(12, 15), *range(15, 18))}) == 6


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


@pytest.mark.parametrize("done", [(), (0, 2)])
def test_a_batch_that_does_not_fit_is_sampled_in_parts_and_the_samples_stay_the_same(done, monkeypatch):
    generation, model, sizes = generation_of(), make_model(initializer_range=0.02), []
    whole = {i: ids for i, ids in draw(generation, model).items() if i not in done}
    generate = type(model).generate
    monkeypatch.setattr(sampling, "parts_that_fit", lambda batch, *_: split_evenly(batch, 3))
    monkeypatch.setattr(
        type(model), "generate", lambda self, ids, **kwargs: sizes.append(len(ids)) or generate(self, ids, **kwargs)
    )
    samples = {i: ids for i, ids, _ in sample(model, Template(), PROMPTS, "s", generation, share=Share(done=done))}
    # By length, prompts 2 and 0 are the first part, which is skipped when both are done.
    assert {i: ids for i, ids in samples.items() if i not in done} == whole
    assert sizes == ([2, 2, 3] if not done else [2, 3])


def test_parts_are_consecutive_and_nearly_equal():
    assert split_evenly(range(64), 1) == [range(64)]
    parts = split_evenly(list(range(65)), 3)
    assert [len(part) for part in parts] == [21, 22, 22] and [i for part in parts for i in part] == list(range(65))


SHAPE_OF_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
               "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256}  # fmt: skip


def test_the_memory_of_a_row_is_its_cache_when_all_of_its_tokens_are_there():
    config = LlamaConfig(**SHAPE_OF_3B)
    of_length = [bytes_per_row(config, 2, 500, length) for length in (4000, 5000)]
    per_token = 2 * 2 * 8 * 128 * (28 + 1)  # keys and values in bf16, those of one layer twice
    assert of_length[1] - of_length[0] == 1000 * per_token
    assert of_length[0] == (4500 + kv_cache.BLOCK) * per_token + 32 * 128_256
    assert bytes_per_row(config, 4, 500, 4000) > 1.9 * of_length[0], "float32 keys and values take twice the memory"
    # A long prompt with a short response takes most in the pass over the prompt.
    assert bytes_per_row(config, 2, 8000, 1) > (8001 + kv_cache.BLOCK) * per_token + 32 * 128_256


class OnCard(torch.nn.Module):
    """A model of 3B shape whose weight says that it is on a GPU."""

    config = LlamaConfig(**SHAPE_OF_3B)

    def parameters(self):
        device = type("Device", (), {"type": "cuda"})
        return iter([type("Weight", (), {"device": device, "element_size": lambda self: 2})()])


@pytest.mark.parametrize(("total", "num_parts"), [(80, 1), (40, 2), (24, 4)])
def test_rows_of_a_batch_are_as_many_as_fit_beside_the_weights(total, num_parts, monkeypatch):
    """64 rows of 2,048 + 4,096 tokens have 45 GB of keys and values; the weights take 6 GB."""
    gib = 2**30
    monkeypatch.setattr(sampling_memory, "release_accelerator", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((total - 7) * gib, total * gib))
    parts = parts_that_fit(range(64), OnCard(), 2048, 4096)
    assert len(parts) == num_parts
    assert max(map(len, parts)) * bytes_per_row(OnCard.config, 2, 2048, 4096) < 0.9 * total * gib - 7 * gib
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, total * gib))
    assert len(parts_that_fit(range(64), OnCard(), 2048, 4096)) == 64, "row by row, where not even one seems to fit"


def test_on_a_cpu_a_batch_is_never_split():
    assert parts_that_fit(range(10**6), make_model(), 10**6, 10**6) == [range(10**6)]
